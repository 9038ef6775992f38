"""encode: what the disk, the memory or a file system fails to give is one line, and costs no more than it must."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_jobs import CLIPS, content, encode_whole, make_config, prepared, recorded, task, usable, write_broken_world

from sorahpc.config import Config
from sorahpc.data import isolate
from sorahpc.data.cache import INDEX
from sorahpc.data.claims import WORK
from sorahpc.data.latents import LatentCache
from sorahpc.data.maintenance import retry, verify
from sorahpc.data.toyworld import write_world
from sorahpc.errors import DataError, SetupError, Stopped
from sorahpc.jobs import encode, prepare
from sorahpc.models.vae import Vae
from sorahpc.runs import Task


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_broken_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    return encode_whole(world)


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
    left = [cache_dir / ".shard-0.h5.elsewhere.1.1.part", work / "notes", work / f".{shard.stem}.lease.x.stale"]
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
