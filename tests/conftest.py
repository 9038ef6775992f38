"""What holds for every test: one thread a process, and no GPU test where there is no GPU."""

from __future__ import annotations

import os

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
