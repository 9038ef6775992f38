"""What the training of an autoencoder starts from, and what is known of those weights."""

from __future__ import annotations

import json
from typing import Any

import torch

from sorahpc.config import TrainVaeConfig
from sorahpc.errors import ConfigError
from sorahpc.models.vae import Vae, build_vae, load_vae
from sorahpc.runs import read_json
from sorahpc.store import resolve

NOTE = "train_vae.json"  # beside the weights: how they were trained


def start_vae(spec: TrainVaeConfig) -> Vae:
    """The autoencoder as a training begins, in float32 on the CPU: of random weights, or those of `init`.

    Raises:
        ConfigError: class or arguments that don't make one, or that aren't those of `init`.
    """
    if spec.init is None:
        assert spec.class_name is not None and spec.arch is not None
        torch.manual_seed(spec.seed)
        return build_vae(spec.class_name, spec.arch)
    vae = load_vae(spec.init, where="train_vae.init")
    if spec.class_name not in (None, vae.id):
        raise ConfigError(
            f"train_vae.class_name: {spec.init} (train_vae.init) holds {vae.id}, found {spec.class_name}; "
            "leave class_name and arch out"
        )
    for name, value in (spec.arch or {}).items():
        there = json.loads(json.dumps(dict(vae.module.config).get(name)))  # tuples as lists, as YAML has them
        if there != value:
            raise ConfigError(
                f"train_vae.arch.{name}: {spec.init} (train_vae.init) has {json.dumps(there)}, found "
                f"{json.dumps(value)}; leave class_name and arch out"
            )
    vae.module.requires_grad_(True)
    return vae


def learns_variance(spec: TrainVaeConfig, vae: Vae, has_variance: bool) -> bool:
    """Whether the posterior's variance is the class's own, learned one.

    Raises:
        ConfigError: the class has none.
    """
    if spec.posterior is not None:
        if spec.posterior == "learned" and not has_variance:
            raise ConfigError(f"train_vae.posterior: {vae.id} gives no variance, so fixed expected, found learned")
        return spec.posterior == "learned"
    if spec.init is None or not has_variance:
        return False
    # One of ours that was trained with a fixed variance has never learned what it gives for it.
    return (_init_note(spec) or {}).get("posterior") != "fixed"


def _init_note(spec: TrainVaeConfig) -> dict[str, Any] | None:
    """What a training wrote beside the weights of `init`; None where there is no `init`, or it is none of ours."""
    if spec.init is None:
        return None
    folder = resolve(spec.init, "vae", "train_vae.init")
    return read_json((folder.parent if folder.is_file() else folder) / NOTE)


def init_limit(spec: TrainVaeConfig) -> str:
    """The place from which clips may have been trained on by `init`: over all places where it is none of ours."""
    note = _init_note(spec)
    if note is None:
        return "g"  # after every hex digit
    limit = note.get("held_out_below")
    return limit if isinstance(limit, str) else ""
