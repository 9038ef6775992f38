"""Detailed captions: what an answer of a language model must be, how it is kept, and how clips come to theirs.

    <run>/captions/clips/3f/3f...json      a clip's item: what was asked, every raw answer with the reason it was
    <run>/captions/prompts/...             rejected for, and the caption that was taken; the same for a prompt
    <run>/captions.parquet                 a row a clip, once every clip of the manifest has its item

An item is named by the hash of all that decides it (clip, model, prompt, settings), written aside and linked to its
name: it is whole, never changes, and of two writers the first wins. An inode a clip is the price of losing only the
clip in work when a task is killed.

Answers are plain text. JSON was left out: a small model spoils the syntax, not the caption, more often than the other
way round, and what plain text brings instead (a preamble, a list, a refusal) can be seen and is rejected below. So is
an answer in JSON, or its braces and keys would be in the caption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from sorahpc.config import CaptionConfig, Config, config_hash
from sorahpc.data.manifest import ROWS_AT_ONCE, Rows, shown
from sorahpc.data.parquet import read_table
from sorahpc.errors import DataError
from sorahpc.files import read_regular
from sorahpc.runs import aside, atomic_write, fsync_dir

CAPTIONS = "captions.parquet"  # its name in the run folder
ITEMS = "captions"  # and that of the folder of the items
ITEM_FORMAT = 1
MAX_RAW_CHARS = 20_000  # of an answer that is kept; twice the longest caption that can be taken
_VERSION_KEY, _VERSION, _SETTINGS_KEY = b"sorahpc.captions", b"1", b"sorahpc.caption_settings"


# ---------------------------------------------------------------------------------------------------------------------
# What an answer must be

# Held against the beginning only, but for _ASSISTANT: a caption may quote a sign that says "I can't stop", but none
# begins so.
_ASSISTANT = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|text-based (?:ai|model))\b"
    r"|\bi(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model|text-based)\b"
    r"|\bi (?:cannot|can ?not|can't|am unable to) (?:provide|generate|create|write|produce|view|access)\b",
    re.IGNORECASE,
)
_THINGS = r"(?:image|video|frame|caption|picture)s?"
_REFUSAL = re.compile(
    r"(?:(?:i(?:'m| am)|we(?:'re| are)) (?:so |very |really |truly |terribly )?sorry\b"
    r"|sorry(?:[,.;!]| but| i\b| for| about| the)"
    r"|(?:i |we |my |our |please accept my )(?:sincere )?apolog|apologies\b"
    r"|unfortunately\b"
    r"|(?:i|we) (?:cannot|can ?not|can't|can only|could ?n[o']t|could not|do not|don't|did not|didn't|won't|will not"
    r"|would not|wouldn't|must decline|have to decline|need|decline|refuse|lack|require)\b"
    r"|i(?:'m| am) (?:unable|not able|not allowed|not permitted|not comfortable|not sure|afraid)\b"
    r"|(?:this|the|your) (?:request|content|prompt|question)\b[^.]{0,60}\b(?:violate|against|inappropriate|not allowed)"
    rf"|(?:there (?:is|are|was|were) )?no {_THINGS}\b[^.]{{0,30}}\b(?:provided|attached|given|supplied|uploaded)"
    r"|it (?:seems|appears|looks like) (?:that )?(?:you|there|no)\b"
    rf"|the {_THINGS} (?:is|are|was|were) (?:not |un)(?:available|readable|accessible|attached|provided)\b"
    rf"|it (?:seems|appears|looks like) (?:that )?the {_THINGS} (?:is|are|was|were|did)\b"
    r"|(?:please|could you(?: please)?|can you|kindly) (?:provide|share|upload|attach|send|give|clarify)\b)",
    re.IGNORECASE,
)
# How models begin to refuse in the tongue that they know best. Openings alone: what such an answer says on, who knows.
# People in a caption may look sorry, or say so; and Myanmar and Dubai begin or end as such words do.
_REFUSAL_ELSEWHERE = re.compile(
    r"(?:我?(?:很|非常|十分)?(?:抱歉|对不起|對不起)(?!地)|我(?:无法|無法|不能)"
    r"|作[为為].{0,8}?(?:(?<![a-z])AI|人工智[能慧]|[语語]言模型)(?:[，,、我]|[语語]言|模型|助[手理])"
    r"|(?:大変)?申し訳(?!なさ)|(?:すみません|ごめんなさい)(?!と)"
    r"|(?:정말 )?(?:죄송|미안)(?!한 |해하|마)"
    r"|(?:es )?tut (?:mir|uns) (?:sehr )?leid\b|(?:leider )?(?:kann|darf) ich\b"
    r"|ich (?:kann|darf) (?:\w+ )?(?:nicht|kein)"
    r"|(?:je suis )?(?:vraiment )?désolée?(?:[,.;!]| mais\b)|je ne (?:peux|suis)\b|malheureusement\b"
    r"|lo (?:siento|lamento)\b|(?:yo )?no puedo\b|lamentablemente\b"
    r"|desculpe\b|(?:sinto|lamento) muito\b|(?:eu )?não (?:posso|consigo)\b|infelizmente\b"
    r"|mi dispiace\b|(?:io )?non posso\b|purtroppo\b"
    r"|извините\b|мне (?:очень )?жаль\b|(?:к сожалению,? )?я не могу\b|к сожалению\b)",
    re.IGNORECASE,
)
_CHATTER = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely|alright|understood|great|no problem|got it)(?: thing)?\s*[,!.:]"
    r"|(?:sure|certainly|okay|ok)(?: thing)? (?:here|i|let)\b"
    r"|(?:hello|hi)(?: there)?[!,.]|here you (?:go|are)\b"
    r"|(?:here(?:'s| is| are)|below is|the following is|this is) [^.:]{0,60}\b(?:caption|description|version|prompt)\b"
    r"|thank(?:s| you) for\b|let me (?:know|describe|help|expand|try)\b|as (?:requested|you asked|instructed)\b"
    rf"|based on (?:the|your|these) (?:\w+ )?(?:{_THINGS}|prompt|description)\b"
    r"|i(?:'\w+)?\s|we(?:'\w+)? (?:can|could|see|have|are (?:shown|given|looking))\b)",
    re.IGNORECASE,
)
_POSTSCRIPT = re.compile(
    r"\n\s*[(\[]?(?:notes?\s*:|p\.?s\.?\s*:|(?:please )?(?:let me know|feel free)\b|i (?:hope|have|kept|avoided)\b"
    r"|(?:word count|short caption|short prompt)\s*:)|\((?:word count|\d+ words\b)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:(?:detailed|expanded|improved|new|full|video|final) )*"
    r"(?:caption|description|prompt|answer|response|output|assistant)\s*:\s*",
    re.IGNORECASE,
)
_THINKING = re.compile(r"\s*<think(?:ing)?>.*?</think(?:ing)?>\s*", re.DOTALL | re.IGNORECASE)
_MARKUP = re.compile(
    r"\A(?:[\[{]|\|(?=.*\|))|```|\*\*|^\s{0,3}(?:#{1,6}|[-*•]|\d{1,2}[.)])\s|<\|[^|<>]{1,40}\|>|</?[a-z][a-z0-9_-]{0,20}/?>",
    re.MULTILINE | re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "「": "」"}
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder what a person reads
_MIN_DISTINCT = 0.6  # of an answer's runs of three words: a text said twice has 0.5
RULES = 4  # version of `judge` and `merge`: raise it when they take other answers

INSTRUCTION = (
    "Write a detailed caption for a short video clip, as training data for a text-to-video model. You are given the "
    "clip's short caption{frames}. In one paragraph of plain English, describe the subjects and what they look like, "
    "what moves and how, the place and the background, colours and light, and how the camera moves. Keep every fact of "
    "the short caption. {care} Do not speak of the caption, of frames or of yourself. Answer with the caption alone, "
    "in 60 to 150 words, without a heading, list, quotes or markup.\n\nShort caption: {caption}"
)
_WITH_FRAMES = (" and, in order, some of its frames", "Describe only what the frames show.")
_TEXT_ALONE = ("", "Add no object, person or event that it does not imply.")
PROMPT_INSTRUCTION = (
    "Write a detailed prompt for a text-to-video model from a user's short one. In one paragraph of plain English, "
    "describe the subjects and what they look like, what moves and how, the place and the background, colours and "
    "light, and how the camera moves. Keep every subject, number, colour and action of the short prompt, and what it "
    "leaves open fill in plausibly. Do not speak of the prompt or of yourself. Answer with the detailed prompt alone, "
    "in 60 to 150 words, without a heading, list, quotes or markup.\n\nShort prompt: {caption}"
)


def instruction_of(section: CaptionConfig) -> str:
    """What the model is asked of a clip, with {caption} still in it."""
    frames, care = _WITH_FRAMES if section.frames else _TEXT_ALONE
    return section.instruction or INSTRUCTION.replace("{frames}", frames).replace("{care}", care)


def judge(answer: str, original: str, min_chars: int, max_chars: int) -> tuple[str, str]:
    """What of a raw answer is the caption, or why it is none.

    A reasoning model's closed block of thoughts, a label (`Caption:`) and quotes around the whole are taken off, white
    space is joined; nothing else is mended.

    Returns:
        (caption, "") or ("", reason), the reason being ``kind`` or ``kind: detail``.
    """
    if thoughts := _THINKING.match(answer):
        answer = answer[thoughts.end() :]
    answer = _LABEL.sub("", answer.strip(), count=1) if _LABEL.match(answer.strip()) else answer.strip()
    if len(answer) > 1 and _QUOTES.get(answer[0]) == answer[-1] and answer[0] not in answer[1:-1]:
        answer = answer[1:-1].strip()
    if not answer:
        return "", "empty"
    for char in answer:
        if (unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") and char not in "\t\n\r") or char in _OVERRIDES:
            return "", f"control character: U+{ord(char):04X}"
    if "\ufffd" in answer:
        return "", "not text: bytes that are not UTF-8"
    plain = answer.replace("’", "'")
    if _ASSISTANT.search(plain) or _REFUSAL.match(plain) or _REFUSAL_ELSEWHERE.match(plain):
        return "", "refusal"
    if _CHATTER.match(plain):
        return "", "chatter: it speaks to the reader first"
    if _POSTSCRIPT.search(plain):
        return "", "chatter: it speaks to the reader at the end"
    if markup := _MARKUP.search(answer):
        return "", f"markup: {shown(markup.group().strip())!r}"
    caption = " ".join(answer.split())
    if not min_chars <= len(caption) <= max_chars:
        return "", f"length: {len(caption)} characters, expected {min_chars} to {max_chars}"
    visible = [c for c in caption if not c.isspace()]
    letters = sum(unicodedata.category(c)[0] in "LM" for c in visible)
    if 2 * letters < len(visible):
        return "", f"not text: {letters} letters among {len(visible)} characters"
    if loop := _loop(caption):
        return "", f"repetition: {loop}"
    if _folded(caption) == _folded(original):
        return "", "unchanged: it repeats the short caption"
    return caption, ""


def _loop(caption: str) -> str:
    """What a model that has lost its way says again and again, or ""."""
    words = caption.lower().split()
    units = words if len(words) * 20 > len(caption) else list(caption)  # scripts that put no spaces between words
    for size in range(1, 9):
        run = 0
        for i in range(size, len(units)):
            run = run + 1 if units[i] == units[i - size] else 0
            if run >= 3 * size and run + size >= 6:  # four times in a row, and more than "very very very very"
                return f"{shown(' '.join(units[i - size + 1 : i + 1]))[:40]!r} again and again"
    triples = list(zip(units, units[1:], units[2:], strict=False))
    if len(triples) >= 12 and len(set(triples)) < _MIN_DISTINCT * len(triples):
        return f"{len(set(triples))} different runs of three words among {len(triples)}"
    return ""


def _folded(text: str) -> str:
    """A text by its letters and digits alone."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


