"""A language model behind an OpenAI-compatible server, by `http.client`: no other library, no redirect, no proxy.

What the server sends is untrusted: at most MAX_RESPONSE_BYTES of it are read, within `timeout_s` from the first byte
sent to the last one read, and only one text of it is used. The API key comes from the environment and goes into one
header; it is taken out of whatever the server says before that is shown or kept.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import io
import json
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from sorahpc.config import EndpointConfig
from sorahpc.data.manifest import shown
from sorahpc.errors import SetupError, Stopped

log = logging.getLogger(__name__)

MAX_RESPONSE_BYTES = 4 << 20  # a caption has some kB; with room for a reasoning model's thoughts
MAX_WAIT_S = 600.0  # a server that asks for more patience than this is asked again by another run
CONNECT_S = 10.0  # to the server's first sign of life, and the longest that a stop waits for
MAX_REFUSED = 100  # answers in a row; then it is not the questions
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
JPEG_QUALITY = 90
_SHOWN_CHARS = 200
_REFUSED = "refused by the endpoint"
_NONE = "not an answer: no chat completion"


class _Again(Exception):
    """Ask again later; `wait_s` if the server said when. `answer`: what it is after the last attempt, if it is one."""

    def __init__(self, why: str, wait_s: float | None = None, answer: tuple[str, str] | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.answer = answer


class Endpoint:
    """Chat completions of one model. Thread-safe.

    Attributes:
        identity: what names the model in an item's hash. Not the address, which changes with each Slurm job.
        concurrency: requests that may run at the same time.
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Raises SetupError where the variable of the key is not set or can't be a header."""
        self.identity = {"endpoint_model": config.model}
        self.concurrency = config.concurrency
        self._config = config
        url = urlsplit(config.url)
        self._https, self._host, self._path = url.scheme == "https", url.hostname or "", f"{url.path}/chat/completions"
        try:
            self._port = url.port or (443 if self._https else 80)
        except ValueError:
            raise SetupError(f"caption.endpoint.url: {config.url}: expected a port below 65536") from None
        self._key = ""
        if config.key_env is not None:
            self._key = os.environ.get(config.key_env, "").strip()
            if not self._key:
                raise SetupError(f"caption.endpoint.key_env: the environment variable {config.key_env} is not set here")
            if not (self._key.isascii() and self._key.isprintable()):
                raise SetupError(f"caption.endpoint.key_env: {config.key_env} holds characters that no API key has")
        self._tls = ssl.create_default_context() if self._https else None
        self._refused = 0  # answers in a row
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def plain(self, text: str) -> str:
        """As it is: what a text may not hold is the server's to know."""
        return text.encode("utf-8", "replace").decode("utf-8")

    def stop(self) -> None:
        """End every request and wait of other threads at once: each raises Stopped."""
        self._stop.set()
        with self._lock:
            for sock in self._open:
                _shut(sock)

    def answer(
        self, prompt: str, frames: Sequence[np.ndarray], *, seed: int, temperature: float, max_new_tokens: int
    ) -> tuple[str, str]:
        """Ask once, as often as it takes to get an answer.

        Args:
            frames: uint8 [H,W,3] each, RGB.

        Returns:
            (text, fault): the answer, and why it can't be used whatever it says, or "".

        Raises:
            SetupError: no answer after `retries`, one that no other answer will follow (a wrong key, name or address,
                a redirect), or MAX_REFUSED refusals in a row, or bodies in a row that are no chat completion.
            Stopped: `stop` was called.
        """
        content: Any = prompt
        if frames:
            images = [{"type": "image_url", "image_url": {"url": _data_url(f)}} for f in frames]
            content = [*images, {"type": "text", "text": prompt}]
        body = {
            "model": self._config.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stream": False,
        }  # fmt: skip
        data = json.dumps(body).encode()
        for attempt in range(self._config.retries + 1):
            try:
                response, said = self._post(data)
                return self._counted(self._read(response, said))
            except _Again as again:
                if self._stop.is_set():
                    raise Stopped("caption: stopped while it waited for the endpoint") from None
                if attempt == self._config.retries:
                    if again.answer is not None:
                        return self._counted(again.answer)
                    raise SetupError(
                        f"caption.endpoint: {self._config.url}: no answer in {attempt + 1} attempts: {again}; what was "
                        "answered is kept, run again when the server is there"
                    ) from None
                # Half of it by chance: tasks that failed together must not come back together.
                wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
                wait_s = wait_s if again.wait_s is None else again.wait_s
                if wait_s > MAX_WAIT_S:
                    raise SetupError(
                        f"caption.endpoint: {self._config.url}: asks to wait {wait_s:.0f} s ({again}); what was "
                        "answered is kept, run again then"
                    ) from None
                log.info("%s: %s; again in %.1f s", self._config.url, again, wait_s)
                self._stop.wait(wait_s)
        raise AssertionError

    def _post(self, data: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """One request. A response without its body where the status alone decides."""
        if self._stop.is_set():
            raise _Again("stopped")
        timeout_s, late = self._config.timeout_s, threading.Event()
        if self._https:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=min(timeout_s, CONNECT_S), context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=min(timeout_s, CONNECT_S))
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        sock: socket.socket | None = None

        def end() -> None:  # a socket's own timeout starts anew with every byte
            late.set()
            if sock is not None:
                _shut(sock)

        timer = threading.Timer(timeout_s, end)
        timer.daemon = True
        try:
            timer.start()
            connection.connect()
            sock = connection.sock
            assert sock is not None
            sock.settimeout(timeout_s)
            with self._lock:
                self._open.add(sock)
            if self._stop.is_set() or late.is_set():
                raise TimeoutError
            connection.request("POST", self._path, data, headers)
            response = connection.getresponse()
            body = response.read(MAX_RESPONSE_BYTES + 1)
            if late.is_set():
                raise TimeoutError
            if response.length and len(body) <= MAX_RESPONSE_BYTES:
                raise _Again(f"the answer ended {response.length} bytes early")
            return response, body
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                raise SetupError(f"caption.endpoint: {self._config.url}: {error.verify_message}") from None
            why = f"nothing within {timeout_s:g} s" if late.is_set() or isinstance(error, TimeoutError) else ""
            raise _Again(why or self._shown(str(error) or type(error).__name__)) from None
        finally:
            timer.cancel()
            with self._lock:
                if sock is not None:
                    self._open.discard(sock)
            connection.close()

    def _read(self, response: http.client.HTTPResponse, body: bytes) -> tuple[str, str]:
        status, where = response.status, f"caption.endpoint: {self._config.url}"
        if status == 200:
            status = _inner_status(body)
        said = self._shown(_message(body))
        if status == 429 or status >= 500 or status == 408:
            raise _Again(f"status {status} {said}".strip(), _retry_after(response.getheader("Retry-After")))
        if 300 <= status < 400:
            to = self._shown(response.getheader("Location") or "nowhere")
            raise SetupError(f"{where}: status {status}, a redirect to {to}, which is not followed; give that address")
        if status in (400, 413, 422):  # of this one question: too long for the model, or filtered
            return said, f"{_REFUSED}: status {status}"
        if status != 200:
            hint = {401: "see key_env", 403: "see key_env", 404: "see url and model"}.get(status, "see url")
            raise SetupError(f"{where}: status {status} for model {shown(self._config.model)}: {said}; {hint}")
        if len(body) > MAX_RESPONSE_BYTES:
            return "", f"not an answer: over {MAX_RESPONSE_BYTES} bytes"
        try:
            choice = json.loads(body)["choices"][0]
            message = choice["message"]
            text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            # A gateway's way to say that the server behind it is busy, or out of quota; or it is of this question.
            raise _Again(f"status 200, no chat completion: {said}", answer=(said, _NONE)) from None
        if isinstance(refusal, str) and refusal:
            return self._without_key(refusal), "refusal"
        if not isinstance(text, str):
            return said, "not an answer: no text in the chat completion"
        text = self._without_key(text)
        if finish == "length":
            return text, "cut: it reached max_new_tokens"
        return text, "refusal: content filter" if finish == "content_filter" else ""

    def _counted(self, answer: tuple[str, str]) -> tuple[str, str]:
        """The answer, unless the endpoint has refused too many questions in a row, or answered none: a body or a
        parameter that it never takes would cost every clip its caption."""
        said, fault = answer
        with self._lock:
            self._refused = self._refused + 1 if fault.startswith((_REFUSED, _NONE)) else 0
            if self._refused < MAX_REFUSED:
                return answer
        raise SetupError(
            f"caption.endpoint: {self._config.url}: {self._refused} questions in a row {fault}: {self._shown(said)}; "
            "see to the server or the section; the clips that it refused are in the folder of the captions, with that "
            "reason: delete them there to have them asked again"
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _shown(self, text: str) -> str:
        text = shown(" ".join(self._without_key(text).split()))
        return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def _message(body: bytes) -> str:
    """What a server says of an error: OpenAI's `error.message`, else its beginning as text."""
    try:
        error = json.loads(body)["error"]
        said = error["message"] if isinstance(error, dict) else error
        if isinstance(said, str):
            return said
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return body[:2000].decode("utf-8", "replace")


def _inner_status(body: bytes) -> int:
    """200, or the status that a gateway tells in the body when it was the server behind it that failed."""
    try:
        answer = json.loads(body)
        code = 200 if "choices" in answer else answer["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 200
    return code if type(code) is int and 400 <= code < 600 else 200


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date; None where neither was said."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _data_url(frame: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
