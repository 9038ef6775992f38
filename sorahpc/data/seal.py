"""The seal: 24 bytes after the end of a file, the crc32 of all before it, so that any flipped bit is found.

Of a Parquet file it lies ahead of the footer, where no reader looks, and is the crc32 of all before and behind it.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from sorahpc.data.manifest import shown
from sorahpc.errors import DataError
from sorahpc.files import open_regular
from sorahpc.ops._library import native

SEAL = re.compile(rb"sorahpc crc32 ([0-9a-f]{8})\r\n")  # \r\n: a transfer as text shows
SEAL_BYTES = 24
_BLOCK_BYTES = 1 << 20


def seal_of(crc: int) -> bytes:
    return b"sorahpc crc32 %08x\r\n" % crc


def check_seal(path: Path) -> None:
    """Read a whole file and hold it against its seal.

    Raises:
        DataError: it has none, or its bytes are not those that were written. OSError: it can't be read.
    """
    size = path.stat().st_size
    crc, left = 0, size - SEAL_BYTES
    with open_regular(path) as file:
        block = memoryview(bytearray(min(_BLOCK_BYTES, max(left, 1))))
        while left > 0:
            got = file.readinto(block[: min(left, len(block))])
            if not got:
                break
            crc, left = crc32(block[:got], crc), left - got
        found = SEAL.fullmatch(file.read(SEAL_BYTES + 1)) if left == 0 else None
    if found is None:
        raise DataError(f"{shown(path)}: no seal at its end: the file was cut, or damaged there")
    if int(found[1], 16) != crc:
        raise DataError(f"{shown(path)}: damaged: crc32 of the file {found[1].decode()} expected, found {crc:08x}")


def sealed_parquet(data: bytes) -> bytes:
    """A Parquet file with a seal. Much of what Parquet writes beside the values is read by nobody, and so would be a
    bit that flips there."""
    at = _footer(data)
    return data[:at] + seal_of(crc32(data)) + data[at:]


def check_parquet_seal(path: Path) -> None:
    """As `check_seal`, of what `sealed_parquet` gives."""
    with open_regular(path) as file:
        data = file.read()
    at = _footer(data)
    found = SEAL.fullmatch(data[max(0, at - SEAL_BYTES) : at])
    if found is None:
        raise DataError(f"{shown(path)}: no seal ahead of its footer: the file was cut, or damaged there")
    crc = crc32(data[at:], crc32(data[: at - SEAL_BYTES]))
    if int(found[1], 16) != crc:
        raise DataError(f"{shown(path)}: damaged: crc32 of the file {found[1].decode()} expected, found {crc:08x}")


def _footer(data: bytes) -> int:
    """Where the footer of a Parquet file begins, whose length is ahead of the mark of 4 bytes at the end."""
    return max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))


def crc32(data: Any, crc: int = 0) -> int:
    """zlib's crc32 of bytes, going on from `crc`; ten times as fast where ``sorahpc._C`` is built."""
    module = native()
    return int(zlib.crc32(data, crc) if module is None else module.crc32(data, crc))
