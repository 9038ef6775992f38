"""From a video file to a clip: what is in the file, which frames at which size, and their pixels.

Files are untrusted. They are opened here, as files and not by name (a name is never read as a URL or a pattern), and
must be regular (a FIFO would hang). What is in them is looked at by a child process (sorahpc.data.isolate), with the
code of sorahpc.data.child; parallelism is over files, by threads that each ask a child of their own.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sorahpc import files
from sorahpc.config import ClipConfig, ScenesConfig
from sorahpc.data import isolate, measures
from sorahpc.data.frames import TIME_TOLERANCE_S
from sorahpc.data.frames import ClipPlan as ClipPlan
from sorahpc.data.frames import Probe as Probe
from sorahpc.data.manifest import Video, shown
from sorahpc.errors import ConfigError, DataError
from sorahpc.models.lengths import Lengths

log = logging.getLogger(__name__)

# How long a file may take. Generous: a busy machine or file system must not cost a good file. Probing reads it whole,
# at 200 MB/s or more where the machine is ours alone; decoding takes 0.1 to 3 s a second of 4K video.
PATIENCE_S = 60.0
PROBE_BYTES_PER_S = 10e6
DECODE_S_PER_S = 60.0
# Reasons that are of the machine and its file system as likely as of the file: another time it may be read.
PASSING = ("can't read", "took longer", "decoder killed", "needs more than")
CHANGED = "changed since prepare looked at it: run prepare and encode again"
# Of these, seconds later is too soon: a mount that a node lacks, a copy that is under way.
AWAY = ("no such file", "dangling link", CHANGED)


def may_pass_soon(reason: str) -> bool:
    """Whether it is worth while to try again at once."""
    return reason.startswith(PASSING)


def may_pass(reason: str) -> bool:
    """Whether `cache retry` has the clip tried again: its file may be there, and as it was, by then."""
    return reason.startswith((*PASSING, *AWAY))


class VideoError(DataError):
    """A video that can't be used. `reason` is ``kind`` or ``kind: detail``; the message has the path before it."""

    def __init__(self, path: Path | str, reason: str, *, from_file: bool = True) -> None:
        super().__init__(f"{shown(path)}: {reason}")
        self.from_file = from_file  # what was read said so; else it is what became of the decoder
        self.path = str(path)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------------------
