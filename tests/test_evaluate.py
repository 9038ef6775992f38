"""Judging samples and measuring reconstructions; the whole job runs in test_readme.py and in the demo."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from sorahpc.config import Config, parse_config
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import caption, render, scene_of
from sorahpc.errors import DataError, Stopped
from sorahpc.jobs import evaluate
from sorahpc.report import ASPECTS, shares
from sorahpc.runs import Task


def configure(tmp_path: Path) -> Config:
    return parse_config(
        {
            "run": "r",
            "runs_dir": str(tmp_path),
            "vae": {"path": "unused"},
            "evaluate": {"toyworld": True, "reconstructions": 0},
        }
    )


def make_samples(config: Config, prompts: list[str | None]) -> None:
    """Real clips of the world as samples; `None`: their own captions as prompts."""
    entries = []
    for i, prompt in enumerate(prompts):
        scene = scene_of(3, i)
        write_mp4(config.samples_dir / f"{i:05d}-x.mp4", render(scene), scene.fps)
        entries.append({"name": f"{i:05d}-x", "prompt": prompt or caption(scene)})
    (config.samples_dir / "prompts.json").write_text(json.dumps({"samples": entries}))


def run(config: Config, **task: object) -> list[dict[str, dict[str, object]]]:
    evaluate.run(config, Task(config.run_dir, "evaluate", writes=False, **task))  # type: ignore[arg-type]
    return json.loads((config.samples_dir / "judgements.json").read_text())["samples"]


def test_clips_of_the_world_show_what_their_captions_say(tmp_path: Path) -> None:
    config = configure(tmp_path)
    make_samples(config, [None] * 12)
    rows = run(config)
    assert shares(rows) == dict.fromkeys(ASPECTS, (12, 12))
    assert rows[0]["colour"]["asked"] == rows[0]["colour"]["found"]


def test_a_wrong_colour_is_counted_with_what_was_found(tmp_path: Path) -> None:
    config = configure(tmp_path)
    scene = scene_of(3, 0)
    other = "cyan" if scene.colour != "cyan" else "red"
    make_samples(config, [caption(scene).replace(scene.colour, other)])
    row = run(config)[0]
    assert row["visible"]["ok"] and row["shape"]["ok"]
    assert row["colour"] == {"ok": False, "asked": other, "found": scene.colour}


def test_samples_that_are_not_made_yet_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(tmp_path)
    make_samples(config, [None, None])
    next(config.samples_dir.glob("00001*.mp4")).unlink()
    with caplog.at_level(logging.WARNING):
        assert len(run(config)) == 1
    assert "1 of 2 samples are not made yet" in caplog.text


def test_a_prompt_of_another_world_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = configure(tmp_path)
    make_samples(config, ["a dog on the beach"])
    with pytest.raises(DataError, match=r"set evaluate\.toyworld: false"):
        run(config)


def test_without_samples_the_error_says_what_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `sorahpc sample` first"):
        run(configure(tmp_path))


def test_it_stops_between_clips(tmp_path: Path) -> None:
    config = configure(tmp_path)
    make_samples(config, [None, None])
    with pytest.raises(Stopped, match="1 of 2"):
        run(config, stop_requested=lambda: True)


def test_psnr_is_that_of_the_mean_squared_error_over_all_values() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] = 10  # half of the values: mean squared error 50
    assert evaluate.psnr_db(a, b) == pytest.approx(10 * np.log10(255**2 / 50))
    assert evaluate.psnr_db(a, a) == 99.0
    assert evaluate.psnr_db(a, a + 255) == pytest.approx(0.0)
