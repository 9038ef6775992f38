"""What is in a video file, and the pixels of a clip of it: PyAV on the CPU, one thread a file.

This is what runs in the child process that serves `sorahpc.data.decode`. It is handed open files, imports neither
torch nor what reads configurations, and says of a file that it can't use why.

Files are untrusted. Only the demuxers of video containers open them (a playlist named .mp4 could make FFmpeg open
other files), only the decoders of DECODERS look at their streams, and a frame has at most MAX_PIXELS.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import struct
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from sorahpc.data import measures

MAX_PIXELS = 8192 * 8192  # a frame; twice 8K. A header may claim any size, and the decoder would allocate it
MAX_FRAMES = 10_000_000  # a file; 4 days at 30 fps
TIME_TOLERANCE_S = 1e-3  # containers round times, Matroska to 1 ms
SEEK_FROM_S = 5.0  # a clip that begins later is read from a key frame; for less, decoding all is as fast
_BEFORE_S = 1.0  # so much before it: a frame that is deinterlaced depends on those beside it

_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf"
# FFmpeg has over 250 video decoders, and its holes are in those that nobody uses. These are what cameras, phones,
# editors and the web write. Names of decoders, since that is what FFmpeg's own list holds.
DECODERS = tuple(
    "h264 hevc vvc av1 libdav1d libaom-av1 vp8 vp9 libvpx libvpx-vp9 mpeg1video mpeg2video mpegvideo mpeg4 h263 flv "
    "msmpeg4v1 msmpeg4v2 msmpeg4 wmv1 wmv2 wmv3 vc1 theora mjpeg prores dnxhd dvvideo ffv1 huffyuv ffvhuff utvideo "
    "rawvideo".split()
)
_AVCOL_SPC_UNSPECIFIED, _AVCOL_SPC_SMPTE170M = 2, 6  # as in a frame; 170M is BT.601's
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
# x and y of red, green and blue, all with the white of D65. Narrow ones other than BT.709's are near enough to it.
_WIDE = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # P3, as phones and screens have it
}
_BT709, _D65 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)), (0.3127, 0.3290)
_WHITE_NITS = 203  # of HDR, which becomes white: ITU-R BT.2408
_MAX_CLIPPED = 1e-3  # such a pixel is up to 30 levels off
_DALI_BYTES = 256 << 20  # of frames that are held at a time
# Chroma interpolated instead of repeated: half the error at hard edges, for a tenth of the time.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_SMALL = Interpolation.AREA  # of pictures that are only measured


class Unusable(Exception):
    """A file that can't be used; its text is the reason, ``kind`` or ``kind: detail``."""


@dataclass(frozen=True)
class Probe:
    """What a file presents, counted and decoded rather than believed. Fields as in `Video`."""

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    duration_s: float


@dataclass(frozen=True)
class ClipPlan:
    """Which pixels to take from a video: a frame for each time, in seconds from the first one, at this size."""

    times_s: tuple[float, ...]
    height: int
    width: int


