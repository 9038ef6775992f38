"""Cases, rows and nodes of `profile kernels` for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sorahpc.profiling.cases import Case
from sorahpc.profiling.results import OURS, Ceiling, Node, Row

CPU = torch.device("cpu")


def make_case(difference: float = 0.0, name: str = "K0 twice") -> Case:
    x = torch.ones(1000)
    calls: dict[str, Any] = {OURS: lambda: x * 2, "eager": lambda: x + x + difference}
    return Case(name, torch.float32, "1000", 2 * x.nbytes, 1000, calls, 1e-6)


def fails(*_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image\n for this device")


def make_row(median_ms: float, **changes: Any) -> Row:
    row = Row(
        date="2026-01-01 00:00", device="A", threads=1, torch="2", commit="c", case="K1 rope", dtype="float32",
        shape="L=1", candidate=OURS, median_ms=median_ms, p10_ms=1.0, p90_ms=2.0, gb_s=10.0, gflop_s=5.0, of_limit=0.9,
        limit_gb_s=11.0, ours_is_faster_by=1.0, peak_mb=3.0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def make_node(device: str = "A", rows: tuple[Row, ...] = (), **changes: Any) -> Node:
    ceilings = (Ceiling("copy", "any", 1, 20.0, "memcpy"), Ceiling("matmul", "float32", 1, 100.0, "torch.matmul"))
    node = Node(device, "node1", "2026-01-01 00:00", "2", "c", ceilings, rows)
    return dataclasses.replace(node, **changes)
