"""Parquet tables that are read whole: a manifest, captions, the index of a cache. If they fit into memory.

A Parquet file says little about what it becomes. A text that comes a million times lies in it once, and a billion equal
numbers are a few bytes: 1 MB may become 100 GB. So rows are counted before anything is read, and texts are measured
before they are laid out. That bounds accidents: pages of a file whose headers lie about sizes may still take 2 GB each.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sorahpc.errors import DataError
from sorahpc.files import open_regular

_SHARE = 0.8  # of the memory that a table may take
# What a table becomes in Python: of a manifest of 300,000 rows, 22 values and 280 bytes each, a row took 2.2 kB.
_VALUE_BYTES = 64
_COPIES = 3
_BATCH_ROWS = 1 << 15  # Arrow lays out at most 2 GB of text at once, and rows of ours have at most 50 kB


def read_table(path: Path, name: str, again: str, columns: Collection[str] | None = None) -> pa.Table:
    """Read a table of numbers and texts, by one thread.

    Args:
        path: the file. name: it, as a line may show it. again: what to do about a damaged one.
        columns: those that are read, where they are there; None: all.

    Raises:
        FileNotFoundError: there is none.
        DataError: it can't be read, is no Parquet file, or would take more memory than there is.
    """
    memory = _SHARE * memory_bytes()

    def fail(fault: str) -> NoReturn:
        raise DataError(f"{name}: {fault}; {again}") from None

    def need(num_bytes: float, what: str) -> None:
        if num_bytes > memory:
            fail(
                f"too large: {what} take about {num_bytes / 1e9:.3g} GB of memory, at most {memory / 1e9:.3g} GB are "
                "there for it: give it more, or, if it should not be so large"
            )

    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            need(size, f"its {size} bytes")
            data = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        fail(f"can't read it: {error.strerror}")
    try:
        source = pq.ParquetFile(pa.BufferReader(data))
        found, groups = source.metadata, range(source.metadata.num_row_groups)
        schema = pa.schema([f for f in source.schema_arrow if columns is None or f.name in columns])
        for field in schema:
            if not (pa.types.is_string(field.type) or pa.types.is_primitive(field.type)):
                fail(f"column `{field.name}` is {field.type}, expected text or a number")
        rows = max(found.num_rows, sum(found.row_group(i).num_rows for i in groups))
        unpacked = sum(found.row_group(i).total_byte_size for i in groups)
        values_bytes = _VALUE_BYTES * rows * len(schema)
        need(values_bytes + _COPIES * unpacked, f"{rows} rows of {len(schema)} columns, {unpacked} bytes unpacked,")
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        source = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
        parts: list[pa.RecordBatch] = []
        unpacked = 0
        # One thread: with Arrow's pool 2 of 40 short processes aborted at exit (pyarrow 26.0.1, "terminate called").
        for batch in source.iter_batches(_BATCH_ROWS, columns=schema.names, use_threads=False):
            laid_out = []
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
                    unpacked += pc.sum(lengths.take(column.indices)).as_py() or 0
                    need(values_bytes + _COPIES * unpacked, f"{rows} rows with {unpacked} bytes of text or more")
                    column = column.dictionary_decode()
                laid_out.append(column)
            parts.append(pa.RecordBatch.from_arrays(laid_out, schema=schema))
        pa.default_memory_pool().release_unused()  # 1.2 kB a row, which what is made of the table needs itself
        told = {key: value for key, value in (found.metadata or {}).items() if key != b"ARROW:schema"}
        return pa.Table.from_batches(parts, schema).replace_schema_metadata(told)
    except (pa.ArrowException, OSError) as error:  # of bytes in memory, so whatever Arrow calls it, it is the content
        fail(f"not a whole Parquet file: {(str(error).splitlines() or ['damaged'])[0]}")


def memory_bytes() -> int:
    """Of this machine, or what the cgroup of this process allows, as Slurm and containers set it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *_allowed(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))])


def _allowed(cgroups: str, root: Path) -> Iterator[int]:
    """The limits on memory of a process's cgroup and those above it.

    Args:
        cgroups: /proc/<pid>/cgroup. root: where cgroups are mounted: those of version 2, and of version 1 by kind.
    """
    for line in cgroups.splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, limit = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        own = top / name.strip("/")
        for folder in (own, *own.parents):
            try:
                value = (folder / limit).read_text().strip()
            except OSError:  # not mounted here; the root of all has none
                continue
            if value.isdecimal():
                yield int(value)
