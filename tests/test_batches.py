"""The batches of an autoencoder's training: the same on any number of ranks, whatever memory there is."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from models import COSMOS
from vae_trainings import spec_of

from sorahpc.data.batches import Batches
from sorahpc.data.clips import ClipCache, moving_pixels
from sorahpc.data.toyworld import render, scene_of
from sorahpc.errors import ConfigError, DataError
from sorahpc.models.vae import build_vae


def batches(frames: list[np.ndarray], limit: int, rank: int, size: int, broken: tuple[int, ...] = ()) -> Batches:
    def load(i: int) -> np.ndarray:
        if i in broken:
            raise DataError(f"{i}: broken")
        return frames[i]

    spec = spec_of(batch_clips=4, steps=6, crop_px=32)
    shapes = {i: clip.shape[:3] for i, clip in enumerate(frames)}
    return Batches(ClipCache(load, limit, 2), shapes, build_vae("AutoencoderKLCosmos", COSMOS), spec, rank, size)  # type: ignore[arg-type]


def test_a_batch_depends_on_seed_and_step_only_not_on_ranks_nor_on_memory() -> None:
    frames = [render(scene_of(2, i, frames=[9], sizes=[(64, 64 + 32 * (i % 2))])) for i in range(6)]
    whole = batches(frames, 1 << 30, 0, 1)
    expected = [whole.next(step) for step in range(6)]
    assert expected[0].shape == (4, 5, 32, 32, 3) and not np.array_equal(expected[0], expected[1])
    for size in (2, 4):
        shares = [batches(frames, 0, rank, size) for rank in range(size)]  # nothing is kept
        for step in (0, 1, 2, 3, 4, 5):
            assert np.array_equal(np.concatenate([share.next(step) for share in shares]), expected[step])
        asked = sum(share.clips.decoded for share in shares)
        assert asked <= 24  # each rank its own clips only, each once: those ahead are held
    assert np.array_equal(batches(frames, 0, 0, 1).next(4), expected[4])  # as after a resume


def test_a_crop_under_the_stride_is_refused_and_not_taken_for_none() -> None:
    vae, spec = build_vae("AutoencoderKLCosmos", COSMOS), spec_of(crop_px=7)
    with pytest.raises(ConfigError, match=r"^train_vae.crop_px: 8 or more expected, the stride of .*Cosmos, found 7$"):
        Batches(ClipCache(lambda i: np.zeros((9, 64, 64, 3), np.uint8), 0, 1), {0: (9, 64, 64)}, vae, spec)


def test_a_clip_that_can_not_be_decoded_is_left_out_by_every_rank_alike(caplog: pytest.LogCaptureFixture) -> None:
    frames = [render(scene_of(2, i, frames=[9], sizes=[(64, 64)])) for i in range(4)]
    broken = (1, 3)
    with caplog.at_level(logging.WARNING):
        whole = batches(frames, 1 << 30, 0, 1, broken)
        expected = [whole.next(step) for step in range(6)]
    assert sorted(m for m in caplog.messages if m.startswith("left out")) == [
        "left out: 1: broken",
        "left out: 3: broken",
    ]
    shares = [batches(frames, 0, rank, 2, broken) for rank in range(2)]
    for step in range(6):
        assert np.array_equal(np.concatenate([share.next(step) for share in shares]), expected[step])
    with pytest.raises(DataError, match=r"none of the 4 clips of 5x32x32 can be decoded"):
        batches(frames, 0, 0, 1, (0, 1, 2, 3)).next(0)


def test_clips_are_decoded_once_while_they_fit_and_memory_stays_bounded() -> None:
    clip = np.zeros((2, 8, 8, 3), np.uint8)
    with ClipCache(lambda i: clip + i, 3 * clip.nbytes, 2) as cache:
        for i in (0, 1, 2, 0, 1, 2):
            assert cache.ask(i).result().pixels[0, 0, 0, 0] == i
        assert cache.decoded == 3
        cache.ask(0).result()
        cache.ask(3).result()
        cache.ask(0).result()  # forgets 1, which was not asked for longest
        assert cache.decoded == 4 and cache._bytes <= 3 * clip.nbytes and set(cache._kept) == {0, 2, 3}
        cache.ask(1).result()
        assert cache.decoded == 5


def test_moving_pixels_are_those_of_the_object_and_none_in_a_still_clip() -> None:
    scene = next(s for s in (scene_of(2, i, frames=[17]) for i in range(50)) if s.speed == "fast" and s.bar is None)
    clip = render(scene)
    found = moving_pixels(clip)
    assert 0 < len(found) <= 512
    places = np.array([scene.position(t / scene.fps) for t in range(scene.frames)])
    half_w, half_h = scene.half_extents
    low, high = places.min(0) - [half_w + 1, half_h + 1], places.max(0) + [half_w + 1, half_h + 1]
    assert (found[:, 2] >= low[0]).all() and (found[:, 2] <= high[0]).all()
    assert (found[:, 1] >= low[1]).all() and (found[:, 1] <= high[1]).all()
    assert moving_pixels(np.repeat(clip[:1], 9, axis=0)).shape == (0, 3)
