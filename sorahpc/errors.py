"""Errors that reach the user as one line, each with the exit code of its kind.

Raise one of these for anything a user or a cluster can cause; use ``assert`` for our own bugs. The message says what
is wrong, where (dotted key, file or sample), what was expected, what was found, and what to do next, on one line a
fault. The command line prints it without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations


class SoraHPCError(Exception):
    """Base of all expected failures. Never raised itself: exit code 1 means a bug of ours."""

    exit_code = 1


class ConfigError(SoraHPCError):
    """The configuration or a command-line argument is wrong; nothing was started."""

    exit_code = 2


class SetupError(SoraHPCError):
    """The machine lacks something the job needs: a program, a library, a device, a writable folder, a free run."""

    exit_code = 3


class DataError(SoraHPCError):
    """Videos, captions, a manifest or a latent cache are missing, broken, or made by something else."""

    exit_code = 4


class CheckpointError(SoraHPCError):
    """A checkpoint is missing, incomplete, altered, or of another model; it was not loaded."""

    exit_code = 5


class Stopped(SoraHPCError):
    """Stopped on request (time limit, preemption, cancel) with progress saved: requeue to go on."""

    exit_code = 10


class NumericsError(SoraHPCError):
    """A loss, gradient or result is not finite; the weights were not touched by that step, nothing was put out."""

    exit_code = 16


class SlowerError(SoraHPCError):
    """A kernel takes longer than in the baseline, by more than the margin; what was measured is written."""

    exit_code = 17


class NoProgressError(SoraHPCError):
    """Repeated restarts made no progress; requeuing again would not help."""

    exit_code = 20
