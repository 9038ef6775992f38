"""The autoencoder of Open-Sora 1.2: the pictures of SDXL's autoencoder, and a causal one over time on its latents.

Written from what the public repository (github.com/hpcaitech/Open-Sora, tag v1.2.0, opensora/models/vae) says of its
layers, and named as its weights are (huggingface.co/hpcai-tech/OpenSora-VAE-v1.2). Stride 4 x 8 x 8, 4 channels.

    clip -> spatial_vae, frame by frame, x 0.18215 -> temporal_vae, 17 frames at a time -> latent

The temporal part begins anew every `micro_frame_size` frames, with zeros in front that fill the first latent frame: 17
frames are 5 latent frames, 34 are 10. Its group norms see such a piece as a whole. The published pipeline draws from
the pictures' posterior too; here its mean is taken, in training as well, so that a latent is a function of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

SPATIAL_SCALE = 0.18215  # Stable Diffusion's, which the temporal part was trained behind

# Of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers, vae/config.json, which the published config names.
SPATIAL = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu", "sample_size": 512, "scaling_factor": 0.13025,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "force_upcast": False,
}  # fmt: skip
# Of VAE_Temporal_SD in the repository.
TEMPORAL = {
    "latent_channels": 4, "filters": 128, "num_res_blocks": 4, "channel_multipliers": [1, 2, 2, 4],
    "temporal_downsample": [False, True, True], "num_groups": 32,
}  # fmt: skip
PUBLISHED = "VideoAutoencoderPipeline"  # what the published config.json calls it


def published_arch(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `OpenSoraVae` that the published config.json stands for.

    Raises:
        ValueError: it names other parts than those that are known here.
    """
    spatial, temporal = config.get("vae_2d"), config.get("vae_temporal")
    found = [part.get("type") if isinstance(part, dict) else part for part in (spatial, temporal)]
    if found != ["VideoAutoencoderKL", "VAE_Temporal_SD"]:
        raise ValueError(f"vae_2d VideoAutoencoderKL and vae_temporal VAE_Temporal_SD expected, found {found}")
    own: dict[str, Any] = {name: config[name] for name in ("micro_frame_size", "shift", "scale") if name in config}
    return {"spatial": dict(SPATIAL), "temporal": dict(TEMPORAL), "micro_frame_size": 17, **own}


class CausalConv3d(nn.Module):
    """A convolution that sees earlier frames only: zeros stand for those before the first. [B,C,T,H,W]."""

    def __init__(self, channels: int, out: int, kernel: int, stride_t: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self.pad = (side, side, side, side, kernel - stride_t, 0)
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride_t, 1, 1), bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(F.pad(x, self.pad))
        return y


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels)
        self.conv1 = CausalConv3d(channels, out, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out)
        self.conv2 = CausalConv3d(out, out, 3, bias=False)
        self.conv3 = CausalConv3d(channels, out, 1, bias=False) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv3(x) + y


def _blocks(channels: int, out: int, num: int, num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(channels if i == 0 else out, out, num_groups) for i in range(num))


class Encoder(nn.Module):
    """[B,C,T,H,W] -> moments [B,2C,T/stride,H,W]; T is a multiple of the stride."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        base, num, groups = arch["filters"], arch["num_res_blocks"], arch["num_groups"]
        widths = [base * m for m in arch["channel_multipliers"]]
        self.conv_in = CausalConv3d(arch["latent_channels"], base, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _blocks(before, width, num, groups) for before, width in zip([base, *widths], widths, strict=False)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride_t=2) if halved else nn.Identity()
            for width, halved in zip(widths[:-1], arch["temporal_downsample"], strict=True)
        )
        self.res_blocks = _blocks(widths[-1], widths[-1], num, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * arch["latent_channels"], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for i, blocks in enumerate(self.block_res_blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    """[B,C,T,H,W] -> [B,C,T*stride,H,W]."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        base, num, groups = arch["filters"], arch["num_res_blocks"], arch["num_groups"]
        widths = [base * m for m in arch["channel_multipliers"]]
        self.conv1 = CausalConv3d(arch["latent_channels"], widths[-1], 3)
        self.res_blocks = _blocks(widths[-1], widths[-1], num, groups)
        # As the encoder's, but from the last to the first: block i follows block i + 1.
        self.block_res_blocks = nn.ModuleList(
            _blocks(before, width, num, groups) for before, width in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if halved else nn.Identity()
            for width, halved in zip(widths[1:], arch["temporal_downsample"], strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], arch["latent_channels"], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for i in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[i]:  # type: ignore[attr-defined]
                x = block(x)
            if i:
                conv = self.conv_blocks[i - 1]
                x = conv(x)
                if isinstance(conv, CausalConv3d):  # channel 2c + k of a frame is channel c of its k-th half
                    x = x.unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVae(nn.Module):
    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        channels = arch["latent_channels"]
        self.stride = 2 ** sum(arch["temporal_downsample"])
        self.encoder = Encoder(arch)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = Decoder(arch)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,T,H,W] -> moments [B,2C,ceil(T/stride),H,W]."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.stride, 0))
        return self.quant_conv(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B,C,T,H,W] -> [B,C,(T-1)*stride+1,H,W]."""
        return self.decoder(self.post_quant_conv(z))[:, :, self.stride - 1 :]


@dataclass(frozen=True)
class Posterior:
    """A normal distribution of independent values; float [B,C,T,H,W] each."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def mode(self) -> torch.Tensor:
        return self.mean


