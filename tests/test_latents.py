"""Reading a cache: what is read is what was written, under the key asked for, from any thread or process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from caches import C, D, dims, info, write

from sorahpc.data import latents as module
from sorahpc.data.cache import INDEX, build_index, pin_info, plan_shards
from sorahpc.data.latents import LatentCache
from sorahpc.data.maintenance import verify
from sorahpc.data.shards import ShardWriter, write_empty_text
from sorahpc.errors import DataError
from sorahpc.ops._library import native

needs_native = pytest.mark.skipif(native() is None, reason="sorahpc._C is not built")


@pytest.fixture(params=["compiled", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which bytes are read."""
    if request.param == "python":
        monkeypatch.setattr(module, "_native", lambda: None)
    elif native() is None:
        pytest.skip("sorahpc._C is not built")
    return request.param


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_gives_back_what_was_written_rounded_once(tmp_path: Path, dtype: str, reader: str) -> None:
    rows = write(tmp_path, dtype)
    cache = LatentCache(tmp_path, expect=info(dtype))
    assert len(cache) == len(rows) and cache.keys == [r[0] for r in rows]
    assert cache.captions == [r[3] for r in rows] and cache.sources == [r[5] for r in rows]
    torch_dtype = getattr(torch, dtype)
    for i, (key, latent, texts, *_) in enumerate(rows):
        z, read = cache.read(i)
        (text,), (e,) = texts.values(), read.values()
        assert z.dtype == e.dtype == torch.float32 and list(read) == ["text"]
        assert torch.equal(z, latent.to(torch_dtype).float()) and torch.equal(e, text.to(torch_dtype).float())
        assert tuple(cache.shapes[i]) == tuple(latent.shape) and cache.text_lens[i] == len(text)
        assert cache.ids[i] == int(key, 16) >> 1 >= 0
    assert torch.equal(cache.empty_texts["text"], torch.ones(1, D))
    values = torch.cat([r[1].to(torch_dtype).double().flatten(1) for r in rows], dim=1)
    torch.testing.assert_close(cache.mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache.std.double(), values.std(1, unbiased=False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_the_texts_of_both_captions_by_every_encoder_come_back(tmp_path: Path, clip: bool, reader: str) -> None:
    rows = write(tmp_path, clip=clip, detailed=True)
    cache = LatentCache(tmp_path)
    assert cache.dims == dims(clip) and cache.detailed == [r[7] for r in rows] and cache.detailed.count("") == 4
    order = [3, 1, 1, 8, 0]
    for wanted in ([True] * 5, [False] * 5, [True, True, False, False, True]):
        out = torch.empty(cache.nbytes(order, wanted), dtype=torch.uint8)
        for i, second, (z, texts) in zip(order, wanted, cache.read_bits(order, out, wanted), strict=True):
            prefix = "detailed_" if second and i % 3 else ""
            assert torch.equal(z, rows[i][1].half()) and set(texts) == set(dims(clip))
            assert all(torch.equal(e, rows[i][2][prefix + name].half()) for name, e in texts.items())
    assert {name: tuple(e.shape) for name, e in cache.empty_texts.items()} == {k: (1, n) for k, n in dims(clip).items()}
    assert verify(tmp_path).faults == []


def test_caches_without_a_second_caption_or_clip_are_what_they_were(tmp_path: Path) -> None:
    write(tmp_path)
    columns = pq.read_table(tmp_path / INDEX).schema.names
    assert not [name for name in columns if "detailed" in name or "clip" in name]
    assert not [name for name in h5py.File(next(tmp_path.glob("shard-*.h5"))) if "detailed" in name or "clip" in name]


def test_a_flipped_byte_anywhere_in_the_data_is_found_and_names_shard_and_sample(tmp_path: Path, reader: str) -> None:
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
            with pytest.raises(
                DataError, match=f"{path.name}: sample {rows[i][0]}: .*crc32 [0-9a-f]{{8}} expected, found"
            ):
                cache.read(i)
            cache.read(1)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=f"{path.name}: {len(good)} bytes expected"):
        LatentCache(tmp_path)


def test_a_shard_that_shrinks_or_goes_after_opening_is_an_error_that_names_the_sample(
    tmp_path: Path, reader: str
) -> None:
    rows = write(tmp_path, count=4)
    (path,) = tmp_path.glob("shard-*.h5")
    cache = LatentCache(tmp_path)
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=f"sample {rows[0][0]}.* bytes expected, found [0-9]"):
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
    write_empty_text(tmp_path, {"text": torch.ones(1, D)}, "float16")
    writer = ShardWriter(tmp_path, plan_shards(["1" * 16], 1)[0].name, "float16", C, {"text": D})
    latent = torch.randn(C, 2, 3, 4)
    latent[2] = 0.3
    writer.add("1" * 16, latent, {"text": torch.ones(1, D)}, "", 8.0, "x")
    writer.commit()
    build_index(tmp_path, [writer.name])
    cache = LatentCache(tmp_path)
    assert cache.std[2] == 1.0 and (cache.std[[0, 1, 3]] > 0.3).all()


def _read_all(cache: LatentCache) -> int:
    crc = 0
    for i in range(len(cache)):
        latent, texts = cache.read(i)
        for x in (latent, *texts.values()):
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