# ---------------------------------------------------------------------------------------------------------------------
# opening


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, ready to decode. Raises Unusable."""
    file.seek(0)
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise Unusable("empty file: 0 bytes")
    try:
        container = av.open(
            file,
            format=None,
            options={"format_whitelist": _DEMUXERS, "codec_whitelist": ",".join(DECODERS)},
            metadata_errors="replace",
            buffer_size=1 << 16,
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unusable(_why_not_opened(head, error)) from None
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            others = sorted({s.type for s in container.streams})
            raise Unusable(f"no video stream: only {' and '.join(others) or 'an empty container'}")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise Unusable("no decoder: FFmpeg does not know the codec")
        if context.codec.name not in DECODERS:
            raise Unusable(f"no decoder: {context.codec.name} is not among those trusted with files of others")
        if context.width * context.height > MAX_PIXELS:
            raise Unusable(f"too large: {context.width}x{context.height} px, at most {MAX_PIXELS} px a frame")
        context.thread_count = 1
        # The stream's own headers may claim another size than the container did.
        context.options = {"max_pixels": str(MAX_PIXELS), "codec_whitelist": ",".join(DECODERS)}
        try:
            yield container, stream
        except OSError as error:  # of the file system; FFmpeg's own are caught where they arise
            raise Unusable(f"can't read: {error.strerror}") from None


def _why_not_opened(head: bytes, error: Exception) -> str:
    text = head[:512]
    if b"\0" not in text and not any(b < 9 for b in text):
        try:
            text.decode("utf-8")
            return "not a video: a text file"
        except UnicodeDecodeError as bad:
            if bad.start > len(text) - 4:  # a character cut by the window
                return "not a video: a text file"
    if text.startswith(b"PK\3\4"):
        return "not a video: a zip archive"
    if text[4:8] == b"ftyp":
        return "corrupt or truncated: an mp4 without its index (moov)"
    return f"not a video: {_ffmpeg_words(error)}"


def _ffmpeg_words(error: Exception) -> str:
    """What FFmpeg says of an error. Raises MemoryError where that is what it was: no fault in the file's content."""
    if getattr(error, "errno", None) == errno.ENOMEM:
        raise MemoryError from error
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# probing