class OpenSoraVae(nn.Module):
    """Both parts, with the face of a diffusers autoencoder: `config`, `encode(x).latent_dist`, `decode(z).sample`.

    Args:
        autoencoder: class of the spatial part, diffusers' AutoencoderKL.
        spatial, temporal: arguments of the parts where they are not SPATIAL's and TEMPORAL's.
        micro_frame_size: frames after which the temporal part begins anew.
        micro_batch_size: frames that the spatial part takes at a time, to spare memory.
        shift, scale: by which the published model normalises, a value a channel: (z - shift) / scale. They lie among
            the weights.

    Raises:
        ValueError: parts that don't fit together.
    """

    def __init__(
        self,
        autoencoder: Any,
        spatial: dict[str, Any] | None = None,
        temporal: dict[str, Any] | None = None,
        micro_frame_size: int = 17,
        micro_batch_size: int = 4,
        shift: tuple[float, ...] | list[float] = (-0.10, 0.34, 0.27, 0.98),
        scale: tuple[float, ...] | list[float] = (3.85, 2.32, 2.33, 3.06),
    ) -> None:
        super().__init__()
        unknown = sorted((spatial or {}).keys() - SPATIAL.keys()) + sorted((temporal or {}).keys() - TEMPORAL.keys())
        if unknown:
            raise ValueError(f"unknown arguments {', '.join(unknown)}")
        spatial, temporal = {**SPATIAL, **(spatial or {})}, {**TEMPORAL, **(temporal or {})}
        channels = temporal["latent_channels"]
        if not spatial["latent_channels"] == channels == len(shift) == len(scale):
            raise ValueError(
                f"as many latent channels everywhere expected, found {spatial['latent_channels']} spatial, {channels} "
                f"temporal, {len(shift)} shift and {len(scale)} scale"
            )
        self.temporal_vae = TemporalVae(temporal)
        stride = self.temporal_vae.stride
        if micro_frame_size < 1 or (micro_frame_size - 1) % stride:
            raise ValueError(f"micro_frame_size: {stride}k+1 expected, found {micro_frame_size}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: at least 1 expected, found {micro_batch_size}")
        self.config: dict[str, Any] = {
            "spatial": spatial, "temporal": temporal, "micro_frame_size": micro_frame_size,
            "micro_batch_size": micro_batch_size, "shift": list(shift), "scale": list(scale),
        }  # fmt: skip
        self.spatial_vae = nn.Module()
        self.spatial_vae.module = autoencoder(**spatial)
        self.register_buffer("scale", torch.tensor(list(scale)).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(list(shift)).view(1, -1, 1, 1, 1))

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        """[B,3,T,H,W] in [-1, 1] -> `latent_dist`, the raw posterior."""
        pictures = x.transpose(1, 2).flatten(0, 1)
        means = [self.spatial_vae.module.encode(part).latent_dist.mode() for part in self._batches(pictures)]  # type: ignore[union-attr, operator]
        y = torch.cat(means).unflatten(0, (len(x), -1)).transpose(1, 2) * SPATIAL_SCALE
        moments = [self.temporal_vae.encode(part) for part in y.split(self.config["micro_frame_size"], dim=2)]
        mean, logvar = torch.cat(moments, dim=2).chunk(2, dim=1)
        return SimpleNamespace(latent_dist=Posterior(mean, logvar.clamp(-30, 20)))

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        """Raw latent [B,C,T,H,W] -> `sample` [B,3,T',H',W']."""
        piece = (self.config["micro_frame_size"] - 1) // self.temporal_vae.stride + 1
        y = torch.cat([self.temporal_vae.decode(part) for part in z.split(piece, dim=2)], dim=2) / SPATIAL_SCALE
        pictures = y.transpose(1, 2).flatten(0, 1)
        frames = [self.spatial_vae.module.decode(part).sample for part in self._batches(pictures)]  # type: ignore[union-attr, operator]
        return SimpleNamespace(sample=torch.cat(frames).unflatten(0, (len(z), -1)).transpose(1, 2))

    def _batches(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return pictures.split(self.config["micro_batch_size"])