# ---------------------------------------------------------------------------------------------------------------------
# Items


@dataclass(frozen=True)
class Attempt:
    """One answer: as it came (at most MAX_RAW_CHARS), how it was asked for, and why it was not taken ("" if it was)."""

    seed: int
    temperature: float
    text: str
    rejected: str


@dataclass(frozen=True)
class Item:
    """What became of a short caption. `caption` is "" where no answer was accepted, and `reason` says why then."""

    sha256: str
    subject: str  # key of the clip, or "" of a prompt
    original: str
    frames: int  # that the model was shown
    prompt: str  # what it was asked
    model: dict[str, str]
    caption: str
    reason: str
    attempts: tuple[Attempt, ...]


def item_path(folder: Path, sha256: str) -> Path:
    return folder / sha256[:2] / f"{sha256}.json"


def known_items(folder: Path) -> set[str]:
    """Hashes of the items that are there, from one look into each folder."""
    return {path.stem for path in folder.glob("[0-9a-f][0-9a-f]/*.json")} if folder.is_dir() else set()


def write_item(folder: Path, item: Item) -> Item:
    """Keep an item. Returns the one that is there then: another task may have been first.

    Raises:
        DataError: it can't be written.
    """
    path = item_path(folder, item.sha256)
    new = aside(path)
    text = json.dumps({"format": ITEM_FORMAT, **asdict(item)}, indent=1, ensure_ascii=True)
    try:
        atomic_write(new, text + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
        finally:
            new.unlink(missing_ok=True)
        fsync_dir(path.parent)
    except OSError as error:
        raise DataError(f"{shown(path)}: can't write the caption: {error.strerror or error}; run again") from None
    return read_item(folder, item.sha256)


def read_item(folder: Path, sha256: str) -> Item:
    """Raises DataError where it is missing or not what `write_item` has written."""
    path = item_path(folder, sha256)
    try:
        data = json.loads(read_regular(path))
        if data.pop("format") != ITEM_FORMAT:
            raise ValueError("another format")
        item = Item(**{**data, "attempts": tuple(Attempt(**a) for a in data["attempts"])})
        texts = (item.sha256, item.subject, item.original, item.prompt, item.caption, item.reason)
        if (
            not all(isinstance(t, str) for t in texts)
            or item.sha256 != sha256
            or bool(item.caption) == bool(item.reason)
        ):
            raise ValueError("fields that don't agree")
    except OSError as error:
        raise DataError(f"{shown(path)}: can't read the caption: {error.strerror}; run again") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{shown(path)}: not a caption as it was written ({fault}); delete it and run again") from None
    return item


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Row:
    """A clip's caption. `caption` is "" where the original stays, and `reason` says why."""

    key: str
    caption: str
    reason: str
    item: str  # sha256 of its item


def caption_settings(config: Config) -> str:
    """Hash of all in the config that decides captions, but for the weights behind the model's name or path."""
    section = config.caption
    assert section is not None
    clip: dict[str, Any] | None = None
    if section.frames:
        clip = {"fps": config.clip.fps, "max_frames": config.clip.max_frames}
        if config.clip.max_tokens is not None and config.vae is not None:  # which may make clips shorter
            clip |= {"all": config.clip.model_dump(mode="json"), "vae": str(config.vae.path)}
            clip["patch"] = config.model.patch if config.model else None
    data = section.model_dump(mode="json", exclude={"path", "endpoint", "resources", "clips", "prompt_instruction"})
    # An endpoint is known by its model: the same server has another address in each Slurm job.
    model = section.endpoint.model if section.endpoint else str(section.path)
    return config_hash({**data, "model": model, "instruction": instruction_of(section), "clip": clip, "rules": RULES})


def merge(items: Sequence[Item]) -> list[Row]:
    """Rows of clips, in the order of the items. A caption that an earlier clip has too describes no clip in detail: the
    later one keeps its original. So a row doesn't change when others are appended."""
    first: dict[str, Item] = {}
    rows = []
    for item in items:
        caption, reason = item.caption, item.reason
        if caption:
            other = first.setdefault(_folded(caption), item)
            # By the text alone, clips of one short caption are one question: one answer is no fault.
            if other is not item and (item.frames or other.original != item.original):
                caption, reason = "", f"duplicate: the same answer as for {other.subject}"
        rows.append(Row(item.subject, caption, reason, item.sha256))
    return rows


_COLUMNS = [f.name for f in dataclasses.fields(Row)]


def write_captions(path: Path, rows: Sequence[Row], settings: str) -> None:
    """Write the table; it appears whole or not at all. Equal rows and settings give equal bytes.

    Raises:
        DataError: it can't be written.
    """
    schema = pa.schema(
        [pa.field(name, pa.string(), nullable=False) for name in _COLUMNS],
        metadata={_VERSION_KEY: _VERSION, _SETTINGS_KEY: settings.encode()},
    )
    buffer = io.BytesIO()
    columns = {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
    table = pa.table(columns, schema=schema)
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROWS_AT_ONCE)
    try:
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"{shown(path)}: can't write the captions: {error.strerror}") from None


