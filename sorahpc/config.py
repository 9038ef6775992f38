"""The configuration of a run: its sections and their rules, checked before anything starts.

A fault is one line: the dotted key, what was found, what was expected, and a suggestion where one is near. Rules that
join several fields live in the section that owns them all. configfile.py reads the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sorahpc.errors import ConfigError

# A value that may reach a shell script, a scheduler option or a file name. No control characters, quotes, spaces or
# shell syntax: what can't be written can't be injected.
SAFE_VALUE = re.compile(r"[A-Za-z0-9._:=,@%+/\[\]-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# What sorahpc.profiling.cases makes; here, so that a wrong kernels.only is known without torch.
KERNEL_CASES = (
    "K1 rope3d",
    "K2 qk-norm + rope3d",
    "K3 gated residual + norm + modulate",
    "K4 patchify",
    "K4 flow_patchify",
    "K5 add_sincos3d",
)


def shipped_dir() -> Path:
    """Folder ``configs/`` of the checkout, or the copy that an installed package carries."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "model").is_dir():
            return folder
    raise ConfigError(f"configs: no folder of shipped configs beside {package}; reinstall sorahpc")


def _check_path(path: Path) -> Path:
    text = str(path)
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError("a path without control characters")
    # What we ship is found from any working directory, also where only the package is installed.
    if not path.is_absolute() and path.parts[:1] == ("configs",) and not path.exists():
        inside = shipped_dir().joinpath(*path.parts[1:])
        if inside.exists():
            return inside
    return path


def _check_safe(text: str) -> str:
    if not SAFE_VALUE.fullmatch(text) or text.startswith("-"):
        raise ValueError("letters, digits and any of ._:=,@%+/[]- (it goes into a script)")
    return text


def _check_variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("the name of an environment variable: letters, digits and _, not starting with a digit")
    return text


def _check_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError("1 to 64 letters, digits, dots, dashes or underscores, starting with a letter or digit")
    return text


def _check_url(text: str) -> str:
    # Credentials, also those of a query, would end up in every config.yaml and error line.
    if not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?", text):
        raise ValueError("http(s)://host[:port]/path, without user, password, query or fragment")
    return text.rstrip("/")


def _check_instruction(text: str) -> str:
    if text.count("{caption}") != 1:
        raise ValueError("a text that holds {caption} once, where the short caption goes")
    return text


ConfigPath = Annotated[Path, AfterValidator(_check_path)]
SafeStr = Annotated[str, AfterValidator(_check_safe)]
RunName = Annotated[str, AfterValidator(_check_name)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ArrayResources(Section):
    """What an array of independent tasks asks for, a task."""

    tasks: int = Field(1, ge=1, le=10_000, description="independent tasks; the result does not depend on it")
    cpus_per_task: int = Field(1, ge=1)
    mem_gb: float | None = Field(None, gt=0, description="memory a task; None: the partition's default")
    time_min: int = Field(60, ge=1, description="time limit")


class GangResources(Section):
    """What a job of ranks that work together asks for. World size = nodes x tasks_per_node."""

    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="ranks a node; on CUDA one a GPU")
    cpus_per_task: int = Field(1, ge=1)
    mem_gb: float | None = Field(None, gt=0, description="memory a node; None: the partition's default")
    time_min: int = Field(60, ge=1, description="time limit")

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


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

    fps: float = Field(8.0, gt=0, le=240, description="frames a second after resampling by presentation time")
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


