"""The client of chat completions, against a server that is slow, broken or hostile."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from endpoints import completion, send, serving

from sorahpc.config import EndpointConfig
from sorahpc.errors import SetupError, Stopped
from sorahpc.models import endpoint
from sorahpc.models.endpoint import MAX_RESPONSE_BYTES, Endpoint

ASK: dict[str, Any] = {"seed": 5, "temperature": 0.5, "max_new_tokens": 99}
KEY = "canary-key-1234567890"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


def client(url: str, **changes: Any) -> Endpoint:
    return Endpoint(EndpointConfig(**{"url": url, "model": "m", "timeout_s": 5, "retries": 2, **changes}))


def ask(url: str, frames: list[np.ndarray] | None = None, **changes: Any) -> tuple[str, str]:
    return client(url, **changes).answer("describe it", frames or [], **ASK)


def test_a_question_with_frames_is_one_request_and_its_answer_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    frames = [np.full((20, 32, 3), value, np.uint8) for value in (0, 200)]
    with serving(lambda h, b, n: send(h, 200, completion("a red ball"))) as server:
        assert ask(server.url, frames, key_env="MY_KEY") == ("a red ball", "")
        assert ask(server.url) == ("a red ball", "")
    (path, headers, body), (_, plain_headers, plain) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert {k: body[k] for k in ("model", "seed", "temperature", "max_tokens", "stream")} == {
        "model": "m", "seed": 5, "temperature": 0.5, "max_tokens": 99, "stream": False,
    }  # fmt: skip
    *images, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "describe it"} and len(images) == 2
    for image, frame in zip(images, frames, strict=True):
        kind, _, data = image["image_url"]["url"].partition(",")
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert kind == "data:image/jpeg;base64" and decoded.shape == frame.shape
        assert abs(decoded.astype(int) - frame).max() < 4
    assert plain["messages"] == [{"role": "user", "content": "describe it"}] and "Authorization" not in plain_headers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (completion("cut short", "length"), ("cut short", "cut: it reached max_new_tokens")),
        (completion(None, refusal="I'm sorry"), ("I'm sorry", "refusal")),
        (completion("half", "content_filter"), ("half", "refusal: content filter")),
        (completion(None), (None, "not an answer: no text in the chat completion")),
        (completion([{"type": "text", "text": "x"}]), (None, "not an answer: no text in the chat completion")),
        (b"", (None, "not an answer: no chat completion")),
        (b"<html>busy</html>", ("<html>busy</html>", "not an answer: no chat completion")),
        (b'{"choices": []}', (None, "not an answer: no chat completion")),
        (b'{"choices": [[]]}', (None, "not an answer: no chat completion")),
        (b'{"choices": [{"message": "x"}]}', (None, "not an answer: no chat completion")),
        (b"[" * 200_000, (None, "not an answer: no chat completion")),
        (b"\xff\xfe\x00garbage\x1b[31m", (None, "not an answer: no chat completion")),
        (b"x" * (MAX_RESPONSE_BYTES + 1), ("", f"not an answer: over {MAX_RESPONSE_BYTES} bytes")),
    ],
)
def test_an_answer_that_is_none_is_a_fault_and_no_crash(body: bytes, expected: tuple[str | None, str]) -> None:
    with serving(lambda h, b, n: send(h, 200, body)) as server:
        text, fault = ask(server.url)
    assert fault == expected[1] and text in (text if expected[0] is None else expected[0],)
    assert len(text) < 300 and text.isprintable()
    assert len(server.requests) == (3 if expected[1].endswith("no chat completion") else 1)


@pytest.mark.parametrize("body", [b'{"error": {"message": "no quota"}}', b"<html>no quota</html>", b""])
def test_a_gateway_that_says_200_and_no_completion_is_asked_again_and_stops_the_job_in_the_end(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    with serving(lambda h, b, n: send(h, 200, completion("ok") if n == 2 else body)) as server:
        assert ask(server.url) == ("ok", "")
    monkeypatch.setattr(endpoint, "MAX_REFUSED", 2)
    with serving(lambda h, b, n: send(h, 200, body)) as server:
        asked = client(server.url)
        assert asked.answer("q", [], **ASK)[1] == "not an answer: no chat completion"
        with pytest.raises(SetupError, match=r"2 questions in a row not an answer: no chat completion: .*; see to"):
            asked.answer("q", [], **ASK)


def test_an_endless_body_is_cut_at_the_limit() -> None:
    sent = 0

    def endless(h: Any, b: Any, n: int) -> None:
        h.send_response(200)
        h.end_headers()
        nonlocal sent
        while True:
            sent += h.wfile.write(b"x" * 65536)

    with serving(endless) as server:
        assert ask(server.url) == ("", f"not an answer: over {MAX_RESPONSE_BYTES} bytes")
    assert MAX_RESPONSE_BYTES < sent < 4 * MAX_RESPONSE_BYTES  # what the sockets' buffers take is sent too


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_a_busy_server_is_asked_again(status: int) -> None:
    with serving(
        lambda h, b, n: send(h, 200, completion("ok")) if n == 2 else send(h, status, b'{"error": {"message": "busy"}}')
    ) as server:
        assert ask(server.url) == ("ok", "")
    assert len(server.requests) == 3
    with serving(lambda h, b, n: send(h, status, b'{"error": {"message": "busy"}}')) as server:
        with pytest.raises(SetupError) as caught:
            ask(server.url)
    assert len(server.requests) == 3
    assert str(caught.value) == (
        f"caption.endpoint: {server.url}: no answer in 3 attempts: status {status} busy; what was answered is kept, "
        "run again when the server is there"
    )


def test_a_gateway_that_tells_of_the_server_behind_it_in_the_body_is_heard() -> None:
    def failing(code: Any) -> bytes:
        return json.dumps({"error": {"code": code, "message": "of the server behind"}}).encode()

    with serving(lambda h, b, n: send(h, 200, completion("ok") if n == 2 else failing(502))) as server:
        assert ask(server.url) == ("ok", "")
    with serving(lambda h, b, n: send(h, 200, failing(401))) as server:
        with pytest.raises(SetupError, match=r"status 401 for model .*: of the server behind; see key_env"):
            ask(server.url)
    with serving(lambda h, b, n: send(h, 200, failing(413))) as server:
        assert ask(server.url) == ("of the server behind", "refused by the endpoint: status 413")
    for code in (None, True, "429", 200, 10**40):
        with serving(lambda h, b, n, code=code: send(h, 200, failing(code))) as server:
            assert ask(server.url) == ("of the server behind", "not an answer: no chat completion")


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_honoured(dated: bool) -> None:
    def respond(h: Any, b: Any, n: int) -> None:
        if n:
            return send(h, 200, completion("ok"))
        when = email.utils.formatdate(time.time() + 2, usegmt=True) if dated else "1"
        return send(h, 429, b"", Retry_After=when)

    start = time.monotonic()
    with serving(respond) as server:
        assert ask(server.url) == ("ok", "")
    assert 0.9 < time.monotonic() - start < 20  # a date has whole seconds


def test_who_asks_for_an_hour_is_not_waited_for() -> None:
    with serving(lambda h, b, n: send(h, 429, b"quota", Retry_After="3600")) as server:
        with pytest.raises(SetupError, match=r"asks to wait 3600 s \(status 429 quota\); what was answered is kept"):
            ask(server.url)
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "9" * 40, "Wed, 99 Foo 2026 99:99:99 GMT", "²"])
def test_a_retry_after_that_means_nothing_is_no_crash(value: str) -> None:
    assert endpoint._retry_after(value) is None


def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda h, b, n: send(h, 200, completion("stolen"))) as thief:
        with serving(lambda h, b, n: send(h, 307, b"", Location=f"{thief.url}/chat/completions")) as server:
            with pytest.raises(SetupError, match=r"status 307, a redirect to http://127.* is not followed"):
                ask(server.url, key_env="MY_KEY")
    assert not thief.requests


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "see key_env"), (403, "see key_env"), (404, "see url and model"), (405, "see url")]
)
def test_what_no_retry_mends_ends_at_once_in_one_line_without_the_key(
    monkeypatch: pytest.MonkeyPatch, status: int, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    body = json.dumps({"error": {"message": f"no such thing: {KEY}\n\x1b[31mred"}}).encode()
    with caplog.at_level(logging.DEBUG), serving(lambda h, b, n: send(h, status, body)) as server:
        with pytest.raises(SetupError) as caught:
            ask(server.url, key_env="MY_KEY")
    assert len(server.requests) == 1 and KEY not in str(caught.value) + caplog.text
    assert str(caught.value) == (
        f"caption.endpoint: {server.url}: status {status} for model m: no such thing: [key] \\x1b[31mred; {hint}"
    )


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_costs_itself_only(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda h, b, n: send(h, status, f"too long, {KEY}".encode())) as server:
        assert ask(server.url, key_env="MY_KEY") == ("too long, [key]", f"refused by the endpoint: status {status}")


def test_a_server_that_refuses_every_question_is_at_fault_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_REFUSED", 3)

    def respond(handler: Any, body: Any, n: int) -> None:
        send(handler, *((200, completion("yes")) if n == 1 else (413, b"no images here")))

    with serving(respond) as server:
        asked = client(server.url)
        faults = [asked.answer("q", [], **ASK)[1] for _ in range(4)]
        assert [fault[-3:] for fault in faults] == ["413", "", "413", "413"]
        with pytest.raises(SetupError, match=r"3 questions in a row refused .* 413: no images here; see to") as caught:
            asked.answer("q", [], **ASK)
    assert "\n" not in str(caught.value)


def test_the_key_is_taken_out_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda h, b, n: send(h, 200, completion(f"your key is {KEY}"))) as server:
        assert ask(server.url, key_env="MY_KEY") == ("your key is [key]", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "MY_KEY is not set here"), ("  ", "is not set here"), ("a\r\nHost: b", "holds characters"), ("é", "holds")],
)
def test_a_key_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: str) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(SetupError, match=f"caption.endpoint.key_env: .*{expected}"):
        client("http://127.0.0.1:1/v1", key_env="MY_KEY")


def _silent(h: Any, b: Any, n: int) -> None:
    h.server.released.wait(30)


def _dripping(h: Any, b: Any, n: int) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "1000")
    h.end_headers()
    while not h.server.released.wait(0.05):  # each byte would start a socket's own timeout anew
        h.wfile.write(b" ")


@pytest.mark.parametrize("respond", [_silent, _dripping])
def test_a_server_that_hangs_or_drips_is_left_in_time(respond: Any) -> None:
    start = time.monotonic()
    with serving(respond) as server:
        with pytest.raises(SetupError, match=r"no answer in 2 attempts: nothing within 0.4 s"):
            ask(server.url, timeout_s=0.4, retries=1)
    assert 0.7 < time.monotonic() - start < 20 and len(server.requests) == 2


def _cut(h: Any, b: Any, n: int) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "1000")
    h.end_headers()
    h.wfile.write(b'{"choices": [')


def _nonsense(h: Any, b: Any, n: int) -> None:
    h.wfile.write(b"\x00\x01SMTP ready\r\n\r\n")


def _headers(h: Any, b: Any, n: int) -> None:
    h.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n")


@pytest.mark.parametrize(
    ("respond", "expected"),
    [(_cut, "the answer ended 987 bytes early"), (_nonsense, "no answer in 1 attempts"), (_headers, "got more than")],
)
def test_a_broken_connection_is_asked_again(respond: Any, expected: str) -> None:
    with serving(respond) as server:
        with pytest.raises(SetupError, match=expected) as caught:
            ask(server.url, retries=0)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(SetupError, match=r"no answer in 3 attempts: .*Connection refused"):
            ask(f"http://127.0.0.1:{s.getsockname()[1]}/v1")
    with pytest.raises(SetupError, match="expected a port below 65536"):
        client("http://127.0.0.1:99999/v1")


@pytest.fixture
def two_waiting() -> Iterator[tuple[Endpoint, list[threading.Thread], list[BaseException]]]:
    """One thread in a request that hangs, one in the wait before the next attempt."""

    def respond(h: Any, b: Any, n: int) -> None:
        if b["seed"] == 0:
            return _silent(h, b, n)
        return send(h, 503, b"", Retry_After="500")

    ended: list[BaseException] = []
    with serving(respond) as server:
        asked = client(server.url, timeout_s=60)

        def run(seed: int) -> None:
            try:
                asked.answer("x", [], **{**ASK, "seed": seed})
            except BaseException as error:
                ended.append(error)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while len(server.requests) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        yield asked, threads, ended


def test_a_stop_ends_requests_and_waits_at_once(two_waiting: Any) -> None:
    asked, threads, ended = two_waiting
    start = time.monotonic()
    asked.stop()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - start < 9 and [type(e) for e in ended] == [Stopped, Stopped]


def test_no_proxy_of_the_environment_sees_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda h, b, n: send(h, 200, completion("proxied"))) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with serving(lambda h, b, n: send(h, 200, completion("direct"))) as server:
            assert ask(server.url) == ("direct", "")
    assert not proxy.requests