def read_captions(path: Path) -> tuple[list[Row], str]:
    """The table's rows, and the hash of the settings that made it.

    Raises:
        DataError: it is missing, unreadable, of another version, or a column is not what it must be.
    """
    table, settings = _read(path)
    return [Row(*values) for values in zip(*(table.column(c).to_pylist() for c in _COLUMNS), strict=True)], settings


def _read(path: Path) -> tuple[pa.Table, str]:
    name, again = shown(path), "run `sorahpc caption` again"
    try:
        table = read_table(path, name, again, _COLUMNS)
    except FileNotFoundError:
        raise DataError(f"{name}: no such table of captions; run `sorahpc caption` first") from None
    metadata = table.schema.metadata or {}
    if metadata.get(_VERSION_KEY) != _VERSION:
        found = metadata.get(_VERSION_KEY, b"none").decode(errors="replace")
        raise DataError(f"{name}: captions of version {_VERSION.decode()} expected, found {shown(found)}; {again}")
    for column in _COLUMNS:
        kind = table.schema.field(column).type if column in table.schema.names else "missing"
        if kind != pa.string() or table.column(column).null_count:
            raise DataError(f"{name}: column `{column}`: text without gaps expected, found {kind}; {again}")
    return table, metadata.get(_SETTINGS_KEY, b"").decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# The manifest as it is encoded


