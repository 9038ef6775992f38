"""Sections of what a trained model is used for, and of what is measured: `sample`, `evaluate`, `kernels`, `profile`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sorahpc.config.values import MAX_FPS, MIN_FPS, ArrayResources, ConfigPath, Section

# What sorahpc.profiling.cases makes; here, so that a wrong kernels.only is known without torch.
KERNEL_CASES = (
    "K1 rope3d",
    "K2 qk-norm + rope3d",
    "K3 gated residual + norm + modulate",
    "K4 patchify",
    "K4 flow_patchify",
    "K5 add_sincos3d",
)


class SampleConfig(Section):
    """Checkpoint + prompts -> mp4 files."""

    prompts: ConfigPath = Field(description="text file, a prompt a line, or JSONL with `prompt` and optional settings")
    out: ConfigPath | None = Field(None, description="folder for the samples; None: <run>/samples")
    checkpoint: ConfigPath | None = Field(None, description="checkpoint folder; None: the run's newest")
    frames: int = Field(17, ge=1, description="frames, as the VAE takes them (4k+1)")
    height: int = Field(64, ge=8, description="height in px, a multiple of VAE stride x patch")
    width: int = Field(64, ge=8, description="width in px, a multiple of VAE stride x patch")
    fps: float = Field(8.0, ge=MIN_FPS, le=MAX_FPS)
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
