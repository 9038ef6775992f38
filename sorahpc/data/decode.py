"""From a video file to a clip: what is in the file, which frames at which size, and their pixels.

PyAV on the CPU, one thread a file: parallelism is over files. A GPU decoder has its place behind `decode`, with the
same contract.

Files are untrusted. They are opened as files, not by name (a name is never read as a URL or a pattern), only by the
demuxers of video containers (a playlist named .mp4 could make FFmpeg open other files), must be regular (a FIFO would
hang), and declare at most MAX_PIXELS.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from sorahpc.config import ClipConfig
from sorahpc.data.manifest import Video, shown
from sorahpc.errors import ConfigError, DataError

MAX_PIXELS = 8192 * 8192  # a frame; twice 8K. A header may claim any size, and the decoder would allocate it
MAX_FRAMES = 10_000_000  # a file; 4 days at 30 fps
TIME_TOLERANCE_S = 1e-3  # containers round times, Matroska to 1 ms

_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf"
_AVCOL_SPC_UNSPECIFIED = 2
# Chroma interpolated instead of repeated: half the error at hard edges, for a tenth of the time.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class VideoError(DataError):
    """A video that can't be used. `reason` is ``kind`` or ``kind: detail``; the message has the path before it."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.path = str(path)
        self.reason = reason


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


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a regular file for reading, never waiting for it.

    Raises:
        VideoError: it is missing, a dangling or looping link, a FIFO, socket, device or folder, or not readable.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a FIFO without a writer would hang
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise VideoError(path, "dangling link" if os.path.islink(path) else "no such file") from None
        if error.errno == errno.ELOOP:
            raise VideoError(path, "link that leads back to itself") from None
        if error.errno == errno.ENXIO:
            raise VideoError(path, "not a regular file: a socket") from None
        raise VideoError(path, f"can't read: {error.strerror}") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise VideoError(path, f"not a regular file: {kinds.get(stat.S_IFMT(mode), 'special')}")
    return os.fdopen(fd, "rb")


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, ready to decode. Raises VideoError."""
    with open_regular(path) as file:
        head = file.read(4096)
        file.seek(0)
        if not head:
            raise VideoError(path, "empty file: 0 bytes")
        try:
            container = av.open(
                file,
                format=None,
                options={"format_whitelist": _DEMUXERS},
                metadata_errors="replace",
                buffer_size=1 << 16,
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(path, _why_not_opened(head, error)) from None
        with container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                others = sorted({s.type for s in container.streams})
                raise VideoError(path, f"no video stream: only {' and '.join(others) or 'an empty container'}")
            stream = streams[0]
            context = stream.codec_context
            if context is None:
                raise VideoError(path, "no decoder: FFmpeg does not know the codec")
            if context.width * context.height > MAX_PIXELS:
                raise VideoError(
                    path, f"too large: {context.width}x{context.height} px, at most {MAX_PIXELS} px a frame"
                )
            context.thread_count = 1
            context.options = {"max_pixels": str(MAX_PIXELS)}  # the stream's own headers may claim another size
            try:
                yield container, stream
            except OSError as error:  # of the file system; FFmpeg's own are caught where they arise
                raise VideoError(path, f"can't read: {error.strerror}") from None


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
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# probing


def probe(path: Path | str) -> Probe:
    """Read a file through: count its frames, hold them against its index, decode the first.

    Raises:
        VideoError: anything that makes it unusable, with its reason.
    """
    with _opened(path) as (container, stream):
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
                raise VideoError(path, _cut(packets, stream.frames, _ffmpeg_words(error))) from None
            if packet.size and packet.pts is not None and packet.time_base:
                all_end = max(all_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise VideoError(path, _cut(packets, stream.frames, "an incomplete packet"))
            if packet.size:
                packets += 1
                if packets > MAX_FRAMES:
                    raise VideoError(path, f"too long: more than {MAX_FRAMES} frames")
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
                    raise VideoError(path, f"can't decode the first frame: {_ffmpeg_words(error)}") from None
        indexed = stream.frames if "mov" in container.format.name else 0  # AVI's header counts dropped frames too
        if packets < indexed:
            raise VideoError(path, _cut(packets, indexed, "end of file"))
        if picture is None or not frames:
            raise VideoError(path, "no frames: the video stream is empty")
        if picture.width * picture.height > MAX_PIXELS:
            raise VideoError(path, f"too large: {picture.width}x{picture.height} px, at most {MAX_PIXELS} px a frame")
        if (
            not indexed and container.duration
        ):  # no exact count: the header's duration is all there is to hold it against
            # Some writers measure the duration from time 0, others from the first frame: believe the kinder one.
            end_us = all_end * 1e6 - min(container.start_time or 0, 0)
            missing_s = (container.duration - end_us) / 1e6
            if missing_s > max(2.5 / float(rate) if rate else 0.1, 0.02 * container.duration / 1e6):
                raise VideoError(
                    path, f"truncated: ends {missing_s:.2f} s before the {container.duration / 1e6:.2f} s of its header"
                )
        if timed:
            assert first_pts is not None and last_end is not None
            duration_s = float((last_end - first_pts) * stream.time_base)
        else:
            duration_s = float(frames / rate) if rate else 0.0
        width, height = _display_size(picture, stream)
        if abs(picture.rotation) % 180 == 90:
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
# planning


def plan_clip(
    video: Video,
    clip: ClipConfig,
    *,
    stride: tuple[int, int, int],
    patch_hw: tuple[int, int],
    floor_frames: Callable[[int], int],
) -> ClipPlan:
    """Choose the frames and the size of a video's clip.

    Frames: from the start, one every 1 / clip.fps seconds as long as the video lasts, at most clip.max_frames, then as
    many as the VAE takes. A video with fewer frames a second than clip.fps repeats frames; its motion keeps its speed.

    Size: height and width are multiples of stride x patch, their product at most clip.max_area_px, and neither exceeds
    the video's: nothing is scaled up, since that adds tokens and no detail. Among these the one that keeps most of the
    picture at most resolution: share of the picture left after the crop, times square root of the area.

    Args:
        video: a row of the manifest.
        clip: the wishes.
        stride: (t, h, w) of the VAE.
        patch_hw: (ph, pw) of the model.
        floor_frames: largest number of frames at most n that the VAE takes, at least 1.

    Raises:
        VideoError: the video is rejected, too short or too small; with its reason.
        ConfigError: clip.max_area_px is under one patch, for any video.
    """
    if not video.ok:
        raise VideoError(video.path, video.reason)
    available = max(1, math.ceil(video.duration_s * clip.fps - TIME_TOLERANCE_S * clip.fps))
    num_frames = floor_frames(min(available, clip.max_frames))
    if num_frames < clip.min_frames:
        raise VideoError(
            video.path,
            f"too short: {video.duration_s:.3g} s, {num_frames} frames at clip.fps={clip.fps:g}; "
            f"clip.min_frames={clip.min_frames}",
        )
    height, width = _plan_size(video, clip.max_area_px, stride[1] * patch_hw[0], stride[2] * patch_hw[1])
    return ClipPlan(tuple(i / clip.fps for i in range(num_frames)), height, width)


def _plan_size(video: Video, max_area_px: int, unit_h: int, unit_w: int) -> tuple[int, int]:
    if unit_h * unit_w > max_area_px:
        raise ConfigError(
            f"clip.max_area_px: at least {unit_h * unit_w} = one patch of {unit_h}x{unit_w} px "
            f"(VAE stride x model patch), found {max_area_px}"
        )
    most_h, most_w = video.height // unit_h, video.width // unit_w
    if most_h < 1 or most_w < 1:
        raise VideoError(
            video.path, f"too small: {video.width}x{video.height} px, under one patch of {unit_w}x{unit_h} px"
        )
    best, best_score = (0, 0), -1.0
    for rows in range(1, min(most_h, max_area_px // (unit_h * unit_w)) + 1):
        height = rows * unit_h
        largest = min(most_w, max_area_px // (height * unit_w))
        wanted = height * video.width / video.height / unit_w  # columns that keep the aspect
        for columns in {min(max(1, c), largest) for c in (math.floor(wanted), math.ceil(wanted))}:
            width = columns * unit_w
            ratio = (width * video.height) / (height * video.width)
            score = min(ratio, 1 / ratio) * math.sqrt(height * width)
            if score > best_score:
                best, best_score = (height, width), score
    return best


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def decode(path: Path | str, plan: ClipPlan) -> np.ndarray:
    """The pixels of a plan.

    For each time the frame on screen then: the last one presented at or before it. Rotation and pixel aspect are
    honoured, the picture is scaled to cover the size and cropped in the middle. Colours are converted as the stream
    flags them; unflagged ones by BT.709 from 720 lines or 1280 columns on, else by BT.601, as players do.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        VideoError: the file can't be read, is corrupt, or ends before the plan does.
    """
    times_s = np.asarray(plan.times_s)
    clip = np.empty((len(times_s), plan.height, plan.width, 3), np.uint8)
    done = count = 0
    on_screen, ends_s = None, 0.0
    with _opened(path) as (container, stream):
        reformatter = VideoReformatter()  # shared: one a frame would cost 2.4 times as long

        def show(frame: Any, until_s: float) -> int:
            """Fill the times before `until_s` that are still open with this frame."""
            last = int(np.searchsorted(times_s, until_s - TIME_TOLERANCE_S))
            if last > done:
                clip[done:last] = _pixels(frame, stream, plan, reformatter)
            return max(done, last)

        for frame, begins_s, length_s in _presented(path, container, stream):
            if on_screen is not None:
                done = show(on_screen, begins_s)
                if done == len(times_s):
                    return clip
            on_screen, ends_s, count = frame, begins_s + length_s, count + 1
        if on_screen is None:
            raise VideoError(path, "no frames: nothing could be decoded")
        done = show(on_screen, ends_s + 2 * TIME_TOLERANCE_S)
    if done < len(times_s):
        raise VideoError(
            path, f"truncated: ends at {ends_s:.3f} s after {count} frames, the clip needs {times_s[done]:.3f} s"
        )
    return clip


def _presented(path: Path | str, container: Any, stream: Any) -> Iterator[tuple[Any, float, float]]:
    """Decoded frames, each with when it comes on screen, from the first one, and how long it stays, in seconds."""
    rate = stream.average_rate or stream.guessed_rate
    step_s = float(1 / rate) if rate else 0.0
    start_s = None
    frames = container.decode(stream)
    for count in itertools.count():
        try:
            frame = next(frames, None)
        except av.FFmpegError as error:
            raise VideoError(path, f"corrupt: after {count} frames: {_ffmpeg_words(error)}") from None
        if frame is None:
            return
        if frame.is_corrupt:
            raise VideoError(path, f"corrupt: frame {count} has errors")
        time_s = count * step_s if frame.pts is None else float(frame.pts * frame.time_base)
        start_s = time_s if start_s is None else start_s
        yield frame, time_s - start_s, float(frame.duration * frame.time_base) if frame.duration else step_s


def _pixels(frame: Any, stream: Any, plan: ClipPlan, reformatter: VideoReformatter) -> np.ndarray:
    """uint8 [H, W, 3] of the plan's size: scaled to cover, cropped in the middle, upright."""
    quarters = round(frame.rotation / 90) % 4  # counter-clockwise
    height, width = (plan.width, plan.height) if quarters % 2 else (plan.height, plan.width)
    shown_w, shown_h = _display_size(frame, stream)
    scale = max(width / shown_w, height / shown_h)
    scaled_w, scaled_h = max(width, round(shown_w * scale)), max(height, round(shown_h * scale))
    colorspace = None  # the frame's own
    if not frame.format.is_rgb and frame.colorspace == _AVCOL_SPC_UNSPECIFIED:
        hd = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) >= 720
        colorspace = Colorspace.ITU709 if hd else Colorspace.ITU601
    rgb = reformatter.reformat(
        frame,
        width=scaled_w,
        height=scaled_h,
        format="rgb24",
        src_colorspace=colorspace,
        dst_color_range=ColorRange.JPEG,
        interpolation=_INTERPOLATION,
        threads=1,
    ).to_ndarray()
    top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
    return np.rot90(rgb[top : top + height, left : left + width], quarters)
