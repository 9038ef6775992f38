"""The latent cache: what is read is what was written, under the key asked for, or an error names file and sample."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sorahpc.data import cache as module
from sorahpc.data.cache import (
    INDEX,
    INFO,
    LatentCache,
    ShardWriter,
    build_index,
    check_info,
    clean_caption,
    pin_info,
    plan_shards,
    read_info,
    read_shard,
    remove_stale_parts,
    write_empty_text,
)
from sorahpc.errors import DataError

C, D = 4, 8
SHAPES = [(C, 3, 8, 8), (C, 1, 6, 10), (C, 5, 10, 6), (C, 3, 8, 8), (C, 2, 1, 1)]


def info(dtype: str = "float16") -> dict:
    return {
        "vae": {"id": "V", "weights_sha256": "a" * 64},
        "text": {"id": "T", "weights_sha256": "b" * 64},
        "dtype": dtype,
        "channels": C,
        "text_dim": D,
        "clip": {"fps": 8.0, "max_frames": 17},
    }


def samples(count: int = 10) -> list[tuple]:
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        latent = torch.randn(SHAPES[i % len(SHAPES)], generator=g) * 2 + torch.arange(C)[:, None, None, None]
        text = torch.randn(1 + i % 3, D, generator=g)
        out.append(
            (f"{(i + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}", latent, text, f"clip {i} ü🎈", 8.0, f"/videos/{i}.mp4")
        )
    return out


def write(folder: Path, dtype: str = "float16", count: int = 10, per_shard: int = 4) -> list[tuple]:
    rows = samples(count)
    pin_info(folder, info(dtype))
    write_empty_text(folder, torch.ones(1, D), dtype)
    plan = plan_shards([r[0] for r in rows], per_shard)
    for shard in plan:
        writer = ShardWriter(folder, shard.name, dtype, C, D)
        for i in shard.rows:
            writer.add(*rows[i])
        writer.commit()
    assert build_index(folder, [s.name for s in plan]).samples == count
    return rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_gives_back_what_was_written_rounded_once(tmp_path: Path, dtype: str) -> None:
    rows = write(tmp_path, dtype)
    cache = LatentCache(tmp_path, expect=info(dtype))
    assert len(cache) == len(rows) and cache.keys == [r[0] for r in rows]
    assert cache.captions == [r[3] for r in rows] and cache.sources == [r[5] for r in rows]
    torch_dtype = getattr(torch, dtype)
    for i, (key, latent, text, *_) in enumerate(rows):
        z, e = cache.read(i)
        assert z.dtype == e.dtype == torch.float32
        assert torch.equal(z, latent.to(torch_dtype).float()) and torch.equal(e, text.to(torch_dtype).float())
        assert tuple(cache.shapes[i]) == tuple(latent.shape) and cache.text_lens[i] == len(text)
        assert cache.ids[i] == int(key, 16) >> 1 >= 0
    assert torch.equal(cache.empty_text, torch.ones(1, D))
    values = torch.cat([r[1].to(torch_dtype).double().flatten(1) for r in rows], dim=1)
    torch.testing.assert_close(cache.mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache.std.double(), values.std(1, unbiased=False), rtol=1e-6, atol=1e-6)


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


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_flipped_byte_anywhere_in_the_data_is_found_and_names_shard_and_sample(tmp_path: Path) -> None:
    rows = write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    good = path.read_bytes()
    table = pq.read_table(tmp_path / INDEX).to_pylist()
    for i in (0, 3):
        nbytes = 2 * rows[i][1].numel()
        for offset in (table[i]["latent_offset"], table[i]["latent_offset"] + nbytes - 1, table[i]["text_offset"]):
            bad = bytearray(good)
            bad[offset] ^= 0x10
            path.write_bytes(bad)
            cache = LatentCache(tmp_path)
            with pytest.raises(DataError, match=f"{path.name}: sample {rows[i][0]}: .*crc32 differs"):
                cache.read(i)
            cache.read(1)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=f"{path.name}: {len(good)} bytes expected"):
        LatentCache(tmp_path)


def test_a_shard_that_shrinks_or_goes_after_opening_is_an_error_that_names_the_sample(tmp_path: Path) -> None:
    rows = write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    cache = LatentCache(tmp_path)
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=f"sample {rows[0][0]}.*bytes"):
        for i in range(4):
            cache.read(i)
    cache = pickle.loads(pickle.dumps(cache))
    path.unlink()
    with pytest.raises(DataError, match=f"sample {rows[0][0]}: can't read"):
        cache.read(0)


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
            for row in read_shard(path, C, D, "float16").rows:
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
            read_shard(path, C, D, "float16")


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
    ],
)
def test_hostile_values_in_a_shard_are_refused_by_name(tmp_path: Path, name: str, values: list, word: str) -> None:
    write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    with h5py.File(path, "r+") as f:
        f[name][...] = values
    with pytest.raises(DataError, match=word):
        read_shard(path, C, D, "float16")


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [
        ("shard", "../../../etc/passwd", "not listed"),
        ("latent_offset", -1, "latent ends"),
        ("latent_offset", 1 << 62, "latent ends"),
        ("width", 1 << 20, "latent ends"),
        ("width", 1 << 62, "shapes"),
        ("width", 0, "shapes"),
        ("channels", C + 1, "shapes"),
        ("text_len", 0, "text"),
        ("text_len", 1 << 61, "text"),
        ("key", "not a key", "keys"),
    ],
)
def test_hostile_values_in_the_index_are_refused_by_name(tmp_path: Path, column: str, value: object, word: str) -> None:
    write(tmp_path, count=4)
    table = pq.read_table(tmp_path / INDEX)
    rows = table.to_pylist()
    rows[2][column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / INDEX)
    with pytest.raises(DataError, match=f"{INDEX}: .*{word}"):
        LatentCache(tmp_path)


def test_an_index_that_is_no_parquet_or_is_missing_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    (tmp_path / INDEX).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match=r"damaged.*encode"):
        LatentCache(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DataError, match=r"isn't complete.*encode"):
        LatentCache(tmp_path)
    with pytest.raises(DataError, match="no latent cache here"):
        LatentCache(tmp_path / "nowhere")


def test_another_key_is_refused_by_field_with_both_values(tmp_path: Path) -> None:
    pin_info(tmp_path, info())
    pin_info(tmp_path, info())
    other = info()
    other["vae"] = {"id": "V", "weights_sha256": "c" * 64}
    other["clip"] = {"fps": 12.0, "max_frames": 17}
    with pytest.raises(DataError) as caught:
        pin_info(tmp_path, other)
    first, second = str(caught.value).splitlines()
    assert "field `vae.weights_sha256`" in first and "c" * 64 in first and "a" * 64 in first
    assert "field `clip.fps`: expected 12.0, found 8.0" in second
    assert read_info(tmp_path)["clip"]["fps"] == 8.0
    with pytest.raises(DataError, match="dtype"):
        check_info(tmp_path / INFO, read_info(tmp_path), {"dtype": "bfloat16"})


def test_a_reader_with_another_key_is_refused(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    LatentCache(tmp_path, expect={"text": {"id": "T"}})
    with pytest.raises(DataError, match=r'field `text.id`: expected "umT5", found "T"'):
        LatentCache(tmp_path, expect={"text": {"id": "umT5"}})


def test_of_many_workers_that_pin_at_once_one_wins_and_the_others_agree_or_are_refused(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def worker(dtype: str) -> None:
        try:
            pin_info(tmp_path, info(dtype))
            outcomes.append(dtype)
        except DataError as error:
            assert "field `dtype`" in str(error)

    threads = [threading.Thread(target=worker, args=(["float16", "bfloat16"][i % 2],)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert outcomes == [read_info(tmp_path)["dtype"]] * 8
    assert [p.name for p in tmp_path.iterdir()] == [INFO]


@pytest.mark.parametrize("text", ["[]", "{", '{"version": 2}', "", "[" * 100_000])
def test_a_broken_cache_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / INFO).write_text(text)
    with pytest.raises(DataError, match=INFO) as caught:
        LatentCache(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_name_the_clip(tmp_path: Path, value: float) -> None:
    key, latent, text, *rest = samples(1)[0]
    writer = ShardWriter(tmp_path, "shard-" + "0" * 16 + ".h5", "bfloat16", C, D)
    latent[1, 2, 3, 4] = value
    with pytest.raises(DataError, match=r"/videos/0.mp4: .*latent.*not finite"):
        writer.add(key, latent, text, *rest)
    assert writer.samples == []


def test_values_beyond_float16_are_refused_in_float16_and_kept_in_bfloat16(tmp_path: Path) -> None:
    key, latent, text, *rest = samples(1)[0]
    latent[0, 0, 0, 0] = 70_000.0
    with pytest.raises(DataError, match=r"70000.*encode.dtype=float16; use encode.dtype=bfloat16"):
        ShardWriter(tmp_path, "x", "float16", C, D).add(key, latent, text, *rest)
    ShardWriter(tmp_path, "x", "bfloat16", C, D).add(key, latent, text, *rest)


def test_a_shard_without_a_sample_is_written_and_keeps_the_reasons(tmp_path: Path) -> None:
    pin_info(tmp_path, info())
    name = plan_shards(["0" * 16], 4)[0].name
    writer = ShardWriter(tmp_path, name, "float16", C, D)
    writer.reject("0" * 16, "/videos/bad\n.mp4", "truncated:\n\0 half of it")
    writer.commit()
    summary = build_index(tmp_path, [name])
    assert summary is not None and summary.samples == 0
    assert summary.rejected == [{"key": "0" * 16, "source": "/videos/bad\\n.mp4", "reason": "truncated:   half of it"}]
    assert json.loads((tmp_path / "rejected.json").read_text()) == summary.rejected
    with pytest.raises(DataError, match="no sample"):
        LatentCache(tmp_path)


def test_the_index_waits_for_the_last_shard(tmp_path: Path) -> None:
    write(tmp_path, count=8)
    names = sorted(p.name for p in tmp_path.glob("shard-*.h5"))
    os.rename(tmp_path / names[0], tmp_path / "away")
    assert build_index(tmp_path, names) is None
    os.rename(tmp_path / "away", tmp_path / names[0])
    assert build_index(tmp_path, names).samples == 8


def test_a_constant_channel_gets_std_1(tmp_path: Path) -> None:
    pin_info(tmp_path, info())
    write_empty_text(tmp_path, torch.ones(1, D), "float16")
    writer = ShardWriter(tmp_path, plan_shards(["1" * 16], 1)[0].name, "float16", C, D)
    latent = torch.randn(C, 2, 3, 4)
    latent[2] = 0.3
    writer.add("1" * 16, latent, torch.ones(1, D), "", 8.0, "x")
    writer.commit()
    build_index(tmp_path, [writer.name])
    cache = LatentCache(tmp_path)
    assert cache.std[2] == 1.0 and (cache.std[[0, 1, 3]] > 0.3).all()


def test_captions_from_others_are_made_printable_and_short() -> None:
    assert clean_caption("a\0b\nc\x1b[31m\u202e\ud800") == "a b c [31m ?"
    assert len(clean_caption("x" * 10**6)) == module.MAX_CAPTION_CHARS
    assert clean_caption("猫がボールで遊ぶ 🎾") == "猫がボールで遊ぶ 🎾"


def test_the_plan_is_a_function_of_the_keys_in_their_order() -> None:
    keys: list[str | None] = [f"{i:016x}" for i in range(10)]
    plan = plan_shards(keys, 4)
    assert [s.rows for s in plan] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert plan == plan_shards(keys, 4)
    assert plan_shards([*keys, "f" * 16], 4)[:2] == plan[:2]
    assert plan_shards(keys[::-1], 4)[0].name != plan[0].name
    assert plan_shards([], 4) == []


def test_a_row_that_comes_or_goes_changes_its_own_shard_alone() -> None:
    keys: list[str | None] = [f"{i:016x}" for i in range(12)]
    plan = plan_shards(keys, 4)
    without = plan_shards([*keys[:5], None, *keys[6:]], 4)
    assert [s.rows for s in without] == [(0, 1, 2, 3), (4, 6, 7), (8, 9, 10, 11)]
    assert (without[0], without[2]) == (plan[0], plan[2]) and without[1].name != plan[1].name
    assert plan_shards([*keys[:4], None, None, None, None, *keys[8:]], 4) == [plan[0], plan[2]]
    assert plan_shards([None] * 9, 4) == []


def test_parts_of_the_dead_and_of_the_silent_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    import socket
    import subprocess
    import sys

    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, gone = tmp_path / f".a.h5.{host}.{os.getpid()}.part", tmp_path / f".b.h5.{host}.{dead.pid}.part"
    other, silent = tmp_path / f".c.h5.elsewhere.{dead.pid}.part", tmp_path / f".d.h5.elsewhere.{dead.pid}.part"
    for path in (mine, gone, other, silent):
        path.write_bytes(b"x")
    os.utime(silent, (1, 1))
    assert remove_stale_parts(tmp_path) == [gone.name, silent.name]
    assert mine.exists() and other.exists()


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    writer = ShardWriter(tmp_path, "shard-" + "0" * 16 + ".h5", "float16", C, D)
    writer.add(*samples(1)[0])
    with pytest.raises(DataError, match="No space left on device"):
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def _read_all(cache: LatentCache) -> int:
    crc = 0
    for i in range(len(cache)):
        for x in cache.read(i):
            crc = zlib.crc32(x.numpy().tobytes(), crc)
    return crc


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path: Path, method: str) -> None:
    write(tmp_path)
    cache = LatentCache(tmp_path)
    expected = _read_all(cache)  # files are open before the fork
    with multiprocessing.get_context(method).Pool(2 if method == "fork" else 1) as pool:  # spawn imports torch anew
        assert pool.map(_read_all, [cache] * 3) == [expected] * 3


def test_threads_read_the_same_with_fewer_descriptors_than_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, count=12, per_shard=1)
    monkeypatch.setattr(module, "MAX_OPEN_SHARDS", 2)
    cache = LatentCache(tmp_path)
    expected, found = _read_all(cache), []
    threads = [threading.Thread(target=lambda: [found.append(_read_all(cache)) for _ in range(20)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [expected] * 80
    assert len(cache._files) == 2