def probe(file: IO[bytes]) -> Probe:
    """Read a file through: count its frames, hold them against its index, decode the first.

    Raises:
        Unusable: with the reason. MemoryError.
    """
    with _opened(file) as (container, stream):
        packets = frames = 0
        first_pts = last_end = None  # of the video, in its time base
        all_end = -math.inf  # of any stream, in seconds
        timed = True
        picture = None
        rate = stream.average_rate or stream.guessed_rate
        step = 1 / (rate * stream.time_base) if rate else 0  # one frame in the time base
        demuxer = container.demux()
        while True:
            try:
                packet = next(demuxer)
            except StopIteration:
                break
            except av.FFmpegError as error:
                raise Unusable(_cut(packets, stream.frames, _ffmpeg_words(error))) from None
            if packet.size and packet.pts is not None and packet.time_base:
                all_end = max(all_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise Unusable(_cut(packets, stream.frames, "an incomplete packet"))
            if packet.size:
                packets += 1
                if packets > MAX_FRAMES:
                    raise Unusable(f"too long: more than {MAX_FRAMES} frames")
                if not packet.is_discard:  # decoded, but not presented (cut by an edit list)
                    frames += 1
                    if packet.pts is None:
                        timed = False
                    else:
                        end = packet.pts + (packet.duration or step)
                        first_pts = packet.pts if first_pts is None else min(first_pts, packet.pts)
                        last_end = end if last_end is None else max(last_end, end)
            if picture is None:
                try:
                    picture = next(iter(packet.decode()), None)
                except av.FFmpegError as error:
                    raise Unusable(f"can't decode the first frame: {_ffmpeg_words(error)}") from None
        indexed = stream.frames if "mov" in container.format.name else 0  # AVI's header counts dropped frames too
        if packets < indexed:
            raise Unusable(_cut(packets, indexed, "end of file"))
        if picture is None or not frames:
            raise Unusable("no frames: the video stream is empty")
        if picture.width * picture.height > MAX_PIXELS:
            raise Unusable(f"too large: {picture.width}x{picture.height} px, at most {MAX_PIXELS} px a frame")
        if (
            not indexed and container.duration
        ):  # no exact count: the header's duration is all there is to hold it against
            # Some writers measure the duration from time 0, others from the first frame: believe the kinder one.
            end_us = all_end * 1e6 - min(container.start_time or 0, 0)
            missing_s = (container.duration - end_us) / 1e6
            if missing_s > max(2.5 / float(rate) if rate else 0.1, 0.02 * container.duration / 1e6):
                raise Unusable(
                    f"truncated: ends {missing_s:.2f} s before the {container.duration / 1e6:.2f} s of its header"
                )
        if timed:
            assert first_pts is not None and last_end is not None
            duration_s = float((last_end - first_pts) * stream.time_base)
        else:
            duration_s = float(frames / rate) if rate else 0.0
        _pixels(picture, _turn(picture), stream, ClipPlan((0.0,), 16, 16), VideoReformatter())  # can it be converted?
        width, height = _display_size(picture, stream)
        if _turn(picture)[0] % 2:
            width, height = height, width
        fps = frames / duration_s if duration_s > 0 else 0.0
        return Probe(frames, fps, round(width), round(height), stream.codec_context.codec.canonical_name, duration_s)


def _cut(found: int, expected: int, why: str) -> str:
    counted = f"{found} of {expected} frames" if expected else f"{found} frames"
    return f"truncated or corrupt: {counted}, then {why}"


def _display_size(frame: Any, stream: Any) -> tuple[float, float]:
    """Width in square pixels and height, before rotation."""
    aspect = stream.sample_aspect_ratio
    if not aspect or not Fraction(1, 8) <= aspect <= 8:  # 0: unknown; beyond: nonsense
        aspect = 1
    return float(frame.width * aspect), float(frame.height)


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def measure(file: IO[bytes], height: int, width: int, scenes: measures.Scenes) -> np.ndarray:
    """Decode a file through, from its first frame to its last, and measure its clips.

    Args:
        height, width: of the pictures that are measured, upright.
        scenes: how it is cut; afterwards it knows how many frames and short scenes there were.

    Returns:
        CLIP [N].

    Raises:
        Unusable: it is corrupt at any place. MemoryError.
    """
    plan = ClipPlan((), height, width)
    with _opened(file) as (container, stream):
        reformatter = VideoReformatter()

        def show(frame: Any, begins_s: float, until_s: float) -> None:
            def picture() -> np.ndarray:
                return _pixels(frame, _turn(frame), stream, plan, reformatter, _SMALL)

            scenes.add(functools.cache(picture), begins_s, until_s)

        on_screen, shown_s, lasts_s = None, 0.0, 0.0
        for frame, begins_s, length_s in _presented(container, stream):
            if on_screen is not None:
                show(on_screen, shown_s, begins_s)
            on_screen, shown_s, lasts_s = frame, begins_s, length_s
        if on_screen is None:
            raise Unusable("no frames: nothing could be decoded")
        show(on_screen, shown_s, shown_s + lasts_s)
    return scenes.end()


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def decode(file: IO[bytes], plan: ClipPlan, clip: np.ndarray) -> None:
    """The pixels of a plan, written into `clip`, uint8 [T, H, W, 3], RGB.

    For each time the frame on screen then: the last one presented at or before it. Rotation, mirroring and pixel aspect
    are honoured, fields of interlaced frames are made whole, the picture is scaled to cover the size and cropped in the
    middle. Colours are converted as the stream flags them; unflagged ones by BT.709 from 720 lines or 1280 columns on,
    else by BT.601, as players do. Of HDR (PQ, HLG) what is brighter than the reference white of ITU-R BT.2408,
    203 cd/m2, is white.

    Raises:
        Unusable: the file can't be read, is corrupt, or ends before the plan does. MemoryError.
    """
    if plan.times_s[0] >= SEEK_FROM_S:
        try:
            return _decode(file, plan, clip, from_key_frame=True)
        except Unusable:
            pass  # no times, no index, or a wrong one: read from the beginning, the file shows whether it is sound
    _decode(file, plan, clip, from_key_frame=False)


def _decode(file: IO[bytes], plan: ClipPlan, clip: np.ndarray, *, from_key_frame: bool) -> None:
    times_s = np.asarray(plan.times_s)
    done = count = 0
    on_screen, ends_s = None, 0.0
    with _opened(file) as (container, stream):
        reformatter = VideoReformatter()  # shared: one a frame would cost 2.4 times as long

        def show(frame: Any, until_s: float) -> int:
            """Fill the times before `until_s` that are still open with this frame."""
            last = int(np.searchsorted(times_s, until_s - TIME_TOLERANCE_S))
            if last > done:
                clip[done:last] = _pixels(frame, _turn(frame), stream, plan, reformatter)
            return max(done, last)

        frames = (
            _presented_from(container, stream, plan.times_s[0]) if from_key_frame else _presented(container, stream)
        )
        for frame, begins_s, length_s in _deinterlaced(frames):
            if on_screen is not None:
                done = show(on_screen, begins_s)
                if done == len(times_s):
                    return
            on_screen, ends_s, count = frame, begins_s + length_s, count + 1
        if on_screen is None:
            raise Unusable("no frames: nothing could be decoded")
        done = show(on_screen, ends_s + 2 * TIME_TOLERANCE_S)
    if done < len(times_s):
        raise Unusable(f"truncated: ends at {ends_s:.3f} s after {count} frames, the clip needs {times_s[done]:.3f} s")


def _presented(container: Any, stream: Any, start_s: float | None = None) -> Iterator[tuple[Any, float, float]]:
    """Decoded frames, each with when it comes on screen, from the first one, and how long it stays, in seconds.

    start_s: when the first one comes on screen, where decoding begins at another.

    A decoder gives frames in the order in which they are shown. Raises Unusable where their times are in another.
    """
    rate = stream.average_rate or stream.guessed_rate
    step_s = float(1 / rate) if rate else 0.0
    timed = start_s is not None
    time_s = -step_s
    # An AVI says only when a frame is decoded, one after the other. FFmpeg guesses the rest, and of H.264 with B-frames
    # wrongly: so the k-th frame that is shown has the time of the k-th packet.
    decoding_times: deque[int | None] | None = deque() if container.format.name == "avi" else None
    for count, frame in enumerate(_decoded(container, stream, decoding_times)):
        if frame.is_corrupt:
            raise Unusable(f"corrupt: frame {count} has errors")
        at = frame.pts
        if timed and at is None:
            raise Unusable(f"untimed: frame {count} says no time")
        if decoding_times is not None:
            at = decoding_times.popleft() if decoding_times else None
        before_s, time_s = time_s, time_s + step_s if at is None else float(at * stream.time_base)
        start_s = time_s if start_s is None else start_s
        if count and time_s < before_s:
            if time_s < before_s - max(step_s, TIME_TOLERANCE_S):
                raise Unusable(f"out of order: frame {count} at {time_s:.3f} s comes after one at {before_s:.3f} s")
            time_s = before_s
        yield frame, time_s - start_s, float(frame.duration * frame.time_base) if frame.duration else step_s


def _decoded(container: Any, stream: Any, decoding_times: deque[int | None] | None) -> Iterator[Any]:
    """Frames; `decoding_times` gets that of each packet before its frames are given. Raises Unusable."""
    count = 0
    try:
        for packet in container.demux(stream):
            if decoding_times is not None and packet.size:
                decoding_times.append(packet.dts)
            for frame in packet.decode():
                count += 1
                yield frame
    except av.FFmpegError as error:
        raise Unusable(f"corrupt: after {count} frames: {_ffmpeg_words(error)}") from None


def _presented_from(container: Any, stream: Any, from_s: float) -> Iterator[tuple[Any, float, float]]:
    """As `_presented`, from the last key frame at or before a time on: a scene late in a film is not read from the
    film's beginning. Raises Unusable where such a frame is not found."""
    try:
        first = next(container.decode(stream), None)
        if first is None or first.pts is None or container.format.name == "avi":
            raise Unusable("untimed: the first frame says no time, or it is an AVI, which is timed by counting")
        start_s = float(first.pts * first.time_base)
        container.seek(int((start_s + from_s - _BEFORE_S) / stream.time_base), stream=stream)
    except (av.FFmpegError, OverflowError) as error:
        raise Unusable(f"can't seek: {error}") from None
    found = False
    for frame, begins_s, length_s in _presented(container, stream, start_s):
        if not found and begins_s > from_s + TIME_TOLERANCE_S:
            raise Unusable(f"can't seek: no key frame before {from_s:.3f} s")
        # What is shown before the key frame may refer to frames that were not read.
        found = found or frame.key_frame
        if found:
            yield frame, begins_s, length_s


def _deinterlaced(presented: Iterator[tuple[Any, float, float]]) -> Iterator[tuple[Any, float, float]]:
    """What `_presented` gives, with each interlaced frame made of its first field and what moved around it (bwdif).

    Two fields are two moments: woven into one picture, all that moves has combs.
    """
    graph: Graph | None = None
    kind: tuple[Any, ...] = ()
    times: deque[tuple[float, float]] = deque()  # of the frames that are in the filter: it gives one for each

    def ready(graph: Graph) -> Iterator[tuple[Any, float, float]]:
        while times:
            try:
                frame = graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield frame, *times.popleft()

    try:
        for count, (frame, begins_s, length_s) in enumerate(presented):
            now = (frame.width, frame.height, frame.format.name)
            if graph is not None and now != kind:  # a filter takes one size
                graph.vpush(None)
                yield from ready(graph)
                graph = None
            if graph is None:
                if not frame.interlaced_frame:
                    yield frame, begins_s, length_s
                    continue
                graph, kind = Graph(), now
                graph.threads = 1
                source = graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
                )
                graph.link_nodes(
                    source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
                )
                graph.configure()
            frame.pts, frame.time_base = count, Fraction(1, 1000)  # their real times are kept here
            times.append((begins_s, length_s))
            graph.vpush(frame)
            yield from ready(graph)
        if graph is not None:
            graph.vpush(None)
            yield from ready(graph)
    except av.FFmpegError as error:
        raise Unusable(f"can't deinterlace: {_ffmpeg_words(error)}") from None


