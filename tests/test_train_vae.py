"""train-vae: the same training on any number of ranks, resumed to the same bits, with every term; fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import COSMOS, write_vae
from ranks import free_port, run_on_ranks
from safetensors.torch import load_file, save_file
from vae_trainings import WAN_TINY, all_terms, configure, spec_of, write_lpips, write_wan

from sorahpc.config import Config, VaeConfig
from sorahpc.data import keys
from sorahpc.data.batches import Batches
from sorahpc.data.clips import ClipCache
from sorahpc.data.manifest import Video, read_manifest, write_manifest
from sorahpc.data.toyworld import render, scene_of
from sorahpc.errors import ConfigError, DataError, NumericsError, SetupError, Stopped
from sorahpc.jobs import train_vae
from sorahpc.jobs.train_vae import measure, summary
from sorahpc.models.vae import WEIGHTS, Vae, build_vae, load_vae
from sorahpc.models.vae_start import start_vae
from sorahpc.models.vae_training import Trainer
from sorahpc.runs import Task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 12 clips, and random weights for LPIPS."""
    from sorahpc.data.toyworld import write_world
    from sorahpc.jobs import prepare

    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "videos", 12, seed=1)
    config = configure(folder)
    prepare.run(config, Task(config.run_dir, "prepare"))
    write_lpips(folder)
    return folder


def at(folder: Path, world: Path, **train: object) -> Config:
    (folder / "r").mkdir(parents=True)
    shutil.copy(world / "r/manifest.parquet", folder / "r/manifest.parquet")
    return configure(folder, **train)


def stopped_at(config: Config, step: int, **place: int) -> None:
    looks = iter(range(10_000))
    task = Task(config.run_dir, "train-vae", stop_requested=lambda: next(looks) >= step, **place)
    with pytest.raises(Stopped, match=rf"stopped at step \d+ of {config.train_vae.steps}; the state is saved"):
        train_vae.run(config, task)


# ---------------------------------------------------------------------------------------------------------------------
# The whole job


@pytest.mark.parametrize("terms", ["plain", "all"])
def test_train_vae_writes_what_load_vae_reads_and_a_killed_run_resumes_to_the_same_bits(
    world: Path, tmp_path: Path, terms: str
) -> None:
    more = {**all_terms(world), **WAN_TINY, "posterior": "learned"} if terms == "all" else {}
    outs = []
    for name, stops in (("whole", ()), ("parts", (3, 2))):
        config = at(tmp_path / name, world, **more)
        for stop in stops:
            stopped_at(config, stop)
        train_vae.run(config, Task(config.run_dir, "train-vae"))
        outs.append((tmp_path / name / "vae" / WEIGHTS).read_bytes())
        result = json.loads((config.run_dir / "train_vae/result.json").read_text())
        assert result["clips"] == 2 and result["psnr_db"] > 3 and len(result["latent_std"]) == 4
        assert result["psnr_db_worst"] <= result["psnr_db"] and -1 < result["ssim_worst"] <= result["ssim"] < 1
        clip = np.zeros((5, 64, 64, 3), np.uint8)
        assert load_vae(tmp_path / name / "vae").encode(clip).shape == (4, 2, 8, 8)
    assert outs[0] == outs[1]
    state = load_file(tmp_path / "whole/r/train_vae/state.safetensors")
    assert ("judge.body.0.weight" in state) == ("discriminator.0.exp_avg" in state) == (terms == "all")
    with pytest.raises(DataError, match=r"state.safetensors: field `train_vae.lr`: expected 0.5, found 0.03; use the"):
        train_vae.run(configure(tmp_path / "whole", **{**more, "lr": 0.5}), Task(tmp_path / "whole/r", "train-vae"))