def test_a_batch_of_samples_is_views_of_the_callers_memory_and_equals_one_after_the_other(
    tmp_path: Path, reader: str
) -> None:
    write(tmp_path)
    cache = LatentCache(tmp_path)
    samples = [7, 0, 3, 3, 9, 1]
    out = torch.full((cache.nbytes(samples) + 64,), 0x5A, dtype=torch.uint8)
    pairs = cache.read_bits(samples, out)
    for i, (z, texts) in zip(samples, pairs, strict=True):
        e = texts["text"]
        assert z.dtype == e.dtype == torch.float16 and z.untyped_storage().data_ptr() == out.data_ptr()
        expected = cache.read(i)
        assert torch.equal(z.float(), expected[0]) and torch.equal(e.float(), expected[1]["text"])
    assert (out[-64:] == 0x5A).all()
    assert cache.read_bits([], torch.empty(0, dtype=torch.uint8)) == []


@needs_native
def test_every_way_to_a_crc32_is_that_of_zlib() -> None:
    data = np.random.default_rng(0).bytes(100_003)
    for way in native().crc32_ways():
        for size in (*range(70), 127, 128, 129, 255, 256, 1023, 2047, 2048, 2049, 4096 + 17, len(data)):
            for start in (0, 1, 13):
                piece = data[start : start + size]
                assert native().crc32(piece, 0, way) == zlib.crc32(piece), (way, size, start)
                assert native().crc32(piece, 0xDEADBEEF, way) == zlib.crc32(piece, 0xDEADBEEF), (way, size, start)


def _requests(fd: int, size: int) -> tuple[np.ndarray, int]:
    """Pieces of all sizes, some past the end of the file, some that can't be read at all, without overlap in `out`."""
    rng = np.random.default_rng(1)
    rows, place = [], 0
    for k in range(200):
        nbytes = 100 if k % 50 == 7 else int(rng.choice([0, 1, 100, 4096, 300_000]))
        offset = int(rng.integers(0, size + 1000))
        rows.append((10_000 if k % 50 == 7 else fd, offset, nbytes, place))
        place += nbytes + int(rng.integers(3))
    return np.array(rows, np.int64), place


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("in_memory", ["all", "none", "the end"])
def test_compiled_reads_equal_those_of_python_also_at_the_end_of_the_file_and_of_a_bad_descriptor(
    tmp_path: Path, threads: int, in_memory: str
) -> None:
    (tmp_path / "x").write_bytes(np.random.default_rng(0).bytes(700_001))
    with open(tmp_path / "x", "rb") as file:
        os.fsync(file.fileno())  # what isn't on disk can't be dropped
        requests, size = _requests(file.fileno(), 700_001)
        outs = [np.zeros(size, np.uint8), np.zeros(size, np.uint8)]
        results = [np.full((len(requests), 3), -1, np.int64) for _ in outs]
        module.read_batch(requests, results[0], outs[0])
        drop = {"all": 0, "none": 700_001, "the end": 400_000}[in_memory]
        if drop:  # a length of 0 would be all of it
            os.posix_fadvise(file.fileno(), 0, drop, os.POSIX_FADV_DONTNEED)
        native().read_batch(requests, results[1], outs[1], threads, True)
        assert (outs[0] == outs[1]).all() and (results[0] == results[1]).all()
        assert (results[0][:, 0] == 9).sum() == 4 and (results[0][:, 1] < requests[:, 2]).sum() > 10
        native().read_batch(requests, results[1], outs[1], threads, False)
        assert (outs[0] == outs[1]).all() and (results[1][:, 2] == 0).all()


@needs_native
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r.__setitem__((1, 3), 90), "request 1 ends outside out"),
        (lambda r: r.__setitem__((1, 2), -1), "request 1 ends outside out"),
        (lambda r: r.__setitem__((0, 2), 2**63 - 1), "request 0 ends outside out"),
        (lambda r: r.__setitem__((0, 1), -5), "request 0 ends outside out"),
    ],
)
def test_a_request_that_would_write_outside_the_buffer_is_refused(
    change: Callable[[np.ndarray], None], word: str
) -> None:
    requests = np.array([[0, 0, 10, 0], [0, 0, 20, 50]], np.int64)
    change(requests)
    with pytest.raises(ValueError, match=word):
        native().read_batch(requests, np.empty((2, 3), np.int64), np.empty(100, np.uint8), 1, True)
    good = np.array([[0, 0, 10, 0]], np.int64)
    for bad in (good.astype(np.int32), good[:, :3], good.T, good[:, ::-1]):
        with pytest.raises(ValueError, match="requests: int64"):
            native().read_batch(bad, np.empty((1, 3), np.int64), np.empty(100, np.uint8), 1, True)
    with pytest.raises(ValueError, match="a row a request"):
        native().read_batch(good, np.empty((2, 3), np.int64), np.empty(100, np.uint8), 1, True)


def test_signals_during_a_read_neither_shorten_nor_fail_it(tmp_path: Path, reader: str) -> None:
    write(tmp_path)
    cache = LatentCache(tmp_path)
    expected, hits = _read_all(cache), []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            assert _read_all(cache) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(hits) > 10


def _read_in_threads(cache: LatentCache) -> int:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(_read_all(cache))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return found[0] if len(set(found)) == 1 else -1


@needs_native
def test_a_child_that_was_forked_amid_threaded_reads_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    cache = LatentCache(tmp_path)
    expected, stop = _read_all(cache), threading.Event()

    def keep_reading() -> None:
        big = np.array([[0, 0, 1 << 20, k << 20] for k in range(4)], np.int64)
        with open("/dev/zero", "rb") as file:
            big[:, 0] = file.fileno()
            while not stop.is_set():
                native().read_batch(big, np.empty((4, 3), np.int64), np.empty(4 << 20, np.uint8), 4, True)

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(_read_in_threads, [cache] * 6).get(timeout=60) == [expected] * 6
    finally:
        stop.set()
        thread.join()
