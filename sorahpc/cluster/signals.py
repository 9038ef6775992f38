"""Signals set a flag; the job looks at it between steps. Nothing else ever happens in a handler.

USR2 comes ahead of the time limit, TERM on preemption, cancel and node shutdown, INT from a terminal. USR1 is left
alone: libraries use it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """A flag that the stop signals raise. Call it to read it.

    A second INT raises KeyboardInterrupt: a person at a terminal can always leave.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def _set(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def install(self) -> StopFlag:
        """Take the stop signals over. Main thread only."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._set)
        return self

    def restore(self) -> None:
        """Give the stop signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}


def ignore_stop_signals() -> None:
    """From here to the end of the process no stop signal counts.

    When the first rank of a gang leaves with 10, srun sends TERM to the others; one that is already tearing down
    would die by it, and the job's exit code would be 143 in place of 10.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as `parent`, which started it, is gone. Linux.

    Raises:
        SystemExit: `parent` was gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died between the start of this process and the call above
        raise SystemExit(1)


def die_after(process: int) -> None:
    """As `die_with`, for a process that need not be the parent: a thread waits for its end and kills this one. Linux.

    Raises:
        SystemExit: it was gone already.
    """
    try:
        end = os.pidfd_open(process)
    except ProcessLookupError:
        raise SystemExit(1) from None

    def wait() -> None:
        select.select([end], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="launcher's end", daemon=True).start()
