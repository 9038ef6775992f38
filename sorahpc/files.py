"""Files that others name are opened as what they should be: regular ones, and never waited for."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link",
}  # fmt: skip


class NotRegular(OSError):
    """A FIFO, socket, device or folder: reading it could wait for ever, or never end. `strerror` says which."""

    def __init__(self, path: Path | str, mode: int) -> None:
        kind = _KINDS.get(stat.S_IFMT(mode), "special")
        super().__init__(errno.EINVAL, f"not a regular file: {kind}", str(path))


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file for reading, never waiting for it.

    Raises:
        NotRegular: it is none. OSError: it can't be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a FIFO without a writer would hang
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotRegular(path, stat.S_IFSOCK) from None
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise NotRegular(path, mode)
    return os.fdopen(fd, "rb")


def read_regular(path: Path | str) -> bytes:
    """Read a regular file. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: Path | str, encoding: str = "utf-8") -> str:
    """Read a regular file as text, with every end of a line as a newline. Raises as `open_regular`, and
    UnicodeDecodeError."""
    with io.TextIOWrapper(open_regular(path), encoding=encoding) as file:
        return file.read()
