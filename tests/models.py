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
FOUR = {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
# Every class that is known, tiny: (class, arch, stride, unit u of its clip lengths k u + 1).
ZOO = {
    "Cosmos": ("AutoencoderKLCosmos", COSMOS, (4, 8, 8), 4),
    "Wan 2.1": ("AutoencoderKLWan", WAN, (4, 8, 8), 4),
    "Wan 2.2": (
        "AutoencoderKLWan", {**WAN, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                             "decoder_base_dim": 8}, (4, 16, 16), 4,
    ),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {**FOUR, "norm_num_groups": 2}, (4, 8, 8), 4),
    "HunyuanVideo 1.5": (
        "AutoencoderKLHunyuanVideo15", {"latent_channels": 4, "block_out_channels": [8, 8, 16, 16, 16],
                                        "layers_per_block": 1}, (4, 16, 16), 4,
    ),
    "CogVideoX": ("AutoencoderKLCogVideoX", {**FOUR, "norm_num_groups": 2}, (4, 8, 8), 8),
    "EasyAnimate": ("AutoencoderKLMagvit", {**FOUR, "norm_num_groups": 2}, (4, 8, 8), 4),
    "LTX": (
        "AutoencoderKLLTXVideo",
        {"latent_channels": 4, "block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4,
         "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5}, (8, 32, 32), 8,
    ),
    "Mochi": (
        "AutoencoderKLMochi",
        {"latent_channels": 4, "encoder_block_out_channels": [32] * 4, "decoder_block_out_channels": [32] * 4,
         "layers_per_block": [1] * 5, "latents_mean": None, "latents_std": None}, (6, 8, 8), 6,
    ),
    "Qwen-Image": ("AutoencoderKLQwenImage", WAN, (4, 8, 8), 4),
    "KVAE": ("AutoencoderKLKVAEVideo", {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4},
             (4, 8, 8), 4),
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
