"""Models for tests: tiny, with random weights, written as a user's folder would be."""

from __future__ import annotations

from pathlib import Path

import torch

from sorahpc.models.text import make_tiny_t5
from sorahpc.models.vae import build_vae, save_vae

COSMOS = {
    "latent_channels": 4, "encoder_block_out_channels": [8, 8, 8], "decode_block_out_channels": [8, 8, 8],
    "attention_resolutions": [], "resolution": 64, "num_layers": 1, "patch_size": 4, "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4, "latents_mean": None, "latents_std": None,
}  # fmt: skip


def write_vae(folder: Path) -> Path:
    """A Cosmos autoencoder of stride 4x8x8 with 4 channels."""
    torch.manual_seed(0)
    vae = build_vae("AutoencoderKLCosmos", COSMOS)
    save_vae(vae, vae.module.state_dict(), folder, torch.float32)
    return folder


def write_t5(folder: Path, videos: Path) -> Path:
    """A T5 of 16 dims that knows the captions beside `videos`."""
    make_tiny_t5(folder, [p.read_text() for p in sorted(videos.glob("*.txt"))], dim=16, seed=0)
    return folder