class EndpointConfig(Section):
    """A server that speaks OpenAI's chat completions, such as vLLM, SGLang, llama.cpp or a hosted one."""

    url: Annotated[str, AfterValidator(_check_url)] = Field(
        description="base address: /chat/completions is added, so it mostly ends in /v1"
    )
    model: str = Field(min_length=1, max_length=256, description="name of the model, as the server knows it")
    key_env: Annotated[str, AfterValidator(_check_variable)] | None = Field(
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
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype of the VAE")
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
    clips_per_shard: int = Field(64, ge=1, description="rows of the manifest a shard: what a task claims at a time")
    resources: ArrayResources = Field(
        ArrayResources(), description="tasks: how many are started; more may join while they run, and any may go"
    )


class PerceptualConfig(Section):
    """LPIPS in the loss: the distance of some frames by the features of VGG16."""

    vgg: ConfigPath = Field(
        description="VGG16 of ImageNet in torchvision's names: safetensors, a folder with model.safetensors, or vgg16"
    )
    heads: ConfigPath = Field(description="LPIPS's linear heads: safetensors with lin0.model.1.weight and so on")
    weight: float = Field(1.0, gt=0)
    frames: int = Field(4, ge=1, description="frames of a clip that are compared at a step")


class AdversarialConfig(Section):
    """A discriminator of patches in the loss: PatchGAN over time too, hinge loss, balanced as in VQGAN."""

    weight: float = Field(0.8, gt=0, description="1: it pulls at the last layer as strongly as the reconstruction does")
    start_step: int = Field(1000, ge=0, description="first step with it: an autoencoder that knows nothing is no match")
    channels: int = Field(64, ge=8, multiple_of=8, description="of the discriminator's first layer")
    layers: int = Field(3, ge=1, le=6, description="layers that halve height and width")
    lr: float = Field(2e-4, gt=0, le=10, description="of Adam, constant")


class TrainVaeConfig(Section):
    """Manifest -> an autoencoder of one's own, as `vae.path` loads it; from scratch, or fine-tuned from `init`."""

    out: ConfigPath = Field(description="folder that the finished autoencoder is written to")
    init: ConfigPath | None = Field(
        None, description="autoencoder to start from, as vae.path; None: class_name and arch, with random weights"
    )
    class_name: str | None = Field(None, description="autoencoder class, such as AutoencoderKLCosmos")
    arch: dict[str, Any] | None = Field(None, description="arguments of that class")
    weights_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="dtype of the stored weights"
    )
    steps: int = Field(ge=1, description="optimizer steps")
    batch_clips: int = Field(4, ge=1, description="clips a step, all of one size; every number of ranks divides it")
    window_frames: int | None = Field(None, ge=1, description="train on windows of this many frames; None: whole clips")
    crop_px: int | None = Field(
        None, ge=1, description="and on crops of this side; not for classes that pool over frames (AutoencoderKLCosmos)"
    )
    lr: float = Field(
        0.03,
        gt=0,
        le=10,
        description="of Muon, at its peak: linear warm-up over 100 steps, then cosine decay to 1 % of it",
    )
    l1_weight: float = Field(0.0, ge=0, description="weight of the mean absolute error beside the mean squared error")
    focus: float = Field(
        0.8, ge=0, le=1, description="share of windows and crops that hold a certain moving pixel; others lie anywhere"
    )
    recolour: float = Field(
        0.5, ge=0, le=1, description="share of clips with permuted and inverted channels at the start, falling to 0"
    )
    kl_weight: float = Field(1e-4, ge=0, description="weight of KL(posterior || unit normal), mean per latent value")
    posterior: Literal["fixed", "learned"] | None = Field(
        None, description="its variance: latent_noise, or what the class gives; None: learned where init has learned it"
    )
    latent_noise: float = Field(0.1, gt=0, description="standard deviation of a fixed posterior")
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    ema_decay: float = Field(0.998, ge=0, lt=1, description="the averaged weights are what is written")
    holdout_clips: int = Field(16, ge=0, description="clips (at most a fifth) kept out of training, to measure PSNR on")
    seed: int = Field(0, ge=0, lt=2**31)
    save_every: int = Field(500, ge=1, description="steps between saved states, from which a rerun resumes")
    cache_gb: float = Field(4.0, ge=0, description="decoded clips that a rank keeps in memory; no result depends on it")
    resources: GangResources = GangResources()

    @model_validator(mode="after")
    def _agrees(self) -> TrainVaeConfig:
        for name in ("class_name", "arch"):
            if self.init is None and getattr(self, name) is None:
                raise ValueError(f"{name}: a value, or `init` to start from")
        world = self.resources.world_size
        if self.batch_clips % world:
            raise ValueError(
                f"batch_clips: a multiple of the number of ranks {world} = resources.nodes {self.resources.nodes} x "
                f"resources.tasks_per_node {self.resources.tasks_per_node}, not {self.batch_clips}"
            )
        return self