def decode_dali(file: IO[bytes], plan: ClipPlan, clip: np.ndarray, gpu: int) -> None:
    """As `decode`, with the frames from DALI: from PyAV come their times, from the packets, and the first of them, for
    what DALI does not tell. Turning, scaling and cropping are the same code, on RGB in place of YUV.

    Raises:
        Unusable: DALI can't read it, or would not read it right: a job for `decode`. MemoryError.
    """
    from sorahpc.data import dali

    with _opened(file) as (container, stream):
        num_bytes = os.fstat(file.fileno()).st_size
        if refusal := dali.refuses(stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt, num_bytes):
            raise Unusable(refusal)
        first, times_s, ends_s = _timed(container, stream, plan.times_s[-1])
        if plan.times_s[-1] >= ends_s + TIME_TOLERANCE_S:
            raise Unusable("truncated")
        if first.interlaced_frame or first.color_trc in _HDR or first.color_primaries in _WIDE:
            raise Unusable("interlaced, HDR or of wide gamut: not for DALI")
        numbers = np.searchsorted(times_s - TIME_TOLERANCE_S, plan.times_s, side="right") - 1
        told = first.colorspace if first.colorspace != _AVCOL_SPC_UNSPECIFIED else _usual_colorspace(first)
        by_601 = told in (Colorspace.ITU601, Colorspace.ITU624, _AVCOL_SPC_SMPTE170M)
        reformatter = VideoReformatter()
        needed = sorted(set(numbers.tolist()))
        at_once = max(1, _DALI_BYTES // (first.width * first.height * 3))
        file.seek(0)
        data = np.frombuffer(file.read(), np.uint8)
        for i in range(0, len(needed), at_once):
            group = needed[i : i + at_once]
            try:
                pictures = dali.read(data, group, gpu)
            except RuntimeError as error:
                raise Unusable(f"DALI: {' '.join(str(error).split())[:200]}") from None
            if pictures.shape != (len(group), first.height, first.width, 3):
                raise Unusable(f"DALI: frames of another size: {pictures.shape}")
            if not by_601 and _clipped(pictures) > _MAX_CLIPPED:
                raise Unusable("DALI: colours beyond BT.601's RGB, which it takes for a stream of another matrix")
            for number, pixels in zip(group, pictures, strict=True):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if not by_601:  # back by the matrix that DALI took, and again by the stream's own
                    frame = reformatter.reformat(
                        frame,
                        format="yuv444p",
                        dst_colorspace=Colorspace.ITU601,
                        dst_color_range=ColorRange.JPEG,
                        threads=1,
                    )
                    frame.colorspace, frame.color_range = told, ColorRange.JPEG
                clip[numbers == number] = _pixels(frame, _turn(first), stream, plan, reformatter)


def _clipped(pictures: np.ndarray) -> float:
    """The largest share in a picture of pixels with a colour that the way to RGB may have cut off."""
    high, low = pictures.max(-1), pictures.min(-1)
    cut = ((high == 255) | (low == 0)) & (high - low > 32)  # a grey is a grey by any matrix
    return float(cut.mean((1, 2)).max())


def _timed(container: Any, stream: Any, last_s: float) -> tuple[Any, np.ndarray, float]:
    """The first frame; when each frame up to a time, or a few more, comes on screen, in seconds from the first one,
    float64 [N]; and when the last of these ends. Raises Unusable where packets don't say."""
    first = None
    pts: list[int] = []
    end = 0
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
            pts.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or step))
            # No later packet is presented before its decoding time.
            if first is not None and float((packet.dts - min(pts)) * stream.time_base) > last_s + 1:
                break
    except av.FFmpegError as error:
        raise Unusable(f"corrupt: {_ffmpeg_words(error)}") from None
    if first is None or not pts:
        raise Unusable("no frames: nothing could be decoded")
    times = np.sort(np.asarray(pts, np.int64))
    base = float(stream.time_base)
    return first, (times - times[0]) * base, float(end - int(times[0])) * base


