"""Child processes that look into files of others, so that what such a file does to a decoder costs that file alone.

A decoder that a file makes crash, hang or eat memory can't be held by an exception. So files are read in children that
live long and serve many: starting one costs 0.3 s, asking it 0.1 ms. A child gets an open file, never a name, and
gives back numbers or a reason as JSON, never a pickle, and frames through shared memory. It can write no file over
64 kB, has a bound on its memory, and inherits neither the environment nor the stop signals of its parent; it dies with
its parent. That bounds accidents. It is no sandbox for code that has taken a child over.

The verdict about a file does not depend on the files before it: whatever a used child can't do is asked of a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

import numpy as np

from sorahpc.errors import SetupError

log = logging.getLogger(__name__)

MAX_MEMORY_BYTES = 2 << 30  # of a child. The largest real thing, 16 references of 8K in 10 bits, is 1.6 GB
# In which a child that gets on has read of its file: 64 kB at a time are a minute's work or two at the most. Without it
# a hang late in a film would have the days that the whole film may take.
STALLED_S = 600.0
_LOOK_S = 10.0
START_S = 120.0  # for a child to start: 0.3 s, or much longer from a shared file system that is busy
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_MAX_ANSWER_BYTES = 1 << 16
_MAX_STDERR_BYTES = 1 << 16
# Those of MPS too: where it shares a GPU among processes, one that doesn't find it gets no place there.
_ENVIRONMENT = (
    "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_MPS_LOG_DIRECTORY", "TZ",
)  # fmt: skip
# Without site: no .pth file and no sitecustomize of the environment, and half the time to start.
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from sorahpc.data import isolate; isolate.serve(*map(int, sys.argv[1:3]))"
)


class Failed(Exception):
    """The child did not answer as it should; its text is the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# the parent's side


