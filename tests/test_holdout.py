"""Clips held out of a training are none that it was ever trained on, whatever becomes of the folder."""

from __future__ import annotations

import dataclasses
import random

from sorahpc.data.holdout import limit_of, place_of
from sorahpc.data.manifest import Video


def video(i: int, **fields: object) -> Video:
    row = Video(f"{i:016x}", f"/videos/{i:06d}.mp4", "", 17, 8.0, 64, 64, "h264", 2.0, 1000 + i, 0, "ok", "")
    return dataclasses.replace(row, **fields)  # type: ignore[arg-type]


def held(videos: list[Video], limit: str) -> list[Video]:
    return [v for v in videos if place_of(v) < limit]


def test_so_many_are_held_out_as_asked_and_a_fifth_at_most_in_whatever_order() -> None:
    videos = [video(i) for i in range(100)]
    assert [len(held(videos, limit_of(videos, most))) for most in (0, 7, 20, 50)] == [0, 7, 20, 20]
    assert held(videos[:4], limit_of(videos[:4], 16)) == []
    chosen = held(videos, limit_of(videos, 10))
    assert chosen != videos[:10]  # not those of one source, which come first
    again = videos[::-1]
    assert held(again, limit_of(again, 10)) == chosen[::-1]


def test_a_clip_keeps_its_place_under_another_name_caption_and_key_and_a_scene_has_its_own() -> None:
    first = video(0, start_s=1.5)
    same = dataclasses.replace(first, key="f" * 16, path="/elsewhere/x.mp4", caption="anything", mtime_ns=7)
    assert place_of(same) == place_of(first) and len(place_of(first)) == 16
    assert len({place_of(v) for v in (first, video(0), video(1, start_s=1.5))}) == 3


def test_what_was_trained_on_is_never_held_out_whichever_videos_come_go_and_come_back() -> None:
    rng = random.Random(0)
    every = [video(i) for i in range(400)]
    for _ in range(50):
        limit, trained = None, set()
        for _ in range(12):
            videos = rng.sample(every, rng.randint(5, 400))
            limit = limit_of(videos, 16, limit)
            out = held(videos, limit)
            assert len(out) <= 16 and not trained & {v.key for v in out}
            trained |= {v.key for v in videos} - {v.key for v in out}


def test_of_new_videos_too_some_are_held_out_and_where_they_are_too_many_others_are_trained_on() -> None:
    few, many = [video(i) for i in range(50)], [video(i) for i in range(400)]
    before = limit_of(few, 10)
    after = limit_of(many, 10, before)
    assert after < before and len(held(many, after)) == 10
    assert held(few, after) != held(many, after)  # new ones among them
    assert held(few, limit_of(few, 10, after)) == held(few, after)  # and back: those that it came to train on stay so
    assert len(held(few[5:], limit_of(few[5:], 10, before))) < 10  # none in place of those that are gone


def test_copies_of_a_video_are_held_out_together_or_not_at_all() -> None:
    videos = [video(i, size_bytes=1000 + i // 4) for i in range(100)]
    out = held(videos, limit_of(videos, 10))
    assert len(out) == 8 and len({place_of(v) for v in out}) == 2
    assert held([video(i, size_bytes=5) for i in range(100)], limit_of([video(0, size_bytes=5)] * 100, 10)) == []
