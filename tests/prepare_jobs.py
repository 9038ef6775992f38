"""Runs of `prepare` for tests: videos with captions beside them, and the rows of the manifest that they become."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data.manifest import Video, read_manifest
from sorahpc.jobs import prepare
from sorahpc.runs import Task


def config_for(videos: Path, captions: Path | None = None, cpus: int = 1) -> Config:
    section = {"videos": str(videos), "captions": captions and str(captions), "resources": {"cpus_per_task": cpus}}
    return parse_config({"run": "r", "runs_dir": str(videos.parent / "runs"), "prepare": section})


def prepared(videos: Path, captions: Path | None = None, cpus: int = 1) -> list[Video]:
    config = config_for(videos, captions, cpus)
    prepare.run(config, Task(config.run_dir, "prepare"))
    return read_manifest(config.run_dir / "manifest.parquet")


def with_section(videos: Path, task: Task | None = None, **section: object) -> list[Video]:
    config = parse_config(
        {"run": "r", "runs_dir": str(videos.parent / "runs"), "prepare": {"videos": str(videos), **section}}
    )
    prepare.run(config, task or Task(config.run_dir, "prepare"))
    return read_manifest(config.run_dir / "manifest.parquet")


def by_name(videos: list[Video], root: Path) -> dict[str, Video]:
    return {os.path.relpath(v.path, root): v for v in videos}


def put(path: Path, caption: str | bytes | None, source: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return path


def looked_at(monkeypatch: pytest.MonkeyPatch, look: str) -> list[str]:
    """A list that is given the name of each file that `prepare.<look>` is called for from now on: probe or measure."""
    seen: list[str] = []
    real = getattr(prepare, look)
    monkeypatch.setattr(prepare, look, lambda path, *how: seen.append(os.path.basename(path)) or real(path, *how))
    return seen
