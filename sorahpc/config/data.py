"""Sections of what makes a cache out of videos: `prepare`, `clip`, `caption`, `vae`, `text`, `encode`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sorahpc.config.values import MAX_FPS, MIN_FPS, ArrayResources, ConfigPath, Section, VariableName


class ScenesConfig(Section):
    """How videos are cut into scenes, each a clip of its own."""

    threshold: float = Field(
        27.0, gt=0, le=255, description="content score from frame to frame that is a cut, as PySceneDetect measures it"
    )
    min_s: float = Field(1.0, ge=0.1, le=3600, description="a shorter scene is left out")


class FiltersConfig(Section):
    """Which clips are left out. None: all stay. Changing them costs no decoding."""

    min_side_px: int | None = Field(None, ge=1, description="smaller of width and height")
    min_duration_s: float | None = Field(None, gt=0)
    max_duration_s: float | None = Field(None, gt=0)
    max_black: float | None = Field(None, ge=0, le=1, description="share of black pixels")
    min_motion: float | None = Field(
        None, gt=0, le=255, description="mean change of luma in a quarter second, of 255 levels"
    )
    max_motion: float | None = Field(None, gt=0, le=255)
    max_static: float | None = Field(None, ge=0, lt=1, description="share of quarter seconds in which nothing moves")
    near_duplicate_bits: int | None = Field(
        None,
        ge=0,
        le=23,
        description="clips whose hashes differ in at most so many of 192 bits are one: the first stays",
    )

    @property
    def needs_measures(self) -> list[str]:
        """Of those that are set, the ones that need pictures."""
        fields = ("max_black", "min_motion", "max_motion", "max_static", "near_duplicate_bits")
        return [field for field in fields if getattr(self, field) is not None]

    @model_validator(mode="after")
    def _order(self) -> FiltersConfig:
        for low, high in (("min_duration_s", "max_duration_s"), ("min_motion", "max_motion")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low}: at most {high} = {most:g}, not {least:g}")
        return self


class PrepareConfig(Section):
    """Folder of videos -> manifest."""

    videos: ConfigPath = Field(description="folder of video files, searched recursively")
    captions: ConfigPath | None = Field(
        None, description="JSONL or CSV with `path` (relative to videos) and `caption`; None: a .txt beside each video"
    )
    measure: bool = Field(
        True, description="decode each video once, small, to measure it; false: its packets are read, not its pictures"
    )
    scenes: ScenesConfig | None = Field(None, description="cut videos into scenes; None: a video is one clip")
    filters: FiltersConfig = FiltersConfig()
    resources: ArrayResources = ArrayResources()

    @model_validator(mode="after")
    def _measured(self) -> PrepareConfig:
        needs = ["scenes"] * (self.scenes is not None) + [f"filters.{name}" for name in self.filters.needs_measures]
        if needs and not self.measure:
            raise ValueError(f"measure: true, which {needs[0]} needs")
        return self


class ClipConfig(Section):
    """How a clip is taken: from the start of a video or scene, resampled in time, scaled with its aspect kept."""

    fps: float = Field(8.0, ge=MIN_FPS, le=MAX_FPS, description="frames a second after resampling by presentation time")
    max_frames: int = Field(17, ge=1, description="longest clip; rounded down to what the VAE takes (4k+1)")
    min_frames: int = Field(1, ge=1, description="a video shorter than this is rejected, with its reason")
    max_area_px: int = Field(64 * 64, ge=256, description="largest height x width; the aspect ratio is kept")
    max_tokens: int | None = Field(
        None, ge=1, description="largest number of tokens: a clip over it is made smaller, then shorter; None: any"
    )
    min_area_px: int | None = Field(
        None, ge=1, description="a clip over max_tokens is made no smaller than this, rather shorter; None: one patch"
    )

    @model_validator(mode="after")
    def _order(self) -> ClipConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames: at most max_frames = {self.max_frames}")
        if self.min_area_px is not None and self.max_tokens is None:
            raise ValueError("min_area_px: only with max_tokens, which makes clips smaller")
        if self.min_area_px is not None and self.min_area_px > self.max_area_px:
            raise ValueError(f"min_area_px: at most max_area_px = {self.max_area_px}")
        return self


class TilingConfig(Section):
    """Clips too long or too large for the VAE's memory: parts that overlap, blended. Part of what a cache holds."""

    tile_px: int | None = Field(
        None, ge=1, description="side of a tile, a multiple of the VAE's stride; None: no tiles"
    )
    overlap_px: int = Field(64, ge=0, description="what two neighbouring tiles share, a multiple of the stride")
    chunk_frames: int | None = Field(
        None, ge=1, description="frames of a chunk, as the VAE takes them (4k+1); None: no chunks"
    )
    overlap_frames: int = Field(9, ge=1, description="what two neighbouring chunks share: temporal stride x k + 1")

    @model_validator(mode="after")
    def _smaller(self) -> TilingConfig:
        if self.tile_px and self.overlap_px >= self.tile_px:
            raise ValueError(f"overlap_px: less than tile_px = {self.tile_px}, not {self.overlap_px}")
        if self.chunk_frames and self.overlap_frames >= self.chunk_frames:
            raise ValueError(f"overlap_frames: less than chunk_frames = {self.chunk_frames}, not {self.overlap_frames}")
        return self


