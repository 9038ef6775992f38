"""E1: how much of the VAE's own speed the job `encode` keeps, beside a plain loop that decodes, encodes and writes.

python benchmarks/bench_encode.py                       the cases of this machine; some minutes
python benchmarks/bench_encode.py --only vae --rounds 9 --threads 1

Files are real: H.264 in mp4, written for this. Each round takes turns: the VAE alone on clips that lie decoded in
memory; the job as it runs on a cluster, into a new cache, from the call until the index is there; the plain loop. The
job and the loop have the models loaded already, as they are for all but the first seconds of a real one.

efficiency: the job's frames a second over the VAE's of the same round, median of the rounds. vae_busy: share of the
job's time in which the VAE was at work; above the efficiency where VAE and decoders share cores or memory, so that the
VAE itself is slower. line: share of the CPU time of the thread that feeds the VAE which went into the VAE; what others
do on the machine doesn't touch it. bound: what the efficiency would be if nothing but the decoders' work were added to
the VAE's on the cores that this process may use. Rows go to benchmarks/results/encode_<date>_<device>.csv, replacing
those of the same case and threads.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import av
import h5py
import numpy as np
import torch
from table import read_rows, write_rows

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data import isolate
from sorahpc.data.decode import decode_by, plan_clip
from sorahpc.data.manifest import MANIFEST, read_manifest
from sorahpc.data.mp4 import write_mp4
from sorahpc.jobs import encode, prepare
from sorahpc.models.text import load_texts, make_tiny_t5
from sorahpc.models.vae import build_vae, load_vae, save_vae
from sorahpc.profiling.machine import commit_of_this, device_name, now_utc, slug
from sorahpc.runs import Task

RESULTS = Path(__file__).resolve().parent / "results"
COSMOS = {
    "latent_channels": 16, "attention_resolutions": [], "resolution": 256, "num_layers": 1, "patch_size": 4,
    "spatial_compression_ratio": 8, "temporal_compression_ratio": 4, "latents_mean": None, "latents_std": None,
}  # fmt: skip
# Channels of the VAE's blocks; frames, height and width of the videos at 24 fps; the clip that is cut from them.
# `vae`: a VAE that is slow beside decoding, as real ones are (5 to 41 Mpixel/s on an A100, facts of their papers).
# `decode`: long videos of 720 lines and next to no VAE, where the job can't be faster than the decoders.
# `real`: HunyuanVideo's VAE as it is (None), with random weights, in bfloat16; for a GPU.
CASES: dict[str, tuple[list[int] | None, tuple[int, int, int], dict[str, Any]]] = {
    "vae": ([16, 32, 32], (24, 320, 320), {"fps": 24, "max_frames": 17, "max_area_px": 256 * 256}),
    "decode": ([8, 8, 8], (72, 720, 1280), {"fps": 4, "max_frames": 9, "max_area_px": 96 * 96}),
    "real": (None, (48, 720, 1280), {"fps": 24, "max_frames": 33, "max_area_px": 512 * 512}),
}
FIELDS = ["date", "device", "versions", "commit", "case", "threads", "cores", "clips", "clip", "vae_frames_s"]
FIELDS += ["job_frames_s", "loop_frames_s", "efficiency", "low", "high", "loop_efficiency", "vae_busy", "line", "bound"]
FIELDS += ["job_mpix_s", "vae_ms_clip", "decode_cpu_ms_clip"]


def videos(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """Moving texture with some noise: neither as easy for H.264 as a flat picture nor as hard as noise."""
    rng = np.random.default_rng(0)
    num, height, width = shape
    base = rng.integers(0, 256, (height // 8 + 16, width // 8 + 16, 3)).astype(np.uint8)
    texture = base.repeat(8, 0).repeat(8, 1)
    for i in range(count):
        frames = np.stack([np.roll(texture, (t + i, 2 * t), (0, 1))[:height, :width] for t in range(num)])
        noisy = frames.astype(np.int16) + rng.integers(-6, 7, frames.shape, np.int16)
        write_mp4(folder / f"{i:04}.mp4", noisy.clip(0, 255).astype(np.uint8), 24, durable=False)
        (folder / f"{i:04}.txt").write_text(f"a texture that moves to the left, number {i}")


def make(folder: Path, case: str, count: int) -> Config:
    channels, shape, clip = CASES[case]
    torch.manual_seed(0)
    if channels is None:
        vae, dtype = build_vae("AutoencoderKLHunyuanVideo", {}), "bfloat16"
    else:
        arch = {**COSMOS, "encoder_block_out_channels": channels, "decode_block_out_channels": [8, 8, 8]}
        vae, dtype = build_vae("AutoencoderKLCosmos", arch), "float32"
    save_vae(vae, vae.module.state_dict(), folder / "vae", getattr(torch, dtype))
    (folder / "videos").mkdir()
    videos(folder / "videos", count, shape)
    make_tiny_t5(folder / "t5", [p.read_text() for p in sorted((folder / "videos").glob("*.txt"))], dim=64, seed=0)
    config = parse_config(
        {
            "run": "r", "runs_dir": str(folder / "runs"), "prepare": {"videos": str(folder / "videos")}, "clip": clip,
            "vae": {"path": str(folder / "vae"), "dtype": dtype}, "encode": {"clips_per_shard": 8},
            "text": {"path": str(folder / "t5"), "max_tokens": 64},
        }
    )  # fmt: skip
    prepare.run(config, Task(config.run_dir, "prepare", writes=False))
    return config


def measure(folder: Path, case: str, count: int, rounds: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    config = make(folder, case, count)
    assert config.vae is not None and config.text is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(config.vae.path, config.vae.dtype, device, None)
    texts = load_texts(config.text, device)
    rows = read_manifest(config.run_dir / MANIFEST)
    assert all(row.ok for row in rows), [row.reason for row in rows]
    plans = [plan_clip(row, config.clip, stride=vae.stride, patch=(1, 1, 1), lengths=vae.lengths) for row in rows]
    pixels = [decode_by("pyav", row.path, plan)[0] for row, plan in zip(rows, plans, strict=True)]
    frames = sum(len(clip) for clip in pixels)
    took = {"vae": 0.0, "vae_cpu": 0.0}
    plain_encode = vae.encode

    def timed(clip: np.ndarray) -> torch.Tensor:
        start, cpu = time.perf_counter(), time.thread_time()
        latent = plain_encode(clip)
        took["vae"] += time.perf_counter() - start
        took["vae_cpu"] += time.thread_time() - cpu
        return latent

    vae.encode = timed  # type: ignore[method-assign]
    encode.load_vae = lambda *_: vae  # type: ignore[assignment]
    encode.load_texts = lambda *_: texts  # type: ignore[assignment]

    def alone() -> None:
        for clip in pixels:
            vae.encode(clip)

    def job() -> None:
        encode.run(config, Task(config.run_dir, "encode"))

    def loop() -> None:
        with h5py.File(folder / "loop.h5", "w") as file:
            for row, plan in zip(rows, plans, strict=True):
                clip, _ = decode_by("pyav", row.path, plan)
                group = file.create_group(row.key)
                group["latent"] = vae.encode(clip).half().numpy()
                group["text"] = texts.encode([row.caption])[0]["text"].half().numpy()
                group["caption"] = row.caption
            file.flush()
            os.fsync(file.id.get_vfd_handle())

    ways = {"vae": alone, "job": job, "loop": loop}
    times: dict[str, list[float]] = {name: [] for name in ways}
    busy, line = [], []
    for round_ in range(rounds + 1):  # the first one warms up: children, pages, memory
        for name, way in ways.items():
            for path in (config.cache_dir, folder / "loop.h5"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            took |= {"vae": 0.0, "vae_cpu": 0.0}
            start, cpu = time.perf_counter(), time.thread_time()
            way()
            wall, cpu = time.perf_counter() - start, time.thread_time() - cpu
            if round_:
                times[name].append(wall)
                if name == "job":
                    busy.append(took["vae"] / wall)
                    line.append(took["vae_cpu"] / cpu)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    isolate.end_all()  # so that their time is counted
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    served = count * (1 + 2 * (rounds + 1))  # what they decoded; starting and probing is in it too, 1 s of two children
    decode_s = (after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime) / served
    vae_s = median(times["vae"]) / count
    cores = len(os.sched_getaffinity(0))
    # All work over all cores; no clip is faster than the VAE, nor than the decoders, of which there are AHEAD.
    work_s = (decode_s + (threads * vae_s if device == "cpu" else 0.0)) / cores
    best_s = max(vae_s, work_s, decode_s / encode.AHEAD)
    ratios = [v / j for v, j in zip(times["vae"], times["job"], strict=True)]
    return {
        "case": case, "threads": threads, "cores": cores, "clips": count,
        "clip": "x".join(map(str, pixels[0].shape[:3])),
        "vae_frames_s": round(frames / median(times["vae"]), 2),
        "job_frames_s": round(frames / median(times["job"]), 2),
        "loop_frames_s": round(frames / median(times["loop"]), 2),
        "efficiency": round(median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3),
        "loop_efficiency": round(median(v / p for v, p in zip(times["vae"], times["loop"], strict=True)), 3),
        "vae_busy": round(median(busy), 3), "line": round(median(line), 3),
        "bound": round(vae_s / best_s, 3),
        "job_mpix_s": round(sum(clip[..., 0].size for clip in pixels) / median(times["job"]) / 1e6, 3),
        "vae_ms_clip": round(1e3 * vae_s, 1), "decode_cpu_ms_clip": round(1e3 * decode_s, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="*", default=None, help="`real` by itself on a GPU alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="of the VAE, on a CPU")
    parser.add_argument("--folder", type=Path, default=None, help="where files go; the temporary folder without it")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out or RESULTS / f"encode_{now_utc()[:10]}_{slug(device)}.csv"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__}
    about = {
        "date": now_utc(), "device": device_name(device), "commit": commit_of_this(),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
    }  # fmt: skip
    rows = read_rows(out)
    for case in args.only or [case for case in CASES if case != "real" or device.type == "cuda"]:
        for threads in args.threads if device.type == "cpu" else [1]:
            folder = Path(tempfile.mkdtemp(dir=args.folder))
            try:
                new = measure(folder, case, args.clips, args.rounds, threads)
            finally:
                shutil.rmtree(folder)
            print(*(f"{name}={value}" for name, value in new.items()), flush=True)
            rows = [row for row in rows if (row["case"], int(row["threads"])) != (case, threads)] + [{**about, **new}]
            write_rows(out, FIELDS, rows)
    print(out)


if __name__ == "__main__":
    main()
