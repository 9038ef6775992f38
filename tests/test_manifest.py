from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sorahpc.data.manifest import Video, open_manifest, read_manifest, read_rows, shown, write_manifest
from sorahpc.errors import DataError

OK = Video(
    "0123456789abcdef", "/v/a b.mp4", "a cat, \"quoted\" 'so' é☃", 9, 8.0, 64, 48, "h264", 1.125, 10, 20, "ok", ""
)
BAD = Video("", "/v/b\n.mp4", "", 0, 0.0, 0, 0, "", 0.0, -1, -1, "rejected", "no such file")


def test_what_is_written_is_read_in_its_order(tmp_path: Path) -> None:
    videos = [BAD, OK, dataclasses.replace(BAD, path="/v/c.mp4")]
    write_manifest(tmp_path / "new" / "m.parquet", videos)
    assert read_manifest(tmp_path / "new" / "m.parquet") == videos
    write_manifest(tmp_path / "m.parquet", [])
    assert read_manifest(tmp_path / "m.parquet") == []
    assert pq.read_table(tmp_path / "new" / "m.parquet").num_rows == 3  # plain Parquet for every other tool


def test_rows_are_made_when_they_are_asked_for_and_take_little_memory_until_then(tmp_path: Path) -> None:
    count, path = 70_000, tmp_path / "m.parquet"
    scene = dataclasses.replace(OK, caption="word " * 20, luma=1.5, black=0.2, motion=3.5, static=0.0, hash="01ab" * 12)
    videos = [
        dataclasses.replace(scene, key=f"{i:016x}", path=f"/v/{i}.mp4", caption="word " * 20) for i in range(count)
    ]
    write_manifest(path, videos)
    assert pq.ParquetFile(path).metadata.num_row_groups == 2
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    rows = open_manifest(path)
    objects, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert objects < 20 * count and pa.total_allocated_bytes() - before < 500 * count
    assert len(rows) == count and list(rows) == videos
    for i in (0, 1, (1 << 16) - 1, 1 << 16, count - 1, -1):
        assert rows[i] == videos[i]
    assert rows[65_530:65_540] == videos[65_530:65_540]
    with pytest.raises(IndexError):
        rows[count]
    keys = [f"{i:016x}" for i in range(1, count + 1)]
    anew = rows.with_keys(keys)
    assert anew[5] == dataclasses.replace(videos[5], key=keys[5]) and rows[5] == videos[5]


def test_a_manifest_of_version_1_is_read_as_whole_videos_that_were_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, [OK, BAD])
    table = pq.read_table(path).drop_columns(["start_s", "end_s", "luma", "black", "motion", "static", "hash"])
    pq.write_table(table.replace_schema_metadata({"sorahpc.manifest": "1"}), path)
    assert read_manifest(path) == [OK, BAD] and not OK.measured and (OK.start_s, OK.end_s) == (0, OK.duration_s)


def test_measures_and_how_they_were_made_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    scene = dataclasses.replace(
        OK, start_s=2.5, luma=101.5, black=0.25, motion=3.5, static=0.0, hash="0123456789abcdef" * 3
    )
    write_manifest(path, [scene, BAD, OK], {"scenes": None, "finished": True})
    with pytest.raises(DataError, match="is also that of row 0"):
        read_manifest(path)
    assert read_rows(path) == ([scene, BAD, OK], {"scenes": None, "finished": True})
    table = pq.read_table(path)
    assert table["end_s"].to_pylist() == [3.625, 0, 1.125] and table["black"].to_pylist() == [0.25, None, None]


def altered(tmp_path: Path, **columns: object) -> Path:
    """A manifest with columns replaced (or dropped: None)."""
    path = tmp_path / "m.parquet"
    write_manifest(path, [OK, BAD])
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.remove_column(at) if values is None else table.set_column(at, name, values)
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": None}, "column `caption` is missing"),
        ({"frames": pa.array([1.5, 2.5])}, "column `frames` is double, expected int64"),
        ({"path": pa.array(["/a", None])}, "column `path` has 1 empty values"),
        ({"status": pa.array(["ok", "maybe"])}, "row 1: status `ok` or `rejected` expected, found 'maybe'"),
        ({"key": pa.array(["../../etc/passwd", ""])}, "row 0: key: 16 hex digits expected"),
        ({"hash": pa.array([None, "../etc"])}, "row 1: hash: 48 hex digits expected"),
        ({"start_s": pa.array([0.0, None])}, "column `start_s` has 1 empty values"),
        (
            {
                "key": pa.array([OK.key] * 2),
                "status": pa.array(["ok"] * 2),
                "frames": pa.array([9, 9]),
                "width": pa.array([64, 64], pa.int32()),
                "height": pa.array([64, 64], pa.int32()),
            },
            "row 1: key 0123456789abcdef is also that of row 0",
        ),
        ({"hash": pa.array(["", None])}, "row 0: hash: 48 hex digits expected, found ''"),
        ({"width": pa.array([-5, 0], pa.int32())}, "row 0: width: 1 or more expected, found -5"),
        ({"duration_s": pa.array([math.nan, 0.0])}, "row 0: duration_s: a number from 0 expected, found nan"),
        ({"fps": pa.array([math.inf, 0.0])}, "row 0: fps: a number from 0 expected, found inf"),
        ({"hash": pa.array(["0" * 48, None])}, "row 0: luma: a number expected, as it has a hash, found None"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused_by_file_and_column(tmp_path: Path, columns: dict, message: str) -> None:
    path = altered(tmp_path, **columns)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(DataError, match="no such manifest; run `sorahpc prepare` first"):
        read_manifest(path)
    for data in (b"", b"text", b"PAR1" + b"\0" * 100 + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="not a whole Parquet file"):
            read_manifest(path)
    write_manifest(path, [OK] * 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read_manifest(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="not a regular file: a folder"):
        read_manifest(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    for metadata, found in [(None, "none"), ({"sorahpc.manifest": "3"}, "3")]:
        write_manifest(path, [OK])
        pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
        with pytest.raises(DataError, match=f"manifest version 2 expected, found {found}"):
            read_manifest(path)


def test_a_manifest_that_can_not_be_written_is_one_error_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, [OK])

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(DataError, match="can't write the manifest: No space left on device"):
        write_manifest(path, [OK, BAD])
    assert read_manifest(path) == [OK]


@given(st.text(st.characters()))
@settings(max_examples=200)
def test_a_path_is_shown_on_one_printable_line(name: str) -> None:
    assert shown(name).isprintable()
