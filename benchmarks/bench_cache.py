"""D1: samples out of a cache at random, beside raw preadv and other ways to keep them.

python benchmarks/bench_cache.py                        32 KB to 16 MB, warm and cold; four minutes
python benchmarks/bench_cache.py --only 0.5 --rounds 15

All candidates of a size hold the same bytes, and take turns in one process, in another order each round. A read is of
one sample, in the same random order, none twice: the second time it would be warm. Ours and raw preadv read batches of
4 MB, or of two samples, into a buffer that is used again, as the others' memory is by malloc. Warm is the best of four
reads in a row: who comes after one with other memory finds its own gone from the CPU's caches. Cold is one read, after
POSIX_FADV_DONTNEED on the candidate's files. The median over rounds counts. Rows go to
benchmarks/results/cache_<date>_<device>.csv, replacing those of the same size.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import torch
from safetensors.torch import save_file
from table import read_rows, write_rows

from sorahpc.data import latents
from sorahpc.ops._library import native
from sorahpc.profiling.machine import commit_of_this, device_name, now_utc, slug

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"0.03": (16, 1, 32, 32), "0.5": (16, 4, 64, 64), "4": (16, 8, 128, 128), "16": (16, 32, 128, 128)}
TOTAL_BYTES = 512 << 20  # a size's samples: more than the caches of the CPU
READ_BYTES = 64 << 20  # a measurement: so few of them that what a kernel reads beyond a sample is seldom of use
BATCH_BYTES = 4 << 20
READS = (8, 1024)  # at least and at most
WARM_READS = 4
FIELDS = ["date", "device", "versions", "commit", "sample_kb", "state", "candidate"]
FIELDS += ["median_mb_s", "samples_s", "of_preadv", "x_h5py_slicing"]


def candidates(folder: Path, data: np.ndarray, order: list[int]) -> dict[str, tuple[Callable[[], object], list[Path]]]:
    """What each does to read the samples of `order`, and its files. data: float16 [N,C,T,H,W]."""
    nbytes = data[0].nbytes
    batch = max(BATCH_BYTES // nbytes, 2)
    out = np.zeros(nbytes * batch, np.uint8)
    found: dict[str, tuple[Callable[[], object], list[Path]]] = {}

    shard = folder / "shard.h5"
    with h5py.File(shard, "w", libver=("v110", "v110")) as f:
        dataset = f.create_dataset("x", data.shape, data.dtype, chunks=(1, *data.shape[1:]))
        for i, x in enumerate(data):
            dataset.id.write_direct_chunk((i, 0, 0, 0, 0), x.tobytes())
        offsets = [dataset.id.get_chunk_info_by_coord((i, 0, 0, 0, 0)).byte_offset for i in range(len(data))]
    fd = os.open(shard, os.O_RDONLY)
    rows = [(fd, offsets[i], nbytes, k % batch * nbytes) for k, i in enumerate(order)]
    batches = [np.array(rows[k : k + batch], np.int64) for k in range(0, len(rows), batch)]
    results = [np.zeros((len(requests), 3), np.int64) for requests in batches]

    def raw() -> None:
        for fd, offset, length, place in rows:
            assert os.preadv(fd, [out.data[place : place + length]], offset) == length

    found["raw preadv"] = raw, [shard]
    found["ours, python reference, crc32"] = (
        lambda: [latents.read_batch(a, b, out) for a, b in zip(batches, results, strict=True)],
        [shard],
    )
    module = native()

    def ours(threads: int, crc: bool) -> None:
        for a, b in zip(batches, results, strict=True):
            module.read_batch(a, b, out, threads, crc)

    if module is not None:
        for threads in range(1, min(4, os.cpu_count() or 1) + 1):
            for crc in (False, True):
                name = f"ours, {threads} thread{'s' * (threads > 1)}{', crc32' * crc}"
                found[name] = functools.partial(ours, threads, crc), [shard]

    sliced = h5py.File(shard, "r", locking=False)["x"]
    into = np.empty(data.shape[1:], data.dtype)

    def read_direct() -> None:
        for i in order:
            sliced.read_direct(into, np.s_[i])

    found["h5py slicing"] = lambda: [sliced[i] for i in order], [shard]
    found["h5py read_direct"] = read_direct, [shard]

    path = folder / "x.safetensors"
    save_file({str(i): torch.from_numpy(x) for i, x in enumerate(data)}, path)
    tensors = safetensors.safe_open(path, "pt")
    found["safetensors"] = (
        lambda: [tensors.get_tensor(str(i)).clone() for i in order],
        [path],
    )  # a view of the file else

    files = [folder / f"{i}.pt" for i in range(len(data))]
    for x, file in zip(data, files, strict=True):
        torch.save(torch.from_numpy(x.copy()), file)
    found[".pt files"] = lambda: [torch.load(files[i], weights_only=True) for i in order], files

    path = folder / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i, x in enumerate(data):
            entry = tarfile.TarInfo(f"{i:06}.bin")
            entry.size = nbytes
            archive.addfile(entry, io.BytesIO(x.tobytes()))
    with tarfile.open(path) as archive:
        places = [member.offset_data for member in archive]
    tar = open(path, "rb", buffering=0)

    def from_tar() -> None:
        for i in order:
            tar.seek(places[i])
            tar.read(nbytes)

    found["tar by its own index"] = from_tar, [path]

    path = folder / "x.parquet"
    column = pa.array([x.tobytes() for x in data], pa.binary())
    pq.write_table(pa.table({"x": column}), path, row_group_size=1, compression="none", use_dictionary=False)
    table = pq.ParquetFile(path)
    found["parquet, a row group a sample"] = lambda: [table.read_row_group(i, use_threads=False) for i in order], [path]

    try:
        import lmdb
    except ImportError:
        pass
    else:
        base = lmdb.open(str(folder / "lmdb"), map_size=2 * data.nbytes + (64 << 20))
        with base.begin(write=True) as write:
            for i, x in enumerate(data):
                write.put(str(i).encode(), x.tobytes())

        def from_lmdb() -> None:
            with base.begin() as read:
                for i in order:
                    assert read.get(str(i).encode()) is not None

        found["lmdb"] = from_lmdb, [folder / "lmdb" / "data.mdb"]

    last = data[order[len(rows) - len(batches[-1]) :]].reshape(-1).view(np.uint8)
    for name in [n for n in found if n.startswith(("raw", "ours"))]:
        out[:] = 0
        found[name][0]()
        assert (out[: len(last)] == last).all(), name
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, nargs="*", default=list(SIZES), help="sizes of a sample in MB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=None, help="file system to measure; the temporary one without it"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    out = args.out or RESULTS / f"cache_{now_utc()[:10]}_{slug(cpu)}.csv"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "h5py": h5py.__version__}
    versions |= {"safetensors": safetensors.__version__, "pyarrow": pa.__version__}
    try:
        import lmdb
    except ImportError:
        versions["lmdb"] = "not installed"
    else:
        versions["lmdb"] = lmdb.__version__
    about = {
        "date": now_utc(),
        "device": device_name(cpu),
        "versions": " ".join(f"{k}={v}" for k, v in versions.items()),
        "commit": commit_of_this(),
    }
    rows = read_rows(out)
    for size in args.only:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            new = measure(folder, SIZES[size], args.rounds)
        finally:
            shutil.rmtree(folder)
        kb = new[0]["sample_kb"]
        rows = [row for row in rows if float(row["sample_kb"]) != kb] + [{**about, **row} for row in new]
        write_rows(out, FIELDS, rows)
    print(out)


def timed(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def measure(folder: Path, shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    nbytes = 2 * int(np.prod(shape))
    count = max(TOTAL_BYTES // nbytes, READS[0])
    data = rng.integers(0, 2**15, (count, *shape), np.uint16).view(np.float16)
    order = rng.permutation(count)[: int(np.clip(READ_BYTES // nbytes, *READS))].tolist()
    ways = candidates(folder, data, order)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a page that is not on disk yet can't be dropped
    rows = []
    for state in ("warm", "cold"):
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in rng.permutation(list(ways)).tolist():
                read, paths = ways[name]
                if state == "cold":
                    if name in ("safetensors", "lmdb"):
                        continue  # their pages stay, being mapped: what would be measured is warm
                    for path in paths:
                        with open(path, "rb") as file:
                            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                took[name].append(min(timed(read) for _ in range(WARM_READS if state == "warm" else 1)))
        best = {name: median(t) for name, t in took.items() if t}
        for name, t in best.items():
            rows.append(
                {
                    "sample_kb": nbytes / 1024, "state": state, "candidate": name,
                    "median_mb_s": round(nbytes * len(order) / t / 1e6, 1), "samples_s": round(len(order) / t, 1),
                    "of_preadv": round(best["raw preadv"] / t, 3),
                    "x_h5py_slicing": round(best["h5py slicing"] / t, 2),
                }
            )  # fmt: skip
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


if __name__ == "__main__":
    main()
