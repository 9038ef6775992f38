"""What is in a video file, and the pixels of a clip of it: PyAV on the CPU, one thread a file.

This is what runs in the child process that serves `sorahpc.data.decode`. It is handed open files, imports neither
torch nor what reads configurations, and says of a file that it can't use why.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import VideoReformatter

from sorahpc.data import measures
from sorahpc.data.container import MAX_PIXELS, Unusable, ffmpeg_words, opened
from sorahpc.data.pictures import SMALL, display_size, pixels, turn_of

MAX_FRAMES = 10_000_000  # a file; 4 days at 30 fps
TIME_TOLERANCE_S = 1e-3  # containers round times, Matroska to 1 ms
SEEK_FROM_S = 5.0  # a clip that begins later is read from a key frame; for less, decoding all is as fast
_BEFORE_S = 1.0  # so much before it: a frame that is deinterlaced depends on those beside it


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
# probing


def probe(file: IO[bytes]) -> Probe:
    """Read a file through: count its frames, hold them against its index, decode the first.

    Raises:
        Unusable: with the reason. MemoryError.
    """
    with opened(file) as (container, stream):
        packets = frames = 0
        first_pts = last_pts = None  # of the video, in its time base
        last_end = 0
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
                raise Unusable(_cut(packets, stream.frames, ffmpeg_words(error))) from None
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
                        first_pts = packet.pts if first_pts is None else min(first_pts, packet.pts)
                        # Of the frame that is shown last, as decoding will have it. An mp4's lengths are from packet
                        # to packet in the order of decoding: of a variable rate, those of others may reach beyond.
                        if last_pts is None or packet.pts >= last_pts:
                            last_pts, last_end = packet.pts, packet.pts + (packet.duration or step)
            if picture is None:
                try:
                    picture = next(iter(packet.decode()), None)
                except av.FFmpegError as error:
                    raise Unusable(f"can't decode the first frame: {ffmpeg_words(error)}") from None
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
            assert first_pts is not None
            duration_s = float((last_end - first_pts) * stream.time_base)
        else:
            duration_s = float(frames / rate) if rate else 0.0
        pixels(picture, turn_of(picture), stream, (16, 16), VideoReformatter())  # can it be converted?
        width, height = display_size(picture, stream)
        if turn_of(picture)[0] % 2:
            width, height = height, width
        fps = frames / duration_s if duration_s > 0 else 0.0
        return Probe(frames, fps, round(width), round(height), stream.codec_context.codec.canonical_name, duration_s)


def _cut(found: int, expected: int, why: str) -> str:
    counted = f"{found} of {expected} frames" if expected else f"{found} frames"
    return f"truncated or corrupt: {counted}, then {why}"


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
    with opened(file) as (container, stream):
        reformatter = VideoReformatter()

        def show(frame: Any, begins_s: float, until_s: float) -> None:
            def picture() -> np.ndarray:
                return pixels(frame, turn_of(frame), stream, (height, width), reformatter, SMALL)

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
    middle. Colours are converted as the stream flags them; where it flags no matrix by BT.2020 if they are HDR or have
    BT.2020's primaries, by BT.709 from 720 lines or 1280 columns on, else by BT.601, as players do. Of HDR (PQ, HLG)
    what is brighter than the reference white of ITU-R BT.2408, 203 cd/m2, is white.

    Transparency is left out, as by FFmpeg's own way to rgb24: a pixel has the colour that the file holds for it, even
    where nothing of it would be seen.

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
    with opened(file) as (container, stream):
        reformatter = VideoReformatter()  # shared: one a frame would cost 2.4 times as long

        def show(frame: Any, until_s: float) -> int:
            """Fill the times before `until_s` that are still open with this frame."""
            last = int(np.searchsorted(times_s, until_s - TIME_TOLERANCE_S))
            if last > done:
                clip[done:last] = pixels(frame, turn_of(frame), stream, (plan.height, plan.width), reformatter)
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
        raise Unusable(f"corrupt: after {count} frames: {ffmpeg_words(error)}") from None


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
        raise Unusable(f"can't deinterlace: {ffmpeg_words(error)}") from None
