"""The prompts file: what to sample, one prompt a line or one JSON object a line, checked before anything is loaded.

A prompt is text for the model and nothing else: it reaches file names only through `slug`, and pages only escaped.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorahpc.errors import ConfigError
from sorahpc.files import read_text

MAX_PROMPT_CHARS = 20_000
MAX_FILE_BYTES = 256 << 20
SLUG_CHARS = 40


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file. None: as the section `sample` of the config says.

    `detailed` is what `sample.expand` made of the text, "" where it was not asked for or nothing was accepted.
    """

    index: int  # 0-based place among the prompts of the file
    line: int  # 1-based line, for messages
    text: str
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    detailed: str = ""
    expansion: dict[str, Any] | None = None  # how `detailed` was made, or why it was not

    @property
    def condition(self) -> str:
        """What the model is conditioned on."""
        return self.detailed or self.text

    @property
    def name(self) -> str:
        """Stem of this sample's files: ``00007-a-red-ball-moves-left``."""
        return f"{self.index:05d}-{slug(self.text)}"


def slug(text: str) -> str:
    """Up to 40 characters of [a-z0-9-] that remind of `text`, safe as part of a file name whatever the text is."""
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_CHARS].rstrip("-") or "prompt"


def read_prompts(path: Path) -> list[Prompt]:
    """Read and check a prompts file.

    ``.jsonl``: an object a line with ``prompt`` and optional ``seed``, ``height``, ``width``, ``frames``, ``fps``. Any
    other name: a prompt a line, where blank lines and those starting with ``#`` are skipped.

    Raises:
        ConfigError: one line a fault, each with its file and line; at most 20 of them.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"sample.prompts: {path} has {size} bytes; at most {MAX_FILE_BYTES}, split it")
        content = read_text(path, "utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"sample.prompts: no file {path}; write one with a prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"sample.prompts: can't read {path}: {reason}") from None

    is_jsonl = path.suffix.lower() == ".jsonl"
    prompts: list[Prompt] = []
    faults: list[str] = []
    # Not splitlines(): it also cuts at U+2028 and form feeds, which a prompt may hold or be refused for by name.
    for number, raw in enumerate(content.split("\n"), start=1):
        line = raw.strip(" \t\r")
        if not line or (not is_jsonl and line.startswith("#")):
            continue
        try:
            fields = _parse_object(line) if is_jsonl else {"prompt": line}
            text = _check_text(fields.pop("prompt"))
            prompts.append(Prompt(index=len(prompts), line=number, text=text, **fields))
        except ValueError as error:
            faults.append(f"{path} line {number}: {error}")
    if faults:
        more = [f"{path}: and {len(faults) - 20} more faults"] if len(faults) > 20 else []
        raise ConfigError("\n".join([*faults[:20], *more]))
    if not prompts:
        raise ConfigError(f"sample.prompts: {path} holds no prompt; write one a line")
    return prompts


def _check_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"prompt: expected text, found {_shown(text)}")
    text = text.strip()
    if not text:
        raise ValueError("prompt: expected text, found nothing")
    if len(text) > MAX_PROMPT_CHARS:
        raise ValueError(f"prompt: {len(text)} characters; at most {MAX_PROMPT_CHARS}")
    for i, char in enumerate(text):
        # Tabs and line breaks inside JSON strings are blanks to the tokenizer; the rest of Cc has no meaning in a
        # prompt, and a lone surrogate can't be written to any file.
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r":
            code = f"U+{ord(char):04X}"
            raise ValueError(f"prompt: character {i + 1} is {code}, a control character or half a pair; remove it")
    return text


def _integer(low: int, high: int) -> Any:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            raise ValueError(f"expected a whole number from {low} to {high - 1}, found {_shown(value)}")
        return value

    return check


def _fps(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= 240:
        raise ValueError(f"expected a number above 0 and at most 240, found {_shown(value)}")
    return float(value)


# The bounds of a size only keep a typing error from asking for terabytes; the VAE and the patch decide what is valid.
_FIELDS = {
    "seed": _integer(0, 2**31),
    "height": _integer(8, 16_385),
    "width": _integer(8, 16_385),
    "frames": _integer(1, 100_001),
    "fps": _fps,
}


def _parse_object(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {getattr(error, 'msg', None) or 'a number or nesting too long'}") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object with `prompt`, found {_shown(data)}")
    if "prompt" not in data:
        raise ValueError("prompt: missing")
    fields: dict[str, Any] = {"prompt": data.pop("prompt")}
    for key, value in data.items():
        if key not in _FIELDS:
            close = difflib.get_close_matches(key[:64], list(_FIELDS), n=1)
            raise ValueError(f"{_shown(key)}: unknown key" + (f"; did you mean `{close[0]}`?" if close else ""))
        if value is not None:
            try:
                fields[key] = _FIELDS[key](value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return fields


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
