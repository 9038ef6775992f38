"""Runs of `encode` for tests: a world with broken files, its cache, and tasks in processes of their own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import write_t5, write_vae

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data import indexing
from sorahpc.data.manifest import Video, read_manifest, write_manifest
from sorahpc.data.samples import Sample
from sorahpc.data.toyworld import write_world
from sorahpc.jobs import encode, prepare
from sorahpc.runs import Task

CLIPS = 14
BROKEN = {"zero.mp4": b"", "text.mp4": b"no video at all\n"}


def write_broken_world(folder: Path) -> Path:
    """Videos (one of them damaged, and prepare didn't see it), a tiny VAE and T5 with random weights."""
    write_world(folder / "videos", CLIPS, seed=1)
    for name, data in BROKEN.items():
        (folder / "videos" / name).write_bytes(data)
        (folder / "videos" / name).with_suffix(".txt").write_text("broken")
    write_t5(folder / "t5", folder / "videos")
    write_vae(folder / "vae")
    config = make_config(folder, "prepared")
    prepare.run(config, Task(config.run_dir, "prepare"))
    victim = folder / "videos/000003.mp4"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    manifest, status = config.run_dir / "manifest.parquet", victim.stat()
    seen = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}  # as if it had looked whole
    rows = [replace(v, **seen) if v.path == str(victim) else v for v in read_manifest(manifest)]
    write_manifest(manifest, rows)
    return folder


def make_config(world: Path, run: str, **sections: object) -> Config:
    return parse_config(
        {
            "run": run, "runs_dir": str(world / "runs"), "prepare": {"videos": str(world / "videos")},
            "clip": {"fps": 8, "max_frames": 9, "min_frames": 5, "max_area_px": 4096},
            "vae": {"path": str(world / "vae")}, "text": {"path": str(world / "t5"), "max_tokens": 32},
            "encode": {"clips_per_shard": 3}, **sections,
        }
    )  # fmt: skip


def prepared(world: Path, run: str, **sections: object) -> Config:
    """A run that has the manifest of the broken world."""
    config = make_config(world, run, **sections)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "manifest.parquet").write_bytes((world / "runs/prepared/manifest.parquet").read_bytes())
    return config


LAUNCHES = itertools.count()


def task(config: Config, rank: int = 0, world_size: int = 1, **more: object) -> Task:
    """Of a launch of its own, if it is not named."""
    more = {"launch": f"{os.getpid()}:{next(LAUNCHES)}", **more}
    return Task(config.run_dir, "encode", rank=rank, world_size=world_size, **more)  # type: ignore[arg-type]


def content(config: Config) -> dict[str, bytes]:
    """Every file of the cache but temporary ones."""
    return {p.name: p.read_bytes() for p in sorted(config.cache_dir.iterdir()) if not p.name.startswith(".")}


def encode_whole(world: Path) -> dict[str, bytes]:
    """The cache that one uninterrupted task makes."""
    config = prepared(world, "whole")
    encode.run(config, task(config))
    return content(config)


def usable(config: Config) -> list[Video]:
    return [v for v in read_manifest(config.run_dir / "manifest.parquet") if v.ok]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that is given the key of each clip that is encoded from now on."""
    encoded: list[str] = []
    real = encode._encode
    monkeypatch.setattr(encode, "_encode", lambda video, *rest: (encoded.append(video.key), real(video, *rest))[1])
    return encoded


def _worker(
    config: Config, rank: int, world_size: int, told: Path, sleepy: bool = False, launch: str | None = None
) -> None:
    """A task that writes the key of each clip that it has encoded; the sleepy one stops itself after the second. Beside
    it is written who builds the index."""
    torch.set_num_threads(1)
    real, build = encode._encode, indexing.build_index

    def builds(*args: object) -> object:
        with open(f"{told}.built", "a") as file:
            file.write(f"{rank}\n")
        return build(*args)  # type: ignore[arg-type]

    def encodes(video: object, *rest: object) -> object:
        record = real(video, *rest)  # type: ignore[arg-type]
        with open(told, "a") as file:
            file.write(f"{record.key if isinstance(record, Sample) else record['key']}\n")
        if sleepy and len(told.read_text().split()) == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return record

    encode._encode, indexing.build_index = encodes, builds  # type: ignore[assignment]
    encode.run(config, task(config, rank, world_size, **({"launch": launch} if launch else {})))


def start(config: Config, rank: int, world_size: int, told: Path, *more: object) -> multiprocessing.Process:
    # spawn would spend its life importing torch
    worker = multiprocessing.get_context("fork").Process(target=_worker, args=(config, rank, world_size, told, *more))
    worker.start()
    return worker  # type: ignore[return-value]


class Clock:
    """In place of `time` in the job: a pause passes at once, after what others do meanwhile."""

    def __init__(self, meanwhile: Callable[[int], None] = lambda pause: None) -> None:
        self.now, self.pauses, self.meanwhile = 0.0, 0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.meanwhile(self.pauses)
        self.pauses += 1
        self.now += 1000.0
