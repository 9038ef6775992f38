"""What a Parquet file would become is known before it does."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sorahpc.data import parquet
from sorahpc.data.cache import load_index
from sorahpc.data.captions import read_captions
from sorahpc.data.manifest import Video, read_manifest, write_manifest
from sorahpc.data.parquet import read_table
from sorahpc.errors import DataError


@pytest.mark.parametrize("row_group_size", [7, 1 << 20])
@pytest.mark.parametrize("use_dictionary", [False, True])
def test_a_table_is_what_pyarrow_reads(tmp_path: Path, use_dictionary: bool, row_group_size: int) -> None:
    count = 100
    columns = {
        "key": [f"{i:016x}" for i in range(count)],
        "caption": ["ü🎈" * (i % 3) for i in range(count)],
        "same": ["x" * 1000] * count,
        "frames": list(range(count)),
        "luma": [None if i % 4 else i / 7 for i in range(count)],
        "hash": [None if i % 5 else "f" * 48 for i in range(count)],
        "crc": pa.array(range(count), pa.uint32()),
    }
    schema = pa.schema([pa.field(name, pa.array(c).type, name != "key") for name, c in columns.items()], {"a": "b"})
    path = tmp_path / "a.parquet"
    for table in (pa.table(columns, schema=schema), schema.empty_table()):
        pq.write_table(table, path, compression="zstd", use_dictionary=use_dictionary, row_group_size=row_group_size)
        read = read_table(path, "a", "again")
        assert read.equals(table, check_metadata=True) and read.equals(pq.read_table(path), check_metadata=True)
        some = read_table(path, "a", "again", ("frames", "none", "key"))
        assert some.equals(table.select(["key", "frames"]), check_metadata=True)


def repeated(path: Path, columns: dict[str, object], rows: int) -> Path:
    """A file in which each of these values comes `rows` times and lies once."""
    zeros = pa.repeat(pa.scalar(0, pa.int32()), rows)
    table = pa.table(
        {name: pa.DictionaryArray.from_arrays(zeros, pa.array([value])) for name, value in columns.items()}
    )
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 100_000
    return path


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest.parquet": (read_manifest, "delete it and run `sorahpc prepare` again"),
    "captions.parquet": (read_captions, "run `sorahpc caption` again"),
    "index.parquet": (lambda path: load_index(path.parent), "or delete it and run `sorahpc encode` again"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("value", "rows", "what"),
    [
        ("x" * 20_000, 50_000, "50000 rows with 655360000 bytes of text or more"),  # 1 GB
        ("x", 5_000_000, "5000000 rows of 1 columns, "),
        (1, 5_000_000, "5000000 rows of 1 columns, "),
    ],
)
def test_what_would_become_larger_than_the_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, rows: int, what: str
) -> None:
    monkeypatch.setattr(parquet, "memory_bytes", lambda: 1 << 28)
    path = repeated(tmp_path / name, {"key": value}, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, again = READERS[name]
    with pytest.raises(DataError) as caught:
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB: it was laid out"
    text = str(caught.value)
    assert text.startswith(f"{path}: too large: {what}") and text.endswith(again) and "\n" not in text
    assert "GB of memory, at most 0.215 GB are there for it" in text


def test_a_file_larger_than_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "a.parquet", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(parquet, "memory_bytes", lambda: 1 << 39)
    with pytest.raises(DataError, match=r"a: too large: its 1099511627776 bytes take about .* GB of memory"):
        read_table(tmp_path / "a.parquet", "a", "again")


def test_lists_are_refused_unread_and_other_columns_of_any_kind_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    many = pa.ListArray.from_arrays(pa.array([0, 10_000_000], pa.int32()), pa.repeat(pa.scalar(0), 10_000_000))
    pq.write_table(pa.table({"key": many}), path)
    with pytest.raises(DataError, match=r"column `key` is list<.*>, expected text or a number; again"):
        read_table(path, "a", "again")
    video = Video("0" * 16, "/v.mp4", "a clip", 17, 8.0, 64, 64, "h264", 2.125, 1, 1, "ok", "")
    write_manifest(path, [video])
    table = pq.read_table(path)
    pq.write_table(table.append_column("tags", pa.array([["a", "b"]])), path)
    assert read_manifest(path) == [video]


def test_memory_is_what_the_cgroup_allows(tmp_path: Path) -> None:
    for name, value in {
        "job/memory.max": "max\n", "job/step/memory.max": "5000\n", "memory/slurm/memory.limit_in_bytes": "7000\n",
        "memory/slurm/uid/memory.limit_in_bytes": "9223372036854771712\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value)
    assert list(parquet._allowed("0::/job/step\n", tmp_path)) == [5000]
    assert list(parquet._allowed("0::/job/other/deep\n", tmp_path)) == []
    lines = "9:name=systemd:/x\n4:cpu,memory:/slurm/uid\n3:cpuset:/\n0::/\n"
    assert list(parquet._allowed(lines, tmp_path)) == [9223372036854771712, 7000]
    assert 1 << 20 < parquet.memory_bytes() < 1 << 60
