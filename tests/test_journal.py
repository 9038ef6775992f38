"""The journal of a shard: whatever is cut, flipped or foreign in it, what is given back is what was written."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from caches import C, dims, samples

from sorahpc.data import journal as module
from sorahpc.data.journal import Journal, Record, replay
from sorahpc.data.samples import Sample, rejection
from sorahpc.data.shards import ShardWriter
from sorahpc.errors import DataError

HEAD = {"shard": "shard-0123456789abcdef.h5", "cache_sha256": "a" * 64}


def packed(folder: Path, dtype: str = "float16", count: int = 5) -> list[Record]:
    """Samples of five shapes, some with a second caption, and a rejected clip in the middle."""
    writer = ShardWriter(folder, HEAD["shard"], dtype, C, dims(clip=True))
    rows: list[Record] = [writer.pack(*row) for row in samples(count, clip=True, detailed=True)]
    return [*rows[:2], rejection("f" * 16, "/videos/bad\n.mp4", "cut:\0 half of it"), *rows[2:]]


def write(path: Path, records: Sequence[Record]) -> list[int]:
    """Returns where each record ends; first the end of the head."""
    journal = Journal(path, HEAD)
    ends = [path.stat().st_size]
    for record in records:
        journal.add(record)
        ends.append(path.stat().st_size)
    journal.sync()
    journal.close()
    return ends


def read(path: Path, dtype: str = "float16", head: dict[str, str] = HEAD) -> list[Record]:
    return list(replay(path, head, dtype, C, dims(clip=True)))


def equal(a: Record, b: Record) -> bool:
    if not (isinstance(a, Sample) and isinstance(b, Sample)):
        return a == b
    arrays = [(a.sum, b.sum), (a.sumsq, b.sumsq), *((a.bits(n), b.bits(n)) for n in ("latent", *a.lengths))]
    plain = [n for n in vars(a) if n not in ("sum", "sumsq", "bits")]
    same = all(x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in arrays)
    return same and all(getattr(a, n) == getattr(b, n) for n in plain)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_read_back_is_bit_for_bit_what_was_added(tmp_path: Path, dtype: str) -> None:
    records = packed(tmp_path, dtype)
    write(tmp_path / "j", records)
    back = read(tmp_path / "j", dtype)
    assert len(back) == 6 and all(map(equal, back, records))


def test_a_shard_made_through_the_journal_has_the_bytes_of_one_made_in_memory(tmp_path: Path) -> None:
    records = packed(tmp_path)
    journal = Journal(tmp_path / "j", HEAD)
    made = []
    for name, kept in (("memory", records), ("journal", [journal.add(r) for r in records])):
        writer = ShardWriter(tmp_path, f"{name}.h5", "float16", C, dims(clip=True))
        writer.samples = [r for r in kept if isinstance(r, Sample)]
        writer.rejected = [r for r in kept if isinstance(r, dict)]
        made.append(writer.commit().read_bytes())
    journal.close()
    assert made[0] == made[1]


def test_of_a_journal_that_was_cut_anywhere_the_whole_records_are_read(tmp_path: Path) -> None:
    path, records = tmp_path / "j", packed(tmp_path)
    ends = write(path, records)
    data = path.read_bytes()
    for cut in sorted({*range(0, len(data), 97), *ends, *(e - 1 for e in ends), *(e + 1 for e in ends[:-1])}):
        path.write_bytes(data[:cut])
        back = read(path)
        assert len(back) == max(sum(end <= cut for end in ends) - 1, 0)
        assert all(map(equal, back, records))


def test_no_flipped_bit_is_read_in_silence_and_what_is_before_it_stays(tmp_path: Path) -> None:
    path, records = tmp_path / "j", packed(tmp_path)
    ends = write(path, records)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(len(data), size=200).tolist(), *(e + k for e in ends[:-1] for k in range(20))]:
        bad = bytearray(data)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        back = read(path)
        assert len(back) == max(sum(end <= at for end in ends) - 1, 0), at
        assert all(map(equal, back, records))


def test_garbage_behind_whole_records_and_lengths_beyond_the_file_are_not_read(tmp_path: Path) -> None:
    path, records = tmp_path / "j", packed(tmp_path)
    write(path, records)
    data = path.read_bytes()
    huge = module._HEAD.pack(b"SHJ1", 10, 1 << 62, 0)
    for tail in (b"\0" * 4096, os.urandom(4096), huge, huge + b"{}" * 5):
        path.write_bytes(data + tail)
        assert len(read(path)) == len(records)
    for text in (b"[1]", b"{}", b'{"sample": 3}', b'{"sample": {}}', b'{"rejected": {"key": 1}}', b"[" * 10_000):
        crc = module.crc32(text, module.crc32(module._HEAD.pack(b"SHJ1", len(text), 0, 0)))
        path.write_bytes(data + module._HEAD.pack(b"SHJ1", len(text), 0, crc) + text)
        assert len(read(path)) == len(records)


@pytest.mark.parametrize("field", ["shard", "cache_sha256"])
def test_a_journal_of_another_shard_or_of_other_settings_gives_nothing(tmp_path: Path, field: str) -> None:
    write(tmp_path / "j", packed(tmp_path))
    assert read(tmp_path / "j", head={**HEAD, field: "other"}) == []
    (tmp_path / "empty").touch()
    assert read(tmp_path / "empty") == []


def test_of_texts_or_channels_that_are_not_those_of_the_cache_nothing_is_read(tmp_path: Path) -> None:
    write(tmp_path / "j", packed(tmp_path))
    assert list(replay(tmp_path / "j", HEAD, "float16", C + 1, dims(clip=True))) == []
    assert list(replay(tmp_path / "j", HEAD, "float16", C, dims())) == []
    assert list(replay(tmp_path / "j", HEAD, "float16", C, {**dims(clip=True), "text": 5})) == []


def test_a_full_disk_is_one_line_and_the_records_before_it_stay(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's."""
    records = packed(tmp_path)
    ends = write(tmp_path / "all", records)
    journal = Journal(tmp_path / "j", HEAD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ends[2] + 30, before[1]))
    try:
        journal.add(records[0])
        kept = journal.add(records[1])
        with pytest.raises(DataError, match=r"j: can't write the journal: File too large; .* run again") as told:
            journal.add(records[3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value)
    assert (tmp_path / "j").stat().st_size == ends[2] and len(read(tmp_path / "j")) == 2
    assert equal(kept, records[1])
    journal.close()


def test_bytes_that_change_on_the_disk_are_not_written_into_the_shard(tmp_path: Path) -> None:
    records = packed(tmp_path)
    journal = Journal(tmp_path / "j", HEAD)
    kept = journal.add(records[0])
    assert isinstance(kept, Sample)
    with open(tmp_path / "j", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(DataError, match=f"j: sample {kept.key} doesn't read back as it was written"):
        for name in kept.lengths:
            kept.bits(name)
    journal.close()


def test_a_journal_is_never_written_over_another(tmp_path: Path) -> None:
    write(tmp_path / "j", packed(tmp_path))
    with pytest.raises(DataError, match="File exists"):
        Journal(tmp_path / "j", HEAD)
    assert len(read(tmp_path / "j")) == 6
