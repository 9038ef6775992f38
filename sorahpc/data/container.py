"""A video file is opened, or it is said why not.

Files are untrusted. Only the demuxers of video containers open them (a playlist named .mp4 could make FFmpeg open
other files), only the decoders of DECODERS look at their streams, and a frame has at most MAX_PIXELS.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import av
from av.stream import Disposition

MAX_PIXELS = 8192 * 8192  # a frame; twice 8K. A header may claim any size, and the decoder would allocate it
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf"
# FFmpeg has over 250 video decoders, and its holes are in those that nobody uses. These are what cameras, phones,
# editors and the web write. Names of decoders, since that is what FFmpeg's own list holds.
DECODERS = tuple(
    "h264 hevc vvc av1 libdav1d libaom-av1 vp8 vp9 libvpx libvpx-vp9 mpeg1video mpeg2video mpegvideo mpeg4 h263 flv "
    "msmpeg4v1 msmpeg4v2 msmpeg4 wmv1 wmv2 wmv3 vc1 theora mjpeg prores dnxhd dvvideo ffv1 huffyuv ffvhuff utvideo "
    "rawvideo".split()
)


class Unusable(Exception):
    """A file that can't be used; its text is the reason, ``kind`` or ``kind: detail``."""


@contextmanager
def opened(file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, ready to decode. Raises Unusable."""
    try:
        file.seek(0)
        head = file.read(4096)
        file.seek(0)
    except OSError as error:
        raise Unusable(f"can't read: {error.strerror}") from None
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
        if isinstance(error, OSError) and not isinstance(error, av.FFmpegError):  # of the file system
            raise Unusable(f"can't read: {error.strerror}") from None
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
        if profile := _dolby_vision(container, stream):
            raise Unusable(
                f"Dolby Vision profile {profile}: no picture for other decoders in it; convert it to HDR10 or SDR"
            )
        context.thread_count = 1
        # The stream's own headers may claim another size than the container did.
        context.options = {"max_pixels": str(MAX_PIXELS), "codec_whitelist": ",".join(DECODERS)}
        try:
            yield container, stream
        except OSError as error:  # of the file system; FFmpeg's own are caught where they arise
            raise Unusable(f"can't read: {error.strerror}") from None


# "DOVI configuration record: version: 1.0, profile: 5, level: 6, rpu flag: 1, ..., compatibility id: 0, ..."
_RECORD = re.compile(r"DOVI configuration record: .*\bprofile: (\d+), .*\bcompatibility id: (\d+)")
_INCOMPATIBLE = ("5", "10", "20")  # of HEVC, AV1, MV-HEVC; others have a base layer as of HDR10, HLG or SDR


def _dolby_vision(container: Any, stream: Any) -> str:
    """The profile, where a stream says that its pictures are of IPTPQc2; as YCbCr they would be green and violet.

    Told by the configuration record in the container, which PyAV shows in this text alone; else "".
    """
    if stream.codec_context.codec.canonical_name not in ("hevc", "av1"):
        return ""
    before = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        described = container.dumps_format()
    finally:
        av.logging.set_level(before)
    own = re.search(rf"^  Stream #0:{stream.index}\b.*?(?=^  Stream #|\Z)", described, re.DOTALL | re.MULTILINE)
    found = _RECORD.search(own[0]) if own else None
    return found[1] if found and found[1] in _INCOMPATIBLE and found[2] == "0" else ""


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
    if getattr(error, "errno", None) == errno.EINVAL:  # so FFmpeg says that a format is not on the list
        return f"not a video: of no format that is opened ({_DEMUXERS.replace(',', ' ')}), or its header is broken"
    return f"not a video: {ffmpeg_words(error)}"


def ffmpeg_words(error: Exception) -> str:
    """What FFmpeg says of an error. Raises MemoryError where that is what it was: no fault in the file's content."""
    if getattr(error, "errno", None) == errno.ENOMEM:
        raise MemoryError from error
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
