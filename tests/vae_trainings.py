"""Small trainings of autoencoders for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import COSMOS, WAN
from safetensors.torch import save_file

from sorahpc.config import Config, TrainVaeConfig
from sorahpc.configfile import parse_config
from sorahpc.models.vae import build_vae, save_vae

WAN_TINY = {"class_name": "AutoencoderKLWan", "arch": WAN}


def configure(folder: Path, **train: object) -> Config:
    if not train.get("init"):
        train = {"class_name": "AutoencoderKLCosmos", "arch": COSMOS, **train}
    return parse_config(
        {
            "run": "r", "runs_dir": str(folder), "prepare": {"videos": str(folder / "videos")},
            "clip": {"fps": 8, "max_frames": 9, "min_frames": 5, "max_area_px": 4096},
            "train_vae": {"out": str(folder / "vae"), "steps": 8, "batch_clips": 2, "window_frames": 5,
                          "save_every": 3, "holdout_clips": 2, **train},
        }
    )  # fmt: skip


def spec_of(**train: object) -> TrainVaeConfig:
    spec = configure(Path("/x"), **train).train_vae
    assert spec is not None
    return spec


def write_lpips(folder: Path) -> None:
    from sorahpc.models.lpips import Lpips

    torch.manual_seed(0)
    module = Lpips()
    state = {f"features.{name}": value for name, value in module.features.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    save_file({f"lin{k}.model.1.weight": torch.rand_like(h) for k, h in enumerate(module.heads)}, folder / "heads")


def all_terms(world: Path) -> dict[str, Any]:
    return {
        "crop_px": 32, "l1_weight": 0.5, "perceptual": {"vgg": str(world), "heads": str(world / "heads"), "frames": 1},
        "adversarial": {"start_step": 1, "channels": 8, "layers": 2},
    }  # fmt: skip


def write_wan(folder: Path) -> Path:
    """A Wan that has a variance of its own."""
    torch.manual_seed(3)
    vae = build_vae(*WAN_TINY.values())  # type: ignore[arg-type]
    save_vae(vae, vae.module.state_dict(), folder, torch.float32)
    return folder
