"""Judging samples and measuring reconstructions; the whole job runs in test_readme.py and in the demo."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from models import write_t5, write_vae

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data.cache import build_index, load_index
from sorahpc.data.manifest import read_manifest
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import caption, render, scene_of, write_world
from sorahpc.errors import DataError, Stopped
from sorahpc.jobs import encode, evaluate, prepare
from sorahpc.models.vae import Vae, load_vae
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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned clips, a tiny VAE and T5 with random weights."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "videos", 5, seed=1)
    write_t5(folder / "t5", folder / "videos")
    write_vae(folder / "vae")
    return folder


@pytest.fixture
def encoded(world: Path, tmp_path: Path) -> Config:
    """Of a run whose cache holds all videos of its own folder."""
    shutil.copytree(world / "videos", tmp_path / "videos")
    config = parse_config(
        {
            "run": "r", "runs_dir": str(tmp_path), "prepare": {"videos": str(tmp_path / "videos")},
            "clip": {"fps": 8, "max_frames": 5, "min_frames": 5, "max_area_px": 4096},
            "vae": {"path": str(world / "vae")}, "text": {"path": str(world / "t5"), "max_tokens": 32},
            "evaluate": {"toyworld": True, "reconstructions": 5},
        }
    )  # fmt: skip
    make_samples(config, [None])
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, Task(config.run_dir, "encode"))
    return config


def reconstructed(config: Config) -> list[str]:
    """Names of the videos that are reconstructed."""
    assert len(run(config)) == 1  # whatever becomes of the clips, samples are judged
    data = json.loads((config.run_dir / "reconstructions/reconstructions.json").read_text())
    names = {v.key: Path(v.path).name for v in read_manifest(config.run_dir / "manifest.parquet") if v.ok}
    assert data["keys"] == [clip["key"] for clip in data["clips"]]
    assert all(0 < clip["psnr_db"] < 99 and -1 <= clip["ssim"] < 1 for clip in data["clips"])
    return [names[key] for key in data["keys"]]


def test_on_a_gpu_node_the_vae_decodes_on_the_gpu_of_the_task(encoded: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def load(path: Path, dtype: str, device: torch.device, tiling: object) -> Vae:
        devices.append(str(device))
        return load_vae(path, dtype, "cpu")

    monkeypatch.setattr(evaluate, "load_vae", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    run(encoded, local_rank=6)
    assert devices == ["cuda:2"]


def test_copies_and_renames_do_not_hide_the_videos_that_are_used(encoded: Config) -> None:
    assert encoded.prepare is not None
    videos = encoded.prepare.videos
    for suffix in ("mp4", "txt"):
        shutil.copy(videos / f"000001.{suffix}", videos / f"copy.{suffix}")
        (videos / f"000002.{suffix}").rename(videos / f"renamed.{suffix}")
    prepare.run(encoded, Task(encoded.run_dir, "prepare"))
    assert reconstructed(encoded) == ["000000.mp4", "000001.mp4", "renamed.mp4", "000003.mp4", "000004.mp4"]


def test_clips_whose_video_or_caption_changed_are_left_out_and_said(
    encoded: Config, caplog: pytest.LogCaptureFixture
) -> None:
    assert encoded.prepare is not None
    videos = encoded.prepare.videos
    (videos / "000000.mp4").unlink()
    (videos / "000003.txt").write_text("another caption")
    prepare.run(encoded, Task(encoded.run_dir, "prepare"))
    (videos / "000004.mp4").rename(videos / "away")  # since then
    caplog.clear()
    assert reconstructed(encoded) == ["000001.mp4", "000002.mp4"]
    said = [m for m in caplog.messages if m.startswith("reconstruction left out: ")]
    assert len(said) == 3 and "changed since encode" in said[0] and said[2].endswith("000004.mp4: no such file")
    (videos / "away").rename(videos / "000004.mp4")  # back: the next run has it
    assert reconstructed(encoded) == ["000001.mp4", "000002.mp4", "000004.mp4"]
    shutil.copy(videos / "000001.mp4", videos / "000002.mp4")
    caplog.clear()
    assert reconstructed(encoded) == ["000001.mp4", "000004.mp4"]
    assert "000002.mp4: changed since prepare looked at it" in caplog.text
    for mp4 in videos.glob("*.mp4"):
        mp4.unlink()
    assert reconstructed(encoded) == []
    assert "no reconstruction: none of 5 cached clips has its video any more" in caplog.text


def test_reconstructions_by_a_vae_of_another_config_are_refused_but_for_a_cache_from_before_it_was_pinned(
    encoded: Config, tmp_path: Path
) -> None:
    assert encoded.vae is not None
    shutil.copytree(encoded.vae.path, tmp_path / "vae")
    told = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**told, "resolution": 2 * told["resolution"]}))
    config = encoded.model_copy(update={"vae": encoded.vae.model_copy(update={"path": tmp_path / "vae"})})
    with pytest.raises(DataError, match=r"^vae\.path: \S+ has config_sha256 [0-9a-f]{64}, but the cache .* with"):
        run(config)
    made = config.cache_dir / "cache.json"
    info = json.loads(made.read_text())
    del info["vae"]["config_sha256"]
    shards = list(load_index(config.cache_dir)[1]["shards"])
    made.write_text(json.dumps(info))
    build_index(config.cache_dir, shards)
    assert len(reconstructed(config)) == 5
