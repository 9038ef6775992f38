"""encode: whatever is killed, stopped or broken, the cache ends up the same, and says what is not in it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from models import write_t5, write_vae
from videos import shots

from sorahpc import lease
from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data import cache, claims, indexing, isolate, leftovers
from sorahpc.data.cache import INDEX, INFO
from sorahpc.data.claims import WORK
from sorahpc.data.decode import ClipPlan, decode
from sorahpc.data.latents import LatentCache
from sorahpc.data.maintenance import repair, retry, verify
from sorahpc.data.manifest import Video, read_manifest, write_manifest
from sorahpc.data.samples import Sample
from sorahpc.data.toyworld import write_world
from sorahpc.errors import ConfigError, DataError, SetupError, Stopped
from sorahpc.jobs import encode, prepare
from sorahpc.models.text import make_tiny_t5
from sorahpc.models.vae import Vae, load_vae
from sorahpc.runs import Task

CLIPS = 14
BROKEN = {"zero.mp4": b"", "text.mp4": b"no video at all\n"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos (one of them damaged, and prepare didn't see it), a tiny VAE and T5 with random weights."""
    folder = tmp_path_factory.mktemp("world")
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


def usable(config: Config) -> list[Video]:
    return [v for v in read_manifest(config.run_dir / "manifest.parquet") if v.ok]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that is given the key of each clip that is encoded from now on."""
    encoded: list[str] = []
    real = encode._encode
    monkeypatch.setattr(encode, "_encode", lambda video, *rest: (encoded.append(video.key), real(video, *rest))[1])
    return encoded


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    """The cache that one uninterrupted task makes."""
    config = prepared(world, "whole")
    encode.run(config, task(config))
    return content(config)


def test_all_usable_clips_are_encoded_and_the_broken_one_is_named_with_its_reason(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = prepared(world, "named")
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    cache = LatentCache(config.cache_dir)
    assert len(cache) == CLIPS - 1
    rejected = json.loads((config.cache_dir / "rejected.json").read_text())
    assert [Path(r["source"]).name for r in rejected] == ["000003.mp4"] and "corrupt" in rejected[0]["reason"]
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1 and "000003.mp4" in lines[0]
    assert "cache complete: 13 samples, 1 clips rejected" in caplog.text
    status = json.loads((config.run_dir / "jobs/encode/status/0.json").read_text())
    assert (status["done"], status["total"], status["unit"]) == (CLIPS, CLIPS, "clip")
    shapes = {tuple(s) for s in cache.shapes.tolist()}
    assert shapes <= {(4, 3, 8, 8), (4, 3, 6, 10), (4, 3, 10, 6)} and len(shapes) > 1
    assert cache.fps.tolist() == [8.0] * len(cache) and all(c.startswith("a ") for c in cache.captions)
    assert cache.info["vae"]["id"] == "AutoencoderKLCosmos" and cache.info["clip"]["max_frames"] == 9
    z, e = cache.read(0)
    assert z.abs().max() > 0 and e["text"].shape == (cache.text_lens[0], 16)


def test_the_text_and_the_latents_are_those_of_the_models_themselves(world: Path, whole: dict[str, bytes]) -> None:
    from sorahpc.models.text import load_text

    config = prepared(world, "whole")
    cache = LatentCache(config.cache_dir)
    text = load_text(config.text.path, 32)
    _, e = cache.read(5)
    assert torch.equal(e["text"], text.encode([cache.captions[5]])[0].half().float())
    assert torch.equal(cache.empty_texts["text"], text.encode([""])[0].half().float())


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


def keys_in(told: Path) -> list[str]:
    return told.read_text().split() if told.exists() else []


def wait_for(wanted: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not wanted():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def test_one_task_of_several_does_all_where_the_others_never_come(world: Path, whole: dict[str, bytes]) -> None:
    config = prepared(world, "alone")
    encode.run(config, task(config, 2, 3))
    assert content(config) == whole


def test_more_tasks_at_once_than_there_are_shards_make_the_same_bytes_and_no_clip_and_no_index_twice(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    config = prepared(world, "at_once")
    tasks = [start(config, rank, 6, tmp_path / "told", False, "one") for rank in range(6)]
    for one in tasks:
        one.join(120)
    assert [one.exitcode for one in tasks] == [0] * 6
    assert content(config) == whole
    assert len(keys_in(tmp_path / "told.built")) == 1
    assert sorted(keys_in(tmp_path / "told")) == sorted({v.key for v in usable(config)})
    assert list((config.cache_dir / WORK).iterdir()) == []


def test_a_task_that_is_killed_costs_one_clip_and_another_that_comes_later_goes_on_for_it(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    config = prepared(world, "one_killed", encode={"clips_per_shard": 7})
    told = tmp_path / "told"
    first = start(config, 0, 2, told)
    wait_for(lambda: len(keys_in(told)) >= 3, "three clips")
    os.kill(first.pid, signal.SIGKILL)  # type: ignore[arg-type]
    before = len(keys_in(told))
    tasks = [start(config, rank, 3, told) for rank in (1, 2)]
    for one in [first, *tasks]:
        one.join(120)
    assert [one.exitcode for one in [first, *tasks]] == [-signal.SIGKILL, 0, 0]
    keys = keys_in(told)
    assert 3 <= before < CLIPS and CLIPS == len(set(keys)) <= len(keys) <= CLIPS + 1
    other = prepared(world, "not_killed", encode={"clips_per_shard": 7})
    encode.run(other, task(other))
    assert content(config) == content(other) and list((config.cache_dir / WORK).iterdir()) == []


def test_what_a_killed_task_left_of_a_shard_that_is_planned_no_more_goes_a_day_later(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    config = prepared(world, "planned_no_more", encode={"clips_per_shard": 7})
    first = start(config, 0, 1, tmp_path / "told")
    wait_for(lambda: len(keys_in(tmp_path / "told")) >= 3, "three clips")
    os.kill(first.pid, signal.SIGKILL)  # type: ignore[arg-type]
    first.join()
    config = prepared(world, "planned_no_more")
    encode.run(config, task(config))
    left = sorted((config.cache_dir / WORK).iterdir())
    assert content(config) == whole and {p.suffix for p in left} == {".journal", ".lease"}
    for path in left:
        os.utime(path, (time.time() - leftovers.LEFT_AFTER_S - 1,) * 2)
    encode.run(config, task(config))
    assert content(config) == whole and list((config.cache_dir / WORK).iterdir()) == []


def test_a_task_that_slept_finds_that_its_shard_was_taken_over_and_spoils_nothing(
    world: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.2)
    config = prepared(world, "slept")
    told = tmp_path / "told"
    sleeper = start(config, 0, 1, told, True)
    wait_for(lambda: Path(f"/proc/{sleeper.pid}/stat").read_text().split()[2] == "T", "asleep")
    slept_on = keys_in(told)[1]
    encode.run(config, task(config))
    assert content(config) == whole
    (config.cache_dir / INDEX).unlink()  # so that the sleeper has something to do
    os.kill(sleeper.pid, signal.SIGCONT)  # type: ignore[arg-type]
    sleeper.join(60)
    assert sleeper.exitcode == 0 and content(config) == whole
    assert keys_in(told)[1:] == [slept_on]  # none after it
    assert list((config.cache_dir / WORK).iterdir()) == []


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


def without_a_shard(world: Path, run: str) -> tuple[Config, Path]:
    """A run whose cache lacks a shard and so has no index, and the shard's path."""
    config = prepared(world, run)
    encode.run(config, task(config))
    shard = min(config.cache_dir.glob("shard-*.h5"))
    for path in (shard, config.cache_dir / INDEX):
        path.unlink()
    return config, shard