def _usual_colorspace(frame: Any) -> int:
    """What players take where the stream flags none."""
    hd = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) >= 720
    return int(Colorspace.ITU709 if hd else Colorspace.ITU601)


def _ordinary(rgb: np.ndarray, trc: int, primaries: int) -> np.ndarray:
    """HDR or wide-gamut R'G'B', uint16 [H, W, 3], as ordinary video: BT.709 on the display of BT.1886, uint8.

    What is brighter than the reference white, or outside of BT.709's gamut, is cut off. FFmpeg's own conversion gives
    the same to a level, but takes seconds a clip to prepare.
    """
    light = _light(trc)[rgb]  # of the display, the white being 1; of HLG, of the scene
    matrix = _to_bt709(
        ColorPrimaries.BT2020 if primaries not in _WIDE and primaries != ColorPrimaries.BT709 else primaries
    )
    if trc == ColorTrc.ARIB_STD_B67:  # BT.2100's OOTF, for a display of 1,000 cd/m2
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (1000 / _WHITE_NITS * luminance**0.2)[..., None]
    light = np.clip(light @ matrix.T, 0, 1)
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)


@functools.cache
def _light(trc: int) -> np.ndarray:
    """The light of each of 65,536 code values, float32."""
    code = np.minimum(np.arange(1 << 16) / (255 << 8), 1)  # swscale's white, 255 in the upper byte
    if trc == ColorTrc.SMPTE2084:  # its EOTF
        root = code ** (32 / 2523)
        nits = 10_000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        light = nits / _WHITE_NITS
    elif trc == ColorTrc.ARIB_STD_B67:  # BT.2100, the inverse OETF of HLG
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:
        light = code**2.4
    return light.astype(np.float32)