class _Child:
    """A child and the memory that it shares. One caller at a time."""

    def __init__(self) -> None:
        self.used = False
        self.memory: mmap.mmap | None = None
        self.stderr = tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        self.socket = ours
        command = [sys.executable, "-I", "-S", "-B", "-c", _START, str(theirs.fileno()), str(MAX_MEMORY_BYTES)]
        env = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # A scheduler sends its stop signals to every process of a task. Here they must not end a decoder, whose file
        # would be blamed. A new process inherits what is blocked, so that it is so from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            self.process = subprocess.Popen(
                [*command, *(os.path.abspath(p) for p in sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
                env=env,
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            ours.close()
            self.stderr.close()
            raise SetupError(f"decoder: can't start {sys.executable}: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        _all.add(self)
        try:
            self._answer(START_S)
        except Failed as error:
            said = self.said()
            self.end()
            raise SetupError(
                f"decoder: its process can't start: {error}{said and ': ' + said}; try `sorahpc doctor`"
            ) from None
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], file: IO[bytes], deadline_s: float, num_bytes: int = 0) -> dict[str, Any]:
        """Have a request served.

        Args:
            request: `what`, and its arguments. file: what to look into.
            deadline_s: how long it may take; STALLED_S without reading on of the file end it before.
            num_bytes: how much memory is shared; afterwards `memory` holds at least so much.

        Raises:
            Failed: crashed, took too long, or needed too much memory. The child is then of no more use.
        """
        handles = [file.fileno()]
        shared = -1
        try:
            if num_bytes and (self.memory is None or len(self.memory) < num_bytes):
                shared = _sealed(num_bytes)
                self.memory = mmap.mmap(shared, num_bytes)
                handles.append(shared)
            data = json.dumps(request).encode()
            try:
                self.socket.settimeout(deadline_s)
                socket.send_fds(self.socket, [struct.pack("<I", len(data))], handles)
                self.socket.sendall(data)
            except OSError as error:  # dead between two files
                raise Failed(self._death()) from error
        finally:
            if shared >= 0:
                os.close(shared)
        answer = self._answer(deadline_s, file.fileno())
        self.used = True
        if answer.get("memory"):
            raise Failed(f"needs more than {MAX_MEMORY_BYTES / (1 << 30):.2g} GB of memory to read")
        return answer

    def _answer(self, deadline_s: float, fd: int | None = None) -> dict[str, Any]:
        now = since = time.monotonic()
        end, place = now + deadline_s, -1
        data = b""
        while not data.endswith(b"\n"):
            now = time.monotonic()
            if fd is not None and (at := os.lseek(fd, 0, os.SEEK_CUR)) != place:  # the child's place too: one open file
                place, since = at, now
            if len(data) > _MAX_ANSWER_BYTES:
                raise Failed("decoder crashed: endless answer")
            if now >= end:
                raise Failed(f"took longer than {deadline_s:.3g} s")
            if fd is not None and now >= since + STALLED_S:
                raise Failed(f"took longer than {STALLED_S:.3g} s at byte {place} of the file")
            self.socket.settimeout(min(end - now, _LOOK_S, STALLED_S))
            try:
                part = self.socket.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                part = b""
            if not part:
                raise Failed(self._death())
            data += part
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Failed("decoder crashed: not an answer")
        return answer

    def _death(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "decoder crashed: it stopped answering"
        if code == -signal.SIGKILL:
            return "decoder killed: from outside, or since the machine or the job ran out of memory"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"decoder crashed: {signal.Signals(-code).name}"
        return f"decoder crashed: exit code {code}"

    def said(self) -> str:
        """The last line on its stderr, at most 200 characters."""
        self.stderr.seek(0)
        lines = self.stderr.read(_MAX_STDERR_BYTES).decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")[:200]
        return "".join(c if c.isprintable() else " " for c in last).strip()

    def end(self) -> None:
        _all.discard(self)
        self.socket.close()
        self.process.kill()
        self.process.wait()
        self.stderr.close()

    def forget(self) -> None:
        """After a fork: it is the parent's."""
        self.socket.close()
        self.process.returncode = 0  # it must not be waited for
        self.stderr.close()


def _sealed(num_bytes: int) -> int:
    """Memory with a file descriptor, of a size that a child can't change under its parent. Raises SetupError."""
    fd = os.memfd_create("sorahpc-clip", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
    except OSError as error:  # a bound on the size of files or of memory
        os.close(fd)
        raise SetupError(
            f"decoder: can't share {num_bytes} bytes of memory with it: {error.strerror}; see `ulimit -a`"
        ) from None
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


_all: set[_Child] = set()  # children of this process
_idle: list[_Child] = []  # those that nobody is using; together as many as ever were used at a time


def ask(
    request: dict[str, Any], file: IO[bytes], deadline_s: float, num_bytes: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """Have a request about a file served by a child that nobody uses, or a new one. Any thread may ask.

    Returns:
        the answer (see `child.serve`), and the first `num_bytes` of what it wrote, uint8, empty if it wrote nothing.

    Raises:
        Failed: a fresh child too crashed on it, took too long or needed too much memory.
        SetupError: no child could be started.
    """
    try:
        child = _idle.pop()
    except IndexError:
        child = _Child()
    try:
        try:
            answer = child.ask(request, file, deadline_s, num_bytes)
        except Failed as error:
            if not child.used:
                raise
            log.info("a decoder that had served other files: %s; asking a fresh one", error)
            child.end()
            child = _Child()
            answer = child.ask(request, file, deadline_s, num_bytes)
        # A copy, 0.1 ms/MB: the memory serves the next clip, and a child could still write into it.
        written = np.frombuffer(child.memory or b"", np.uint8, num_bytes if "done" in answer else 0).copy()
    except BaseException:  # an interrupt too: what the child is doing is then unknown
        child.end()
        raise
    if answer.get("last"):
        child.end()
    else:
        _idle.append(child)
    return answer, written


@atexit.register
def end_all() -> None:
    """End the idle children; the next request starts one."""
    while _idle:
        _idle.pop().end()


def _after_fork() -> None:
    _idle.clear()
    while _all:
        _all.pop().forget()


os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------------------------------------------------------------
# the child's side


def serve(fd: int, max_memory_bytes: int) -> None:
    """Serve requests until the parent is gone. The whole life of a child."""
    from sorahpc.data import child

    connection = socket.socket(fileno=fd)
    # While a file is read, the end of the parent is a SIGIO, which ends this process. From the kernel: a decoder may
    # never give the interpreter back. (PR_SET_PDEATHSIG would come at the end of the parent's thread.)
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(connection, fcntl.F_GETFL)
    for limit, value in [
        (resource.RLIMIT_DATA, max_memory_bytes),
        (resource.RLIMIT_FSIZE, _MAX_STDERR_BYTES),
        (resource.RLIMIT_CORE, 0),  # gigabytes, for each file that crashes
    ]:
        allowed = resource.getrlimit(limit)[1]
        value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        resource.setrlimit(limit, (value, value))
    memory: mmap.mmap | None = None
    answer: dict[str, Any] = {"ready": True}
    while True:
        connection.sendall(json.dumps(answer).encode() + b"\n")
        size, handles, _, _ = socket.recv_fds(connection, 4, 2)
        if len(size) < 4:
            return
        left = struct.unpack("<I", size)[0]
        data = b""
        while len(data) < left:
            part = connection.recv(left - len(data))
            if not part:
                return
            data += part
        request = json.loads(data)
        fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC)
        if len(handles) > 1:
            memory = mmap.mmap(handles[1], 0)
            os.close(handles[1])
        with os.fdopen(handles[0], "rb") as file:
            try:
                answer = child.serve(request, file, memory)
            except MemoryError:
                answer = {"memory": True}
        fcntl.fcntl(connection, fcntl.F_SETFL, flags)
