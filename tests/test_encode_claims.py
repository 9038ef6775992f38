"""encode: tasks that share a cache, are killed or sleep make the same bytes as one, and no clip twice."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from encode_jobs import CLIPS, Clock, content, encode_whole, prepared, start, task, usable, write_broken_world

from sorahpc import lease
from sorahpc.config import Config
from sorahpc.data import cache, claims, leftovers
from sorahpc.data.cache import INDEX
from sorahpc.data.claims import WORK
from sorahpc.data.latents import LatentCache
from sorahpc.errors import SetupError
from sorahpc.jobs import encode


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_broken_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    return encode_whole(world)


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
