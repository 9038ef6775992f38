"""Models for tests: tiny, with random weights, written as a user's folder would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
             (4, 8, 8), 8),
    "Open-Sora": (
        "OpenSoraVae", {"spatial": {"block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 1},
                        "temporal": {"filters": 8, "num_res_blocks": 1, "num_groups": 2}}, (4, 8, 8), 4,
    ),
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


def write_clip(folder: Path, captions: list[str], cls: str = "CLIPTextModel") -> Path:
    """A CLIP of 16 dims with random weights; its tokenizer puts a start and an end around the words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], 0), (special[1], 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    fast.save_pretrained(folder)
    text = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": 1, "projection_dim": 12}  # fmt: skip
    torch.manual_seed(0)
    if cls == "CLIPModel":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 8, "patch_size": 8}  # fmt: skip
        whole = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        transformers.CLIPModel(whole).save_pretrained(folder)
    else:
        getattr(transformers, cls)(transformers.CLIPTextConfig(**text)).save_pretrained(folder)
    return folder


WORDS = (
    "a the red blue large small wooden ball box dog woman tree river moves rolls falls slowly left right up down over "
    "near behind with soft bright light camera follows grass morning"
).split()
CHAT = (
    "{% for m in messages %}user : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %} <answer>"
)


def _words_tokenizer(folder: Path) -> Any:
    """A word a token, so that whatever a random model says reads like a caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<image>", "<answer>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "answer_token": "<answer>"},
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def _llama(positions: int) -> dict[str, Any]:
    return {
        "vocab_size": 5 + len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": positions,
        "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip


def write_llm(folder: Path, seed: int = 0, positions: int = 1024) -> Path:
    """A causal LM with random weights that says words of WORDS, and at random ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**_llama(positions))).save_pretrained(folder)
    _words_tokenizer(folder).save_pretrained(folder)
    return folder


def write_vlm(folder: Path, seed: int = 0) -> Path:
    """The same with eyes: a LLaVA of 16 px."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16, initializer_range=0.4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_llama(1024)), image_token_index=3, image_seq_length=4,
        initializer_range=0.4, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), _words_tokenizer(folder), patch_size=8,
        vision_feature_select_strategy="default", image_token="<image>", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder
