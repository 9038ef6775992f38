"""Rows of a manifest and plans of clips for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sorahpc.config import ClipConfig
from sorahpc.data.decode import ClipPlan, plan_clip, probe
from sorahpc.data.manifest import Video
from sorahpc.models.lengths import Lengths


def row(path: Path | str = "/v.mp4", **fields: object) -> Video:
    video = Video("0" * 16, str(path), "a clip", 17, 8.0, 64, 64, "h264", 2.125, 1, 1, "ok", "")
    return dataclasses.replace(video, **fields)  # type: ignore[arg-type]


def probed(path: Path) -> Video:
    return row(path, **dataclasses.asdict(probe(path)))


def plan(video: Video, **clip: object) -> ClipPlan:
    return plan_clip(video, ClipConfig(**clip), stride=(4, 8, 8), patch=(1, 2, 2), lengths=Lengths(4, 4))


def at(height: int, width: int, *times: float) -> ClipPlan:
    return ClipPlan(times, height, width)
