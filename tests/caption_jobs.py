"""What the tests of the job caption share: a world, its models, and runs on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from models import write_llm, write_vlm

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data.captions import CAPTIONS, known_items, read_item
from sorahpc.data.manifest import MANIFEST
from sorahpc.data.toyworld import write_world
from sorahpc.jobs import prepare
from sorahpc.runs import Task

CLIPS = 8
BROKEN = "000003.mp4"  # cut short after prepare saw it


def write_captioned_world(folder: Path) -> Path:
    """Videos, a language model and one that sees, and a run `prepared` with their manifest; one video is cut since."""
    write_world(folder / "videos", CLIPS, seed=1)
    write_llm(folder / "llm")
    write_vlm(folder / "vlm")
    config = make_config(folder, "prepared", path=str(folder / "llm"))
    prepare.run(config, Task(config.run_dir, "prepare"))
    victim = folder / "videos" / BROKEN
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return folder


def make_config(world: Path, run: str, **section: Any) -> Config:
    limits = {"frames": 0, "temperature": 0.7, "max_new_tokens": 48, "min_chars": 30, "max_chars": 900, "attempts": 4}
    return parse_config(
        {
            "run": run, "runs_dir": str(world / "runs"), "prepare": {"videos": str(world / "videos")},
            "clip": {"fps": 8, "max_frames": 9, "min_frames": 5, "max_area_px": 4096},
            "caption": {**limits, **section},
        }
    )  # fmt: skip


def prepared(world: Path, run: str, **section: Any) -> Config:
    config = make_config(world, run, **section)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(world / "runs/prepared" / MANIFEST, config.run_dir / MANIFEST)
    return config


def local(world: Path, run: str, **section: Any) -> Config:
    return prepared(world, run, path=str(world / "llm"), **section)


def seeing(world: Path, run: str, **section: Any) -> Config:
    return prepared(world, run, **{"path": str(world / "vlm"), "frames": 3, "frame_area_px": 400, **section})


def served(world: Path, run: str, url: str, **section: Any) -> Config:
    server = {"url": url, "model": "stub", "timeout_s": 5, "retries": 1, "concurrency": 3}
    return prepared(world, run, endpoint={**server, **section.pop("endpoint", {})}, **section)


def task(config: Config, rank: int = 0, world_size: int = 1, **more: Any) -> Task:
    return Task(config.run_dir, "caption", rank=rank, world_size=world_size, **more)


def content(config: Config) -> dict[str, bytes]:
    """The table and every item."""
    files = [config.run_dir / CAPTIONS, *(config.run_dir / "captions").rglob("*")]
    return {str(p.relative_to(config.run_dir)): p.read_bytes() for p in files if p.is_file()}


def items(config: Config) -> list[Any]:
    folder = config.run_dir / "captions/clips"
    return [read_item(folder, sha) for sha in sorted(known_items(folder))]
