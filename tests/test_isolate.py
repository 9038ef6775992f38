"""Files that crash, hang or bloat a decoder cost themselves alone, and no decoder outlives who asked it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from videos import numbered, write_video

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data import decode as decode_module
from sorahpc.data import isolate
from sorahpc.data.decode import ClipPlan, VideoError, decode, may_pass, probe
from sorahpc.data.manifest import read_manifest
from sorahpc.errors import SetupError
from sorahpc.jobs import prepare
from sorahpc.runs import Task

PLAN = ClipPlan((0.0, 0.5, 1.0), 64, 64)

# What a child does on a file that begins with these bytes, in place of reading it: what decoders have done in the wild.
FAULTY = """
import ctypes, os, sys, time
sys.path[:] = sys.argv[3:]
from sorahpc.data import child, isolate
real, served = child.serve, []

def bomb():
    held = []
    while True:
        held.append(bytearray(1 << 24))

def slowly():
    for _ in range(25):
        time.sleep(0.1)
        os.lseek(reading, 1, os.SEEK_CUR)

faults = {
    b"segfault": lambda: ctypes.string_at(0),
    b"abort": os.abort,
    b"exit": lambda: os._exit(3),
    b"hang": lambda: time.sleep(1000),
    b"holds": lambda: ctypes.PyDLL(None).sleep(1000),  # and never gives the interpreter back
    b"slow": slowly,
    b"bomb": bomb,
    b"bug": lambda: {}["of ours"],
    b"second": lambda: os.abort() if served[1:] else None,  # as after a heap that another file has broken
    b"stops": lambda: [os.kill(os.getpid(), n) for n in (2, 15, 12, 1)],
    b"writes": lambda: os.write(os.open("/tmp", os.O_TMPFILE | os.O_WRONLY), bytes(1 << 20)) < 1 << 20 and 1 / 0,
    b"chatty": lambda: os.write(2, b"x" * (1 << 22)),
}

def serve(request, file, memory):
    global reading
    reading = file.fileno()
    served.append(1)
    head = os.pread(file.fileno(), 64, 0).split(b"!")[0]
    try:
        if head in faults:
            faults[head]()
            found = dict(frames=1, fps=8.0, width=64, height=64, codec="x", duration_s=1.0)
            return {"found": found, "done": True, "by": "nobody"}
    except MemoryError:
        raise
    except Exception as error:
        child.decode = child.probe = lambda *_, error=error: (_ for _ in ()).throw(error)
    return real(request, file, memory)

child.serve = serve
isolate.serve(*map(int, sys.argv[1:3]))
"""


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    isolate.end_all()
    yield
    isolate.end_all()
    assert not isolate._all


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_START", FAULTY)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_video(tmp_path / "good.mp4", numbered(9))


def fault(folder: Path, name: str) -> Path:
    path = folder / f"{name}.mp4"
    path.write_bytes(name.encode() + b"!" + bytes(100))
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("segfault", "decoder crashed: SIGSEGV"),
        ("abort", "decoder crashed: SIGABRT"),
        ("exit", "decoder crashed: exit code 3"),
        ("hang", "took longer than 0.2 s"),
        ("holds", "took longer than 0.2 s"),
        ("bomb", "needs more than 0.25 GB of memory to read"),
        ("bug", "unexpected: KeyError: 'of ours'"),
        ("writes", "unexpected: ZeroDivisionError: division by zero"),
    ],
)
def test_a_crash_a_hang_and_a_bomb_are_reasons_and_the_next_file_is_read(
    tmp_path: Path, good: Path, faulty: None, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setattr(isolate, "MAX_MEMORY_BYTES", 1 << 28)  # the usual 2 GB take a second to fill
    bad = fault(tmp_path, name)
    expected = decode(good, PLAN)
    for use in (probe, lambda path: decode(path, PLAN)):
        with pytest.raises(VideoError) as caught, monkeypatch.context() as patch:
            if reason.startswith("took"):
                patch.setattr(decode_module, "PATIENCE_S", 0.2)
                patch.setattr(decode_module, "DECODE_S_PER_S", 0.0)
            use(bad)
        assert caught.value.reason == reason and str(caught.value) == f"{bad}: {reason}"
        assert may_pass(reason) == (name in ("hang", "holds", "bomb"))
        start = time.monotonic()
        isolate.end_all() if name in ("bug", "writes") else None  # which live on, as the stub left them
        assert (decode(good, PLAN) == expected).all()
        assert time.monotonic() - start < decode_module.PATIENCE_S, "it waited for what the bad file was given"


def test_the_verdict_on_a_file_does_not_depend_on_those_before_it(tmp_path: Path, good: Path, faulty: None) -> None:
    probe(good)
    child = isolate._idle[0]
    assert probe(fault(tmp_path, "second")).frames == 1  # crashed the used child, not the fresh one
    assert child.process.returncode == -signal.SIGABRT


def test_stop_signals_sent_to_every_process_and_floods_of_words_end_no_decoder(tmp_path: Path, faulty: None) -> None:
    assert probe(fault(tmp_path, "stops")).frames == 1
    assert probe(fault(tmp_path, "chatty")).frames == 1
    assert os.fstat(isolate._idle[0].stderr.fileno()).st_size <= 1 << 16


def test_a_child_has_no_torch_no_environment_and_no_handles_of_ours(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with open(good, "rb"):
        probe(good)
        (child,) = isolate._idle
        proc = Path(f"/proc/{child.process.pid}")
        assert b"secret" not in (proc / "environ").read_bytes()
        assert not any(name in (proc / "maps").read_text() for name in ("libtorch", "pyarrow", "pydantic"))
        handles = {os.readlink(f) for f in (proc / "fd").iterdir()}
        assert len(handles) <= 4 and not any("good.mp4" in h for h in handles), handles
        limits = (proc / "limits").read_text()
        assert f"Max data size             {isolate.MAX_MEMORY_BYTES}" in limits


def test_a_real_file_that_needs_more_memory_than_there_is_costs_itself_alone(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = write_video(
        tmp_path / "large.mkv", np.zeros((2, 2160, 3840, 3), np.uint8), codec="mjpeg", pix_fmt="yuvj444p"
    )
    wish = ClipPlan((0.0,), 2160, 3840)
    assert decode(large, wish).shape == (1, 2160, 3840, 3)
    isolate.end_all()
    assert probe(good).frames == 9
    status = Path(f"/proc/{isolate._idle[0].process.pid}/status").read_text()
    idle_kb = int(status.split("VmData:")[1].split()[0])
    reasons = set()
    for more_mb in (16, 40):
        isolate.end_all()
        monkeypatch.setattr(isolate, "MAX_MEMORY_BYTES", (idle_kb << 10) + (more_mb << 20))
        with pytest.raises(VideoError) as caught:
            decode(large, wish)
        reasons.add(caught.value.reason[:14])
        assert probe(good).frames == 9
    assert "needs more tha" in reasons and "corrupt: after" not in reasons, reasons


ORPHAN = """
import sys
from sorahpc.data import isolate
from sorahpc.data.decode import probe
isolate._START = sys.argv[2]
child = isolate._Child()
isolate._idle.append(child)
print(child.process.pid, flush=True)
if sys.argv[1] != "idle":
    probe(sys.argv[1])
