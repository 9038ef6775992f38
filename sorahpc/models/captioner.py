"""Short captions and prompts -> detailed ones, by a language model of a local folder or of an endpoint.

Of a local folder weights are read from safetensors only, nothing is fetched, and no code of the folder is run. One
question a forward: a padded batch would be faster, but rounds differently by what else is in it, and then an answer
would depend on the number of tasks. For speed let a server batch, behind `caption.endpoint`.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sorahpc.config import CaptionConfig, Config, config_hash
from sorahpc.data.captions import (
    MAX_RAW_CHARS,
    PROMPT_INSTRUCTION,
    RULES,
    Attempt,
    Item,
    instruction_of,
    judge,
    write_item,
)
from sorahpc.data.decode import ClipPlan, VideoError, decode
from sorahpc.data.keys import check_unchanged
from sorahpc.data.manifest import Video, shown
from sorahpc.errors import ConfigError, Stopped
from sorahpc.models.endpoint import Endpoint
from sorahpc.models.text import WEIGHTS, import_transformers, model_type
from sorahpc.models.weights import sha256_files, weight_files

log = logging.getLogger(__name__)

RETRY_TEMPERATURE = 0.7  # at least, from the second attempt on: another seed alone changes nothing where it is 0
_HASHED = (".json", ".jinja", ".model", ".txt")  # of a model folder, with the weights: another template, another answer
OF_VIDEO = "video: "  # how the reason of an item begins whose frames could not be had
_POLL_S = 0.5


class Captioner(Protocol):
    """A language model. `identity` names it in hashes, `concurrency` is how many threads may ask at a time."""

    identity: dict[str, str]
    concurrency: int

    def plain(self, text: str) -> str:
        """A stranger's text without what would be more than text to the model."""

    def answer(
        self, prompt: str, frames: Sequence[np.ndarray], *, seed: int, temperature: float, max_new_tokens: int
    ) -> tuple[str, str]:
        """(text, fault): the answer, and why it can't be used whatever it says, or ""."""

    def stop(self) -> None:
        """Let those who wait for an answer go, with Stopped."""


def load_captioner(section: CaptionConfig, device: torch.device | str) -> Captioner:
    """The model of the section `caption`. A local one reads its weights when it is first asked.

    Raises:
        ConfigError: a model folder that can't be used. SetupError: no API key in the environment.
    """
    if section.endpoint is not None:
        return Endpoint(section.endpoint)
    assert section.path is not None
    return LocalModel(section.path, section.dtype, device, with_frames=section.frames > 0)


# ---------------------------------------------------------------------------------------------------------------------
# A model of a local folder


