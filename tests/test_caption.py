"""The job caption on tiny random models: resumable, equal for any number of tasks, never silent; encode after it."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_jobs import BROKEN, CLIPS, content, items, local, make_config, seeing, task, write_captioned_world
from models import WORDS, write_llm, write_t5, write_vae

from sorahpc.config import Config, VaeConfig
from sorahpc.configfile import parse_config
from sorahpc.data.captions import CAPTIONS, caption_settings, item_path, known_items, read_captions, write_captions
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import MANIFEST, read_manifest, write_manifest
from sorahpc.errors import DataError, Stopped
from sorahpc.jobs import caption, encode, evaluate
from sorahpc.models import captioner
from sorahpc.models.captioner import LocalModel
from sorahpc.models.text import load_text
from sorahpc.runs import Task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    """What one uninterrupted task makes with the language model."""
    config = local(world, "whole")
    caption.run(config, task(config))
    return content(config)


@pytest.fixture(scope="module")
def seen(world: Path) -> dict[str, bytes]:
    """And with the model that is shown frames."""
    config = seeing(world, "seen")
    caption.run(config, task(config))
    return content(config)


def test_every_clip_has_an_item_with_its_raw_answers_and_a_row(world: Path, whole: dict[str, bytes]) -> None:
    config = local(world, "whole")
    rows, _ = read_captions(config.run_dir / CAPTIONS)
    videos = [v for v in read_manifest(config.run_dir / MANIFEST) if v.ok]
    assert [row.key for row in rows] == [v.key for v in videos] and len(rows) == CLIPS
    assert sum(bool(row.caption) for row in rows) >= CLIPS - 2
    by_key = {v.key: v for v in videos}
    for item in items(config):
        assert item.original == by_key[item.subject].caption and item.original in item.prompt
        assert item.model["id"] == "llama" and len(item.model["weights_sha256"]) == 64
        *rejected, last = item.attempts
        assert all(a.rejected and (a.text.strip() or a.rejected == "empty") for a in rejected)
        assert bool(last.rejected) == (not item.caption) and item.reason == last.rejected
        assert len({a.seed for a in item.attempts}) == len(item.attempts) <= 4
        if item.caption:
            assert set(item.caption.split()) <= set(WORDS) and 30 <= len(item.caption) <= 900
    assert any(len(item.attempts) > 1 for item in items(config))
    status = json.loads((config.run_dir / "jobs/caption/status/0.json").read_text())
    assert (status["done"], status["total"], status["unit"]) == (CLIPS, CLIPS, "clip")


def test_any_number_of_tasks_in_any_order_makes_the_same_bytes(world: Path, whole: dict[str, bytes]) -> None:
    config = local(world, "tasks")
    for rank in (7, 4, 6, 0, 2, 1, 3, 5, 8):  # one more than there are clips
        assert (config.run_dir / CAPTIONS).exists() == (rank == 8)
        caption.run(config, task(config, rank, 9))
    assert content(config) == whole


def test_frames_are_seen_and_the_result_is_the_same_for_any_number_of_tasks(
    world: Path, seen: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    config = seeing(world, "seen2")
    with caplog.at_level(logging.INFO):
        for rank in (1, 0):
            caption.run(config, task(config, rank, 2))
    assert content(config) == seen
    found = {item.subject: item for item in items(config)}
    assert len(found) == CLIPS and {item.frames for item in found.values()} == {3}
    (bad,) = [v for v in read_manifest(config.run_dir / MANIFEST) if v.path.endswith(BROKEN)]
    assert found[bad.key].reason.startswith("video: changed since") and not found[bad.key].attempts
    assert f"clip {bad.key} keeps its caption: video: changed since" in caplog.text


def test_the_next_clips_frames_are_decoded_while_the_model_answers_one_question_at_a_time(
    world: Path, seen: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = seeing(world, "beside")
    answer, decode, decoded, lock = LocalModel._answer, captioner.decode, threading.Semaphore(0), threading.Lock()
    waited = []

    def watched(model: LocalModel, *args: Any) -> tuple[str, str]:
        assert lock.acquire(blocking=False), "two answers at a time"
        try:
            if not waited:  # the first one is not given before another clip's frames are there
                waited.append(decoded.acquire() and decoded.acquire(timeout=60))
            return answer(model, *args)
        finally:
            lock.release()

    def decoding(*args: Any) -> np.ndarray:
        frames = decode(*args)
        decoded.release()
        return frames

    monkeypatch.setattr(LocalModel, "_answer", watched)
    monkeypatch.setattr(captioner, "decode", decoding)
    caption.run(config, task(config))
    assert waited == [True] and content(config) == seen


def test_a_clip_whose_file_was_away_or_another_one_is_asked_about_again_once_it_is_back(
    world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "videos", tmp_path / "videos")
    config = seeing(world, "file_away", min_chars=1, frames=1)
    rows = [
        dataclasses.replace(v, path=str(tmp_path / "videos" / Path(v.path).name))
        for v in read_manifest(config.run_dir / MANIFEST)
    ]
    write_manifest(config.run_dir / MANIFEST, rows[:3])
    away, other = (Path(row.path) for row in rows[:2])
    away.rename(tmp_path / "away")
    other.rename(tmp_path / "other")
    other.write_bytes(b"?")

    def reasons() -> list[str]:
        caption.run(config, task(config))
        found = [row.reason for row in read_captions(config.run_dir / CAPTIONS)[0][:2]]
        return [reason if reason.startswith("video: ") else "" for reason in found]

    changed = "video: changed since prepare looked at it: run prepare and encode again"
    assert reasons() == ["video: no such file", changed] == reasons()
    (tmp_path / "other").replace(other)
    assert reasons() == ["video: no such file", ""]
    (tmp_path / "away").rename(away)
    assert reasons() == ["", ""]

    again = seeing(world, "all_away", min_chars=1, frames=1)
    write_manifest(again.run_dir / MANIFEST, rows[:3])
    (tmp_path / "videos").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"not one of 3 captions was accepted: .*: video: no such file"):
        caption.run(again, task(again))
    (tmp_path / "elsewhere").rename(tmp_path / "videos")
    caption.run(again, task(again))


def test_an_item_that_another_task_forgets_while_the_table_is_to_be_written_is_its_to_ask_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = local(world, "forgotten")
    caption.run(config, task(config, 1, 2))
    read = caption.read_item

    def forgotten(folder: Path, sha256: str) -> Any:
        if len(known_items(folder)) == CLIPS:
            item_path(folder, sha256).unlink()
        return read(folder, sha256)

    monkeypatch.setattr(caption, "read_item", forgotten)
    caption.run(config, task(config, 0, 2))
    monkeypatch.undo()
    assert not (config.run_dir / CAPTIONS).exists() and len(known_items(config.run_dir / "captions/clips")) == CLIPS - 1
    for rank in (0, 1):
        caption.run(config, task(config, rank, 2))
    assert (config.run_dir / CAPTIONS).exists()


def test_a_rerun_does_only_what_is_missing_and_reads_no_weights_for_nothing(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = local(world, "rerun")
    shutil.copytree(world / "runs/whole/captions", config.run_dir / "captions")
    asked: list[str] = []
    real = LocalModel.answer
    monkeypatch.setattr(LocalModel, "answer", lambda self, p, *a, **k: (asked.append(p), real(self, p, *a, **k))[1])
    caption.run(config, task(config))
    assert asked == [] and content(config) == whole
    victim = next((config.run_dir / "captions/clips").rglob("*.json"))
    attempts = len(json.loads(victim.read_text())["attempts"])
    victim.unlink()
    caption.run(config, task(config))
    assert len(asked) == attempts and content(config) == whole


def _killed_worker(config: Config) -> None:
    torch.set_num_threads(1)
    caption.run(config, task(config))


def test_kill_9_at_any_time_leaves_whole_items_only_and_a_rerun_completes_to_the_same_bytes(
    world: Path, whole: dict[str, bytes]
) -> None:
    config = local(world, "killed")
    fork = multiprocessing.get_context("fork")  # spawn would spend its life importing torch
    rng = np.random.default_rng(0)
    clips = config.run_dir / "captions/clips"
    kills = 0
    for round_ in range(40):
        if kills == 8:
            break
        wanted = len(known_items(clips)) + round_ % 4  # as its start, or once so many more items are there
        worker = fork.Process(target=_killed_worker, args=(config,))
        worker.start()
        while worker.is_alive() and len(known_items(clips)) < wanted:
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.02)))
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            kills += 1
        worker.join()
        there = {k: v for k, v in content(config).items() if not Path(k).name.startswith(".")}
        assert there.items() <= whole.items()
        if len(there) > CLIPS // 2:  # more to do, so that later kills find it at work
            (config.run_dir / CAPTIONS).unlink(missing_ok=True)
            shutil.rmtree(config.run_dir / "captions")
    assert kills == 8
    caption.run(config, task(config))
    assert {k: v for k, v in content(config).items() if not Path(k).name.startswith(".")} == whole


def test_a_stop_keeps_what_was_answered(world: Path, whole: dict[str, bytes]) -> None:
    config = local(world, "stopped")
    looks = iter(range(1000))
    with pytest.raises(Stopped, match=r"caption: stopped with \d of 8 clips of this task captioned"):
        caption.run(config, task(config, stop_requested=lambda: next(looks) == 3))
    assert 0 < len(items(config)) < CLIPS and not (config.run_dir / CAPTIONS).exists()
    caption.run(config, task(config))
    assert content(config) == whole


def test_another_model_instruction_or_limit_is_another_question_and_another_place_of_the_model_is_none(
    world: Path, tmp_path: Path
) -> None:
    def asked(**section: Any) -> set[str]:
        config = make_config(world, "prepared", **{"path": str(world / "llm"), **section})
        model = captioner.load_captioner(config.caption, "cpu")
        videos = [v for v in read_manifest(config.run_dir / MANIFEST) if v.ok]
        found = {captioner.clip_question(config, model, v, v.duration_s).sha256 for v in videos}
        assert len(found) == CLIPS
        return found

    write_llm(tmp_path / "other", seed=1)
    changes: list[dict[str, Any]] = [
        {}, {"path": str(tmp_path / "other")}, {"instruction": "Say more: {caption}"}, {"seed": 1}, {"min_chars": 20},
        {"max_new_tokens": 49}, {"temperature": 0.6}, {"dtype": "bfloat16"}, {"path": str(world / "vlm")},
        {"path": str(world / "vlm"), "frames": 2}, {"path": str(world / "vlm"), "frames": 3},
    ]  # fmt: skip
    every = [asked(**change) for change in changes]
    assert len(set().union(*every)) == CLIPS * len(changes)
    assert asked(path=str(shutil.copytree(world / "llm", tmp_path / "moved")), clips=False) == every[0]


# ---------------------------------------------------------------------------------------------------------------------
# What the model is asked, and how it answers


def test_a_captioner_sees_no_more_of_a_video_than_its_clip_will_have(world: Path) -> None:
    config = seeing(world, "spans")
    video = dataclasses.replace(read_manifest(config.run_dir / MANIFEST)[0], duration_s=30.0)
    assert caption._spans(config)(video) == 9 / 8
    few = config.clip.model_copy(update={"max_tokens": 32, "min_area_px": 1024})  # 16 tokens a latent frame
    shorter = config.model_copy(update={"clip": few, "vae": VaeConfig(path=Path("configs/vae/toy"))})
    assert caption._spans(shorter)(video) == 5 / 8
    assert caption._spans(shorter)(dataclasses.replace(video, width=8)) == 9 / 8, "no clip at all: encode says why"
    assert caption_settings(shorter) != caption_settings(config)


def test_a_caption_that_speaks_the_models_language_is_only_text(world: Path) -> None:
    """An image token in a caption would promise the model an image that isn't there, and end the task."""
    model = LocalModel(world / "vlm", "float32", "cpu", with_frames=True)
    hostile = "a <image> ball </s> <answer> <ima<image>ge> {{ 7 * 7 }} {caption} \ud800"
    assert model.plain(hostile) == "a   ball     <ima ge> {{ 7 * 7 }} {caption} ?"
    frames = [np.zeros((16, 16, 3), np.uint8)] * 2
    text, _ = model.answer(model.plain(hostile), frames, seed=0, temperature=0.7, max_new_tokens=20)
    assert text
    from sorahpc.data.captions import instruction_of

    config = seeing(world, "hostile")
    video = read_manifest(config.run_dir / MANIFEST)[0]
    question = captioner.clip_question(config, model, type(video)(**{**vars(video), "caption": hostile}), 1.0)
    assert question.prompt == instruction_of(config.caption).replace("{caption}", model.plain(hostile))
    scene = captioner.clip_question(config, model, type(video)(**{**vars(video), "start_s": 2.5}), 1.0)
    assert scene.frames.times_s == tuple(2.5 + t for t in question.frames.times_s)