def test_who_holds_the_last_shard_and_does_nothing_is_not_waited_for_without_end_and_the_end_is_a_failure(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, shard = without_a_shard(world, "held")
    clock = Clock(lambda pause: held.beat() and None)  # type: ignore[func-returns-value]
    monkeypatch.setattr(encode, "time", clock)
    held = lease.Lease(config.cache_dir / WORK / f"{shard.stem}.lease", "", "slurm:7").acquire()
    said = (
        rf"^encode: 1 shards are missing, and who holds them encoded no clip for 30 min: {shard.name} by Slurm job 7 "
        rf"on .* \(pid {os.getpid()}\), alive \d+ s ago; end them .* and run encode again"
    )
    with caplog.at_level(logging.INFO), pytest.raises(SetupError, match=said) as caught:
        encode.run(config, task(config))
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value) and clock.pauses == 2
    assert f"waiting for {shard.name} by" in caplog.text
    assert INDEX not in content(config) and held.held()
    held.release()
    encode.run(config, task(config))
    assert content(config) == whole


def test_who_holds_the_last_shard_and_is_slow_is_waited_for(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shard = without_a_shard(world, "slow")
    held = lease.Lease(config.cache_dir / WORK / f"{shard.stem}.lease", "", "other").acquire()

    def meanwhile(pause: int) -> None:
        held.beat()
        if pause < 5:
            with open(config.cache_dir / WORK / f"{shard.stem}.{'a' * 32}.journal", "ab") as journal:
                journal.write(b"a clip")
        else:
            shard.write_bytes(whole[shard.name])
            held.release()

    clock = Clock(meanwhile)
    monkeypatch.setattr(encode, "time", clock)
    encode.run(config, task(config))
    assert clock.now > 2 * encode.PATIENCE_S and content(config) == whole


def test_who_is_killed_while_it_builds_the_index_is_followed_by_another_of_the_launch(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, built = prepared(world, "builder_killed"), []
    real = indexing.build_index
    monkeypatch.setattr(indexing, "build_index", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    first = start(config, 0, 2, tmp_path / "told", False, "one")
    first.join(60)
    (lease_left,) = (config.cache_dir / WORK).iterdir()
    assert first.exitcode == -signal.SIGKILL and lease_left.name.startswith("index-") and INDEX not in content(config)
    monkeypatch.setattr(indexing, "build_index", lambda *args: (built.append(args), real(*args))[1])
    encode.run(config, task(config, 1, 2, launch="one"))
    assert content(config) == whole and len(built) == 1 and list((config.cache_dir / WORK).iterdir()) == []


def test_a_task_waits_for_who_builds_the_index_and_does_not_build_it_itself(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = prepared(world, "builder_slow")
    encode.run(config, task(config, launch="one"))
    told, index = config.run_dir / "jobs/encode/index.json", config.cache_dir / INDEX
    name = json.loads(told.read_text())["plan"]
    index.rename(index.with_name(".later"))
    held = lease.Lease(config.cache_dir / WORK / f"{name}.lease", "", "other").acquire()

    def meanwhile(pause: int) -> None:
        held.beat()
        if pause == 5:
            index.with_name(".later").rename(index)
            held.release()

    clock = Clock(meanwhile)
    monkeypatch.setattr(indexing, "time", clock)
    monkeypatch.setattr(indexing, "build_index", None)
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config, launch="one"))
    assert clock.pauses == 6 and content(config) == whole
    assert caplog.text.count("waiting for another task that builds the index") == 1
    held.acquire()
    index.unlink()
    with pytest.raises(Stopped, match="all shards are there"):
        encode.run(config, task(config, launch="one", stop_requested=lambda: clock.pauses > 8))


def test_an_index_that_can_not_be_built_is_told_to_the_tasks_of_the_launch_and_built_by_the_next(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "builder_refused")
    encode.run(config, task(config))
    shard = min(config.cache_dir.glob("shard-*.h5"))
    shard.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(DataError, match=f"{shard.name}: no seal at its end"):
            encode.run(config, task(config, launch="one"))
        monkeypatch.setattr(indexing, "build_index", None)  # once was enough
    monkeypatch.undo()
    with pytest.raises(DataError, match=f"{shard.name}: no seal at its end"):
        encode.run(config, task(config, launch="two"))
    shard.unlink()
    encode.run(config, task(config, launch="two"))  # a task that comes later
    assert content(config) == whole


def test_a_cache_whose_index_another_run_has_built_is_not_taken_for_ones_own(
    world: Path, whole: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, other = (
        prepared(world, f"of_two_{i}", encode={"clips_per_shard": 3, "cache": str(tmp_path)}) for i in (0, 1)
    )
    rows = read_manifest(other.run_dir / "manifest.parquet")
    write_manifest(other.run_dir / "manifest.parquet", [*rows[:3], *rows[4:]])  # the first shard is one of both
    for config in (mine, other):
        encode.run(config, task(config))
    assert len(indexing.open_cache(other)) == CLIPS - 1  # and one can't be decoded
    with pytest.raises(DataError) as caught:
        indexing.open_cache(mine)
    assert str(caught.value) == (
        f"{tmp_path}/{INDEX}: expected the 5 shards of this run's encode, found 5, 4 of them of others: another run "
        "has encoded into this folder since. Run `sorahpc encode` of this run again, which builds the index anew, or "
        "give each its encode.cache"
    )
    encode.run(mine, task(mine))
    assert len(indexing.open_cache(mine)) == CLIPS - 1 and {**whole, **content(mine)} == content(mine)
    assert caplog.messages == [m for m in caplog.messages if "are not in it" not in m]
    (tmp_path / indexing.open_cache(mine).index.shards[0]).unlink()
    repair(tmp_path)
    assert len(indexing.open_cache(mine)) < CLIPS - 1
    said = (
        f"{tmp_path}/{INDEX}: 1 of the 5 shards of this run's encode are not in it; `sorahpc encode` brings them back"
    )
    assert caplog.messages[-1] == said
    merged = mine.model_copy(update={"encode": mine.encode.model_copy(update={"cache": tmp_path / "elsewhere"})})
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    (mine.run_dir / "jobs/encode/index.json").write_text('{"cache": 1, "shards": [{}]}')
    assert len(indexing.open_cache(merged)) == len(indexing.open_cache(mine))


def test_a_gpu_that_is_too_small_ends_the_task_by_the_setting_and_keeps_what_was_encoded(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, encoded = prepared(world, "small_gpu"), recorded(monkeypatch)
    real = Vae.encode

    def encode_four(self: Vae, clip: np.ndarray) -> torch.Tensor:
        if len(encoded) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nSee the documentation")
        return real(self, clip)

    monkeypatch.setattr(Vae, "encode", encode_four)
    with pytest.raises(SetupError) as caught:
        encode.run(config, task(config))
    assert re.fullmatch(
        r"vae.tiling: /.*\.mp4: the VAE lacks GPU memory for \d+ frames of \d+x\d+ px \(CUDA out of memory. Tried to "
        r"allocate 3.00 GiB.\); what was encoded is kept. Take a GPU with more, or begin a cache anew with vae.tiling, "
        r"or with less of clip.max_area_px or clip.max_frames",
        str(caught.value),
    )
    monkeypatch.setattr(Vae, "encode", real)
    encoded.clear()
    encode.run(config, task(config))
    assert len(encoded) == CLIPS - 4 and content(config) == whole


def test_a_rerun_does_only_what_is_missing(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "rerun")
    encode.run(config, task(config))
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert encoded == []
    shard = sorted(config.cache_dir.glob("shard-*.h5"))[1]
    shard.unlink()
    encode.run(config, task(config))
    assert len(encoded) == 3 and content(config) == whole


@pytest.mark.parametrize("kills_wanted", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_at_any_time_leaves_no_unreadable_shard_and_costs_the_clip_that_was_encoded(
    world: Path, whole: dict[str, bytes], tmp_path: Path, kills_wanted: int
) -> None:
    config = prepared(world, f"killed{kills_wanted}")
    told = tmp_path / "told"
    rng = np.random.default_rng(0)
    began = time.monotonic()
    encode.run(config, task(config))
    whole_s = time.monotonic() - began  # of this machine, as busy as it is
    kills = resumed = wanted = 0
    for round_ in range(4 * kills_wanted):
        if kills == kills_wanted:
            break
        there = content(config)
        if INDEX in there:  # done: more to do, so that the kill finds it at work
            for path in [*config.cache_dir.glob("shard-*.h5"), config.cache_dir / INDEX]:
                path.unlink()
            wanted += CLIPS
        worker = start(config, 0, 1, told)
        if round_ % 3:  # once a clip was encoded, or at the worst moment, when a part of a shard is there
            awaited, began = ".work/*.journal" if round_ % 3 == 1 else ".shard-*.part", time.monotonic()
            before = {p: p.stat().st_size for p in config.cache_dir.glob(awaited)}
            while time.monotonic() < began + 10 * whole_s and worker.is_alive():
                if any(size > before.get(p, 1000) for p, size in sizes(config.cache_dir, awaited).items()):
                    break
                time.sleep(0.0002)
        else:
            worker.join(float(rng.uniform(0, whole_s)))
        known = len(list((config.cache_dir / WORK).glob("*.journal")))
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
            kills += 1
            resumed += known > 0
        worker.join()
        for name, data in content(config).items():
            assert data == whole[name], name  # what is there under its name is whole
    assert kills == kills_wanted and resumed > kills // 6
    last = start(config, 0, 1, told)
    last.join(120)
    assert last.exitcode == 0 and content(config) == whole  # nothing lost
    assert not [p.name for p in config.cache_dir.iterdir() if p.name.startswith(".shard")]
    left = [p.name for p in (config.cache_dir / WORK).iterdir()]
    assert all(name.startswith(".") for name in left), left  # of a lease that was half taken: goes when it is old
    assert wanted <= len(keys_in(told)) <= wanted + kills
    keys = LatentCache(config.cache_dir).keys
    assert len(keys) == len(set(keys)) == CLIPS - 1


def sizes(folder: Path, pattern: str) -> dict[Path, int]:
    found = {}
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_size
    return found


def _encode_with_files_of_at_most(nbytes: int, config: Config) -> None:
    import resource

    torch.set_num_threads(1)
    sealed, commit, lock = isolate._sealed, encode.ShardWriter.commit, threading.Lock()

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def unlimited(num_bytes: int) -> int:  # memory that is shared with a decoder is a file too, but none of the disk's
        with lock:
            limit(resource.RLIM_INFINITY)
            try:
                return sealed(num_bytes)
            finally:
                limit(nbytes)

    def limited(writer: encode.ShardWriter) -> Path:
        with lock:
            return commit(writer)

    isolate._sealed, encode.ShardWriter.commit = unlimited, limited  # type: ignore[method-assign]
    limit(nbytes)
    try:
        encode.run(config, task(config))
    except DataError as error:
        (config.run_dir / "said").write_text(str(error)[:nbytes])


def test_a_disk_that_is_full_is_one_line_and_what_was_committed_is_kept(world: Path, whole: dict[str, bytes]) -> None:
    """The limit on a file's size stands for the disk's: the system refuses to write, amid a file."""
    config = prepared(world, "full_disk")
    encode.run(config, task(config))
    shards = sorted(config.cache_dir.glob("shard-*.h5"), key=lambda p: p.stat().st_size)
    for path in [*shards[2:], config.cache_dir / INDEX]:
        path.unlink()
    worker = multiprocessing.get_context("fork").Process(
        target=_encode_with_files_of_at_most, args=(shards[1].stat().st_size, config)
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    said = (config.run_dir / "said").read_text()
    assert "File too large" in said and "shard-" in said and "run again" in said and "\n" not in said
    there = content(config)
    assert INDEX not in there and {shards[0].name, shards[1].name} <= set(there)
    assert all(whole[name] == data for name, data in there.items())
    assert not list(config.cache_dir.glob(".shard*"))
    encode.run(config, task(config))
    assert content(config) == whole


def test_a_stop_between_clips_loses_none_and_goes_on_from_there(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "stopped")
    encoded = recorded(monkeypatch)
    looks = iter(range(100))
    with pytest.raises(Stopped, match="4 of 14 clips encoded"):
        encode.run(config, task(config, stop_requested=lambda: next(looks) == 4))
    assert len(list(config.cache_dir.glob("shard-*.h5"))) == 1
    encode.run(config, task(config))
    assert content(config) == whole and len(encoded) == len(set(encoded)) == CLIPS


def test_clips_in_a_journal_whose_files_have_moved_since_are_encoded_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "moved")
    looks = iter(range(100))
    with pytest.raises(Stopped, match="2 of 14 clips encoded"):
        encode.run(config, task(config, stop_requested=lambda: next(looks) == 2))
    (world / "elsewhere").symlink_to(world / "videos")
    rows = [replace(v, path=v.path.replace("/videos/", "/elsewhere/")) for v in usable(config)]
    write_manifest(config.run_dir / "manifest.parquet", rows)
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert len(encoded) == CLIPS
    assert all("/elsewhere/" in source for source in LatentCache(config.cache_dir).index.sources)


def test_clips_are_decoded_and_shards_written_while_the_vae_is_at_work(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "overlap")
    decoding = [threading.Event() for _ in range(CLIPS + 2)]
    encoding = [threading.Event() for _ in range(CLIPS + 3)]
    order: list[str] = []
    decode, encode_one, commit = encode.decode_by, encode._encode, encode.ShardWriter.commit

    def decodes(by: str, path: str, *rest: object) -> object:
        order.append(path)
        decoding[len(order) - 1].set()
        return decode(by, path, *rest)  # type: ignore[arg-type]

    def encodes(video: object, *rest: object) -> object:
        done = sum(e.is_set() for e in encoding)
        encoding[done].set()
        if done < CLIPS - 2:
            assert decoding[done + 1].wait(30), "the next clip is not decoded meanwhile"
        return encode_one(video, *rest)  # type: ignore[arg-type]

    def commits(writer: object) -> object:
        done = sum(e.is_set() for e in encoding)
        if done < CLIPS:
            assert encoding[done].wait(30), "the next shard is not made meanwhile"
        return commit(writer)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "decode_by", decodes)
    monkeypatch.setattr(encode, "_encode", encodes)
    monkeypatch.setattr(encode.ShardWriter, "commit", commits)
    encode.run(config, task(config))
    assert content(config) == whole


def test_a_shard_says_who_read_each_video(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By DALI in name alone: what it gives is test_dali's affair."""
    import h5py

    config = prepared(world, "readers", encode={"clips_per_shard": 3, "decoder": "dali"})
    decode = encode.decode_by

    def decodes(by: str, path: str, *rest: object) -> tuple[np.ndarray, str]:
        assert by == "dali"
        return decode("pyav", path, *rest)[0], "pyav" if "000001" in path else "dali"  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "decode_by", decodes)
    monkeypatch.setattr(encode.dali, "installed", lambda: True)
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    told = {}
    for path in config.cache_dir.glob("shard-*.h5"):
        with h5py.File(path) as f:
            told |= dict(zip(f["sources"].asstr(), f["decoders"].asstr(), strict=True))
    assert len(told) == CLIPS - 1 and {Path(s).name for s, by in told.items() if by == "pyav"} == {"000001.mp4"}
    assert any("12 clips decoded by dali, 1 clips decoded by pyav" in m for m in caplog.messages)
    assert LatentCache(config.cache_dir).info["decoder"] == "dali"
    with pytest.raises(DataError, match=r"field `decoder`"):
        encode.run(prepared(world, "readers"), task(config))
    with h5py.File(min(prepared(world, "whole").cache_dir.glob("shard-*.h5"))) as f:
        assert "decoders" not in f


def test_each_scene_of_a_video_is_a_sample(world: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = shots(tmp_path / "videos/film.mp4", (50, 60, 70))
    (tmp_path / "videos/film.txt").write_text("three shots")
    config = make_config(
        world, "scenes", prepare={"videos": str(tmp_path / "videos"), "scenes": {}}, encode={"clips_per_shard": 2}
    )
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, task(config))
    rows, cache = read_manifest(config.run_dir / "manifest.parquet"), LatentCache(config.cache_dir)
    assert [(v.start_s, v.end_s) for v in rows] == [(0, 6.25), (6.25, 13.75), (13.75, 22.5)]
    assert sorted(cache.keys) == sorted(v.key for v in rows) and set(cache.sources) == {str(path)}
    vae = load_vae(world / "vae")
    for video in rows:
        times = tuple(video.start_s + i / 8 for i in range(9))
        pixels = decode(path, ClipPlan((0.0, *times), 64, 64))[1:]  # the whole file is read
        z, _ = cache.read(cache.keys.index(video.key))
        assert torch.equal(z.float(), vae.encode(pixels).half().float()), video.start_s
    assert not verify(config.cache_dir).faults


def test_a_file_that_is_another_one_now_is_not_kept_under_the_key_of_the_first(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "videos", 6, seed=3)
    config = make_config(world, "others", prepare={"videos": str(tmp_path / "videos")})
    prepare.run(config, Task(config.run_dir, "prepare"))
    first, second, third, fourth = (tmp_path / f"videos/{i:06d}.mp4" for i in range(4))
    aside = Path(shutil.copytree(tmp_path / "videos", tmp_path / "aside"))
    os.utime(first, (1, 1))  # the same file, of another time, as a copy is
    second.write_bytes(third.read_bytes())
    third.write_bytes(third.read_bytes()[:-1] + b"?")  # of the same size
    fourth.unlink()
    encode.run(config, task(config))
    rejected = json.loads((config.cache_dir / "rejected.json").read_text())
    changed = "changed since prepare looked at it: run prepare and encode again"
    assert {Path(r["source"]).name: r["reason"] for r in rejected} == {
        "000001.mp4": changed, "000002.mp4": changed, "000003.mp4": "no such file"
    }  # fmt: skip
    for path in (second, third, fourth):
        shutil.copy(aside / path.name, path)
    again = retry(config.cache_dir)["clips"]
    assert {Path(clip["source"]).name for clip in again} == {path.name for path in (second, third, fourth)}
    encode.run(config, task(config))
    assert LatentCache(config.cache_dir).keys == [v.key for v in usable(config)] and len(usable(config)) == 6
    third.write_bytes(second.read_bytes())
    fourth.unlink()
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, task(config))
    assert LatentCache(config.cache_dir).keys == [v.key for v in usable(config)] and len(usable(config)) == 5


@pytest.mark.parametrize(("number", "times"), [(errno.ESTALE, 1), (errno.EIO, 2)])
def test_a_file_that_the_file_system_does_not_give_is_tried_twice_before_it_is_rejected(
    world: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    number: int,
    times: int,
) -> None:
    from sorahpc.cli import main

    config, real, opened = prepared(world, f"away{times}"), os.open, []

    def opens(path: object, *rest: object, **more: object) -> int:
        if str(path).endswith("000005.mp4"):
            opened.append(path)
            if len(opened) <= times:
                raise OSError(number, os.strerror(number), path)
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(encode, "RETRY_AFTER_S", 0.0)
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    lines = [r.getMessage() for r in caplog.records if "000005.mp4" in r.getMessage()]
    reason = f"000005.mp4: can't read: {os.strerror(number)}"
    assert f"{reason}; tried once more" in lines[0] and len(opened) == 2
    if times == 1:
        assert content(config) == whole and len(lines) == 1
        return
    rejected = json.loads((config.cache_dir / "rejected.json").read_text())
    assert [r["reason"] for r in rejected if "000005" in r["source"]] == [f"can't read: {os.strerror(number)}"]
    assert f"{reason} (tried twice)" in lines[1] and "cache complete: 12 samples, 2 clips rejected" in caplog.text
    assert f"1 of them for want of time or memory, or by the file system: `sorahpc cache retry {config.cache_dir}`" in (
        caplog.text
    )
    encode.run(config, task(config))
    assert len(opened) == 2  # nobody asked for it

    before = content(config)
    assert main(["cache", "retry", str(config.cache_dir)]) == 0
    assert f"{reason}\n{config.cache_dir}: 1 clips of 1 shards: run `sorahpc encode`" in capsys.readouterr().out
    (shard,) = set(before) - set(content(config))
    (journal,) = (config.cache_dir / WORK).iterdir()
    assert journal.name.startswith(shard.removesuffix("h5"))
    with pytest.raises(DataError, match=r"run `sorahpc encode` again"):
        LatentCache(config.cache_dir)
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert encoded == [v.key for v in usable(config) if "000005" in v.path] and len(opened) == 3
    assert content(config) == whole and list((config.cache_dir / WORK).iterdir()) == []
    assert main(["cache", "retry", str(config.cache_dir)]) == 0
    assert "no clip was rejected for want of time" in capsys.readouterr().out and content(config) == whole


def test_a_stop_before_the_second_try_rejects_nothing(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, opened = prepared(world, "stopped_before_retry"), os.open, []

    def opens(path: object, *rest: object, **more: object) -> int:
        if str(path).endswith("000000.mp4"):
            opened.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *rest, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opens)
        patch.setattr(encode, "RETRY_AFTER_S", 0.0)
        with pytest.raises(Stopped, match="before a clip was tried once more"):
            encode.run(config, task(config, stop_requested=lambda: bool(opened)))
    assert len(opened) == 1
    encode.run(config, task(config))
    assert content(config) == whole


# A decoder's process that is killed, as by a kernel out of memory, the first time that it is given a certain file.
KILLED = """
import os, sys
sys.path[:] = sys.argv[3:]
from sorahpc.data import child, isolate
real = child.serve

def serve(request, file, memory):
    if os.path.exists({first!r}) and os.pread(file.fileno(), 1 << 20, 0) == open({victim!r}, "rb").read():
        os.unlink({first!r})
        os.kill(os.getpid(), 9)
    return real(request, file, memory)

child.serve = serve
isolate.serve(*map(int, sys.argv[1:3]))
"""


def test_a_clip_whose_decoder_was_killed_for_want_of_memory_is_tried_once_more(
    world: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = prepared(world, "out_of_memory")
    first = tmp_path / "first"
    first.touch()
    # The first of all, since a decoder that has served others is followed by a fresh one before that is a reason.
    script = KILLED.format(first=str(first), victim=str(world / "videos/000000.mp4"))
    monkeypatch.setattr(isolate, "_START", script)
    monkeypatch.setattr(encode, "RETRY_AFTER_S", 0.0)
    isolate.end_all()
    try:
        encode.run(config, task(config))
    finally:
        isolate.end_all()
    assert content(config) == whole and not first.exists()
    assert "000000.mp4: decoder killed: " in caplog.text and "tried once more" in caplog.text


def test_what_is_done_is_counted_anew_when_a_shard_is_there_and_not_at_each_clip(tmp_path: Path) -> None:
    class Rows(list[int]):
        counted = 0

        def __len__(self) -> int:
            Rows.counted += 1
            return super().__len__()

    shards = [cache.PlannedShard(f"shard-{i:016x}.h5", Rows([2 * i, 2 * i + 1])) for i in range(9)]  # type: ignore[arg-type]
    (tmp_path / "cache.json").write_text("{}")
    made = claims.Claims(tmp_path, shards, shards[::2], lambda shard: None, lambda shard, record: None, "")  # type: ignore[arg-type,return-value]
    assert made.clips() == 0 and Rows.counted == 0
    for there, clips in ((1, 0), (2, 2), (4, 4)):
        (tmp_path / shards[there].name).touch()
        made.missing()
        assert [made.clips() for _ in range(50)] == [clips] * 50
    assert Rows.counted <= 5


def test_a_shard_that_is_taken_over_while_it_is_written_is_left_to_the_other(
    world: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, reads = prepared(world, "stale"), os.preadv, iter(range(10_000))

    def preadv(*args: object) -> int:
        if next(reads) == 3:  # what NFS says of a journal that the other has deleted
            for taken in (config.cache_dir / WORK).glob("*.lease"):
                taken.unlink()
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    encode.run(config, task(config))
    assert next(reads) > 3 and content(config) == whole


@pytest.mark.timeout(120)  # what waits for a FIFO waits for ever
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_has_a_name_of_ours_and_is_no_file_is_one_line_or_left_alone(
    world: Path, whole: dict[str, bytes], kind: str
) -> None:
    config = prepared(world, f"no_{kind}")
    encode.run(config, task(config))
    cache_dir, work = config.cache_dir, config.cache_dir / WORK
    shard = min(cache_dir.glob("shard-*.h5"))

    def put(path: Path) -> Path:
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
        return path

    def take_away(path: Path) -> None:
        path.rmdir() if path.is_dir() else path.unlink()

    def refused(error: type[Exception], line: str) -> None:
        with pytest.raises(error, match=line) as caught:
            encode.run(config, task(config))
        assert "\n" not in str(caught.value)

    shard.unlink()
    put(shard)
    refused(DataError, rf"{shard.name}: .*not a regular file: a {kind}")
    found = {fault.file: fault.what for fault in verify(cache_dir).faults}
    assert f"not a regular file: a {kind}" in found[shard.name]
    take_away(shard)
    what = "link" if kind == "device" else kind  # a lease is never one, wherever it leads
    lease_file = put(work / f"{shard.stem}.lease")
    refused(
        SetupError, rf"^{shard.name}: its lease .*{lease_file.name}: not a regular file: a {what}; remove it, and run"
    )
    take_away(lease_file)
    journal = put(work / f"{shard.stem}.{'b' * 32}.journal")
    refused(DataError, rf"{journal.name}: can't read the journal: not a regular file: a {kind}; .* and run again$")
    take_away(journal)
    left = [cache_dir / ".shard-0.h5.elsewhere.1.part", work / "notes", work / f".{shard.stem}.lease.x.stale"]
    for path in left:
        put(path)
        os.utime(path, (1, 1), follow_symlinks=False)
    encode.run(config, task(config))
    assert content(config) == whole and all(os.path.lexists(path) for path in left)
    put(work / f"{shard.stem}.{'c' * 32}.journal")  # of a shard that is there
    (cache_dir / "rejected.json").unlink()
    put(cache_dir / "rejected.json")
    (cache_dir / INDEX).unlink()
    put(cache_dir / INDEX)
    if kind == "folder":
        refused(DataError, r"index.parquet: can't write it or rejected.json: Is a directory; .* and run again")
    else:
        assert verify(cache_dir).faults
        encode.run(config, task(config))
        assert content(config) == whole


def test_a_journal_that_can_not_be_read_and_a_cache_that_is_gone_are_one_line(
    world: Path, whole: dict[str, bytes]
) -> None:
    config = prepared(world, "unreadable")
    work = config.cache_dir / WORK
    for name in whole:
        if name.startswith("shard-"):
            (work / f"{name.removesuffix('.h5')}.{'a' * 32}.journal").mkdir(parents=True)
    with pytest.raises(DataError, match=r"journal: can't read the journal: not a regular file: a folder; .* and run"):
        encode.run(config, task(config))
    shutil.rmtree(config.cache_dir)
    looks = iter(range(100))

    def move_away() -> bool:
        if next(looks) == 2:
            config.cache_dir.rename(config.cache_dir.with_name("elsewhere"))
        return False

    with pytest.raises(DataError, match=r"cache.*(No such file|run again)"):
        encode.run(config, task(config, stop_requested=move_away))


def test_a_shard_that_can_not_be_written_ends_the_job(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: object) -> None:
        raise DataError("no space left")

    config = prepared(world, "full")
    monkeypatch.setattr(encode.ShardWriter, "commit", full)
    with pytest.raises(DataError, match="no space left"):
        encode.run(config, task(config))
    assert not list(config.cache_dir.glob("shard-*"))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"clip": {"fps": 4, "max_frames": 9, "min_frames": 5, "max_area_px": 4096}}, "clip.fps"),
        ({"clip": {"fps": 8, "max_frames": 5, "min_frames": 5, "max_area_px": 4096}}, "clip.max_frames"),
        ({"encode": {"clips_per_shard": 3, "dtype": "bfloat16"}}, "dtype"),
        ({"model": {"depth": 1, "dim": 16, "num_heads": 2, "patch": [1, 2, 2]}}, "patch_hw"),
    ],
)
def test_other_settings_are_refused_by_field_and_change_nothing(
    world: Path, whole: dict[str, bytes], sections: dict, field: str
) -> None:
    config = prepared(world, "whole", **sections)
    with pytest.raises(DataError, match=rf"cache.json: field `{field}`: expected .*, found .*"):
        encode.run(config, task(config))
    assert content(config) == whole


def test_another_vae_or_text_encoder_is_refused_by_its_hash(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "vae").mkdir()
    state = load_file(world / "vae/diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.conv_s.bias"][0] += 1e-3
    save_file(state, tmp_path / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "vae/config.json").write_bytes((world / "vae/config.json").read_bytes())
    config = prepared(world, "whole", vae={"path": str(tmp_path / "vae")})
    with pytest.raises(DataError, match=r"field `vae.weights_sha256`: expected \"[0-9a-f]{64}\", found"):
        encode.run(config, task(config))
    make_tiny_t5(tmp_path / "t5", ["a red circle"], dim=16, seed=0)
    config = prepared(world, "whole", text={"path": str(tmp_path / "t5"), "max_tokens": 32})
    with pytest.raises(DataError, match=r"field `text.weights_sha256`"):
        encode.run(config, task(config))


def test_a_vae_of_the_same_weights_and_another_config_is_refused_but_by_a_cache_from_before_it_was_pinned(
    world: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(world / "vae", tmp_path / "vae")
    told = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**told, "resolution": 2 * told["resolution"]}))
    config = prepared(world, "whole", vae={"path": str(tmp_path / "vae")})
    with pytest.raises(DataError) as caught:
        encode.run(config, task(config))
    assert re.fullmatch(
        r"\S+/cache.json: field `vae.config_sha256`: expected \"[0-9a-f]{64}\", found \"[0-9a-f]{64}\"; use [^\n]*",
        str(caught.value),
    )
    assert content(config) == whole
    made = json.loads(whole[INFO])
    del made["vae"]["config_sha256"]
    for name, path in (("before", world / "vae"), ("before_other", tmp_path / "vae")):
        config = prepared(world, name, vae={"path": str(path)})
        config.cache_dir.mkdir(parents=True)
        (config.cache_dir / INFO).write_text(json.dumps(made))
        encode.run(config, task(config))
        assert json.loads((config.cache_dir / INFO).read_text()) == made and len(LatentCache(config.cache_dir)) == 13