@functools.cache
def _to_bt709(primaries: int) -> np.ndarray:
    """Linear RGB of these primaries -> of BT.709, float32 [3, 3] (SMPTE RP 177)."""

    def to_xyz(corners: tuple[tuple[float, float], ...]) -> np.ndarray:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in corners]).T
        white = np.array([_D65[0] / _D65[1], 1, (1 - sum(_D65)) / _D65[1]])
        scaled: np.ndarray = columns * np.linalg.solve(columns, white)
        return scaled

    return np.linalg.solve(to_xyz(_BT709), to_xyz(_WIDE.get(ColorPrimaries(primaries), _BT709))).astype(np.float32)


def _turn(frame: Any) -> tuple[int, bool]:
    """Quarter turns, counter-clockwise, after mirroring left to right, that make a decoded picture upright."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV doesn't know; it still tells the angle
        return round(frame.rotation / 90) % 4, False
    if matrix is None:
        return 0, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # (x, y) goes to (a x + c y, b x + d y), y down
    mirrored = a * d < b * c
    a, b = (-a, -b) if mirrored else (a, b)
    return round(math.degrees(math.atan2(-b, a)) / 90) % 4, mirrored


def _pixels(
    frame: Any,
    turn: tuple[int, bool],
    stream: Any,
    plan: ClipPlan,
    reformatter: VideoReformatter,
    how: int = _INTERPOLATION,
) -> np.ndarray:
    """uint8 [H, W, 3] of the plan's size: scaled to cover, cropped in the middle, upright. Raises Unusable."""
    quarters, mirrored = turn
    height, width = (plan.width, plan.height) if quarters % 2 else (plan.height, plan.width)
    shown_w, shown_h = _display_size(frame, stream)
    scale = max(width / shown_w, height / shown_h)
    scaled_w, scaled_h = max(width, round(shown_w * scale)), max(height, round(shown_h * scale))
    colorspace = None  # the frame's own
    if not frame.format.is_rgb and frame.colorspace == _AVCOL_SPC_UNSPECIFIED:
        colorspace = Colorspace(_usual_colorspace(frame))
    unusual = frame.color_trc in _HDR or frame.color_primaries in _WIDE
    try:
        rgb = reformatter.reformat(
            frame,
            width=scaled_w,
            height=scaled_h,
            format="rgb48le" if unusual else "rgb24",
            src_colorspace=colorspace,
            dst_color_range=ColorRange.JPEG,
            interpolation=how,
            threads=1,
        ).to_ndarray()
    except av.FFmpegError as error:
        raise Unusable(
            f"can't convert {frame.format.name} of matrix {frame.colorspace} to RGB: {_ffmpeg_words(error)}"
        ) from None
    top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
    rgb = rgb[top : top + height, left : left + width]
    if unusual:
        rgb = _ordinary(rgb, frame.color_trc, frame.color_primaries)
    return np.rot90(rgb[:, ::-1] if mirrored else rgb, quarters)


