"""Logging of a task, and the progress display of whoever launched it. No torch.

A task logs one line an event, UTC, to ``log/rank<k>.log`` (appended, so that restarts follow each other) and to stderr.
Progress is not logged: tasks keep it in their status files, and the launching process shows these, in the same way for
tasks of this process, of this machine and of a cluster.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sorahpc.runs import JobFolder, summarize

POLL_S = 0.5
LINE_EVERY_S = 5.0  # where there is no terminal; grows to a minute, so that a week's log stays small


class _Line(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO rank0 sorahpc.jobs.train: text`; a traceback follows only where asked for."""

    converter = staticmethod(time.gmtime)

    def __init__(self, rank: int, tracebacks: bool):
        super().__init__(f"%(asctime)sZ %(levelname)s rank{rank} %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.tracebacks = tracebacks

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")

    def formatException(self, exc_info: Any) -> str:
        return super().formatException(exc_info) if self.tracebacks else ""

    def format(self, record: logging.LogRecord) -> str:
        if self.tracebacks:
            return super().format(record)
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        return self.formatMessage(record)


@contextlib.contextmanager
def task_logging(path: Path, rank: int, *, stderr: bool) -> Iterator[None]:
    """Log everything of this process to `path`, and to stderr where asked for, until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path, mode="a", encoding="utf-8")]
    handlers[0].setFormatter(_Line(rank, tracebacks=True))
    if stderr:
        handlers.append(logging.StreamHandler())
        handlers[1].setFormatter(_Line(rank, tracebacks=False))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def duration(seconds: float | None) -> str:
    """`1 h 02 min`, `3 min 05 s`, `12 s`; `-` for None."""
    if seconds is None:
        return "-"
    s = round(seconds)
    if s >= 86400:
        return f"{s // 86400} d {s % 86400 // 3600:02d} h"
    if s >= 3600:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 60} min {s % 60:02d} s" if s >= 60 else f"{s} s"


def number(value: float | str) -> str:
    """Four significant digits; whole numbers in full."""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def progress_line(job: str, summary: dict[str, Any]) -> str:
    """`train: 120/500 step (24 %), 3.1 step/s, 2 min 03 s left, loss=0.41`."""
    done, total, unit = summary["done"], summary["total"], summary["unit"]
    if total is None:
        return f"{job}: starting"
    percent = f" ({100 * done / total:.0f} %)" if total else ""
    parts = [f"{job}: {number(done)}/{number(total)} {unit}{percent}"]
    if summary["rate"]:
        parts += [f"{number(summary['rate'])} {unit}/s", f"{duration(summary['eta_s'])} left"]
    return ", ".join([*parts, *(f"{k}={number(v)}" for k, v in summary["metrics"].items())])


class Progress:
    """Shows a job's status files while the block runs: a bar on a terminal, else a line every few seconds.

    Args:
        folder: the job's folder.
        stream: where to (stderr, so that stdout stays for results).
    """

    def __init__(self, folder: JobFolder, stream: TextIO | None = None):
        self.folder = folder
        self.stream = stream or sys.stderr
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._last = ""

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        # A display must never end the work it shows: a closed terminal or pipe ends the display alone.
        with contextlib.suppress(OSError, ValueError):
            self._bar() if self.stream.isatty() else self._lines()

    def _line(self) -> None:
        line = progress_line(self.folder.job, summarize(self.folder.statuses()))
        if line != self._last:
            print(line, file=self.stream, flush=True)
        self._last = line

    def _lines(self) -> None:
        while not self._end.wait(min(60.0, max(LINE_EVERY_S, (time.monotonic() - self._start) / 30))):
            self._line()
        self._line()

    def _bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        text = TextColumn("{task.fields[text]}", markup=False)
        console = Console(file=self.stream)
        with RichProgress(BarColumn(), TimeElapsedColumn(), text, console=console, refresh_per_second=4) as bar:
            row = bar.add_task("", total=None, text=f"{self.folder.job}: starting")
            while True:
                ended = self._end.wait(POLL_S)
                summary = summarize(self.folder.statuses())
                bar.update(
                    row,
                    total=summary["total"],
                    completed=summary["done"] or 0,
                    text=progress_line(self.folder.job, summary),
                )
                if ended:
                    return