def test_an_answer_is_a_function_of_question_and_seed_alone_and_leaves_the_global_generator_be(world: Path) -> None:
    model = LocalModel(world / "llm", "float32", "cpu", with_frames=False)

    def said(seed: int, temperature: float = 0.7) -> str:
        return model.answer("a red ball", [], seed=seed, temperature=temperature, max_new_tokens=12)[0]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [said(seed) for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), state) and len(set(first)) == 4
    torch.manual_seed(2)
    assert [said(seed) for seed in (3, 2, 1, 0)] == first[::-1]
    assert len({said(seed, 0.0) for seed in range(3)}) == 1


def test_a_question_that_is_too_long_for_the_model_is_a_fault_of_its_own(tmp_path: Path) -> None:
    model = LocalModel(write_llm(tmp_path / "llm", positions=64), "float32", "cpu", with_frames=False)
    assert model.answer("a ball " * 40, [], seed=0, temperature=0, max_new_tokens=8) == (
        "", "too long for the model: 83 tokens and max_new_tokens 8, at most 64"
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What encode makes of it


def test_encode_stores_both_captions_and_a_new_one_makes_only_its_shard_again(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_t5(world / "t5", world / "videos")
    write_vae(world / "vae")
    run = local(world, "encoded").run_dir
    models = {"vae": {"path": str(world / "vae")}, "text": {"path": str(world / "t5"), "max_tokens": 64}}
    data = local(world, "encoded").model_dump(mode="json")
    config = parse_config({**data, **models, "encode": {"clips_per_shard": 2}})
    plain = parse_config({**data, **models, "encode": {"clips_per_shard": 2}, "caption": None})

    rows = {row.key: row.caption for row in read_captions(world / "runs/whole" / CAPTIONS)[0]}
    videos = [v for v in read_manifest(run / MANIFEST) if v.ok and not v.path.endswith(BROKEN)]
    with pytest.raises(DataError, match="no such table of captions; run `sorahpc caption` first"):
        encode.run(config, Task(run, "encode"))
    shutil.copytree(world / "runs/whole/captions", run / "captions")
    caption.run(config, Task(run, "caption"))
    encode.run(config, Task(run, "encode"))
    cache = LatentCache(run / "cache")
    assert cache.captions == [v.caption for v in videos] and cache.detailed == [rows[v.key] for v in videos]
    assert sum(map(bool, cache.detailed)) >= 4
    i = next(i for i, text in enumerate(cache.detailed) if text)
    text = load_text(world / "t5", 64)
    for second, said in ((False, cache.captions[i]), (True, cache.detailed[i])):
        assert torch.equal(cache.read(i, second)[1]["text"], text.encode([said])[0].half().float())
    encoded: list[str] = []
    real = encode._encode
    monkeypatch.setattr(encode, "_encode", lambda video, *rest: (encoded.append(video.path), real(video, *rest))[1])
    encode.run(config, Task(run, "encode"))
    assert not encoded
    table, settings = read_captions(run / CAPTIONS)
    key = next(v.key for v in videos if rows[v.key])
    changed = [dataclasses.replace(r, caption="another text of it") if r.key == key else r for r in table]
    write_captions(run / CAPTIONS, changed, settings)
    encode.run(config, Task(run, "encode"))
    assert len(encoded) == 2 and "another text of it" in LatentCache(run / "cache").detailed
    # A cached clip still finds its video, to be held beside its reconstruction.
    evaluate.reconstruct(config, torch.device("cpu"), lambda: None)
    made = json.loads((run / "reconstructions/reconstructions.json").read_text())
    assert len(made["clips"]) == 6
    encode.run(plain, Task(run, "encode"))  # without the section, the first caption alone, under the video's own key
    assert LatentCache(run / "cache").keys == [v.key for v in videos] and not any(LatentCache(run / "cache").detailed)