def test_the_command_line_refuses_a_cache_of_another_vae_text_encoder_and_size_by_field_and_decodes_its_own(
    world: Path, whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from sorahpc.cli import main
    from sorahpc.configfile import dump_config

    config = prepared(world, "whole")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    key = LatentCache(config.cache_dir).keys[2]
    shutil.copytree(world / "vae", tmp_path / "vae")
    state = load_file(world / "vae/diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.conv_s.bias"][0] += 1e-3
    save_file(state, tmp_path / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    make_tiny_t5(tmp_path / "t5", ["a red circle"], dim=16, seed=0)
    other = [f"vae.path={tmp_path}/vae", f"text.path={tmp_path}/t5", "clip.max_area_px=2048"]
    assert main(["encode", str(tmp_path / "config.yaml"), *other]) == 4
    said = capfd.readouterr()
    for field in ("vae.weights_sha256", "text.weights_sha256", "clip.max_area_px"):
        assert f"cache.json: field `{field}`: expected" in said.out + said.err
    assert "Traceback" not in said.out + said.err and content(config) == whole

    show = ["cache", "show", str(config.cache_dir), key, "--out", str(tmp_path / "x.mp4"), "--json"]
    assert main([*show, "--vae", str(tmp_path / "vae")]) == 4
    assert "field `vae.weights_sha256`" in capfd.readouterr().err and not (tmp_path / "x.mp4").exists()
    assert main([*show, "--config", str(tmp_path / "config.yaml")]) == 0
    row = json.loads(capfd.readouterr().out)
    with av.open(str(tmp_path / "x.mp4")) as file:
        video = file.streams.video[0]
        size = (sum(1 for _ in file.decode(video)), video.height, video.width, video.average_rate)
    (_, _, h, w) = row["shape"]
    assert row["key"] == key and size == (row["frames"], 8 * h, 8 * w, 8)
    assert main(show) == 2 and main([*show[:3], "f" * 16, "--vae", str(world / "vae")]) == 4
    assert "no sample ffffffffffffffff among 13" in capfd.readouterr().err


def test_if_no_clip_can_be_encoded_the_job_fails_and_names_them(world: Path) -> None:
    config = prepared(world, "none", clip={"fps": 8, "max_frames": 97, "min_frames": 97, "max_area_px": 4096})
    with pytest.raises(DataError, match=r"none of 14 clips could be encoded: .*000000.mp4: too short"):
        encode.run(config, task(config))


def test_no_manifest_or_no_models_is_one_line(world: Path) -> None:
    config = make_config(world, "empty")
    with pytest.raises(DataError, match="sorahpc prepare"):
        encode.run(config, task(config))
    config = prepared(world, "novae", vae={"path": str(world / "nowhere")})
    with pytest.raises(ConfigError, match=r"^vae.path: no folder"):
        encode.run(config, task(config))


def test_the_manifest_may_grow_and_only_the_last_shard_is_made_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(world, "grown")
    videos = read_manifest(config.run_dir / "manifest.parquet")
    ok = [v for v in videos if v.ok]
    write_manifest(config.run_dir / "manifest.parquet", ok[:7])
    encode.run(config, task(config))
    assert len(LatentCache(config.cache_dir)) == 6  # one of the seven is the broken one
    write_manifest(config.run_dir / "manifest.parquet", ok)
    encoded = recorded(monkeypatch)
    encode.run(config, task(config))
    assert encoded == [v.key for v in ok[6:]]
    assert LatentCache(config.cache_dir).keys == [v.key for v in ok if "000003" not in v.path]


def test_a_video_that_becomes_usable_in_the_middle_makes_only_its_own_shard_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_world(tmp_path / "videos", 9, seed=2)
    late = tmp_path / "videos/000004.txt"
    words = late.read_text()
    late.unlink()
    config = make_config(world, "middle", prepare={"videos": str(tmp_path / "videos")})
    prepare.run(config, Task(config.run_dir, "prepare"))
    encode.run(config, task(config))
    before = content(config)
    late.write_text(words)
    prepare.run(config, Task(config.run_dir, "prepare"))
    encoded = recorded(monkeypatch)
    with caplog.at_level(logging.INFO):
        encode.run(config, task(config))
    keys = [v.key for v in read_manifest(config.run_dir / "manifest.parquet")]
    assert encoded == keys[3:6]
    assert LatentCache(config.cache_dir).keys == keys
    shards = {name: data for name, data in before.items() if name.startswith("shard-")}
    assert len(shards) == 3 and shards.items() <= content(config).items()  # what was there is left alone
    assert [m for m in caplog.messages if "not of this manifest" in m] == [
        f"1 shards in {config.cache_dir} are not of this manifest; left alone, no longer read"
    ]


@pytest.mark.gpu
def test_on_cuda_in_bfloat16_the_latents_are_near_those_of_the_cpu(world: Path, whole: dict[str, bytes]) -> None:
    config = prepared(world, "cuda", vae={"path": str(world / "vae"), "dtype": "bfloat16"})
    encode.run(config, task(config))
    here, there = LatentCache(config.cache_dir), LatentCache(prepared(world, "whole").cache_dir)
    assert here.keys == there.keys
    for i in range(len(here)):
        a, b = here.read(i)[0], there.read(i)[0]
        assert (a - b).abs().max() < 0.1 * b.abs().max()