class _Texts(Sequence[str]):
    """Texts in the column that they were read in: of each row that of its place, "" where it has none."""

    def __init__(self, column: pa.ChunkedArray, places: Sequence[int]) -> None:
        self._column, self._places = column, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        place = self._places[i]
        return str(self._column[place]) if place >= 0 else ""


def with_captions(config: Config, videos: Rows) -> tuple[Rows, Sequence[str]]:
    """The manifest as it is encoded, and the detailed caption of each of its rows, "" where it has none.

    A clip with a detailed caption has a key of its own, since the cache knows a sample by its bytes and captions: only
    the shards of clips whose captions changed are made again. Without a section `caption`, or with `clips: false`, rows
    stay as they are.

    Raises:
        DataError: the table is missing, lacks a clip, or was made with other settings.
    """
    section = config.caption
    if section is None or not section.clips:
        return videos, [""] * len(videos)
    path = config.run_dir / CAPTIONS
    table, settings = _read(path)
    if settings != caption_settings(config):
        raise DataError(
            f"{shown(path)}: made with other settings than the section `caption`; run `sorahpc caption` again"
        )
    place_of = {key: i for i, key in enumerate(table.column("key").to_pylist())}
    texts = _Texts(table.column("caption"), range(len(table)))
    keys, places = list[str](), array("q")
    lacking = list[str]()
    for video in videos:
        key, place = video.key, place_of.get(video.key, -1) if video.ok else -1
        if video.ok and place < 0:
            lacking.append(video.path)
        if place >= 0 and (caption := texts[place]):
            key = hashlib.sha256(f"{key}\0detailed\0{caption}".encode()).hexdigest()[:16]
        keys.append(key)
        places.append(place)
    if lacking:
        raise DataError(
            f"{shown(path)}: lacks {len(lacking)} clips of the manifest, such as {shown(lacking[0])}; "
            "run `sorahpc caption` again"
        )
    return videos.with_keys(keys), _Texts(table.column("caption"), places)