class LocalModel:
    """A causal LM, or an image-text-to-text model, of transformers. Made by `load_captioner`.

    The same question, seed and temperature give the same answer, whatever was asked before.
    """

    concurrency = 2  # one clip's frames are decoded while the model is at work on another's

    def __init__(self, folder: Path, dtype: str, device: torch.device | str, *, with_frames: bool) -> None:
        """Raises ConfigError, naming caption.path: no such folder or file, or another kind of model."""
        if not folder.is_dir():
            raise ConfigError(f"caption.path: no folder {folder}; expected a local model (config.json, safetensors)")
        kind = model_type(folder, "caption.path")
        auto = import_transformers().models.auto.modeling_auto
        self._sees = kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if not self._sees and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                f"caption.path: model_type in {folder}/config.json: expected a causal LM or an image-text-to-text "
                f"model of transformers, found {shown(kind)!r}"
            )
        if with_frames and not self._sees:
            raise ConfigError(
                f"caption.frames: 0 expected, since {folder} ({kind}) reads text alone; or give an image-text-to-text "
                "model"
            )
        self._folder, self._dtype, self._device = folder, dtype, torch.device(device)
        self._one = threading.Lock()  # question at a time: they share the seeded generator, and the memory
        weights = weight_files(folder, WEIGHTS, "caption.path")
        others = sorted(p for p in folder.iterdir() if p.suffix in _HASHED and p.is_file())
        self.identity = {"id": kind, "weights_sha256": sha256_files([*weights, *others]), "dtype": dtype}

    @functools.cached_property
    def _reader(self) -> Any:
        """The processor of a model that sees, else the tokenizer."""
        transformers = import_transformers()
        name = "AutoProcessor" if self._sees else "AutoTokenizer"
        reader = self._load(getattr(transformers, name), name)
        if self._sees and not reader.chat_template:
            raise ConfigError(f"caption.path: no chat template in {self._folder}: it says where images go")
        return reader

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return self._reader.tokenizer if self._sees else self._reader

    @functools.cached_property
    def _special(self) -> list[str]:
        """Texts that are one token with a meaning of its own: end of a turn, place of an image."""
        added = [t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special]
        image = [getattr(self._reader, "image_token", None)]
        return sorted({t for t in [*added, *self._tokenizer.all_special_tokens, *image] if t}, key=len, reverse=True)

    @functools.cached_property
    def _model(self) -> Any:
        transformers = import_transformers()
        name = "AutoModelForImageTextToText" if self._sees else "AutoModelForCausalLM"
        model, info = self._load(
            getattr(transformers, name), name, dtype=getattr(torch, self._dtype), use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if faults:
            raise ConfigError(
                f"caption.path: {self._folder}: the weights lack {len(faults)} tensors of config.json, such as "
                f"{shown(faults[0])}"
            )
        ends = model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        self._ends = [int(e) for e in ends] if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]
        # The folder's own (beams, penalties, top-k) would be a second place that decides answers.
        model.generation_config = transformers.GenerationConfig()
        return model.to(self._device).eval().requires_grad_(False)

    def _load(self, cls: Any, name: str, **more: Any) -> Any:
        try:
            return cls.from_pretrained(str(self._folder), local_files_only=True, trust_remote_code=False, **more)
        except Exception as error:  # what a broken folder raises is any of a dozen types
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"caption.path: {self._folder} doesn't load as {name}: {shown(first[:300])}") from error

    def plain(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates, which tokenizers refuse
        for token in self._special:
            text = text.replace(token, " ")
        return text

    def stop(self) -> None:
        """Nothing waits: an answer is computed by whoever asks."""

    def answer(
        self, prompt: str, frames: Sequence[np.ndarray], *, seed: int, temperature: float, max_new_tokens: int
    ) -> tuple[str, str]:
        """As `Captioner`. Raises ConfigError where the folder doesn't load, or its chat template fails."""
        with self._one:
            return self._answer(prompt, frames, seed, temperature, max_new_tokens)

    def _answer(
        self, prompt: str, frames: Sequence[np.ndarray], seed: int, temperature: float, max_new_tokens: int
    ) -> tuple[str, str]:
        model = self._model
        inputs = self._inputs(prompt, frames).to(self._device)
        length = inputs["input_ids"].shape[1]
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length + max_new_tokens > most:
            return "", f"too long for the model: {length} tokens and max_new_tokens {max_new_tokens}, at most {most}"
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(getattr(torch, self._dtype))
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        settings = import_transformers().GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self._ends or None, num_beams=1,
            pad_token_id=next((t for t in (self._tokenizer.pad_token_id, *self._ends) if t is not None), 0),
            **{"do_sample": False, **how},
        )  # fmt: skip
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            tokens = model.generate(**inputs, generation_config=settings)[0, length:].tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text, "" if tokens and tokens[-1] in self._ends else "cut: it reached max_new_tokens"

    def _inputs(self, prompt: str, frames: Sequence[np.ndarray]) -> Any:
        if not self._sees and not self._reader.chat_template:  # a model that only goes on with a text
            return self._reader(f"{prompt}\n\n", return_tensors="pt")
        content: Any = prompt
        if self._sees:
            from PIL import Image

            images = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
            content = [*images, {"type": "text", "text": prompt}]
        try:
            return self._reader.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        except Exception as error:  # a template is a program in a sandbox, and may fail in any way
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"caption.path: the chat template in {self._folder} fails on {len(frames)} frames and a question: "
                f"{shown(first[:300])}"
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Question:
    """A short caption of a clip (`subject` is its key) or a prompt (""), and how it is asked about.

    `sha256` is of all that decides the answer.
    """

    sha256: str
    subject: str
    original: str
    prompt: str
    video: Video | None  # None of a prompt
    frames: ClipPlan | None


