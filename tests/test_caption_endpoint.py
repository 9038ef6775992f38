"""The job caption with a stub server: each clip asked about once, bad answers told apart, nothing lost, no key kept."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from caption_jobs import CLIPS, items, served, task, write_captioned_world
from endpoints import completion, send, serving

from sorahpc.data.captions import CAPTIONS, known_items, read_captions
from sorahpc.data.manifest import MANIFEST, read_manifest
from sorahpc.errors import DataError, SetupError, Stopped
from sorahpc.jobs import caption

GOOD = "A {} rolls slowly over wet grass to the left in the morning sun while the camera stays still, take {}."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned_world(tmp_path_factory.mktemp("world"))


def test_an_endpoint_is_asked_for_each_clip_once_and_bounded_in_number(world: Path) -> None:
    def respond(h: Any, b: dict[str, Any], n: int) -> None:
        time.sleep(0.05)
        send(h, 200, completion(GOOD.format("ball", n)))

    with serving(respond) as server:
        config = served(world, "served", server.url)
        caption.run(config, task(config))
        assert len(server.requests) == CLIPS and 1 < server.most_running <= 3
        caption.run(config, task(config))
        assert len(server.requests) == CLIPS
        moved = served(world, "served", server.url.replace("127.0.0.1", "localhost"))
        caption.run(moved, task(moved))  # the same model behind another address
        assert len(server.requests) == CLIPS
    rows, _ = read_captions(config.run_dir / CAPTIONS)
    assert len({row.caption for row in rows}) == CLIPS
    assert {item.model["endpoint_model"] for item in items(config)} == {"stub"}


def test_a_bad_answer_is_asked_again_with_another_seed_and_then_the_original_stays_with_the_reason(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = [v for v in read_manifest(world / "runs/prepared" / MANIFEST) if v.ok]
    bad = videos[2].caption

    def respond(h: Any, b: dict[str, Any], n: int) -> None:
        prompt = b["messages"][0]["content"]
        if prompt.endswith(bad):
            return send(h, 200, completion("I'm sorry, but I can't help with describing this video to you."))
        if n % 3 == 0 and n < 12:
            return send(h, 200, completion("{" * (n + 1)))
        return send(h, 200, completion(GOOD.format("ball", n)))

    with caplog.at_level(logging.INFO), serving(respond) as server:
        config = served(world, "bad", server.url, temperature=0.0, attempts=3, endpoint={"concurrency": 1})
        caption.run(config, task(config))
    rows = {row.key: row for row in read_captions(config.run_dir / CAPTIONS)[0]}
    alike = [v for v in videos if v.caption == bad]
    assert {k for k, row in rows.items() if not row.caption} == {v.key for v in alike}
    assert rows[videos[2].key].reason == "refusal"
    assert f"clip {videos[2].key} keeps its caption: refusal" in caplog.text
    for item in items(config):
        assert [a.temperature for a in item.attempts] == [0.0, 0.7, 0.7][: len(item.attempts)]
        assert len({a.seed for a in item.attempts}) == len(item.attempts)
    assert max(len(item.attempts) for item in items(config)) == 3
    assert any([a.rejected.split(":")[0] for a in i.attempts] == ["markup", ""] for i in items(config))


def test_one_answer_for_clips_that_differ_is_taken_for_the_first_only(world: Path) -> None:
    with serving(lambda h, b, n: send(h, 200, completion(GOOD.format("ball", 0)))) as server:
        config = served(world, "same", server.url, frames=2)
        caption.run(config, task(config))
        images = [c["type"] for c in server.requests[0][2]["messages"][0]["content"]]
    assert images == ["image_url", "image_url", "text"]
    rows, _ = read_captions(config.run_dir / CAPTIONS)
    assert [bool(row.caption) for row in rows] == [True, *[False] * (CLIPS - 1)]
    kinds = [row.reason.split(":")[0] for row in rows]
    assert kinds.count("duplicate") == CLIPS - 2 and kinds.count("video") == 1


def test_a_server_that_goes_away_loses_nothing_that_was_answered(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sorahpc.models.endpoint.FIRST_WAIT_S", 0.01)

    def respond(h: Any, b: dict[str, Any], n: int) -> None:
        send(h, 200, completion(GOOD.format("ball", n))) if n < 4 else send(h, 503, b"down")

    with serving(respond) as server:
        config = served(world, "away", server.url, endpoint={"concurrency": 1})
        with pytest.raises(SetupError, match="no answer in 2 attempts: status 503 down"):
            caption.run(config, task(config))
    assert len(items(config)) == 4
    with serving(lambda h, b, n: send(h, 200, completion(GOOD.format("box", n)))) as server:
        config = served(world, "away", server.url)
        caption.run(config, task(config))
        assert len(server.requests) == CLIPS - 4


def test_a_stop_does_not_wait_for_a_server_that_hangs(world: Path) -> None:
    with serving(lambda h, b, n: h.server.released.wait(30)) as server:
        config = served(world, "hangs", server.url, endpoint={"timeout_s": 60})
        asked = threading.Event()
        threading.Timer(0.5, asked.set).start()
        start = time.monotonic()
        with pytest.raises(Stopped, match="0 of 8 clips"):
            caption.run(config, task(config, stop_requested=asked.is_set))
        assert time.monotonic() - start < 20
    assert not known_items(config.run_dir / "captions/clips")


def test_if_nothing_is_accepted_the_job_fails_and_says_why(world: Path) -> None:
    with serving(lambda h, b, n: send(h, 200, completion("Sorry, I can't."))) as server:
        config = served(world, "none", server.url, attempts=1)
        with pytest.raises(DataError, match=r"not one of 8 captions was accepted: [0-9a-f]{16}: refusal; "):
            caption.run(config, task(config))
    assert not (config.run_dir / CAPTIONS).exists()


def test_the_key_is_in_no_file_and_no_log(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "canary-0123456789"
    monkeypatch.setenv("MY_KEY", key)
    with (
        caplog.at_level(logging.DEBUG),
        serving(
            lambda h, b, n: send(h, 200, completion(f"{h.headers['Authorization']} {GOOD.format('ball', n)}"))
        ) as server,
    ):
        config = served(world, "key", server.url, endpoint={"key_env": "MY_KEY"})
        caption.run(config, task(config))
        assert server.requests[0][1]["Authorization"] == f"Bearer {key}"
    assert not [p for p in config.run_dir.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    assert key not in caplog.text