class ModelConfig(Section):
    """The Diffusion Transformer. Head dim = dim / num_heads."""

    depth: int = Field(ge=1, description="number of blocks")
    dim: int = Field(ge=8, description="model dim M")
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(4.0, gt=0, le=1000, description="hidden size of the MLP / dim")
    patch: tuple[int, int, int] = Field((1, 2, 2), description="patch size (pt, ph, pw) on the latent")
    position: Literal["rope3d", "sincos3d", "both"] = Field(
        "rope3d", description="how tokens know their place: relative (rope3d), absolute (sincos3d), or both"
    )
    axes_dim: tuple[int, int, int] | None = Field(
        None, description="split of the head dim over (T, H, W) for rope3d; None: near (1/4, 3/8, 3/8)"
    )
    theta: float = Field(10_000.0, gt=1, description="base of the position frequencies")
    norm_eps: float = Field(1e-6, gt=0)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden size of the MLP."""
        return round(self.dim * self.mlp_ratio)

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """(T, H, W) split of the head dim, each even, summing to it."""
        if self.axes_dim is not None:
            return self.axes_dim
        spatial = self.head_dim * 3 // 16 * 2
        return (self.head_dim - 2 * spatial, spatial, spatial)

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads: a divisor of dim = {self.dim}, not {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"num_heads: dim / num_heads must be even, not {self.dim} / {self.num_heads}")
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio: at least 1 / dim = 1 / {self.dim}, not {self.mlp_ratio}")
        if min(self.patch) < 1:
            raise ValueError(f"patch: three sizes of at least 1, not {self.patch}")
        axes = self.rope_axes
        if sum(axes) != self.head_dim or any(a % 2 or a < 0 for a in axes):
            raise ValueError(f"axes_dim: three even numbers summing to the head dim {self.head_dim}, not {axes}")
        if self.position != "rope3d" and self.dim % 6:
            raise ValueError(f"dim: a multiple of 6 for position={self.position}, not {self.dim}")
        return self


class TrainConfig(Section):
    """Cache -> checkpoints. The global batch is packs_per_step packs of at most tokens_per_pack tokens."""

    steps: int = Field(ge=1, description="optimizer steps in all")
    tokens_per_pack: int = Field(ge=1, description="token budget of a pack (one micro-batch)")
    packs_per_step: int = Field(1, ge=1, description="packs a global batch; every dp size must divide it")
    tp: int = Field(1, ge=1, description="tensor-parallel size")
    sp: bool = Field(True, description="sequence parallelism inside the tensor-parallel group; no effect at tp=1")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on CUDA, fp32 on CPU")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: attention and MLP matrices take orthogonalised steps of AdamW's size; AdamW the rest",
    )
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(100, ge=0, description="linear warm-up, then constant")
    decay_steps: int = Field(0, ge=0, description="linear decay to 0 over the last steps; 0: constant to the end")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="of AdamW, each in [0, 1); Muon's momentum is 0.95")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    text_drop: float = Field(0.1, ge=0, le=1, description="share of samples trained with the empty caption (for CFG)")
    detailed_share: float = Field(
        0.95, ge=0, le=1, description="of the visits to a sample that has a detailed caption, those that get it"
    )
    t_mean: float = Field(0.0, description="timestep ~ sigmoid(normal(t_mean, t_std)) ...")
    t_std: float = Field(1.0, gt=0)
    t_uniform: float = Field(0.1, ge=0, le=1, description="... mixed with this share of uniform timesteps")
    t_shift: float = Field(1.0, gt=0, description="t' = s t / (1 + (s - 1) t), towards noise for s > 1")
    seed: int = Field(0, ge=0, lt=2**31)
    save_every: int = Field(500, ge=1, description="steps between checkpoints; the last step is always saved")
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    log_every: int = Field(10, ge=1)
    resources: GangResources = GangResources()

    @model_validator(mode="after")
    def _layout(self) -> TrainConfig:
        world = self.resources.world_size
        if world % self.tp:
            raise ValueError(
                f"tp: a divisor of the world size {world} = resources.nodes {self.resources.nodes} x "
                f"resources.tasks_per_node {self.resources.tasks_per_node}, not {self.tp}"
            )
        if self.packs_per_step % (world // self.tp):
            raise ValueError(
                f"packs_per_step: a multiple of the dp size {world // self.tp} = world size {world} / tp {self.tp}, "
                f"not {self.packs_per_step}"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps: warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} at most "
                f"steps {self.steps}"
            )
        return self


class SampleConfig(Section):
    """Checkpoint + prompts -> mp4 files."""

    prompts: ConfigPath = Field(description="text file, a prompt a line, or JSONL with `prompt` and optional settings")
    out: ConfigPath | None = Field(None, description="folder for the samples; None: <run>/samples")
    checkpoint: ConfigPath | None = Field(None, description="checkpoint folder; None: the run's newest")
    frames: int = Field(17, ge=1, description="frames, as the VAE takes them (4k+1)")
    height: int = Field(64, ge=8, description="height in px, a multiple of VAE stride x patch")
    width: int = Field(64, ge=8, description="width in px, a multiple of VAE stride x patch")
    fps: float = Field(8.0, gt=0, le=240)
    steps: int = Field(30, ge=1, description="Euler steps")
    cfg_scale: float = Field(4.0, ge=0, description="classifier-free guidance; 1: none")
    t_shift: float = Field(1.0, gt=0, description="as train.t_shift, on the sampling grid")
    seed: int = Field(0, ge=0, lt=2**31)
    prompts_per_pack: int = Field(8, ge=1, description="prompts that are denoised together; part of the result's bits")
    expand: bool = Field(False, description="prompts are made detailed by the model of the section `caption` first")
    resources: ArrayResources = ArrayResources()


class EvaluateConfig(Section):
    """Samples and VAE -> figures and clips for the report."""

    reconstructions: int = Field(6, ge=0, le=64, description="real clips shown beside their VAE reconstructions")
    toyworld: bool = Field(False, description="prompts are the toy world's captions: judge each sample by its pixels")
    resources: ArrayResources = ArrayResources()

    @model_validator(mode="after")
    def _one_task(self) -> EvaluateConfig:
        if self.resources.tasks != 1:
            raise ValueError("resources.tasks: 1 (its figures have one writer)")
        return self


class KernelsConfig(Section):
    """What `sorahpc profile kernels` measures: the ops beside their peers and the limits of the node it runs on."""

    only: str = Field("", description="cases whose name begins so, such as K1; empty: all")
    repeats: int = Field(15, ge=3, le=1000, description="times each candidate is run; figures are medians")
    threads: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        (), description="CPU threads to measure with, in turn; empty: what Slurm gave, else resources.cpus_per_task"
    )
    small: bool = Field(False, description="sizes that try the job out in a minute; no figure means anything")
    baseline: ConfigPath | None = Field(
        None, description="node.json of an earlier measurement, or a folder that holds one of this device"
    )
    margin: float | None = Field(
        None, ge=0, le=10, description="an op slower than the baseline by this share: exit code 17; None: 0.1"
    )
    resources: ArrayResources = ArrayResources()

    @model_validator(mode="after")
    def _agrees(self) -> KernelsConfig:
        if self.resources.tasks != 1:
            raise ValueError("resources.tasks: 1 (two on a node would measure each other)")
        if not any(name.startswith(self.only) for name in KERNEL_CASES):
            raise ValueError(f"only: the beginning of one of {', '.join(KERNEL_CASES)}, not {self.only!r}")
        if len(set(self.threads)) < len(self.threads):
            raise ValueError(f"threads: different numbers, not {list(self.threads)}")
        if self.margin is not None and self.baseline is None:
            raise ValueError("margin: kernels.baseline beside it, which it is held against; found none")
        return self


class ProfileConfig(Section):
    """What `sorahpc profile train` and `profile sample` record. They ask for what the job itself asks for."""

    warmup_steps: int = Field(3, ge=1, le=1000, description="steps before the first that counts")
    steps: int = Field(5, ge=1, le=1000, description="steps that are recorded")
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="of training: ranks that are recorded"
    )
    tool: Literal["torch", "nsys", "ncu"] = Field(
        "torch", description="torch: torch.profiler; nsys, ncu: the chosen ranks run under Nsight Systems or Compute"
    )


class DemoConfig(Section):
    """The toy world that `sorahpc demo` makes before it runs the pipeline on it."""

    clips: int = Field(ge=1, le=100_000, description="videos rendered into prepare.videos")
    prompts: int = Field(36, ge=1, le=10_000, description="captions written into sample.prompts, balanced")
    text_dim: int = Field(64, ge=16, multiple_of=16, description="dim of the tiny T5 written into text.path")
    seed: int = Field(0, ge=0, lt=2**31, description="of the world and the T5's weights")


class ClusterConfig(Section):
    """Where jobs run. Values that reach a script are held to an allow-list of characters."""

    kind: Literal["inline", "local", "slurm"] = Field(
        "local",
        description="inline: in this process (one rank); local: processes of this machine; slurm: through submitit",
    )
    partition: SafeStr | None = None
    account: SafeStr | None = None
    qos: SafeStr | None = None
    constraint: SafeStr | None = None
    exclude: SafeStr | None = None
    nodelist: SafeStr | None = None
    reservation: SafeStr | None = None
    gpus_per_task: int = Field(0, ge=0, le=1, description="1: one GPU a rank, asked for as gpus-per-node")
    max_array_parallel: int = Field(256, ge=1, description="array tasks that run at the same time")
    signal_lead_s: int = Field(120, ge=10, description="USR2 comes this long before the time limit")
    python: SafeStr | None = Field(None, description="python of the compute nodes; None: the one that submits")
    env: dict[Annotated[str, AfterValidator(_check_variable)], SafeStr] = Field(
        default_factory=dict, description="environment of the tasks; never put secrets here"
    )


class Config(Section):
    """A whole run. Each job reads its own section and those of what it loads."""

    run: RunName = Field(description="name of the run; its folder is <runs_dir>/<run>")
    runs_dir: ConfigPath = Path("runs")
    ops: Literal["compiled", "reference"] = Field(
        "compiled", description="bodies of the custom ops: the kernels where they are built, or their Python references"
    )
    cluster: ClusterConfig = ClusterConfig()
    prepare: PrepareConfig | None = None
    clip: ClipConfig = ClipConfig()
    caption: CaptionConfig | None = None
    vae: VaeConfig | None = None
    train_vae: TrainVaeConfig | None = None
    text: TextConfig | None = None
    encode: EncodeConfig = EncodeConfig()
    model: ModelConfig | None = None
    train: TrainConfig | None = None
    sample: SampleConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    kernels: KernelsConfig = KernelsConfig()
    profile: ProfileConfig = ProfileConfig()
    demo: DemoConfig | None = None

    @model_validator(mode="after")
    def _tensor_parallel(self) -> Config:
        if self.model and self.train and self.model.num_heads % self.train.tp:
            raise ValueError(f"train.tp: a divisor of model.num_heads = {self.model.num_heads}, not {self.train.tp}")
        if self.model and self.train and self.model.mlp_dim % self.train.tp:
            raise ValueError(
                f"train.tp: a divisor of the hidden size {self.model.mlp_dim} = model.dim {self.model.dim} x "
                f"model.mlp_ratio {self.model.mlp_ratio}, not {self.train.tp}"
            )
        return self

    @model_validator(mode="after")
    def _tokens(self) -> Config:
        if self.train and self.clip.max_tokens and self.clip.max_tokens > self.train.tokens_per_pack:
            raise ValueError(
                f"clip.max_tokens: at most train.tokens_per_pack = {self.train.tokens_per_pack}, since a clip lies in "
                f"one pack, not {self.clip.max_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _expander(self) -> Config:
        if self.sample and self.sample.expand and self.caption is None:
            raise ValueError("sample.expand: false, or a section `caption` that says by which model")
        return self

    @model_validator(mode="after")
    def _profiled_ranks(self) -> Config:
        world = self.train.resources.world_size if self.train else 1
        if max(self.profile.ranks) >= world:
            raise ValueError(f"profile.ranks: ranks from 0 to {world - 1}, not {list(self.profile.ranks)}")
        return self

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.run

    @property
    def cache_dir(self) -> Path:
        return self.encode.cache or self.run_dir / "cache"

    @property
    def samples_dir(self) -> Path:
        return (self.sample.out if self.sample else None) or self.run_dir / "samples"

    def need(self, *sections: str) -> None:
        """Raise ConfigError for each of `sections` that the file leaves out and a job needs."""
        missing = [s for s in sections if getattr(self, s) is None]
        if missing:
            raise ConfigError("\n".join(f"{s}: missing; this job needs the section `{s}:`" for s in missing))


def config_hash(section: BaseModel | dict[str, Any]) -> str:
    """sha256 (hex) of a section's canonical JSON."""
    data = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
