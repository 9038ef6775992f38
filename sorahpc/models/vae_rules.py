"""What each class of video autoencoder says of itself in its config, in words of its own: channels, strides, the clip
lengths that it takes, and what its published models normalise by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Native = tuple[torch.Tensor, torch.Tensor] | None


def _scaled(module: Any) -> Native:
    """z * scaling_factor."""
    factor = float(module.config.scaling_factor)
    return torch.zeros(1, 1), torch.full((1, 1), 1 / factor)


def _by_channel(module: Any) -> Native:
    """(z - latents_mean) / latents_std, and / scaling_factor where there is one. None where the config has none.

    Cosmos has a value for each channel and latent frame; what diffusers applies to shorter clips are the first ones.
    """
    config = dict(module.config)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return None
    mean, std = (
        torch.tensor(config[k], dtype=torch.float32).flatten()[:, None] for k in ("latents_mean", "latents_std")
    )
    return mean, std / float(config.get("scaling_factor") or 1.0)


def _cosmos_by_place(module: Any) -> Native:
    """As `_by_channel`, from flat lists of channels x latent frames."""
    found, channels = _by_channel(module), int(module.config.latent_channels)
    if found is None or len(found[0]) % channels:
        return found
    return found[0].reshape(channels, -1), found[1].reshape(channels, -1)


def _ltx_buffers(module: Any) -> Native:
    """(z - latents_mean) * scaling_factor / latents_std, of buffers that lie among the weights."""
    mean, std = (b.detach().float().cpu()[:, None] for b in (module.latents_mean, module.latents_std))
    return mean, std / float(module.config.scaling_factor)


def _open_sora_buffers(module: Any) -> Native:
    """(z - shift) / scale, of buffers that lie among the weights."""
    return tuple(b.detach().float().cpu().view(-1, 1) for b in (module.shift, module.scale))


@dataclass(frozen=True)
class Rule:
    """What a class says of itself.

    channels: the key of its config that holds the latent channels; two, where one lies in the other. stride: config ->
    (temporal, spatial). frames_unit: the unit u of the clip lengths k u + 1. restart: config -> frames after which it
    begins anew, None: never. native: what its published models normalise by.
    streams: it goes through a clip piece by piece by itself and carries over what the next piece needs, so that a
    piece's memory is all it takes, and cutting in time would only lose what is carried over.
    """

    channels: str | tuple[str, str]
    stride: Callable[[dict[str, Any]], tuple[int, int]]
    frames_unit: Callable[[int], int] = lambda temporal: temporal
    restart: Callable[[dict[str, Any]], int | None] = lambda config: None
    native: Callable[[Any], Native] = _scaled
    streams: bool = False


def _by_ratio(config: dict[str, Any]) -> tuple[int, int]:
    return config["temporal_compression_ratio"], config["spatial_compression_ratio"]


def _wan(config: dict[str, Any]) -> tuple[int, int]:
    return 2 ** sum(config["temperal_downsample"]), 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)


def _ltx(config: dict[str, Any]) -> tuple[int, int]:
    halvings = sum(config["spatio_temporal_scaling"])
    return (
        config.get("temporal_compression_ratio") or config["patch_size_t"] * 2**halvings,
        config.get("spatial_compression_ratio") or config["patch_size"] * 2**halvings,
    )


def _cogvideox(config: dict[str, Any]) -> tuple[int, int]:
    return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)


# From the constructors and pipelines of diffusers 0.42. CogVideoX works on 8 frames at a time whatever its stride: 5
# frames come back as 8, so its unit is twice its stride. So is that of KVAE, which goes by pieces of 16 frames and
# makes 1 frame of a last piece of one latent frame: 21 frames come back as 18.
RULES = {
    "AutoencoderKLCogVideoX": Rule("latent_channels", _cogvideox, lambda temporal: 2 * temporal, streams=True),
    "AutoencoderKLCosmos": Rule("latent_channels", _by_ratio, native=_cosmos_by_place),
    "AutoencoderKLHunyuanVideo": Rule("latent_channels", _by_ratio),
    "AutoencoderKLHunyuanVideo15": Rule("latent_channels", _by_ratio),
    "AutoencoderKLKVAEVideo": Rule(
        "z_channels",
        lambda c: (c["temporal_compress_times"], 2 ** (len(c["ch_mult"]) - 1)),
        lambda temporal: 2 * temporal,
        native=lambda module: None,  # no pipeline of diffusers uses it
        streams=True,
    ),
    "AutoencoderKLLTXVideo": Rule("latent_channels", _ltx, native=_ltx_buffers),
    "AutoencoderKLMagvit": Rule(
        "latent_channels", lambda c: (2 ** (len(c["block_out_channels"]) - 2), 2 ** (len(c["block_out_channels"]) - 1))
    ),
    "AutoencoderKLMochi": Rule(
        "latent_channels",
        lambda c: (math.prod(c["temporal_expansions"]), math.prod(c["spatial_expansions"])),
        native=_by_channel,
    ),
    "AutoencoderKLQwenImage": Rule("z_dim", _wan, native=_by_channel, streams=True),
    "AutoencoderKLWan": Rule("z_dim", _wan, native=_by_channel, streams=True),
    "OpenSoraVae": Rule(
        ("temporal", "latent_channels"),
        lambda c: (2 ** sum(c["temporal"]["temporal_downsample"]), 2 ** (len(c["spatial"]["block_out_channels"]) - 1)),
        restart=lambda c: c["micro_frame_size"],
        native=_open_sora_buffers,
        streams=True,
    ),
}
CLASSES = tuple(sorted(RULES))
