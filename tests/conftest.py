"""What holds for every test: one thread a process, and a GPU is seen by the tests for it alone, skipped where there is
none."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, for a process shows them to all of its tests or to none: `pytest -m gpu` runs the others.

    The jobs take a GPU where they find one, and what most tests hold their results against was computed on the CPU, by
    more ranks than a machine may have GPUs.
    """
    marks = config.getoption("markexpr")
    if "gpu" not in marks or "not gpu" in marks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        none = "no CUDA device, or run without `-m gpu`"
        reason = none if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))