# opening


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a regular file for reading, never waiting for it.

    Raises:
        VideoError: it is missing, a dangling or looping link, a FIFO, socket, device or folder, or not readable.
    """
    try:
        return files.open_regular(path)
    except files.NotRegular as error:
        raise VideoError(path, str(error.strerror)) from None
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise VideoError(path, "dangling link" if os.path.islink(path) else "no such file") from None
        if error.errno == errno.ELOOP:
            raise VideoError(path, "link that leads back to itself") from None
        raise VideoError(path, f"can't read: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# planning


def plan_clip(
    video: Video,
    clip: ClipConfig,
    *,
    stride: tuple[int, int, int],
    patch: tuple[int, int, int],
    lengths: Lengths,
) -> ClipPlan:
    """Choose the frames and the size of a video's clip.

    Frames: from the start of the scene, one every 1 / clip.fps seconds as long as it lasts, at most clip.max_frames,
    then as many as the VAE takes and the patch divides. A video with fewer frames a second than clip.fps repeats
    frames; its motion keeps its speed.

    Size: height and width are multiples of stride x patch, their product at most clip.max_area_px, and neither exceeds
    the video's: nothing is scaled up, since that adds tokens and no detail. Among these the one that keeps most of the
    picture at most resolution: share of the picture left after the crop, times square root of the area.

    Tokens: a clip of more than clip.max_tokens is made smaller, as long as its area stays at clip.min_area_px or more
    (one patch a frame, where that is None); then shorter.

    Args:
        video: a row of the manifest.
        clip: the wishes.
        stride: (t, h, w) of the VAE.
        patch: (pt, ph, pw) of the model.
        lengths: which the VAE takes.

    Raises:
        VideoError: the video is rejected: too short, too small, or too many tokens even when shortest; with its reason.
        ConfigError: clip.max_area_px is under one patch, for any video.
    """
    if not video.ok:
        raise VideoError(video.path, video.reason)
    available = max(1, math.ceil(video.duration_s * clip.fps - TIME_TOLERANCE_S * clip.fps))
    shorter = _from_longest(min(available, clip.max_frames), patch[0], lengths)
    longest = next(shorter, 0)
    if longest < clip.min_frames or longest == 0:
        raise VideoError(
            video.path,
            f"too short: {video.duration_s:.3g} s, {longest} frames at clip.fps={clip.fps:g}; "
            f"clip.min_frames={clip.min_frames}",
        )
    unit_h, unit_w = stride[1] * patch[1], stride[2] * patch[2]
    whole = _plan_size(video, clip.max_area_px, unit_h, unit_w)
    least = max(unit_h * unit_w, min(clip.min_area_px or 0, whole[0] * whole[1]))
    for num_frames in itertools.chain([longest], shorter):
        if num_frames < clip.min_frames:
            break
        height, width = whole
        layers = lengths.latent(num_frames) // patch[0]  # of patches, one after the other in time
        if clip.max_tokens is not None and layers * (height // unit_h) * (width // unit_w) > clip.max_tokens:
            area = clip.max_tokens // layers * unit_h * unit_w
            if area < least:
                continue
            height, width = _plan_size(video, area, unit_h, unit_w)
            if height * width < least:
                continue
        return ClipPlan(tuple(video.start_s + i / clip.fps for i in range(num_frames)), height, width)
    raise VideoError(
        video.path,
        f"too many tokens: over clip.max_tokens={clip.max_tokens} with clip.min_frames={clip.min_frames} "
        f"at {least} px or more (clip.min_area_px)",
    )


def _from_longest(most: int, pt: int, lengths: Lengths) -> Iterator[int]:
    """Lengths in frames that the VAE takes and the patch divides, from `most` down."""
    n = lengths.floor(most)
    while True:
        if lengths.latent(n) % pt == 0:
            yield n
        if n <= 1:
            return
        n = lengths.floor(n - 1)


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
# probing and decoding


def probe(path: Path | str) -> Probe:
    """Read a file through: count its frames, hold them against its index, decode the first.

    Raises:
        VideoError: anything that makes it unusable, with its reason; that it crashed the decoder, took too long or
        needed too much memory too.
        SetupError: the decoder's process can't be started.
    """
    with open_regular(path) as file:
        deadline_s = PATIENCE_S + os.fstat(file.fileno()).st_size / PROBE_BYTES_PER_S
        answer, _ = _ask(path, {"what": "probe"}, file, deadline_s)
    return Probe(**answer["found"])


@dataclass(frozen=True)
class Measured:
    """What decoding a whole file has told."""

    clips: np.ndarray  # measures.CLIP [N]: its clips, in their order
    frames: int  # of the file
    too_short: int  # scenes that are shorter than a clip may be


def measure(path: Path | str, found: Probe, scenes: ScenesConfig | None) -> Measured:
    """Decode a file through at a low resolution, find its scenes, and measure each of them.

    Args:
        found: what `probe` said of it.
        scenes: how to cut it; None: it is one clip.

    Raises:
        VideoError: it is corrupt at any place, crashed the decoder, took too long or needed too much memory.
        SetupError: the decoder's process can't be started.
    """
    height, width = measures.size_of(found.height, found.width)
    most = 1 if scenes is None else math.ceil(found.duration_s / scenes.min_s) + 8
    request = {"what": "measure", "height": height, "width": width, "most": most}
    request |= {"threshold": scenes and scenes.threshold, "min_s": scenes.min_s if scenes else 0.0}
    deadline_s = PATIENCE_S + DECODE_S_PER_S * found.duration_s
    with open_regular(path) as file:
        answer, written = _ask(path, request, file, deadline_s, most * measures.CLIP.itemsize)
    return Measured(written.view(measures.CLIP)[: answer["clips"]], answer["frames"], answer["too_short"])


def decode(path: Path | str, plan: ClipPlan) -> np.ndarray:
    """The pixels of a plan, by PyAV.

    For each time the frame on screen then: the last one presented at or before it. Rotation, mirroring and pixel aspect
    are honoured, fields of interlaced frames are made whole, the picture is scaled to cover the size and cropped in the
    middle. Colours are converted as the stream flags them; where it flags no matrix by BT.2020 if they are HDR or have
    BT.2020's primaries, by BT.709 from 720 lines or 1280 columns on, else by BT.601, as players do. Of HDR (PQ, HLG)
    what is brighter than the reference white of ITU-R BT.2408, 203 cd/m2, is white.

    Transparency is left out, as by FFmpeg's own way to rgb24: a pixel has the colour that the file holds for it, even
    where nothing of it would be seen.

    Returns:
        uint8 [T, H, W, 3], RGB.

    Raises:
        VideoError: the file can't be read, is corrupt, ends before the plan does, crashed the decoder, took too long
        or needed too much memory.
        SetupError: the decoder's process can't be started.
    """
    return decode_by("pyav", path, plan)[0]


def decode_by(decoder: str, path: Path | str, plan: ClipPlan, gpu: int = 0) -> tuple[np.ndarray, str]:
    """As `decode`; with `decoder` ``"dali"`` by DALI where it can read the file, on that GPU where there is one.

    DALI's frames are those of PyAV but for the interpolation of chroma, and for scaling after the way to RGB and not
    before: on the mean at most 1 of 255 levels off, and at most 4 for 99 % of values of natural pictures.

    Returns:
        uint8 [T, H, W, 3], RGB, and who decoded: ``"pyav"`` or ``"dali"``.
    """
    shape = (len(plan.times_s), plan.height, plan.width, 3)
    request = {"what": "decode", "times_s": plan.times_s, "height": plan.height, "width": plan.width}
    request |= {"by": decoder, "gpu": gpu}
    deadline_s = PATIENCE_S + DECODE_S_PER_S * plan.times_s[-1]
    with open_regular(path) as file:
        try:
            answer, pixels = _ask(path, request, file, deadline_s, math.prod(shape))
        except VideoError as error:
            if decoder == "pyav" or error.from_file:
                raise
            log.info("%s: DALI: %s; PyAV reads it", shown(path), error.reason)
            answer, pixels = _ask(path, {**request, "by": "pyav"}, file, deadline_s, math.prod(shape))
    if answer.get("refusal"):
        log.info("%s: read by PyAV: %s", shown(path), shown(answer["refusal"]))
    return pixels.reshape(shape), answer["by"]


def _ask(
    path: Path | str, request: dict[str, Any], file: IO[bytes], deadline_s: float, num_bytes: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    try:
        answer, pixels = isolate.ask(request, file, deadline_s, num_bytes)
    except isolate.Failed as error:
        raise VideoError(path, str(error), from_file=False) from None
    if "unusable" in answer:
        if "trace" in answer:
            log.error("%s: unexpected while reading it:\n%s", shown(path), answer["trace"])
        raise VideoError(path, answer["unusable"])
    return answer, pixels
