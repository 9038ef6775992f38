"""HDF5 files of others, read so that they can't point out of themselves, nor keep a process for ever.

The one place that imports h5py.
"""

from __future__ import annotations

import struct
from typing import IO, Any

import numpy as np

from sorahpc.errors import SetupError

# What a value of a dataset of texts is: bytes in an object of a heap, by their number, the heap's place in the file and
# the object's index.
_OBJECT = struct.Struct("<H6xQ")  # the head of an object: index, bytes
PLACE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])


def h5py() -> Any:
    try:
        import h5py  # 0.2 s: not where only the index is read
    except ImportError as error:
        raise SetupError(f"cache: h5py can't be imported ({error}); pip install 'h5py>=3.14,<4'") from None
    return h5py


def own_dataset(file: Any, name: str) -> Any:
    """A dataset whose values lie in this file; None if there is none of that name. HDF5 can point into any other file,
    by links, virtual datasets and external storage."""
    h5 = h5py()
    found = file
    for part in name.split("/"):
        if not isinstance(found, h5.Group) or not isinstance(found.get(part, getlink=True), h5.HardLink):
            return None
        found = found[part]
    return found if isinstance(found, h5.Dataset) and not found.is_virtual and not found.external else None


def heap_objects(file: IO[bytes], at: int, most: int) -> tuple[dict[int, bytes], int]:
    """The objects of a global heap collection, by index, and its bytes (HDF5 File Format Specification, III.E).

    Not by HDF5, which goes round for ever where a flipped bit makes an object's size wrong (2.0; inside a call that
    nothing can end). Raises ValueError: it is no such collection, or has more than `most` bytes.
    """
    file.seek(at)
    head = file.read(16)
    size = int.from_bytes(head[8:], "little")
    if head[:4] != b"GCOL" or not 16 <= size <= most:
        raise ValueError(f"no heap of texts at byte {at}")
    data = file.read(size - 16)
    objects, place = {}, 0
    while place + 16 <= len(data):
        index, length = _OBJECT.unpack_from(data, place)
        if index == 0:  # what is left is free
            break
        objects[index] = data[place + 16 : place + 16 + length]
        if len(objects[index]) < length:
            raise ValueError(f"a text of the heap at byte {at} ends after it")
        place += 16 + (length + 7) // 8 * 8
    return objects, size