def clip_question(config: Config, captioner: Captioner, video: Video, span_s: float) -> Question:
    """Of a clip: with `caption.frames` frames from the middles of equal parts of its first `span_s` seconds, which are
    what is trained on."""
    section = config.caption
    assert section is not None
    plan = None
    if section.frames:
        count = section.frames if span_s > 0 else 1
        scale = min(1.0, math.sqrt(section.frame_area_px / (video.height * video.width)))
        height, width = (max(1, int(side * scale)) for side in (video.height, video.width))
        plan = ClipPlan(tuple(video.start_s + (i + 0.5) * span_s / count for i in range(count)), height, width)
    return _question(section, captioner, video.key, video.caption, instruction_of(section), video, plan)


def prompt_question(section: CaptionConfig, captioner: Captioner, text: str) -> Question:
    """Of a prompt: of its text alone."""
    instruction = section.prompt_instruction or PROMPT_INSTRUCTION
    return _question(section, captioner, "", " ".join(text.split()), instruction, None, None)


def _question(
    section: CaptionConfig, captioner: Captioner, subject: str, original: str, instruction: str,
    video: Video | None, plan: ClipPlan | None,
) -> Question:  # fmt: skip
    prompt = instruction.replace("{caption}", captioner.plain(original))
    fields = ("max_new_tokens", "temperature", "attempts", "min_chars", "max_chars", "seed")
    decides = {
        "subject": subject, "original": original, "prompt": prompt, "model": captioner.identity, "rules": RULES,
        "frames": [list(plan.times_s), plan.height, plan.width] if plan else None,
        **{field: getattr(section, field) for field in fields},
    }  # fmt: skip
    return Question(config_hash(decides), subject, original, prompt, video, plan)


def ask(section: CaptionConfig, captioner: Captioner, question: Question) -> Item:
    """Ask until an answer is accepted, at most `caption.attempts` times. A video that can't be decoded, or is another
    since prepare, is an item with that reason."""
    attempts: list[Attempt] = []
    caption = reason = ""
    frames: list[np.ndarray] = []
    try:
        if question.video and question.frames:
            check_unchanged(question.video)
            frames = list(decode(question.video.path, question.frames))
    except VideoError as error:
        reason = f"{OF_VIDEO}{error.reason}"
    while not caption and len(attempts) < section.attempts and not reason.startswith(OF_VIDEO):
        seed = (int(question.sha256[:8], 16) + len(attempts)) % 2**31
        temperature = max(section.temperature, RETRY_TEMPERATURE) if attempts else section.temperature
        text, reason = captioner.answer(
            question.prompt, frames, seed=seed, temperature=temperature, max_new_tokens=section.max_new_tokens
        )
        if not reason:
            caption, reason = judge(text, question.original, section.min_chars, section.max_chars)
        attempts.append(Attempt(seed, temperature, text[:MAX_RAW_CHARS], reason))
    num_frames = len(question.frames.times_s) if question.frames else 0
    return Item(
        question.sha256, question.subject, question.original, num_frames, question.prompt, captioner.identity, caption,
        reason, tuple(attempts),
    )  # fmt: skip


def ask_all(
    section: CaptionConfig, captioner: Captioner, questions: Sequence[Question], folder: Path,
    stop_requested: Callable[[], bool], kept: Callable[[Item], None],
) -> None:  # fmt: skip
    """Answer the questions, and keep each item in `folder` as soon as it is whole; `kept` is told of it.

    Raises:
        Stopped: on request; what was answered is kept, what was in work is asked again next time.
        ConfigError, SetupError, DataError: as `Captioner.answer` and `write_item`.
    """
    todo = iter(questions)
    running: set[Future[Item]] = set()
    with ThreadPoolExecutor(captioner.concurrency) as pool:
        try:
            while True:
                if stop_requested():
                    raise Stopped(f"stopped on request with {len(questions)} captions asked for; run again to go on")
                while len(running) < captioner.concurrency and (question := next(todo, None)) is not None:
                    running.add(pool.submit(lambda q: write_item(folder, ask(section, captioner, q)), question))
                if not running:
                    return
                done, running = wait(running, _POLL_S, FIRST_COMPLETED)
                for future in done:
                    kept(future.result())
        except BaseException:
            captioner.stop()
            pool.shutdown(cancel_futures=True)
            raise
