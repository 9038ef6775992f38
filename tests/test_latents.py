"""Reading a cache: what is read is what was written, under the key asked for, from any thread or process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from caches import C, D, info, write

from sorahpc.data import latents as module
from sorahpc.data.cache import INDEX, build_index, pin_info, plan_shards
from sorahpc.data.latents import LatentCache
from sorahpc.data.shards import ShardWriter, write_empty_text
from sorahpc.errors import DataError


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


def test_a_reader_with_another_key_is_refused(tmp_path: Path) -> None:
    write(tmp_path, count=4)
    LatentCache(tmp_path, expect={"text": {"id": "T"}})
    with pytest.raises(DataError, match=r'field `text.id`: expected "umT5", found "T"'):
        LatentCache(tmp_path, expect={"text": {"id": "umT5"}})


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
