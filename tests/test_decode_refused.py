"""decode: what is no whole video, no file or of hostile size is refused by its reason, and leaves nothing open."""

from __future__ import annotations

import errno
import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from plans import at, plan, probed
from videos import broken_files, cut, numbered, numbers, write_video

from sorahpc.data import child, container
from sorahpc.data import decode as decode_module
from sorahpc.data import frames as frames_module
from sorahpc.data.decode import VideoError, decode, may_pass, probe


def test_broken_files_are_refused_with_their_reason(tmp_path: Path) -> None:
    for name, (path, reason) in broken_files(tmp_path).items():
        with pytest.raises(VideoError) as caught:
            probe(path)
        assert caught.value.reason.startswith(reason), (name, caught.value.reason)
        assert str(caught.value) == f"{path}: {caught.value.reason}" and "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.mp4"))
        for name, reason in [
            ("fifo.mp4", "not a regular file: a FIFO"),
            ("dangling.mp4", "dangling link"),
            ("loop.mp4", "link that leads back to itself"),
            ("folder.mp4", "not a regular file: a folder"),
            ("s.mp4", "not a regular file: a socket"),
            ("missing.mp4", "no such file"),
        ]:
            for use in (probe, lambda p: decode(p, at(64, 64, 0))):
                with pytest.raises(VideoError) as caught:
                    use(tmp_path / name)
                assert caught.value.reason == reason
    with pytest.raises(VideoError, match="not a regular file: a device"):
        probe("/dev/zero")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decode_module.os, "open", denied)
    with pytest.raises(VideoError, match="can't read: Permission denied"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_what_the_file_system_does_not_give_is_not_told_as_a_fault_of_the_video(tmp_path: Path, reads: int) -> None:
    """Reading fails at the first bytes, while FFmpeg opens the file, and in the middle of it."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), dtype=np.uint8)
    left = [reads]

    class Away(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().read(size)

    with Away(write_video(tmp_path / "noise.mp4", noise)) as file:
        answer = child.serve({"what": "probe"}, file, None)
    assert answer == {"unusable": "can't read: Stale file handle"}
    assert may_pass(answer["unusable"]) and not may_pass("corrupt: frame 3 has errors")


def test_a_name_is_a_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = write_video(tmp_path / "whole.mp4", numbered(3)).read_bytes()
    for name in ["http:x.mp4", "concat:a|b.mp4", "%03d.mp4", "-i.mp4", "a'b\"c d\n.mp4", "é☃.mp4", "pipe:0.mp4"]:
        Path(name).write_bytes(whole)
        assert probe(name).frames == 3
        assert numbers(decode(Path(name), at(64, 64, 0, 0.25))) == [0, 2]
    os.write(os.open(b"\xff.mp4", os.O_CREAT | os.O_WRONLY), whole)
    assert probe(os.fsdecode(b"\xff.mp4")).frames == 3


def test_hostile_sizes_are_refused_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3))
    clip = np.empty((1, 64, 64, 3), np.uint8)
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 64 - 1)
    for use in (frames_module.probe, lambda f: frames_module.decode(f, at(64, 64, 0), clip)):
        with path.open("rb") as file, pytest.raises(container.Unusable, match="too large: 64x64 px, at most 4095"):
            use(file)
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 64)
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 2)
    with path.open("rb") as file, pytest.raises(container.Unusable, match="too long: more than 2 frames"):
        frames_module.probe(file)


@pytest.mark.parametrize(("name", "codec"), [("a.mov", "png"), ("a.mov", "qtrle"), ("a.avi", "cinepak")])
def test_decoders_that_nobody_uses_look_at_no_file(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, numbered(3), 25, codec=codec, pix_fmt="rgb24")
    for use in (probe, lambda p: decode(p, at(64, 64, 0))):
        with pytest.raises(VideoError, match=f"no decoder: {codec} is not among those trusted with files of others"):
            use(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_no_damage_breaks_more_than_the_file(tmp_path: Path, name: str) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    whole = write_video(tmp_path / name, numbered(20), codec=codec, audio=True).read_bytes()
    rng = np.random.default_rng(1)
    path = tmp_path / f"broken-{name}"
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.integers(1, len(data))]
        else:
            for where in rng.integers(0, len(data), size=1 + trial % 7):
                data[where] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            video = probed(path)
            clip = decode(path, plan(video))
        except VideoError as error:
            assert "\n" not in str(error)
        else:
            assert clip.shape[1:] == (64, 64, 3)


def test_files_are_closed_whatever_happens(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", numbered(9))
    text = tmp_path / "b.mp4"
    text.write_text("text")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        decode(whole, at(64, 64, 0, 0.5))
        probe(whole)
        with pytest.raises(VideoError):
            probe(text)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_shorter_than_its_plan_is_truncated(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(9))
    with pytest.raises(VideoError, match=r"truncated: ends at 1\.125 s after 9 frames, the clip needs 1\.250 s"):
        decode(path, at(64, 64, *(i / 8 for i in range(13))))
    whole = write_video(tmp_path / "b.mp4", numbered(96), faststart=True)
    with pytest.raises(VideoError, match=r"corrupt|truncated"):
        decode(cut(whole, tmp_path / "c.mp4", 0.5), at(64, 64, *(i / 8 for i in range(96))))
