"""Sections of what is trained: `train_vae`, `model`, `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sorahpc.config.values import ConfigPath, GangResources, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


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
    window_frames: int | None = Field(
        None,
        ge=1,
        description="train on windows of this many frames, rounded down to what the class takes; None: whole clips",
    )
    crop_px: int | None = Field(
        None,
        ge=1,
        description="and on crops of this side, rounded down to its stride; not for classes that pool over frames "
        "(AutoencoderKLCosmos)",
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
        if self.position != "sincos3d" and self.head_dim > 256:  # ops.rope.MAX_HEAD_DIM
            raise ValueError(f"num_heads: dim / num_heads at most 256 for rope3d, not {self.dim} / {self.num_heads}")
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
