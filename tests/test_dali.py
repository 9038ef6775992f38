"""DALI and PyAV give the same frames; what DALI can't read, or not right, PyAV reads."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from videos import claim_matrix, cut, numbered, numbers, recording, write_video

from sorahpc.data import dali, isolate
from sorahpc.data.container import Unusable
from sorahpc.data.decode import ClipPlan, VideoError, decode, decode_by
from sorahpc.errors import SetupError
from sorahpc.jobs import encode

INSTALLED = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
if os.environ.get("SORAHPC_REQUIRE_DALI") == "1":
    assert INSTALLED, "SORAHPC_REQUIRE_DALI=1, but DALI is not installed: make dali"
needs_dali = pytest.mark.skipif(not INSTALLED, reason="DALI is not installed: make dali")


def at(height: int, width: int, *times: float) -> ClipPlan:
    return ClipPlan(times, height, width)


def read_by_dali(path: Path, plan: ClipPlan) -> np.ndarray:
    clip, reader = decode_by("dali", path, plan)
    assert reader == "dali"
    return clip


def transcoded(
    path: Path, frames: np.ndarray, codec: str, colorspace: int, color_range: int, color_trc: int = 1
) -> Path:
    """25 frames a second, flagged so and converted so."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    options = {} if codec == "mjpeg" else {"b": "4M", "deadline": "realtime", "cpu-used": "8"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        stream.codec_context.color_trc = color_trc
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=pix_fmt, dst_colorspace=colorspace, dst_color_range=color_range
            )
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@needs_dali
@pytest.mark.parametrize(("codec", "suffix"), [("libvpx-vp9", "webm"), ("libvpx", "mkv"), ("mjpeg", "mov")])
def test_real_pictures_are_the_same_by_both(tmp_path: Path, codec: str, suffix: str) -> None:
    with av.open(str(recording("bikes"))) as container:
        frames = np.stack(
            [f.to_ndarray(format="rgb24") for _, f in zip(range(12), container.decode(video=0), strict=False)]
        )
    for colorspace, color_range in [(1, 1), (5, 1), (5, 2)] if codec == "libvpx-vp9" else [(5, 2)]:
        for crop in ((272, 640), (271, 303)):
            path = transcoded(tmp_path / f"a.{suffix}", frames[:, : crop[0], : crop[1]], codec, colorspace, color_range)
            for size in ((crop[0] // 16 * 16, crop[1] // 16 * 16), (64, 96), (96, 64)):
                plan = at(*size, 0, 0.1, 0.2, 0.21, 0.4)
                error = np.abs(decode(path, plan).astype(int) - read_by_dali(path, plan))
                # Of 255: 0.2 and 1 by the same matrix; 0.8 and 3 where DALI's is taken back in 8 bits.
                assert error.mean() < 1 and np.percentile(error, 99) <= 4, (colorspace, color_range, size)


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_on_a_gpu_pictures_and_their_order_are_the_same_by_both(tmp_path: Path, codec: str) -> None:
    with av.open(str(recording("bikes"))) as container:
        frames = np.stack(
            [f.to_ndarray(format="rgb24") for _, f in zip(range(12), container.decode(video=0), strict=False)]
        )
    for colorspace, color_range in ((1, 1), (5, 1), (5, 2)):
        path = transcoded(tmp_path / "a.mp4", frames[:, :272, :640], codec, colorspace, color_range)
        for plan in (at(272, 640, 0, 0.1, 0.2, 0.21, 0.4), at(64, 96, 0.2, 0.4)):
            error = np.abs(decode(path, plan).astype(int) - read_by_dali(path, plan))
            assert error.mean() < 1 and np.percentile(error, 99) <= 4, (colorspace, color_range)
    counted = write_video(tmp_path / "b.mp4", numbered(60, 160, 160), fps=25, codec=codec, options={"bf": "3"})
    assert numbers(read_by_dali(counted, at(160, 160, *(i / 25 for i in range(60))))) == list(range(60))


@needs_dali
def test_frames_are_chosen_by_their_times(tmp_path: Path) -> None:
    steady = write_video(tmp_path / "a.webm", numbered(50), fps=25, codec="libvpx-vp9", audio=True)
    assert numbers(read_by_dali(steady, at(64, 64, *(i / 8 for i in range(13))))) == [i * 25 // 8 for i in range(13)]
    hidden = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
    for codec in ("libvpx", "libvpx-vp9"):  # with frames that are never shown
        path = write_video(tmp_path / "b.webm", numbered(60), fps=25, codec=codec, options=hidden)
        assert numbers(read_by_dali(path, at(64, 64, *(i / 25 for i in range(60))))) == list(range(60))
    times = [Fraction(t, 1000) for t in (5000, 5040, 5080, 6000, 6040, 6900, 7500, 7540)]
    path = write_video(tmp_path / "c.mkv", numbered(8), times=times, codec="libvpx-vp9")
    plan = at(64, 64, 0, 0.04, 0.5, 0.999, 1.0, 1.8, 2.0, 2.51)
    assert numbers(read_by_dali(path, plan)) == numbers(decode(path, plan)) == [0, 1, 2, 3, 3, 4, 5, 6]


@needs_dali
@pytest.mark.parametrize(
    ("codec", "suffix", "size", "matrix"),
    [
        ("libvpx-vp9", "webm", (96, 128), 5), ("libvpx", "webm", (96, 128), 5), ("mjpeg", "avi", (96, 128), 5),
        ("libvpx-vp9", "webm", (128, 192), 1),
    ],
)  # fmt: skip
def test_a_stream_that_goes_on_in_another_size_or_colour_space_is_read_by_pyav(
    tmp_path: Path, codec: str, suffix: str, size: tuple[int, int], matrix: int
) -> None:
    """As calls and screens are recorded, whose size follows the network and the window."""
    first = transcoded(tmp_path / f"a.{suffix}", numbered(6, 128, 192), codec, 5, 2 if codec == "mjpeg" else 1)
    second = transcoded(tmp_path / f"b.{suffix}", numbered(6, *size), codec, matrix, 2 if codec == "mjpeg" else 1)
    path, end = tmp_path / f"both.{suffix}", 0
    with av.open(str(path), "w") as joined:
        for part in (first, second):
            with av.open(str(part)) as container:
                stream = joined.streams.video[0] if end else joined.add_stream_from_template(container.streams.video[0])
                packets = [p for p in container.demux(video=0) if p.size]
                step = packets[1].pts - packets[0].pts
                for packet in packets:
                    packet.pts, packet.dts, packet.stream = packet.pts + end, packet.dts + end, stream
                    joined.mux(packet)
                end += 6 * step
    plan = at(64, 96, *(i / 25 for i in range(12)))
    clip, reader = decode_by("dali", path, plan)
    assert reader == "pyav" and numbers(clip) == [*range(6), *range(6)] and (clip == decode(path, plan)).all()


@needs_dali
def test_turned_and_stretched_pictures_are_shown_as_by_pyav(tmp_path: Path) -> None:
    frames = numbered(5, height=48, width=80)
    frames[:, :16] = (230, 40, 40)
    for matrix in ((0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)):
        path = write_video(tmp_path / "a.mov", frames, codec="mjpeg", pix_fmt="yuvj420p")
        claim_matrix(path, matrix)
        plan = at(80, 48, 0, 0.25)
        assert np.abs(decode(path, plan).astype(int) - read_by_dali(path, plan)).mean() < 3  # hard edges, smeared
    wide = write_video(tmp_path / "b.mkv", numbered(5), codec="libvpx-vp9", aspect=Fraction(2))
    assert np.abs(decode(wide, at(64, 128, 0)).astype(int) - read_by_dali(wide, at(64, 128, 0))).mean() < 3


@needs_dali
def test_what_dali_can_not_read_right_is_read_by_pyav_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    green = np.tile(np.array((0, 255, 0), np.uint8), (3, 64, 64, 1))
    files = {
        "h264 is not for DALI on the CPU": write_video(tmp_path / "a.mp4", numbered(9)),
        "yuv444p is not for DALI": write_video(tmp_path / "b.webm", numbered(9), codec="libvpx-vp9", pix_fmt="yuv444p"),
        "interlaced, HDR or of wide gamut": transcoded(
            tmp_path / "d.webm", green // 2, "libvpx-vp9", 1, 1, color_trc=16
        ),
        "colours beyond BT.601's RGB": transcoded(tmp_path / "c.webm", green, "libvpx-vp9", 1, 1),
    }
    for why, path in files.items():
        with caplog.at_level(logging.INFO):
            clip, reader = decode_by("dali", path, at(64, 64, 0))
        assert reader == "pyav" and (clip == decode(path, at(64, 64, 0))).all()
        assert caplog.messages[-1].startswith(f"{path}: read by PyAV: ") and why in caplog.messages[-1]
    assert np.abs(decode(files["colours beyond BT.601's RGB"], at(64, 64, 0)).astype(int) - green[0]).max() <= 4


@needs_dali
def test_a_file_that_is_cut_off_is_refused_and_one_that_kills_dali_is_read_by_pyav(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_video(tmp_path / "a.webm", numbered(96), codec="libvpx-vp9")
    plan = at(64, 64, *(i / 8 for i in range(96)))
    with pytest.raises(VideoError, match="truncated: ends at"):  # DALI itself would make up the missing frames
        decode_by("dali", cut(whole, tmp_path / "b.webm", 0.5), plan)
    isolate.end_all()
    start = "import os, sys; sys.path[:] = sys.argv[3:]; from sorahpc.data import dali, isolate; "
    start += "dali.read = lambda *_: os.abort(); isolate.serve(*map(int, sys.argv[1:3]))"
    monkeypatch.setattr(isolate, "_START", start)
    clip, reader = decode_by("dali", whole, plan)
    isolate.end_all()
    assert reader == "pyav" and numbers(clip) == list(range(96))


class FakeDali:
    """Stands for DALI on a GPU: what it gives is what PyAV reads, changed or refused."""

    def __init__(self, path: Path, change: Any = lambda frames: frames) -> None:
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24", src_colorspace="ITU601") for f in container.decode(video=0)]
        self.frames, self.change, self.decoders, self.devices = np.stack(frames), change, self, set[str]()

    def video(self, data: np.ndarray, device: str, frames: list[int]) -> Any:
        self.devices.add(device)
        made = self.change(self.frames[frames])
        return SimpleNamespace(cpu=lambda: made)


def raises(error: Exception) -> Any:
    def fail(frames: np.ndarray) -> np.ndarray:
        raise error

    return fail


def by_fake(monkeypatch: pytest.MonkeyPatch, fake: FakeDali, path: Path, plan: ClipPlan) -> np.ndarray:
    monkeypatch.setattr(dali, "_on_gpu", lambda: True)
    monkeypatch.setattr(dali, "_dynamic", lambda gpu: fake)
    monkeypatch.setattr(dali, "_kinds", set())
    clip = np.zeros((len(plan.times_s), plan.height, plan.width, 3), np.uint8)
    with open(path, "rb") as file:
        dali.decode_dali(file, plan, clip, 3)
    return clip


def test_on_a_gpu_whatever_dali_raises_is_a_reason_to_ask_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plan = write_video(tmp_path / "a.mp4", numbered(9)), at(64, 64, 0, 0.25)
    fake = FakeDali(path)
    assert numbers(by_fake(monkeypatch, fake, path, plan)) == numbers(decode(path, plan)) and fake.devices == {"gpu:0"}
    wrapped = RuntimeError("An error happened during asynchronous execution")
    wrapped.__cause__ = RuntimeError("Codec configuration not supported on this GPU")
    for error, why in {
        wrapped: "DALI: Codec configuration not supported on this GPU",
        AssertionError(): "DALI: AssertionError",
        ValueError("Invalid device id"): "DALI: Invalid device id",
        MemoryError("Can't allocate 9 bytes on device 0."): "DALI: Can't allocate 9 bytes on device 0",
    }.items():
        with pytest.raises(Unusable, match=why):
            by_fake(monkeypatch, FakeDali(path, raises(error)), path, plan)
    monkeypatch.setattr(dali, "_dynamic", raises(RuntimeError("CUDA driver version is insufficient")))
    assert dali.refuses("h264", "yuv420p", 1, 0) == "no DALI: CUDA driver version is insufficient"


def test_on_a_gpu_frames_in_another_range_or_out_of_packets_order_are_left_to_pyav(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = write_video(tmp_path / "a.mp4", numbered(9)), at(64, 64, 0, 0.25)
    wrong = FakeDali(path, lambda frames: (frames.astype(float) * 219 / 255 + 16).astype(np.uint8))
    with pytest.raises(Unusable, match=r"DALI: its first frame is .* of 255 levels off"):
        by_fake(monkeypatch, wrong, path, plan)
    for codec in ("vp9", "av1", "mjpeg", "mpeg4"):
        assert dali.refuses(codec, "yuv420p", 1, 0) == f"{codec} is not for DALI on the GPU"


@pytest.mark.parametrize(("shown", "left"), [(None, "2"), ("4,5,6,7", "6"), ("GPU-a,GPU-b", "GPU-a,GPU-b"), ("", "")])
def test_a_child_sees_the_gpu_of_its_task_alone(shown: str | None, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown or "")
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fake = SimpleNamespace(set_num_threads=lambda num: None)
    for name in ("nvidia", "nvidia.dali", "nvidia.dali.experimental"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["nvidia.dali.experimental"], "dynamic", fake, raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", fake)
    assert dali._dynamic.__wrapped__(2) is fake
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_a_child_that_has_had_videos_of_many_kinds_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plan = write_video(tmp_path / "a.mp4", numbered(9)), at(64, 64, 0)
    isolate.end_all()
    start = isolate._START.replace("; isolate.serve", "; from sorahpc.data import dali; {}; isolate.serve")
    hd, eight_k = ("h264", 1920, 1080), ("hevc", 7680, 4320)
    for kinds, idle in ({hd}, 1), ({eight_k}, 1), ({hd, eight_k}, 0):
        monkeypatch.setattr(isolate, "_START", start.format(f"dali._kinds.update({kinds})"))
        decode(path, plan)
        assert len(isolate._idle) == idle
        isolate.end_all()


def test_dali_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode._decoder("pyav") == "pyav"
    monkeypatch.setattr(dali, "installed", lambda: False)
    with pytest.raises(SetupError, match=r"encode\.decoder: dali is not installed; pip install 'sorahpc\[dali\]'"):
        encode._decoder("dali")
    assert encode._decoder("auto") == "pyav"
    monkeypatch.setattr(dali, "installed", lambda: True)
    monkeypatch.setattr(encode.torch.cuda, "is_available", lambda: False)
    assert encode._decoder("auto") == "pyav" and encode._decoder("dali") == "dali"
    monkeypatch.setattr(encode.torch.cuda, "is_available", lambda: True)
    assert encode._decoder("auto") == "dali"