# ---------------------------------------------------------------------------------------------------------------------
# serving


def serve(request: dict[str, Any], file: IO[bytes], memory: Any) -> dict[str, Any]:
    """What `sorahpc.data.isolate` hands through to a child: `what` is "probe", "measure" or "decode".

    Returns:
        for JSON: {"found": fields of Probe}; {"done": True, "clips": N, "frames": of the video, "too_short": scenes
        that were left out} with CLIP [N] at the start of `memory`; {"done": True, "by": who decoded, "refusal": why it
        was not DALI} with the pixels at the start of `memory`; or {"unusable": reason}, with "trace" for an exception
        that nobody foresaw.

    Raises:
        MemoryError.
    """
    try:
        if request["what"] == "probe":
            return {"found": asdict(probe(file))}
        if request["what"] == "measure":
            scenes = measures.Scenes(request["threshold"], request["min_s"])
            clips = measure(file, request["height"], request["width"], scenes)
            if len(clips) > request["most"]:
                raise Unusable(f"too many scenes: {len(clips)}, more than its length allows")
            np.frombuffer(memory, measures.CLIP, len(clips))[:] = clips
            return {"done": True, "clips": len(clips), "frames": scenes.frames, "too_short": scenes.too_short}
        plan = ClipPlan(tuple(request["times_s"]), request["height"], request["width"])
        shape = (len(plan.times_s), plan.height, plan.width, 3)
        clip = np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)
        refusal = ""
        if request["by"] == "dali":
            try:
                decode_dali(file, plan, clip, request["gpu"])
                return {"done": True, "by": "dali"}
            except Unusable as error:
                refusal = str(error)
        decode(file, plan, clip)
        return {"done": True, "by": "pyav", "refusal": refusal}
    except Unusable as error:
        return {"unusable": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # a hole in our handling of broken files; it must not cost the other files
        text = " ".join(str(error).split())[:500]
        return {"unusable": f"unexpected: {type(error).__name__}: {text}", "trace": traceback.format_exc()[-4000:]}