def train_on(rank: int, world_size: int, folder: Path, world: Path, ports: list[int]) -> None:
    """All steps on these ranks; and from the middle, where one rank has stopped."""
    for name, port in zip(("two", "then_two"), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # another: the ranks leave the first world at different moments
        more = {**all_terms(world), **WAN_TINY, "steps": 4, "resources": {"tasks_per_node": world_size}}
        config = configure(folder / name, **more)
        train_vae.run(config, Task(config.run_dir, "train-vae", rank, world_size, rank, writes=rank == 0))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train_as_one_does_and_go_on_where_one_has_stopped(world: Path, tmp_path: Path) -> None:
    more = {**all_terms(world), **WAN_TINY, "steps": 4}
    config = at(tmp_path / "one", world, **more)
    train_vae.run(config, Task(config.run_dir, "train-vae"))
    at(tmp_path / "two", world, **more)
    stopped_at(at(tmp_path / "then_two", world, **more), 2)
    run_on_ranks(2, train_on, tmp_path, world, [free_port(), free_port()], timeout_s=500)
    start = start_vae(spec_of(**WAN_TINY)).module.state_dict()
    one = load_file(tmp_path / "one/vae" / WEIGHTS)
    moved = float(sum((one[k] - start[k]).square().sum() for k in one)) ** 0.5
    for name in ("two", "then_two"):
        other = load_file(tmp_path / name / "vae" / WEIGHTS)
        off = float(sum((one[k] - other[k]).square().sum() for k in one)) ** 0.5
        assert off < 1e-2 * moved, (name, off / moved)
        results = [json.loads((tmp_path / n / "r/train_vae/result.json").read_text()) for n in ("one", name)]
        assert results[1]["clips"] == 2 and results[1]["psnr_db"] == pytest.approx(results[0]["psnr_db"], abs=0.05)


def test_whole_clips_that_the_gpu_has_no_memory_for_are_measured_in_parts_by_the_next_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training sees windows and crops; neither they nor the clips can be made smaller once there is a state."""
    config = at(tmp_path, world, steps=1, **WAN_TINY)
    encode = Vae._encode_part

    def small(vae: Vae, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(vae, x)

    monkeypatch.setattr(Vae, "_encode_part", small)
    with pytest.raises(SetupError, match=r"vae.tiling: train_vae is done and saved, but .* \(CUDA out of memory"):
        train_vae.run(config, Task(config.run_dir, "train-vae"))
    tiled = {"path": str(tmp_path / "vae"), "tiling": {"tile_px": 32, "overlap_px": 8}}
    config = config.model_copy(update={"vae": VaeConfig.model_validate(tiled)})
    train_vae.run(config, Task(config.run_dir, "train-vae"))
    assert json.loads((config.run_dir / "train_vae/result.json").read_text())["clips"] == 2


@pytest.mark.parametrize("before", [True, False])
def test_an_autoencoder_that_gives_what_is_not_finite_is_no_result_and_out_stays_as_it_was(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    config = at(tmp_path, world, steps=1)
    if before:
        write_vae(tmp_path / "vae")
    there = {p.name: p.read_bytes() for p in (tmp_path / "vae").glob("*")}
    monkeypatch.setattr(train_vae, "psnr_db", lambda *_: float("nan"))
    with pytest.raises(
        NumericsError, match=r"psnr_db of what was to be .*/vae makes of .* not finite; lower train_vae"
    ):
        train_vae.run(config, Task(config.run_dir, "train-vae"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "vae").glob("*")} == there
    assert not (config.run_dir / "train_vae/result.json").exists()
    monkeypatch.undo()
    train_vae.run(config, Task(config.run_dir, "train-vae"))  # from the last state, which is kept
    names = {p.name for p in (tmp_path / "vae").iterdir()}
    assert names == {"config.json", WEIGHTS, "train_vae.json"}
    assert (
        load_file(tmp_path / "vae" / WEIGHTS).keys() and there.get(WEIGHTS) != (tmp_path / "vae" / WEIGHTS).read_bytes()
    )


@pytest.mark.parametrize("holdout", [2, 0])
def test_weights_that_are_finite_as_trained_but_not_as_stored_are_no_result(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: int
) -> None:
    config = at(tmp_path, world, steps=1, weights_dtype="float16", holdout_clips=holdout)
    whole = Trainer.train_step

    def too_large(trainer: Trainer) -> dict[str, float]:
        found = whole(trainer)
        trainer.ema["decoder.conv_out.conv_s.bias"][0] = 1e5  # float16 ends at 65504; black or white pixels come of it
        return found

    monkeypatch.setattr(Trainer, "train_step", too_large)
    lower = r"lower train_vae.lr \(now 0.03\), or train_vae.weights_dtype=float32$"
    with pytest.raises(NumericsError, match=rf"decoder.conv_out.conv_s.bias of what was .*/vae is not finite; {lower}"):
        train_vae.run(config, Task(config.run_dir, "train-vae"))
    assert not list((tmp_path / "vae").iterdir())


def test_an_out_where_other_weights_would_be_read_is_refused_before_anything_is_done(
    world: Path, tmp_path: Path
) -> None:
    config = at(tmp_path, world)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"^train_vae.out: .*/vae: a folder without {WEIGHTS}.index.json expected"):
        train_vae.run(config, Task(config.run_dir, "train-vae"))
    assert not (config.run_dir / "train_vae").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is held out


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], set[int]]]:
    """Of each run: sizes in bytes of the videos that it trains on, and of those that it measures."""
    runs: list[tuple[set[int], set[int]]] = []

    class Recording(Batches):
        def __init__(self, clips: ClipCache, shapes: dict[int, Any], *args: Any) -> None:
            super().__init__(clips, shapes, *args)
            runs.append(({videos[-1][i].size_bytes for i in shapes}, set()))

    def recorded(vae: Vae, load: Any, numbers: list[int]) -> list[dict[str, Any]]:
        rows = measure(vae, load, numbers)
        runs[-1][1].update(videos[-1][row["number"]].size_bytes for row in rows)
        return rows

    videos: list[list[Video]] = []
    whole = train_vae._plan
    monkeypatch.setattr(train_vae, "_plan", lambda *args: videos.append((found := whole(*args))[0]) or found)
    monkeypatch.setattr(train_vae, "Batches", Recording)
    monkeypatch.setattr(train_vae, "measure", recorded)
    return runs


def test_clips_that_were_trained_on_are_not_measured_when_the_folder_has_grown_or_shrunk_since(
    world: Path, tmp_path: Path, seen: list[tuple[set[int], set[int]]]
) -> None:
    config = at(tmp_path, world, steps=4)
    manifest = config.run_dir / "manifest.parquet"
    every = read_manifest(manifest)
    assert len({v.size_bytes for v in every}) == 12
    write_manifest(manifest, every[4:])
    stopped_at(config, 1)
    # Grown in front, so that rows shift; some captions and names are others.
    write_manifest(manifest, [dataclasses.replace(v, key=f"{i:016x}", caption="x") for i, v in enumerate(every)])
    stopped_at(config, 1)
    # Shrunk to what was trained on and one that was never.
    trained = seen[0][0] | seen[1][0]
    left = [v for v in every if v.size_bytes in seen[0][0]]
    write_manifest(manifest, [*left, *(v for v in every if v.size_bytes not in trained)])
    train_vae.run(config, Task(config.run_dir, "train-vae"))
    write_manifest(manifest, every[::-1])
    train_vae.run(config, Task(config.run_dir, "train-vae"))
    trained |= seen[2][0]
    assert len(seen) == 4 and len(trained) >= 9 and 1 <= len(seen[3][1]) <= 2
    for _, measured in seen:
        assert not measured & trained
    result = json.loads((config.run_dir / "train_vae/result.json").read_text())
    assert result["clips"] == len(seen[3][1])


def test_a_file_that_was_replaced_since_prepare_is_left_out(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = at(tmp_path, world, steps=1)
    manifest = config.run_dir / "manifest.parquet"
    # As of files that had other bytes when they were looked at.
    rows = enumerate(read_manifest(manifest))
    write_manifest(manifest, [dataclasses.replace(v, key=f"{i:016x}", mtime_ns=1) for i, v in rows])
    with pytest.raises(DataError, match=r"none of the .* clips of .* can be decoded; the log says why"):
        train_vae.run(config, Task(config.run_dir, "train-vae"))
    assert "left out: " in caplog.text and ".mp4: changed since prepare looked at it" in caplog.text


def test_copies_of_another_time_are_read_through_once_however_often_their_clips_are_decoded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = at(tmp_path, world, steps=20, cache_gb=0)
    manifest = config.run_dir / "manifest.parquet"
    write_manifest(manifest, [dataclasses.replace(v, mtime_ns=1) for v in read_manifest(manifest)])
    keys._digest_at.cache_clear()  # of other tests
    read: list[str] = []
    digest_of = keys.digest_of
    monkeypatch.setattr(keys, "digest_of", lambda path: (read.append(path), digest_of(path))[1])
    train_vae.run(config, Task(config.run_dir, "train-vae"))
    assert len(set(read)) > 8 and len(read) == len(set(read))


def test_a_state_goes_on_under_its_own_settings_only_and_each_other_one_is_named(world: Path, tmp_path: Path) -> None:
    config = at(tmp_path, world, steps=4, holdout_clips=1)
    stopped_at(config, 1)
    state = config.run_dir / "train_vae/state.safetensors"
    before = state.read_bytes()

    def refused(config: Config) -> str:
        with pytest.raises(DataError) as caught:
            train_vae.run(config, Task(config.run_dir, "train-vae"))
        assert state.read_bytes() == before and not (tmp_path / "vae").exists()
        return str(caught.value).replace(f"{state}: ", "")

    advice = "; use the settings that it was saved with, delete it, or use another run name"
    raised = configure(tmp_path, steps=4, holdout_clips=2)
    assert refused(raised) == f"field `train_vae.holdout_clips`: expected 2, found 1{advice}"
    clip = config.clip.model_copy(update={"fps": 4.0, "max_tokens": 99})
    assert refused(config.model_copy(update={"clip": clip})).splitlines() == [
        f"field `clip.fps`: expected 4.0, found 8.0{advice}",
        f"field `clip.max_tokens`: expected 99, found null{advice}",
    ]
    manifest = config.run_dir / "manifest.parquet"
    write_manifest(manifest, read_manifest(manifest), {"scenes": {"min_s": 1.0}})
    assert refused(config) == f'field `prepare.scenes`: expected {{"min_s": 1.0}}, found null{advice}'
    write_manifest(manifest, read_manifest(manifest))
    save_file(load_file(state), state, metadata={"step": "1", "key": "0" * 64})  # as they were before
    before = state.read_bytes()
    assert refused(config) == "of a version that held out other clips; delete it, or use another run name"
    before = before[: len(before) // 2]
    state.write_bytes(before)
    assert re.fullmatch(r"can't be read \([^\n]*\); delete it to train from the start", refused(config))


def test_clips_that_the_first_training_may_have_seen_are_told_of_when_its_weights_are_tuned(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = at(tmp_path / "first", world, steps=1, holdout_clips=1)
    train_vae.run(first, Task(first.run_dir, "train-vae"))
    out = first.train_vae.out
    note = json.loads((out / "train_vae.json").read_text())
    told = r"1 of the clips held out may be among those that .*/first/vae \(train_vae.init\) was trained on"
    for name, holdout, limit, warned in (("same", 1, True, False), ("raised", 2, True, True), ("old", 1, False, True)):
        (out / "train_vae.json").write_text(json.dumps(note if limit else {"posterior": "fixed"}))
        config = at(tmp_path / name, world, steps=1, holdout_clips=holdout, init=str(out))
        caplog.clear()
        train_vae.run(config, Task(config.run_dir, "train-vae"))
        assert any(re.match(told, m) for m in caplog.messages) == warned, name
        after = json.loads((tmp_path / name / "vae/train_vae.json").read_text())["held_out_below"]
        assert after == (note["held_out_below"] if limit else "")  # for who starts from these


def test_fine_tuning_starts_from_the_weights_of_init_and_keeps_its_learned_variance(
    world: Path, tmp_path: Path
) -> None:
    published = write_wan(tmp_path / "published")
    config = at(tmp_path / "tuned", world, init=str(published), steps=2, lr=1e-5, batch_clips=2)
    train_vae.run(config, Task(config.run_dir, "train-vae"))
    before, after = load_file(published / WEIGHTS), load_file(tmp_path / "tuned/vae" / WEIGHTS)
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert max(float((before[k] - after[k]).abs().max()) for k in before) < 1e-4
    note = json.loads((tmp_path / "tuned/vae/train_vae.json").read_text())
    assert len(note.pop("held_out_below")) == 16
    assert note == {"posterior": "learned", "latent_noise": None, "steps": 2, "init": str(published)}


def test_what_was_measured_by_ranks_is_put_together_as_if_by_one() -> None:
    torch.manual_seed(0)
    vae = build_vae("AutoencoderKLCosmos", COSMOS)
    vae = Vae(vae.module.eval(), "", torch.float32, torch.device("cpu"))
    frames = [render(scene_of(2, i, frames=[5], sizes=[(64, 64)])) for i in range(3)]

    def load(i: int) -> np.ndarray:
        if i == 3:
            raise DataError("3: broken")
        return frames[i]

    rows = [measure(vae, load, numbers) for numbers in ([0, 2], [1, 3])]
    result = summary([*rows[1], *rows[0]])
    assert result == summary(measure(vae, load, [0, 1, 2])) and result["clips"] == 3
    z = torch.cat([vae.encode(clip).flatten(1).double() for clip in frames], dim=1)
    assert result["latent_mean"] == [round(v, 4) for v in z.mean(1).tolist()]
    assert result["latent_std"] == [round(v, 4) for v in z.std(1).tolist()]
    assert summary([])["psnr_db"] is None and summary([])["clips"] == 0
