"""Write a clip as H.264 in mp4: what players, browsers and other people's loaders take.

Colour is converted by BT.709, limited range, and the file says so; a reader that honours the flags gets the same
colours back.

The same frames give the same bytes on every run with the same libraries, whatever ran before in the process. That
takes one encoder thread and two detours around reads of uninitialised memory, seen on clips 48 px wide with PyAV 18.1:
our own conversion to yuv420p instead of swscale 9.5, and no macroblock tree in x264 (13 of 291 clips differed between
two runs with it, none of 786 without).
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc

from sorahpc.errors import DataError, SetupError
from sorahpc.runs import atomic_write

AVCOL_SPC_BT709 = 1  # codec_context.colorspace takes libavutil's number, not swscale's

# ITU-R BT.709-6, item 3: luma from red, green, blue; then scaled to the limited range 16..235 and 16..240 of 8 bits.
_KR, _KG, _KB = 0.2126, 0.7152, 0.0722
_LUMA = np.array([_KR, _KG, _KB], np.float32) * np.float32(219 / 255)
_CHROMA = np.array(
    [[-_KR, -_KG, 1 - _KB], [1 - _KR, -_KG, -_KB]] / (2 * np.array([[1 - _KB], [1 - _KR]])) * (224 / 255), np.float32
)


def write_mp4(
    path: Path | str, frames: np.ndarray, fps: float, crf: int = 18, *, preset: str = "veryfast", durable: bool = True
) -> None:
    """Write frames as an H.264 mp4 without sound. The file appears whole or not at all.

    Args:
        path: the file; its folder is made.
        frames: uint8 [T, H, W, 3], RGB. H and W even: yuv420p halves them.
        fps: frames a second.
        crf: quality of x264, 0 (lossless) to 51; 18 can hardly be told from the source.
        preset: x264 preset; the size of the file against the time to write it.
        durable: fsync the file and its folder; costs milliseconds a file.

    Raises:
        ValueError: frames of another shape or dtype, odd or zero sizes, an fps or crf out of range.
        SetupError: this build of PyAV has no H.264 encoder.
        DataError: the file can't be written.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"{path}: frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    num_frames, height, width, _ = frames.shape
    if num_frames < 1 or min(height, width) < 2 or height % 2 or width % 2:
        raise ValueError(f"{path}: at least one frame of even height and width, not T={num_frames} {width}x{height}")
    if not 0 < fps <= 1000 or not 0 <= crf <= 51:
        raise ValueError(f"{path}: fps in (0, 1000] and crf in 0..51, not fps={fps} crf={crf}")
    data = _encode(frames, Fraction(fps).limit_denominator(60_000), crf, preset)
    try:
        atomic_write(path, data, durable=durable)
    except OSError as error:
        raise DataError(f"{path}: can't write the video: {error.strerror}") from None


def _encode(frames: np.ndarray, fps: Fraction, crf: int, preset: str) -> bytes:
    num_frames, height, width, _ = frames.shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": preset, "threads": "1", "x264-params": "mbtree=0"}
        try:
            stream = container.add_stream("libx264", rate=fps, options=options)
        except (ValueError, av.FFmpegError) as error:
            raise SetupError(f"PyAV can't encode H.264 (libx264): {error}; install a wheel of `av` from PyPI") from None
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace = AVCOL_SPC_BT709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        for i in range(num_frames):
            yuv = av.VideoFrame.from_ndarray(_yuv420p(frames[i]), format="yuv420p")
            yuv.pts = i
            yuv.time_base = 1 / fps
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _yuv420p(rgb: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] RGB -> uint8 [H * 3/2, W]: planes Y, U, V one after another, chroma sited left as in H.264."""
    height, width, _ = rgb.shape
    pixels = rgb.astype(np.float32)
    luma = pixels @ _LUMA + 16
    rows = (pixels[0::2] + pixels[1::2]) / 2
    before = np.concatenate([rows[:, :1], rows[:, 1:-1:2]], axis=1)  # the odd column left of each even one
    quarter = (before + 2 * rows[:, 0::2] + rows[:, 1::2]) / 4
    chroma = quarter @ _CHROMA.T + 128
    planes = np.empty(height * width * 3 // 2, np.uint8)
    planes[: height * width] = np.rint(luma).ravel()
    planes[height * width :] = np.rint(chroma).transpose(2, 0, 1).ravel()
    return planes.reshape(height * 3 // 2, width)
