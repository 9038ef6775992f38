from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sorahpc.data import toyworld
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    caption,
    parse_caption,
    render,
    scene_of,
    write_world,
)
from sorahpc.errors import DataError

worlds = st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def centroid(frame: np.ndarray, colour: str) -> tuple[float, float]:
    """Centre of the coverage by a pure colour over grey, in px, from the pixels."""
    weight = np.ptp(frame.astype(np.float64), axis=-1) / np.ptp(COLOURS[colour])
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5
    return float((x * weight).sum() / weight.sum()), float((y * weight).sum() / weight.sum())


def box_centre(frame: np.ndarray) -> tuple[float, float]:
    ys, xs = np.nonzero(np.ptp(frame.astype(int), axis=-1) > 60)
    return (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2


@given(worlds)
@settings(max_examples=200, deadline=None)
def test_a_caption_reads_back_to_the_scene_it_describes(world: tuple[int, int]) -> None:
    scene = scene_of(*world)
    words = parse_caption(caption(scene))
    assert words == {k: getattr(scene, k) for k in words}
    assert set(words) == {"colour", "shape", "size", "direction", "speed", "bounce", "occluder"}


@pytest.mark.parametrize(
    "text", ["", "a cat", "a small pink circle moves right slowly", "a small red circle moves right"]
)
def test_a_caption_of_another_world_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a toy-world caption"):
        parse_caption(text)


@given(worlds, st.sampled_from([(9, 13, 17), (1,), (2,), (5, 33), (81,)]), st.sampled_from([8.0, 24.0, 3.0]))
@settings(max_examples=200, deadline=None)
def test_the_object_stays_inside_the_walls_and_bounces_only_where_the_caption_says(
    world: tuple[int, int], frames: tuple[int, ...], fps: float
) -> None:
    scene = scene_of(*world, frames=frames, fps=fps)
    half_w, half_h = scene.half_extents
    times = np.arange(scene.frames) / scene.fps
    track = np.array([scene.position(t) for t in times])
    assert track[:, 0].min() >= half_w - 1e-6 and track[:, 0].max() <= scene.width - half_w + 1e-6
    assert track[:, 1].min() >= half_h - 1e-6 and track[:, 1].max() <= scene.height - half_h + 1e-6
    straight = np.array(scene.start) + times[:, None] * np.array(scene.velocity)
    assert np.allclose(track, straight, atol=1e-6) == (not scene.bounce)
    assert not (scene.bounce and scene.occluder)
    # The direction is the initial one.
    moved = np.array(scene.position(1e-3)) - np.array(scene.start)
    assert np.allclose(np.sign(np.round(moved, 9)), DIRECTIONS[scene.direction])


def test_a_bounce_comes_in_the_middle_of_a_clip() -> None:
    for scene in (s for s in (scene_of(3, i) for i in range(300)) if s.bounce):
        ahead = (np.array([scene.position(t / scene.fps) for t in range(scene.frames)]) - scene.start)[:, scene.axis]
        ahead = ahead * sum(DIRECTIONS[scene.direction])
        assert 0.3 * scene.frames <= ahead.argmax() <= 0.75 * scene.frames
        assert ahead.max() > -1.5 * ahead.min()  # it went further ahead than back


def test_the_pixels_move_as_the_closed_form_says() -> None:
    seen = set()
    for scene in (scene_of(1, i) for i in range(160)):
        seen.add((scene.shape, scene.bounce, scene.height))
        if scene.occluder:
            continue
        for t, frame in enumerate(render(scene)):
            x, y = scene.position(t / scene.fps)
            if scene.shape != "triangle":  # the centroid of a triangle is below the middle of its box
                assert centroid(frame, scene.colour) == pytest.approx((x, y), abs=0.15)
            assert box_centre(frame) == pytest.approx((x, y), abs=1.01)
    assert len(seen) >= 3 * 2 * 3


def test_a_bar_hides_what_passes_behind_it_and_nothing_at_both_ends() -> None:
    scenes = [s for s in (scene_of(2, i) for i in range(300)) if s.occluder]
    assert len(scenes) > 10
    for scene in scenes:
        area = [(np.ptp(f.astype(int), axis=-1) > 60).sum() for f in render(scene)]
        assert area[0] == pytest.approx(area[-1], rel=0.12)
        assert min(area) < 0.9 * area[0]


def test_attributes_are_balanced() -> None:
    scenes = [scene_of(7, i) for i in range(288)]
    assert set(Counter((s.colour, s.shape, s.direction, s.size, s.speed) for s in scenes).values()) == {1}
    assert all(len({s.colour for s in scenes[i : i + 6]}) == 6 for i in range(0, 288, 6))
    first = scenes[:48]
    for field, values in [("shape", SHAPES), ("direction", DIRECTIONS), ("size", SIZES), ("speed", SPEEDS)]:
        counts = Counter(getattr(s, field) for s in first)
        assert min(counts[v] for v in values) >= 0.4 * 48 / len(values), (field, counts)
    share = np.mean([[s.bounce, s.occluder] for s in scenes], axis=0)
    assert (share > 0.05).all() and (share < 0.4).all()
    assert {(s.frames, s.height, s.width) for s in scenes} == {
        (t, h, w) for t in toyworld.FRAMES for h, w in toyworld.SIZES_PX
    }


def test_seeds_and_indices_give_other_worlds() -> None:
    assert scene_of(0, 5) == scene_of(0, 5)
    assert scene_of(0, 5) != scene_of(1, 5)
    assert scene_of(0, 5).start != scene_of(0, 5 + 288).start


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48), (256, 144), (32, 128)])
def test_frames_have_the_size_asked_for(size: tuple[int, int]) -> None:
    scene = scene_of(0, 0, frames=(5,), sizes=[size])
    frames = render(scene)
    assert frames.shape == (5, *size, 3) and frames.dtype == np.uint8


