"""A shard: plain HDF5 that holds what was added, or a refusal that names file and sample."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from caches import C, D, samples, write

from sorahpc.data.samples import MAX_CAPTION_CHARS, clean_caption
from sorahpc.data.seal import SEAL_BYTES, seal_of
from sorahpc.data.shards import EMPTY_TEXT, ShardWriter, read_empty_text, read_shard
from sorahpc.errors import DataError


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_shard_is_plain_hdf5_for_every_other_tool(tmp_path: Path, dtype: str) -> None:
    rows = write(tmp_path, dtype, count=5, per_shard=5)
    (path,) = tmp_path.glob("shard-*.h5")
    with h5py.File(path, "r") as f:
        data = f["latents/4x3x8x8"]
        assert data.shape == (2, C, 3, 8, 8) and data.chunks == (1, C, 3, 8, 8) and data.compression is None
        bits = data[1]
        assert f["latents/4x3x8x8"].attrs["torch_dtype"] == dtype
        if dtype == "bfloat16":
            assert bits.dtype == np.uint16
            value = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
        else:
            value = torch.from_numpy(bits).float()
        assert torch.equal(value, rows[3][1].to(getattr(torch, dtype)).float())
        assert f["captions"].asstr()[3] == rows[3][3]
        first, last = f["text_offsets"][3:5]
        assert f["text"][first:last].shape == (last - first, D)
        raw = path.read_bytes()[int(f["byte_offsets"][3]) :][: bits.nbytes]
        assert zlib.crc32(raw) == f["latent_crc32"][3] == zlib.crc32(bits.tobytes())


def test_hostile_shards_are_refused_not_crashed_on(tmp_path: Path) -> None:
    """Bytes flipped all over the file: what read_shard lets pass must lie inside the file and have its crc."""
    write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for at in rng.integers(len(bad), size=4):
            bad[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            for row in read_shard(path, C, {"text": D}, "float16").rows:
                nbytes = 2 * row["channels"] * row["frames"] * row["height"] * row["width"]
                assert 0 <= row["latent_offset"] <= len(bad) - nbytes
                assert 0 <= row["text_offset"] <= len(bad) - 2 * D * row["text_len"]
        except DataError as error:
            refused += 1
            assert path.name in str(error) and "\n" not in str(error)
    assert refused > 20
    for cut in (0, 1, 100, 1000, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(DataError, match=path.name):
            read_shard(path, C, {"text": D}, "float16")


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        ("shapes", [[C, 1 << 40, 1 << 40, 1 << 40]] * 4, "shapes"),
        ("shapes", [[C, -1, 8, 8]] * 4, "shapes"),
        ("text_offsets", [0, -5, 3, 4, 1 << 60], "text_offsets"),
        ("text_offsets", [0, 1, 2, 3, 1 << 60], "text"),
        ("byte_offsets", [1 << 62, 0, 0, 0], "latent has no bytes"),
        ("rows", [1 << 60, -1, 0, 0], "latent has no bytes"),
        ("keys", [b"../../etc/passwd"] * 4, "keys"),
        ("stats/sum", [float("nan")] * C, "stats"),
        *[("fps", [8.0, 8.0, fps, 8.0], "fps`: 0.001 to 240 expected") for fps in (0.0, -8.0, 1e-7, 2000.0, math.nan)],
    ],
)
def test_hostile_values_in_a_shard_are_refused_by_name(tmp_path: Path, name: str, values: list, word: str) -> None:
    write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    with h5py.File(path, "r+") as f:
        f[name][...] = values
    data = path.read_bytes()
    path.write_bytes(data + seal_of(zlib.crc32(data)))  # as they could, too
    with pytest.raises(DataError, match=word):
        read_shard(path, C, {"text": D}, "float16")


def test_a_shard_that_points_out_of_its_file_or_fills_the_memory_is_refused(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    good = path.read_bytes()
    other = tmp_path / "other.h5"
    shutil.copy(path, other)
    text = h5py.string_dtype("utf-8")

    def virtual(f: h5py.File, name: str) -> None:
        layout = h5py.VirtualLayout(f[name].shape, f[name].dtype)
        layout[...] = h5py.VirtualSource(str(other), name, f[name].shape)
        del f[name]
        f.create_virtual_dataset(name, layout)

    def external(f: h5py.File, name: str) -> None:
        kind, shape = f[name].dtype, f[name].shape
        del f[name]
        f.create_dataset(name, shape, kind, external=[(str(other), 0, h5py.h5f.UNLIMITED)])

    def linked(f: h5py.File, name: str) -> None:
        del f[name]
        f[name] = h5py.ExternalLink(str(other), name)

    def soft(f: h5py.File, name: str) -> None:
        f.move(name, "elsewhere")
        f[name] = h5py.SoftLink("/elsewhere")

    def huge(f: h5py.File, name: str) -> None:
        """Every value the same megabyte."""
        del f[name]
        f.create_dataset(name, data=["x" * (1 << 20), "", "", ""], dtype=text)
        repeated.append(f[name].id.get_offset())

    def chunked(f: h5py.File, name: str) -> None:
        del f[name]
        f.create_dataset(name, shape=(4,), dtype=text, chunks=(1,))

    def a_text(f: h5py.File, name: str) -> None:
        del f.attrs[name]
        f.attrs[name] = "2"

    for change, name in [
        (virtual, "keys"), (virtual, "text"), (external, "latent_crc32"), (linked, "keys"), (linked, "captions"),
        (linked, "stats"), (soft, "fps"), (huge, "captions"), (chunked, "sources"), (a_text, "sorahpc_cache"),
    ]:  # fmt: skip
        path.write_bytes(good)
        repeated: list[int] = []
        with h5py.File(path, "r+") as f:
            change(f, name)
        data = path.read_bytes()
        for at in repeated:
            data = data[:at] + data[at : at + 16] * 4 + data[at + 64 :]
        path.write_bytes(data + seal_of(zlib.crc32(data)))
        with pytest.raises(DataError, match=f"`{name}|not a shard of cache") as caught:
            read_shard(path, C, {"text": D}, "float16")
        assert "\n" not in str(caught.value), (change, name)


def test_texts_are_read_as_hdf5_reads_them(tmp_path: Path) -> None:
    write(tmp_path, count=10, per_shard=10, detailed=True)
    (path,) = tmp_path.glob("shard-*.h5")
    rows = read_shard(path, C, {"text": D}, "float16").rows
    with h5py.File(path) as f:
        for name, of in {"captions": "caption", "sources": "source", "detailed_captions": "detailed"}.items():
            assert [row[of] for row in rows] == f[name].asstr()[()].tolist()


def test_a_text_whose_size_is_wrong_ends_the_shard_and_not_the_process(tmp_path: Path) -> None:
    """HDF5 2.0 goes round for ever on some of these."""
    write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    good = path.read_bytes()
    heap = good.index(b"GCOL")
    place, sizes = heap + 16, []
    while good[place : place + 2] != b"\0\0":
        sizes.append(place + 8)
        place += 16 + (int.from_bytes(good[place + 8 : place + 16], "little") + 7) // 8 * 8
    refused = 0
    for at in [*sizes, place + 8, heap, heap + 8, heap + 15]:
        for value in (0, 7, 128, 255):
            bad = good[:at] + bytes([value]) + good[at + 1 : -SEAL_BYTES]
            path.write_bytes(bad + seal_of(zlib.crc32(bad)))
            try:
                read_shard(path, C, {"text": D}, "float16")
            except DataError as error:
                refused += 1
                assert path.name in str(error) and "\n" not in str(error)
    assert len(sizes) >= 8 and refused > len(sizes)


def test_an_empty_text_larger_than_its_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / EMPTY_TEXT
    with h5py.File(path, "w") as f:
        f.create_dataset("text", (1 << 20, 1 << 20), "<f2", chunks=(1, 1 << 20))
    path.write_bytes(path.read_bytes() + seal_of(zlib.crc32(path.read_bytes())))
    with pytest.raises(DataError, match="two bytes a value expected"):
        read_empty_text(tmp_path, {"text": 1 << 20}, "float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_name_the_clip(tmp_path: Path, value: float) -> None:
    key, latent, text, *rest = samples(1)[0]
    writer = ShardWriter(tmp_path, "shard-" + "0" * 16 + ".h5", "bfloat16", C, {"text": D})
    latent[1, 2, 3, 4] = value
    with pytest.raises(DataError, match=r"/videos/0.mp4: .*latent.*not finite"):
        writer.add(key, latent, text, *rest)
    assert writer.samples == []


def test_values_beyond_float16_are_refused_in_float16_and_kept_in_bfloat16(tmp_path: Path) -> None:
    key, latent, text, *rest = samples(1)[0]
    latent[0, 0, 0, 0] = 70_000.0
    with pytest.raises(DataError, match=r"70000.*encode.dtype=float16; use encode.dtype=bfloat16"):
        ShardWriter(tmp_path, "x", "float16", C, {"text": D}).add(key, latent, text, *rest)
    ShardWriter(tmp_path, "x", "bfloat16", C, {"text": D}).add(key, latent, text, *rest)


def test_captions_from_others_are_made_printable_and_short() -> None:
    assert clean_caption("a\0b\nc\x1b[31m\u202e\ud800") == "a b c [31m ?"
    assert len(clean_caption("x" * 10**6)) == MAX_CAPTION_CHARS
    assert clean_caption("猫がボールで遊ぶ 🎾") == "猫がボールで遊ぶ 🎾"


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardWriter(tmp_path, "shard-" + "0" * 16 + ".h5", "float16", C, {"text": D})
    writer.add(*samples(1)[0])
    with pytest.raises(DataError, match="No space left on device"):
        writer.commit()
    assert list(tmp_path.iterdir()) == []
