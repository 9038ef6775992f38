"""NVIDIA DALI, the second decoder. Runs in the child process, as frames.py does.

Where there is a CUDA device its NVDEC reads the file, elsewhere DALI's own CPU codecs. Both give frames by their
numbers, as RGB by BT.601 whatever the stream says, in the range that it flags, with chroma interpolated. Here it is
found out when frames are shown, and the matrix is put right. Whatever goes wrong in DALI, PyAV reads the file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import IO, Any

import av
import numpy as np
from av.codec.context import CodecContext
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from sorahpc.data.container import MAX_PIXELS, Unusable, ffmpeg_words, opened
from sorahpc.data.frames import TIME_TOLERANCE_S, ClipPlan
from sorahpc.data.pictures import colorspace_of, is_unusual, pixels, turn_of

MAX_FILE_BYTES = 256 << 20  # a file is handed over whole, in memory
_CPU = ("vp8", "vp9", "mjpeg")
# NVDEC has more. DALI tells its frames by the order of packets, one each: of VP9 and AV1 a packet may show a frame that
# was decoded before, and all later ones would be off by one. Of MJPEG the parser need not say that its range is full.
_GPU = ("h264", "hevc")
_EIGHT_BITS = ("yuv420p", "yuvj420p", "nv12")
_AVCOL_SPC_SMPTE170M = 6  # as in a frame; it is BT.601's
_MAX_CLIPPED = 1e-3  # such a pixel is up to 30 levels off
_MAX_AWAY = 6.0  # on the mean; hard edges with chroma between them come to 3, another range to 9
_HELD_BYTES = 256 << 20  # of frames that are held at a time
_BYTES_A_PIXEL = 30  # of the frames that a decoder on the GPU holds: 20 of them
_MAX_DECODERS_BYTES = 512 << 20
_kinds: set[tuple[str, int, int]] = set()  # that this process's GPU has decoded: codec, width, height


def installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@functools.cache
def _dynamic(gpu: int) -> Any:
    """DALI's dynamic mode, one thread, on that GPU where there is any. Raises ImportError.

    From here on the process sees no other GPU. Else DALI would take streams and threads of the first one for a decoder
    on another, which fails, and hold half a gigabyte of it for each child of each task.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu)] if shown is None else shown.split(",")[gpu : gpu + 1]
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[0]
    import nvidia.dali.experimental.dynamic as dynamic

    dynamic.set_num_threads(1)
    return dynamic


@functools.cache
def _on_gpu() -> bool:
    backend: Any = importlib.import_module("nvidia.dali.backend")  # its types name less than it has
    return bool(backend.GetCUDADeviceCount() > 0)


def is_spent() -> bool:
    """Whether this process is better ended: DALI keeps a decoder for each kind of video, up to 100 of them, in the
    GPU's memory, which the VAE would lack. To start anew takes a second."""
    held = sum(width * height for _, width, height in _kinds) * _BYTES_A_PIXEL
    return len(_kinds) > 1 and held > _MAX_DECODERS_BYTES