@pytest.mark.parametrize(
    "arguments",
    [{"frames": ()}, {"frames": (0,)}, {"sizes": ()}, {"sizes": [(33, 64)]}, {"sizes": [(16, 64)]}, {"fps": 0}],
)
def test_impossible_worlds_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError):
        scene_of(0, 0, **arguments)
    with pytest.raises(ValueError):
        scene_of(-1, 0)


def test_a_world_is_the_same_bytes_for_any_number_of_workers_and_grows(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert write_world(tmp_path / "a", 70, seed=4, progress=lambda *c: calls.append(c)) == 70
    assert calls[0] == (0, 70) and calls[-1] == (70, 70)
    assert write_world(tmp_path / "b", 70, seed=4, workers=2) == 70
    whole = files_of(tmp_path / "a")
    assert whole == files_of(tmp_path / "b")
    assert len(whole) == 2 * 70 + 1

    # Again: nothing to do. What a killed run left out is made again; what exists is not touched.
    assert write_world(tmp_path / "a", 70, seed=4) == 0
    (tmp_path / "a" / "000003.mp4").unlink()
    (tmp_path / "a" / "000011.txt").unlink()
    assert write_world(tmp_path / "a", 70, seed=4) == 2
    assert write_world(tmp_path / "a", 20, seed=4) == 0
    assert files_of(tmp_path / "a") == whole
    assert write_world(tmp_path / "a", 72, seed=4) == 2
    lines = [json.loads(line) for line in (tmp_path / "a" / "scenes.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"{i:06d}.mp4" for i in range(72)]
    assert all((tmp_path / "a" / f"{i:06d}.txt").read_text() == line["caption"] + "\n" for i, line in enumerate(lines))

    with pytest.raises(DataError, match=r"scenes\.jsonl: line 1 is of another world"):
        write_world(tmp_path / "a", 10, seed=5)


def test_a_folder_that_can_not_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write the toy world"):
        write_world(tmp_path / "file" / "world", 1)


# --- mp4 -------------------------------------------------------------------------------------------------------------


def test_an_mp4_holds_the_frames_the_rate_and_the_colours_that_were_written(tmp_path: Path) -> None:
    scene = scene_of(0, 3)
    frames = render(scene)
    write_mp4(tmp_path / "sub" / "a.mp4", frames, 8, crf=4)
    with av.open(str(tmp_path / "sub" / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.frames, stream.average_rate) == ("h264", scene.frames, 8)
        assert [s.type for s in container.streams] == ["video"]
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
    inside = np.ptp(frames.astype(int), axis=-1) == np.ptp(COLOURS[scene.colour])
    core = inside[:, 1:-1, 1:-1].copy()  # away from edges, where 4:2:0 mixes colours
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            core &= inside[:, dy : dy + core.shape[1], dx : dx + core.shape[2]]
    assert core.sum() > 100
    error = np.abs(np.stack(decoded).astype(int) - frames)[:, 1:-1, 1:-1][core]
    assert error.mean() < 4 and np.percentile(error, 99) < 16


def test_an_mp4_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    path = tmp_path / "a.mp4"
    write_mp4(path, frames, 8)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(DataError, match=r"a\.mp4: can't write the video: No space left"):
        write_mp4(path, frames + 90, 8)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_the_bytes_do_not_depend_on_what_the_process_did_before(tmp_path: Path) -> None:
    clips = [render(s) for s in (scene_of(4, i, sizes=[(80, 48)]) for i in range(120))]
    runs = []
    for order in (range(120), reversed(range(120))):
        files = {}
        for i in order:
            junk = [np.full(n, i, np.uint8) for n in (5_000, 12_000, 30_000, 100_000)]  # dirty the heap
            del junk
            write_mp4(tmp_path / "a.mp4", clips[i], 8, durable=False)
            files[i] = (tmp_path / "a.mp4").read_bytes()
        runs.append(files)
    assert [i for i in range(120) if runs[0][i] != runs[1][i]] == []


@pytest.mark.parametrize(
    ("shape", "dtype", "fps", "crf"),
    [
        ((2, 33, 32, 3), np.uint8, 8, 18),
        ((2, 32, 31, 3), np.uint8, 8, 18),
        ((0, 32, 32, 3), np.uint8, 8, 18),
        ((2, 32, 32), np.uint8, 8, 18),
        ((2, 32, 32, 4), np.uint8, 8, 18),
        ((2, 32, 32, 3), np.float32, 8, 18),
        ((2, 32, 32, 3), np.uint8, 0, 18),
        ((2, 32, 32, 3), np.uint8, float("nan"), 18),
        ((2, 32, 32, 3), np.uint8, 8, 60),
    ],
)
def test_frames_that_no_mp4_can_hold_are_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: type, fps: float, crf: int
) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4"):
        write_mp4(tmp_path / "a.mp4", np.zeros(shape, dtype), fps, crf)
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("fps", [8.0, 23.976, 30000 / 1001, 59.94, 0.5])
def test_the_rate_survives(tmp_path: Path, fps: float) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)
