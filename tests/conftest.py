"""What holds for every test: one thread a process; no GPU test where there is no GPU, and no GPU for any other test."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        reason = "no CUDA device" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is not marked `gpu` is of the CPU, whose results are the same bit by bit; jobs and processes that it
    starts would take a GPU by themselves. It is hidden before any fixture, so that those of a module find none either.
    """
    if item.get_closest_marker("gpu"):
        return (yield)
    with contextlib.ExitStack() as hidden:
        hidden.enter_context(mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""))
        if torch := sys.modules.get("torch"):  # it may have looked for GPUs before
            hidden.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
            hidden.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: 0))
        return (yield)
