"""The configuration of a run: its sections and their rules, checked before anything starts.

A fault is one line: the dotted key, what was found, what was expected, and a suggestion where one is near. Rules that
join several fields live in the section that owns them all. configfile.py reads the file.

Sections are in data.py (`prepare`, `clip`, `caption`, `vae`, `text`, `encode`), training.py (`train_vae`, `model`,
`train`), results.py (`sample`, `evaluate`, `kernels`, `profile`), and here (`cluster`, `demo`, and the whole). All are
imported from here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from sorahpc.config.data import (
    CaptionConfig,
    ClipConfig,
    EncodeConfig,
    EndpointConfig,
    FiltersConfig,
    PrepareConfig,
    ScenesConfig,
    TextConfig,
    TilingConfig,
    VaeConfig,
)
from sorahpc.config.results import KERNEL_CASES, EvaluateConfig, KernelsConfig, ProfileConfig, SampleConfig
from sorahpc.config.training import ModelConfig, TrainConfig, TrainVaeConfig
from sorahpc.config.values import (
    MAX_FPS,
    MIN_FPS,
    ArrayResources,
    ConfigPath,
    RunName,
    SafeStr,
    Section,
    VariableName,
    shipped_dir,
)
from sorahpc.errors import ConfigError

__all__ = [
    "KERNEL_CASES",
    "MAX_FPS",
    "MIN_FPS",
    "ArrayResources",
    "CaptionConfig",
    "ClipConfig",
    "ClusterConfig",
    "Config",
    "DemoConfig",
    "EncodeConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "FiltersConfig",
    "KernelsConfig",
    "ModelConfig",
    "PrepareConfig",
    "ProfileConfig",
    "SampleConfig",
    "ScenesConfig",
    "TextConfig",
    "TilingConfig",
    "TrainConfig",
    "TrainVaeConfig",
    "VaeConfig",
    "config_hash",
    "shipped_dir",
]


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
    gpus_per_task: int = Field(
        0, ge=0, le=1, description="1: one GPU a rank, asked for as gpus-per-node, where a job has use for it"
    )
    max_array_parallel: int = Field(256, ge=1, description="array tasks that run at the same time")
    signal_lead_s: int = Field(120, ge=10, description="USR2 comes this long before the time limit")
    python: SafeStr | None = Field(None, description="python of the compute nodes; None: the one that submits")
    env: dict[VariableName, SafeStr] = Field(
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