def _check_url(text: str) -> str:
    # Credentials, also those of a query, would end up in every config.yaml and error line.
    if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?", text):
        raise ValueError("http(s)://host[:port]/path, without user, password, query or fragment")
    return text.rstrip("/")


def _check_instruction(text: str) -> str:
    if text.count("{caption}") != 1:
        raise ValueError("a text that holds {caption} once, where the short caption goes")
    return text


class EndpointConfig(Section):
    """A server that speaks OpenAI's chat completions, such as vLLM, SGLang, llama.cpp or a hosted one."""

    url: Annotated[str, AfterValidator(_check_url)] = Field(
        description="base address: /chat/completions is added, so it mostly ends in /v1"
    )
    model: str = Field(min_length=1, max_length=256, description="name of the model, as the server knows it")
    key_env: VariableName | None = Field(
        None, description="environment variable that holds the API key; None: no key is sent"
    )
    timeout_s: float = Field(120.0, gt=0, le=3600, description="a request, from connecting to the last byte")
    retries: int = Field(6, ge=0, le=100, description="of a request that met 429, 5xx or no answer, waiting longer")
    concurrency: int = Field(4, ge=1, le=256, description="requests of a task at the same time")


class CaptionConfig(Section):
    """Manifest -> detailed captions, and short prompts -> detailed prompts, by a language model."""

    path: ConfigPath | None = Field(
        None, description="local folder of a transformers causal LM or image-text-to-text model with its tokenizer"
    )
    endpoint: EndpointConfig | None = Field(None, description="or a server; one of `path` and `endpoint`")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype of the local model")
    frames: int = Field(4, ge=0, le=64, description="frames of a clip that the model is shown; 0: the text alone")
    frame_area_px: int = Field(448 * 448, ge=256, description="largest height x width of such a frame")
    instruction: Annotated[str, AfterValidator(_check_instruction)] | None = Field(
        None, description="what the model is asked of a clip; None: the built-in text"
    )
    prompt_instruction: Annotated[str, AfterValidator(_check_instruction)] | None = Field(
        None, description="what the model is asked of a prompt (sample.expand); None: the built-in text"
    )
    max_new_tokens: int = Field(384, ge=1, le=8192, description="an answer that reaches it is cut, hence rejected")
    temperature: float = Field(0.0, ge=0, le=2, description="of the first attempt; 0: the likeliest token each time")
    attempts: int = Field(3, ge=1, le=20, description="answers asked for until one is accepted, each with its own seed")
    min_chars: int = Field(60, ge=1, le=10_000, description="a shorter answer is rejected")
    max_chars: int = Field(2000, ge=1, le=10_000, description="and so is a longer one")
    clips: bool = Field(True, description="false: no clip is captioned, only prompts are (sample.expand)")
    seed: int = Field(0, ge=0, lt=2**31, description="of sampling")
    resources: ArrayResources = ArrayResources()

    @model_validator(mode="after")
    def _agrees(self) -> CaptionConfig:
        if (self.path is None) == (self.endpoint is None):
            raise ValueError("path: one of caption.path and caption.endpoint, not both or none")
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars: at most max_chars = {self.max_chars}")
        return self


class VaeConfig(Section):
    path: ConfigPath = Field(
        description="diffusers autoencoder: a folder (config.json + safetensors), a safetensors file, or a fetched name"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="compute dtype of the VAE; on a GPU float32's convolutions are TF32, as torch has them"
    )
    tiling: TilingConfig | None = Field(None, description="how long and large clips are cut; None: whole clips")


class ClipTextConfig(Section):
    """CLIP's text encoder beside T5: its tokens go to cross-attention too, its pooled embedding to the modulation."""

    path: ConfigPath = Field(
        description="transformers CLIP, whole or its text encoder, with its tokenizer: a folder, or a fetched name"
    )
    projected: bool = Field(False, description="the pooled embedding goes through the projection that images share")


class TextConfig(Section):
    path: ConfigPath = Field(description="transformers T5 encoder with its tokenizer: a folder, or a fetched name")
    max_tokens: int = Field(256, ge=1, le=4096, description="captions are cut to this many tokens")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype of the text encoders")
    clip: ClipTextConfig | None = Field(None, description="CLIP beside T5; None: T5 alone")


class EncodeConfig(Section):
    """Manifest -> HDF5 latent cache."""

    cache: ConfigPath | None = Field(None, description="cache folder; None: <run>/cache")
    dtype: Literal["float16", "bfloat16"] = Field("float16", description="storage dtype of latents and text")
    decoder: Literal["auto", "pyav", "dali"] = Field(
        "pyav",
        description="dali: what DALI can't read is left to PyAV; auto: dali where it is installed and CUDA is there",
    )
    clips_per_shard: int = Field(
        64, ge=1, description="rows of the manifest a shard: what a task claims at a time; fixed once a cache is begun"
    )
    resources: ArrayResources = Field(
        ArrayResources(), description="tasks: how many are started; more may join while they run, and any may go"
    )
