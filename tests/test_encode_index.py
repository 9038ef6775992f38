"""encode: the index is built by one task of a launch, whoever is killed or waits, and is of this run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
from encode_jobs import CLIPS, Clock, content, encode_whole, prepared, start, task, write_broken_world

from sorahpc import lease
from sorahpc.data import indexing
from sorahpc.data.cache import INDEX
from sorahpc.data.claims import WORK
from sorahpc.data.maintenance import repair
from sorahpc.data.manifest import read_manifest, write_manifest
from sorahpc.errors import DataError, Stopped
from sorahpc.jobs import encode


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_broken_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    return encode_whole(world)


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
    dropped = [m for m in caplog.messages if "were in it, and are left alone" in m]
    assert len(dropped) == 1 and dropped[0].startswith(f"{tmp_path}/{INDEX}: 4 shards of another run or of a merge")
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


def test_an_encode_that_did_not_end_leaves_the_run_knowing_its_index_from_anothers(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine, other = (
        prepared(world, f"unended_{i}", encode={"clips_per_shard": 3, "cache": str(tmp_path)}) for i in (0, 1)
    )
    rows = read_manifest(mine.run_dir / "manifest.parquet")
    write_manifest(mine.run_dir / "manifest.parquet", rows[6:])
    write_manifest(other.run_dir / "manifest.parquet", rows[:6])
    encode.run(other, task(other))
    assert len(indexing.open_cache(mine)) == 5  # of its own it has encoded nothing: a cache that it was given
    real = indexing.build_index
    for told, grown in (("first", rows[6:12]), ("topped_up", rows[6:])):
        write_manifest(mine.run_dir / "manifest.parquet", grown)
        encode.run(other, task(other))
        monkeypatch.setattr(indexing, "build_index", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        killed = start(mine, 0, 1, tmp_path / told)
        killed.join(60)
        assert killed.exitcode == -signal.SIGKILL
        with pytest.raises(DataError, match=f"{INDEX}: expected the 2 shards of this .* found 2, 2 of them of others"):
            indexing.open_cache(mine)
        monkeypatch.setattr(indexing, "build_index", real)
        encode.run(mine, task(mine))
        assert not set(indexing.open_cache(mine).keys) & {row.key for row in rows[:6]}


def test_an_index_that_a_top_up_could_not_write_leaves_the_one_before_in_use(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = prepared(world, "not_topped_up")
    rows = read_manifest(config.run_dir / "manifest.parquet")
    write_manifest(config.run_dir / "manifest.parquet", rows[:4])
    encode.run(config, task(config))
    write_manifest(config.run_dir / "manifest.parquet", rows)  # its second shard replaces the one of a single clip

    def full(*args: object) -> None:
        raise DataError("No space left on device")

    monkeypatch.setattr(indexing, "build_index", full)
    with pytest.raises(DataError, match="No space left"):
        encode.run(config, task(config))
    assert len(indexing.open_cache(config)) == 3 and "are not in it" not in caplog.text
