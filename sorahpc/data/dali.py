"""NVIDIA DALI, the second decoder: frames of a video by their numbers. Runs in the child process, as frames.py does.

Where there is a CUDA device its NVDEC reads the file, elsewhere DALI's own CPU codecs. Both give RGB by BT.601 whatever
the stream says, in the range that it flags, with chroma interpolated; frames.py puts the matrix right.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import numpy as np

MAX_FILE_BYTES = 256 << 20  # a file is handed over whole, in memory
_CPU = ("vp8", "vp9", "mjpeg")
_GPU = ("vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4")
_EIGHT_BITS = ("yuv420p", "yuvj420p", "nv12")


def installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@functools.cache
def _dynamic() -> Any:
    """DALI's dynamic mode, one thread. Raises ImportError."""
    import nvidia.dali.experimental.dynamic as dynamic

    dynamic.set_num_threads(1)
    return dynamic


@functools.cache
def _on_gpu() -> bool:
    backend: Any = importlib.import_module("nvidia.dali.backend")  # its types name less than it has
    return bool(backend.GetCUDADeviceCount() > 0)


def refuses(codec: str, pix_fmt: str, num_bytes: int) -> str:
    """Why DALI can't read a stream of this kind here; "" if it can."""
    try:
        _dynamic()
    except ImportError as error:
        return f"no DALI: {error}"
    if codec not in (_GPU if _on_gpu() else _CPU):
        return f"{codec} is not for DALI on the {'GPU' if _on_gpu() else 'CPU'}"
    if pix_fmt not in _EIGHT_BITS:
        return f"{pix_fmt} is not for DALI"
    if num_bytes > MAX_FILE_BYTES:
        return f"over {MAX_FILE_BYTES} bytes"
    return ""


def read(data: np.ndarray, numbers: list[int], gpu: int) -> np.ndarray:
    """Frames of a video.

    Args:
        data: the file's bytes, uint8.
        numbers: of frames, in order of presentation; the file has so many, since DALI makes others up.
        gpu: whose NVDEC, where there is a CUDA device.

    Returns:
        uint8 [T, H, W, 3], RGB by BT.601.

    Raises:
        RuntimeError: DALI can't.
    """
    device = f"gpu:{gpu}" if _on_gpu() else "cpu"
    frames = _dynamic().decoders.video(data, device=device, frames=numbers)
    return np.asarray(frames.cpu())
