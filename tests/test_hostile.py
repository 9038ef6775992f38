"""Hundreds of bad files of every kind: each costs itself alone, and the good ones beside them come out bit for bit."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import write_t5, write_vae
from videos import NOTHING, numbered, write_video

from sorahpc.config import ClipConfig, Config
from sorahpc.configfile import parse_config
from sorahpc.data import isolate
from sorahpc.data.decode import ClipPlan, VideoError, decode, plan_clip, probe
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import Video, read_manifest
from sorahpc.jobs import encode, prepare
from sorahpc.models.lengths import Lengths
from sorahpc.runs import Task

SEEDS = [
    ("a.mp4", "libx264", "yuv420p"),
    ("b.mkv", "libx264", "yuv420p10le"),
    ("c.webm", "libvpx-vp9", "yuv420p"),
    ("d.avi", "mpeg4", "yuv420p"),
    ("e.mov", "mjpeg", "yuvj420p"),
    ("f.mpg", "mpeg2video", "yuv420p"),
    ("g.flv", "flv", "yuv420p"),
    ("h.mkv", "ffv1", "bgr0"),
]
NAMES = ["plain", "with space", "quo\"te's", "new\nline", "-dash", "%03d", "pipe:0", "é☃𝄞", "a" * 200, "$(touch x)`;"]
PIXELS = 100_000  # a side


def seeds(folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    made = {}
    for name, codec, pix_fmt in SEEDS:
        fps = 25 if name.endswith((".mpg", ".flv")) else 8
        made[name] = write_video(folder / name, numbered(24), fps, codec=codec, pix_fmt=pix_fmt).read_bytes()
    made["i.mp4"] = write_video(folder / "i.mp4", numbered(24), faststart=True, audio=True).read_bytes()
    made["empty.mp4"] = write_video(folder / "empty.mp4", NOTHING, audio=True).read_bytes()
    return made


def patched(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """`data` with `value` at `offset` after each `mark`."""
    out, at = bytearray(data), -1
    while (at := data.find(mark, at + 1)) >= 0:
        out[at + offset : at + offset + len(value)] = value
    assert bytes(out) != data, mark
    return bytes(out)


def bad_files(made: dict[str, bytes], cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """(suffix, content). Some of them may still be whole videos: a flipped bit can be without consequence."""
    rng = np.random.default_rng(0)
    for name, data in made.items():
        suffix = name[name.index(".") :]
        for k in range(cuts):
            yield suffix, data[: len(data) * (k + 1) // (cuts + 1) + int(rng.integers(-7, 8))]
        for k in range(flips):
            broken = bytearray(data)
            area = len(data) if k % 2 else min(len(data), 1000)  # headers are small, and what breaks parsers
            for where in rng.integers(0, area, size=1 + 3 * (k % 5)):
                broken[where] ^= 1 << int(rng.integers(8))
            yield suffix, bytes(broken)
        half = len(data) // 2
        yield suffix, data[:half] + bytes(half)  # as a download that was interrupted, on a file of full size
        yield suffix, data[half:]
        yield suffix, data[:half] + rng.bytes(200) + data[half:]
        yield suffix, data + data[: len(data) // 3]
        yield {".mp4": ".mkv", ".mkv": ".avi", ".webm": ".mp4"}.get(suffix, ".mp4"), data[: half * 3 // 2]
    mp4, mkv, avi = made["a.mp4"], made["b.mkv"], made["d.avi"]
    long = b"\xff\xff\xff\xf0"
    big = struct.pack(">I", 65535 << 16)
    yield ".mp4", patched(mp4, b"tkhd", 80, big + big)
    yield ".mp4", patched(mp4, b"avc1", 28, struct.pack(">HH", 65535, 65535))
    yield ".mp4", patched(patched(mp4, b"avc1", 28, struct.pack(">HH", 65535, 65535)), b"avcC", 4, bytes(40))
    yield ".avi", patched(avi, b"avih", 8 + 32, struct.pack("<II", PIXELS, PIXELS))
    yield ".avi", patched(avi, b"strf", 8 + 4, struct.pack("<ii", PIXELS, PIXELS))
    yield ".mkv", patched(mkv, b"\xb0\x81\x40\xba\x81\x40", 0, b"\xb0\x81\xff\xba\x81\xff")
    yield ".mp4", patched(mp4, b"mvhd", 20, long)
    yield ".mp4", patched(mp4, b"mdhd", 20, long)
    yield ".mp4", patched(mp4, b"stts", 12, b"\x00\x00\x00\x18" + long)
    yield ".mp4", patched(mp4, b"stsz", 12, b"\x7f\xff\xff\xff")  # sizes of two billion frames
    yield ".mp4", patched(mp4, b"stco", 12, b"\x00\x00\x00\x00")
    yield ".avi", patched(avi, b"avih", 8 + 16, b"\xff\xff\xff\x7f")
    for text in (b"", b"\0", b"text\n", b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n"):
        yield ".mp4", text
    yield ".mp4", b"<MPD><Period/></MPD>" * 50
    yield ".mp4", bytes(100_000)
    yield ".mkv", rng.bytes(100_000)
    yield ".mp4", b"\x00\x00\x00\x08moov" * 20_000
    yield ".mp4", b"\x00\x00\x00\x00moov" + (b"\xff\xff\xff\xf0trak" * 2000)


def config_for(folder: Path, run: str, videos: str) -> Config:
    return parse_config(
        {
            "run": run, "runs_dir": str(folder / "runs"),
            "prepare": {"videos": str(folder / videos), "resources": {"cpus_per_task": 2}},
            "clip": {"fps": 8, "max_frames": 9, "max_area_px": 4096},
            "vae": {"path": str(folder / "vae")}, "text": {"path": str(folder / "t5"), "max_tokens": 32},
            "encode": {"clips_per_shard": 16},
        }
    )  # fmt: skip


def manifest(config: Config) -> dict[str, Video]:
    prepare.run(config, Task(config.run_dir, "prepare"))
    return {os.path.basename(v.path): v for v in read_manifest(config.run_dir / "manifest.parquet")}


def clip_of(video: Video, clip: ClipConfig) -> np.ndarray:
    return decode(
        video.path,
        plan_clip(video, clip, stride=(4, 8, 8), patch=(1, 1, 1), lengths=Lengths(4, 4)),
    )


def fill(folder: Path, cuts: int, flips: int) -> tuple[list[str], int]:
    """Folders `clean` and `all` of videos; names of the good ones, and the number of bad ones."""
    made = seeds(folder / "seeds")
    good = []
    for i, (name, data) in enumerate(list(made.items())[:8]):
        good.append(f"good {i} {NAMES[i]}{name[1:]}")
        for where in ("clean", "all"):
            (folder / where).mkdir(exist_ok=True)
            (folder / where / good[-1]).write_bytes(data)
            (folder / where / good[-1]).with_suffix(".txt").write_text(f"bars that count, {i}")
    bad = 0
    for suffix, data in bad_files(made, cuts, flips):
        path = folder / "all" / f"{bad:04d} {NAMES[bad % len(NAMES)]}{suffix}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"caption {bad}")
        bad += 1
    for name in (b"bad \xff\xfe.mp4", b"\x80.mkv"):
        fd = os.open(os.fsencode(folder / "all") + b"/" + name, os.O_CREAT | os.O_WRONLY)
        os.write(fd, made["a.mp4"])
        os.close(fd)
    os.mkfifo(folder / "all/fifo.mp4")
    (folder / "all/endless.mp4").symlink_to("/dev/zero")
    (folder / "all/loop.mp4").symlink_to("loop.mp4")
    for name in ("fifo", "endless", "loop"):
        (folder / f"all/{name}.txt").write_text("caption")
    return good, bad + 5


def check(folder: Path, good: list[str], bad: int) -> tuple[dict[str, Video], dict[str, Video], Config, Config]:
    isolate.end_all()
    clean_config, all_config = config_for(folder, "clean", "clean"), config_for(folder, "all", "all")
    clean = manifest(clean_config)
    assert sorted(clean) == sorted(good) and all(v.ok for v in clean.values())
    expected = {name: clip_of(video, clean_config.clip) for name, video in clean.items()}

    def flood() -> None:
        while not stop.is_set():
            try:
                fd = os.open(folder / "all/fifo.mp4", os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, bytes(4096))
                os.close(fd)
            except OSError:
                stop.wait(0.01)

    stop = threading.Event()
    writer = threading.Thread(target=flood)  # an endless stream, for whoever would read it
    writer.start()
    try:
        rows = manifest(all_config)
    finally:
        stop.set()
        writer.join()
    assert len(rows) == len(good) + bad
    read = 0
    for name, video in rows.items():
        if name in expected:
            assert video.ok and video.key == clean[name].key
            assert (clip_of(video, all_config.clip) == expected[name]).all(), name
            continue
        if not video.ok:
            assert video.reason and "\n" not in video.reason and not video.reason.startswith("unexpected"), video
            continue
        try:
            frames = clip_of(video, all_config.clip)
        except VideoError as error:
            assert "\n" not in error.reason and not error.reason.startswith("unexpected"), error
        else:
            assert frames.dtype == np.uint8 and frames.ndim == 4
            read += 1
    assert read < bad / 2, "most of them are bad"
    return clean, rows, clean_config, all_config


def test_bad_files_cost_themselves_alone(tmp_path: Path) -> None:
    good, bad = fill(tmp_path, cuts=8, flips=18)
    assert bad >= 300
    check(tmp_path, good, bad)


@pytest.mark.slow
def test_latents_of_good_files_are_bit_identical_beside_a_thousand_bad_ones(tmp_path: Path) -> None:
    good, bad = fill(tmp_path, cuts=25, flips=80)
    assert bad >= 1000
    _, rows, clean_config, all_config = check(tmp_path, good, bad)
    write_t5(tmp_path / "t5", tmp_path / "clean")
    write_vae(tmp_path / "vae")
    for config in (clean_config, all_config):
        encode.run(config, Task(config.run_dir, "encode"))
    a, b = LatentCache(clean_config.cache_dir), LatentCache(all_config.cache_dir)
    assert len(a) == len(good) <= len(b) < sum(v.ok for v in rows.values()) + 1
    for i, key in enumerate(a.keys):
        (x, x_texts), (y, y_texts) = a.read(i), b.read(b.keys.index(key))
        assert (x == y).all() and (x_texts["text"] == y_texts["text"]).all()


def test_a_picture_of_any_claimed_size_is_refused_by_its_header(tmp_path: Path) -> None:
    vp8 = write_video(tmp_path / "a.mkv", numbered(3), codec="libvpx").read_bytes()
    raw = write_video(tmp_path / "a.avi", numbered(3), codec="rawvideo", pix_fmt="bgr24").read_bytes()
    claims = {
        "b.mkv": patched(vp8, b"\x9d\x01\x2a", 3, struct.pack("<HH", 16383, 16383)),
        "b.avi": patched(raw, b"strf", 8 + 4, struct.pack("<ii", 20_000, 20_000)),
        "c.avi": patched(raw, b"strf", 8 + 4, struct.pack("<ii", PIXELS, PIXELS)),
    }
    for name, data in claims.items():
        path = tmp_path / name
        path.write_bytes(data)
        for use in (probe, lambda p: decode(p, ClipPlan((0.0,), 64, 64))):
            with pytest.raises(VideoError, match=r"too large|no video stream|can't decode the first frame|corrupt"):
                use(path)
        status = Path(f"/proc/{isolate._idle[0].process.pid}/status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) < 1 << 18, "it was decoded at that size"