else:
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["hang", "holds"])
def test_a_hang_late_in_a_film_ends_long_before_the_film_would(
    tmp_path: Path, faulty: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(isolate, "STALLED_S", 1.5)
    plan = ClipPlan((7000.0, 7001.0), 64, 64)
    start = time.monotonic()
    with pytest.raises(VideoError) as caught:
        decode(fault(tmp_path, name), plan)
    assert caught.value.reason == "took longer than 1.5 s at byte 0 of the file" and may_pass(caught.value.reason)
    assert 1.5 <= time.monotonic() - start < 60
    assert decode(fault(tmp_path, "slow"), plan).shape == (2, 64, 64, 3)  # 2.5 s, and it reads on


@pytest.mark.parametrize("name", ["idle", "hang", "holds"])
def test_a_child_does_not_outlive_its_parent(tmp_path: Path, name: str) -> None:
    doing = name if name == "idle" else str(fault(tmp_path, name))
    command = [sys.executable, "-c", ORPHAN, doing, FAULTY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)  # until it is at it
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
        parent.wait()
        end = time.monotonic() + 5
        while time.monotonic() < end and _alive(pid):
            time.sleep(0.02)
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # init may be slow to reap
    except OSError:
        return False


def test_the_thread_that_started_a_child_may_end_and_a_fork_starts_its_own(good: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        expected = pool.submit(decode, good, PLAN).result()
    (child,) = isolate._idle
    assert (decode(good, PLAN) == expected).all() and isolate._idle == [child]
    pid = os.fork()
    if not pid:
        same = (decode(good, PLAN) == expected).all() and isolate._idle[0].process.pid != child.process.pid
        isolate.end_all()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (decode(good, PLAN) == expected).all() and isolate._idle == [child]


def test_a_child_that_can_not_start_is_no_fault_of_the_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_START", "raise ImportError('no such\\nthing')")
    with pytest.raises(
        SetupError, match=r"^decoder: its process can't start: decoder crashed: exit code 1: thing; try"
    ):
        probe(good)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SetupError, match=r"^decoder: can't start /nowhere/python: No such file or directory$"):
        probe(good)


def test_a_child_that_dies_between_two_files_is_replaced(good: Path) -> None:
    expected = decode(good, PLAN)
    isolate._idle[0].process.kill()
    isolate._idle[0].process.wait()
    assert (decode(good, PLAN) == expected).all()


def config_for(videos: Path, cpus: int) -> Config:
    section = {"videos": str(videos), "resources": {"cpus_per_task": cpus}}
    return parse_config({"run": "r", "runs_dir": str(videos.parent / "runs"), "prepare": section})


def test_prepare_rejects_them_with_their_reasons_and_keeps_the_others(
    tmp_path: Path, good: Path, faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolate, "MAX_MEMORY_BYTES", 1 << 28)
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "good.mp4").write_bytes(good.read_bytes())
    for name in ("segfault", "abort", "bomb"):
        fault(videos, name)
    for path in list(videos.iterdir()):
        path.with_suffix(".txt").write_text("a caption")
    config = config_for(videos, cpus=3)
    prepare.run(config, Task(config.run_dir, "prepare"))
    rows = {Path(v.path).stem: v.reason for v in read_manifest(config.run_dir / "manifest.parquet")}
    assert rows == {
        "abort": "decoder crashed: SIGABRT",
        "bomb": "needs more than 0.25 GB of memory to read",
        "good": "",
        "segfault": "decoder crashed: SIGSEGV",
    }


def test_prepare_blames_no_file_where_no_decoder_starts(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good.with_suffix(".txt").write_text("a caption")
    monkeypatch.setattr(isolate, "_START", "raise ImportError('none')")
    config = config_for(tmp_path, cpus=1)
    with pytest.raises(SetupError, match="decoder: its process can't start"):
        prepare.run(config, Task(config.run_dir, "prepare"))
    assert not (config.run_dir / "manifest.parquet").exists()