def refuses(codec: str, pix_fmt: str, num_bytes: int, gpu: int) -> str:
    """Why DALI can't read a stream of this kind here; "" if it can."""
    try:
        _dynamic(gpu)
        _on_gpu()
    except Exception as error:  # ImportError, or what a driver that doesn't fit makes of it
        return f"no DALI: {_words(error)}"
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
        RuntimeError, and others: DALI can't. MemoryError: of the GPU too.
    """
    dynamic = _dynamic(gpu)  # it sees this one alone, as its first
    return np.asarray(dynamic.decoders.video(data, device="gpu:0" if _on_gpu() else "cpu", frames=numbers).cpu())


def _words(error: Exception) -> str:
    """What is wrong, in a line: of an error in its other thread DALI says that in the cause."""
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__


def decode_dali(file: IO[bytes], plan: ClipPlan, clip: np.ndarray, gpu: int) -> None:
    """As `decode`, with the frames from DALI: from PyAV come their times, from the packets, and the first of them, for
    what DALI does not tell. Turning, scaling and cropping are the same code, on RGB in place of YUV.

    Raises:
        Unusable: DALI can't read it, or would not read it right: a job for `decode`. MemoryError.
    """
    with opened(file) as (container, stream):
        num_bytes = os.fstat(file.fileno()).st_size
        codec = stream.codec_context.codec.canonical_name
        if refusal := refuses(codec, stream.codec_context.pix_fmt, num_bytes, gpu):
            raise Unusable(refusal)
        first, times_s, ends_s = _timed(container, stream, plan.times_s[-1])
        if plan.times_s[-1] >= ends_s + TIME_TOLERANCE_S:
            raise Unusable("truncated")
        if first.interlaced_frame or is_unusual(first):
            raise Unusable("interlaced, HDR or of wide gamut: not for DALI")
        numbers = np.searchsorted(times_s - TIME_TOLERANCE_S, plan.times_s, side="right") - 1
        told = colorspace_of(first)
        by_601 = told in (Colorspace.ITU601, Colorspace.ITU624, _AVCOL_SPC_SMPTE170M)
        reformatter, size = VideoReformatter(), (plan.height, plan.width)
        needed = sorted(set(numbers.tolist()))
        at_once = max(1, _HELD_BYTES // (first.width * first.height * 3))
        file.seek(0)
        data = np.frombuffer(file.read(), np.uint8)
        if _on_gpu():
            _kinds.add((codec, first.width, first.height))
        for i in range(0, len(needed), at_once):
            group = needed[i : i + at_once]
            try:
                pictures = read(data, group, gpu)
            except Exception as error:  # of any type, by where in it the fault is
                if isinstance(error, MemoryError) and not _on_gpu():
                    raise
                raise Unusable(f"DALI: {_words(error)}") from None  # the GPU's memory may be the VAE's; PyAV needs none
            if pictures.shape != (len(group), first.height, first.width, 3):
                raise Unusable(f"DALI: frames of another size: {pictures.shape}")
            if not by_601 and _clipped(pictures) > _MAX_CLIPPED:
                raise Unusable("DALI: colours beyond BT.601's RGB, which it takes for a stream of another matrix")
            for number, picture in zip(group, pictures, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if not by_601:  # back by the matrix that DALI took, and again by the stream's own
                    frame = reformatter.reformat(
                        frame,
                        format="yuv444p",
                        dst_colorspace=Colorspace.ITU601,
                        dst_color_range=ColorRange.JPEG,
                        threads=1,
                    )
                    frame.colorspace, frame.color_range = told, ColorRange.JPEG
                shown = pixels(frame, turn_of(first), stream, size, reformatter)
                # Of a range that only the container flags NVDEC knows nothing; then PyAV's picture is another.
                if number == 0:
                    away = _mean_error(shown, pixels(first, turn_of(first), stream, size, reformatter))
                    if away > _MAX_AWAY:
                        raise Unusable(f"DALI: its first frame is {away:.1f} of 255 levels off")
                clip[numbers == number] = shown


def _mean_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())


def _clipped(pictures: np.ndarray) -> float:
    """The largest share in a picture of pixels with a colour that the way to RGB may have cut off."""
    high, low = pictures.max(-1), pictures.min(-1)
    cut = ((high == 255) | (low == 0)) & (high - low > 32)  # a grey is a grey by any matrix
    return float(cut.mean((1, 2)).max())


def _timed(container: Any, stream: Any, last_s: float) -> tuple[Any, np.ndarray, float]:
    """The first frame; when each frame up to a time, or a few more, comes on screen, in seconds from the first one,
    float64 [N]; and when the last of these ends. Raises Unusable where packets don't say, or frames change their kind:
    DALI goes on with the first one's size, and gives noise."""
    first = None
    kinds_of, kinds = _KeyFrames(stream), set[tuple[int, ...]]()
    pts: list[int] = []
    last_pts, end = None, 0
    rate = stream.average_rate or stream.guessed_rate
    step = 1 / (rate * stream.time_base) if rate else 0
    try:
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if not packet.size:
                continue
            if packet.pts is None or packet.dts is None or packet.is_discard or packet.is_corrupt:
                raise Unusable("its packets don't say which frames are shown, and when")
            if packet.is_keyframe:
                kinds |= kinds_of(packet)
                if len(kinds) > 1:
                    raise Unusable("frames of several sizes or kinds: not for DALI")
            pts.append(packet.pts)
            if last_pts is None or packet.pts >= last_pts:
                last_pts, end = packet.pts, packet.pts + (packet.duration or step)
            # No later packet is presented before its decoding time.
            if first is not None and float((packet.dts - min(pts)) * stream.time_base) > last_s + 1:
                break
    except av.FFmpegError as error:
        raise Unusable(f"corrupt: {ffmpeg_words(error)}") from None
    if first is None or not pts:
        raise Unusable("no frames: nothing could be decoded")
    times = np.sort(np.asarray(pts, np.int64))
    base = float(stream.time_base)
    return first, (times - times[0]) * base, float(end - int(times[0])) * base


class _KeyFrames:
    """What key frames are, with which a stream may go on in another size or colour space: packets don't tell, so these
    are decoded, one in some seconds. All frames of MJPEG are such, and there the header tells."""

    def __init__(self, stream: Any) -> None:
        own = stream.codec_context
        self._jpeg = own.codec.canonical_name == "mjpeg"
        self._context: Any = CodecContext.create(own.codec.name, "r")
        self._context.extradata, self._context.thread_count = own.extradata, 1
        self._context.options = {"max_pixels": str(MAX_PIXELS)}

    def __call__(self, packet: Any) -> set[tuple[int, ...]]:
        """Of a packet with a key frame; nothing where it gives no frame by itself. Raises FFmpegError."""
        if self._jpeg and (size := _jpeg_size(bytes(packet))):
            return {size}
        frames = [*self._context.decode(packet), *self._context.decode(None)]
        self._context.flush_buffers()
        return {(f.width, f.height, f.colorspace, f.color_range, f.interlaced_frame) for f in frames}


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by the header of a JPEG picture's first frame; None where it isn't found."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if 0xC0 <= data[at + 1] <= 0xC2:  # SOF
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
