"""What published models normalise latents by, held against the code of diffusers' own pipelines."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import COSMOS, WAN, ZOO

from sorahpc.models.vae import Vae, build_vae


def _pipeline(name: str) -> ast.Module:
    import diffusers

    return ast.parse((Path(diffusers.__file__).parent / "pipelines" / f"{name}.py").read_text())


class _Decoded(Exception):
    """What a pipeline hands to its autoencoder."""


def _denormalised_by(pipeline: str, module: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Runs the pipeline's own lines that lead to its `self.vae.decode`, not a copy of them."""

    def decode(z: torch.Tensor, *_: object, **__: object) -> None:
        raise _Decoded(z)

    def calls_decode(node: ast.AST) -> bool:
        return any(ast.unparse(n.func) == "self.vae.decode" for n in ast.walk(node) if isinstance(n, ast.Call))

    # The innermost run of lines that ends in it: a branch of an `if`, or the method `decode_latents`.
    blocks = [
        [line for line in lines if not isinstance(line, ast.Return)]
        for node in ast.walk(_pipeline(pipeline))
        for lines in (
            [node.body, node.orelse] if isinstance(node, ast.If)
            else [node.body] if isinstance(node, ast.FunctionDef) and node.name == "decode_latents" else []
        )
        if any(calls_decode(line) for line in lines)
    ]  # fmt: skip
    vae = SimpleNamespace(config=module.config, dtype=torch.float32, decode=decode)
    # CogVideoX keeps `self.vae.config.scaling_factor` on the pipeline; Cosmos's sigma is its sampler's.
    own = SimpleNamespace(
        vae=vae, vae_scaling_factor_image=getattr(module.config, "scaling_factor", None),
        scheduler=SimpleNamespace(config=SimpleNamespace(sigma_data=1.0)), vae_scale_factor=8,
        _unpack_latents=lambda latents, *_: latents,  # Qwen-Image's tokens
    )  # fmt: skip
    names = {"self": own, "latents": latents, "torch": torch, "height": 16, "width": 16,
             "get_module_execution_device": lambda _: torch.device("cpu")}  # fmt: skip
    if pipeline.startswith("cogvideo"):  # its samples are [B,T,C,H,W]
        names["latents"] = latents.transpose(1, 2)
    with pytest.raises(_Decoded) as caught:
        exec(compile(ast.Module(blocks[-1], []), pipeline, "exec"), names)
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("name", "pipeline", "more"),
    [
        ("HunyuanVideo", "hunyuan_video/pipeline_hunyuan_video", {}),
        ("HunyuanVideo 1.5", "hunyuan_video1_5/pipeline_hunyuan_video1_5", {}),
        ("Wan 2.1", "wan/pipeline_wan", {"z_dim": 16}),
        ("Wan 2.2", "wan/pipeline_wan", {"z_dim": 16, "latents_mean": [0.1 * k for k in range(16)]}),
        ("CogVideoX", "cogvideo/pipeline_cogvideox", {}),
        ("Cosmos", "cosmos/pipeline_cosmos_text2world", {"latent_channels": 16, "latents_mean": 0, "latents_std": 0}),
        ("Mochi", "mochi/pipeline_mochi", {"latent_channels": 12, "latents_mean": 0, "latents_std": 0}),
        ("Qwen-Image", "qwenimage/pipeline_qwenimage", {"z_dim": 16}),
        ("EasyAnimate", "easyanimate/pipeline_easyanimate", {}),
    ],
)
def test_the_native_normalisation_is_that_of_diffusers_pipelines(
    name: str, pipeline: str, more: dict[str, object]
) -> None:
    cls, arch, *_ = ZOO[name]
    arch = {k: v for k, v in {**arch, **more}.items() if v != 0 or k == "attention_resolutions"}  # 0: the default
    vae = build_vae(cls, arch)
    assert vae.native is not None
    mean, std = vae.native
    assert float((std - 1).abs().max()) > 0.01  # it does something
    z = torch.randn(1, vae.channels, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    at = slice(0, 3 if mean.shape[1] > 1 else 1)
    raw = z * std[:, at, None, None] + mean[:, at, None, None]
    torch.testing.assert_close(_denormalised_by(pipeline, vae.module, z), raw, rtol=1e-5, atol=1e-6)


def test_the_native_normalisation_of_ltx_is_that_of_its_pipeline_both_ways() -> None:
    tree = _pipeline("ltx/pipeline_ltx")
    names: dict[str, Any] = {"torch": torch}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("_normalize_latents", "_denormalize_latents"):
            node.decorator_list = []
            exec(compile(ast.Module([node], []), "ltx", "exec"), names)
    cls, arch, *_ = ZOO["LTX"]
    built = build_vae(cls, {**arch, "scaling_factor": 0.7})
    built.module.latents_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    built.module.latents_std.copy_(torch.tensor([1.5, 0.5, 1.0, 3.0]))
    vae = Vae(built.module, "", torch.float32, torch.device("cpu"))
    assert vae.native is not None
    mean, std = (v[:, :, None, None] for v in vae.native)
    z = torch.randn(1, 4, 3, 2, 2)
    args = (built.module.latents_mean, built.module.latents_std, 0.7)
    torch.testing.assert_close(names["_normalize_latents"](z, *args), (z - mean) / std)
    torch.testing.assert_close(names["_denormalize_latents"](z, *args), z * std + mean)


def test_a_model_without_statistics_of_its_size_has_no_native_normalisation() -> None:
    assert build_vae("AutoencoderKLWan", WAN).native is None  # 4 channels, with the constructor's 16 means
    assert build_vae("AutoencoderKLCosmos", COSMOS).native is None
    assert build_vae(*ZOO["KVAE"][:2]).native is None
