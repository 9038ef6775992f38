"""The VAE adapter."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from models import WAN, ZOO, write_vae
from safetensors.torch import load_file, save_file

from sorahpc.config import TilingConfig
from sorahpc.data.toyworld import render, scene_of
from sorahpc.errors import ConfigError
from sorahpc.models.vae import WEIGHTS, Vae, _config_sha256, build_vae, load_vae, read_rule, save_vae
from sorahpc.models.vae_rules import CLASSES


@pytest.fixture(scope="module")
def cosmos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae"))


def noise_clip(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_every_known_class_is_in_the_zoo() -> None:
    assert {entry[0] for entry in ZOO.values()} == set(CLASSES)


@pytest.mark.parametrize("name", ZOO)
def test_each_class_round_trips_by_its_own_rule_and_cuts_nothing_silently(name: str, tmp_path: Path) -> None:
    cls, arch, stride, unit = ZOO[name]
    torch.manual_seed(0)
    built = build_vae(cls, arch)
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    vae = load_vae(tmp_path)
    assert (vae.id, vae.stride, vae.channels) == (cls, stride, 4) and len(vae.weights_sha256) == 64
    assert read_rule(tmp_path) == (vae.stride, vae.lengths)
    assert [vae.floor_frames(n) for n in (1, unit, unit + 1, 2 * unit)] == [1, 1, unit + 1, unit + 1]
    frames, height, width = unit + 1, 64, 96
    z = vae.encode(noise_clip(frames, height, width))
    assert z.dtype == torch.float32 and tuple(z.shape) == vae.latent_shape(frames, height, width)
    clip = vae.decode(z)
    assert clip.dtype == np.uint8 and clip.shape == (frames, height, width, 3)
    assert torch.equal(vae.encode(noise_clip(frames, height, width)), z)  # the posterior's mean, not a draw from it
    for shape in ((frames + 1, height, width), (frames, height - stride[1] // 2, width)):
        with pytest.raises(
            ConfigError, match=rf"^vae: {cls} takes clips of .*{unit}k\+1.* frames with sides"
        ) as caught:
            vae.encode(noise_clip(*shape))
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ZOO)
def test_on_cuda_each_class_gives_what_it_gives_on_the_cpu(name: str) -> None:
    class_name, arch, stride, unit = ZOO[name]
    torch.manual_seed(0)
    module = build_vae(class_name, arch).module.eval()
    tiling = TilingConfig(tile_px=2 * stride[1], overlap_px=stride[1])
    clip = noise_clip(unit + 1, 3 * stride[1], 3 * stride[1])
    vae = Vae(module, "", torch.float32, torch.device("cpu"), tiling)
    z = vae.encode(clip)
    frames = vae.decode(z).astype(int)
    vae = Vae(module.to("cuda"), "", torch.float32, torch.device("cuda"), tiling)
    # Without TF32: some classes with random weights make 100 times of an error in the tenth bit.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert (vae.encode(clip) - z).norm() < 0.01 * z.norm()
        assert np.abs(vae.decode(z) - frames).mean() < 1
    vae = Vae(module.to("cuda", torch.bfloat16), "", torch.bfloat16, torch.device("cuda"), tiling)
    assert vae.encode(clip).isfinite().all() and vae.decode(z).shape == clip.shape


@pytest.mark.parametrize("name", ZOO)
def test_each_length_that_a_class_takes_comes_back_as_long(name: str) -> None:
    class_name, arch, stride, _ = ZOO[name]
    torch.manual_seed(0)
    vae = Vae(build_vae(class_name, arch).module.eval(), "", torch.float32, torch.device("cpu"))
    for frames in range(17, 38):  # over the pieces of 16 or so frames that some go by
        if vae.floor_frames(frames) == frames:
            clip = np.zeros((frames, 2 * stride[1], 2 * stride[1], 3), np.uint8)
            assert vae.decode(vae.encode(clip)).shape == clip.shape


def test_hunyuanvideo_15_masks_at_once_what_diffusers_masks_place_by_place_and_takes_a_batch() -> None:
    class_name, arch, _, _ = ZOO["HunyuanVideo 1.5"]
    torch.manual_seed(0)
    vae = build_vae(class_name, arch)
    blocks = [m for m in vae.module.modules() if hasattr(m, "prepare_causal_attention_mask")]
    own = type(blocks[0]).prepare_causal_attention_mask
    for sizes in ((1, 1), (3, 6), (4, 1)):
        mask = blocks[0].prepare_causal_attention_mask(*sizes, torch.bfloat16, "cpu", batch_size=1)
        assert torch.equal(mask, own(*sizes, torch.bfloat16, "cpu", batch_size=1))
    clips = torch.rand(2, 3, 5, 64, 64)
    both = vae.module.encode(clips).latent_dist.mode()
    apart = torch.cat([vae.module.encode(clip[None]).latent_dist.mode() for clip in clips])
    assert torch.allclose(both, apart, atol=1e-5)
    for block in blocks:
        del block.prepare_causal_attention_mask  # which leaves that of diffusers
    assert torch.equal(vae.module.encode(clips[:1]).latent_dist.mode(), apart[:1])


@pytest.mark.parametrize("shape", [(16, 64, 64), (4, 64, 64), (9, 60, 64), (9, 64, 4), (0, 64, 64)])
def test_a_clip_that_breaks_the_rule_is_refused_not_cut(cosmos: Path, shape: tuple[int, int, int]) -> None:
    vae = load_vae(cosmos)
    with pytest.raises(ConfigError, match=r"4k\+1 frames with sides in multiples of 8 px, found"):
        vae.latent_shape(*shape)
    with pytest.raises(ConfigError, match="nearest below"):
        vae.encode(np.zeros((*shape, 3), np.uint8))


def test_input_that_is_not_a_clip_is_a_bug_of_the_caller(cosmos: Path) -> None:
    vae = load_vae(cosmos)
    for bad in (
        np.zeros((9, 64, 64, 3), np.float32),
        np.zeros((9, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="uint8"):
            vae.encode(bad)
    with pytest.raises(ValueError, match="C = 4"):
        vae.decode(torch.zeros(5, 1, 8, 8))


def test_frames_may_be_a_view_of_any_strides(cosmos: Path) -> None:
    vae, clip = load_vae(cosmos), noise_clip(10, 64, 64)
    assert torch.equal(vae.encode(clip[:9, :, ::-1]), vae.encode(np.ascontiguousarray(clip[:9, :, ::-1])))


def test_bfloat16_compute_is_near_float32_or_refused_in_one_line(cosmos: Path, tmp_path: Path) -> None:
    clip = render(scene_of(1, 0))
    torch.manual_seed(0)
    built = build_vae("AutoencoderKLWan", WAN)
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    a, b = load_vae(tmp_path).encode(clip), load_vae(tmp_path, dtype="bfloat16").encode(clip)
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.1 * a.abs().max()
    with pytest.raises(ConfigError, match=r"^vae.dtype: AutoencoderKLCosmos can't compute in torch.bfloat16 on cpu"):
        load_vae(cosmos, dtype="bfloat16").encode(clip)


def test_pixels_are_rounded_to_the_dtype_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    built = build_vae("AutoencoderKLWan", WAN)
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    vae, seen = load_vae(tmp_path, dtype="bfloat16"), []
    whole = vae.module.encode
    monkeypatch.setattr(vae.module, "encode", lambda x: seen.append(x) or whole(x))
    clip = noise_clip(1, 64, 64)
    vae.encode(clip)
    expected = (torch.from_numpy(clip).permute(3, 0, 1, 2).double() / 127.5 - 1).bfloat16()
    assert torch.equal(seen[0][0], expected)


def test_what_the_class_lacks_is_the_dtype_only_where_float32_would_help(
    cosmos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(x: torch.Tensor) -> None:
        raise NotImplementedError("no kernel for this\nand pages of which there are")

    whole, half = load_vae(cosmos), load_vae(cosmos, dtype="bfloat16")
    for vae in (whole, half):
        monkeypatch.setattr(vae.module, "encode", lacks)
    with pytest.raises(NotImplementedError):
        whole.encode(noise_clip(5, 64, 64))
    with pytest.raises(ConfigError, match=r"^vae.dtype: .*\(no kernel for this\); use float32$"):
        half.encode(noise_clip(5, 64, 64))


def test_weights_in_shards_load_by_their_index_and_give_the_same_latents(cosmos: Path, tmp_path: Path) -> None:
    state = load_file(cosmos / WEIGHTS)
    half = len(state) // 2
    parts = {"a-1.safetensors": list(state)[:half], "a-2.safetensors": list(state)[half:]}
    for name, keys in parts.items():
        save_file({k: state[k] for k in keys}, tmp_path / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((cosmos / "config.json").read_bytes())
    a, b = load_vae(tmp_path), load_vae(cosmos)
    clip = noise_clip(5, 64, 64)
    assert torch.equal(a.encode(clip), b.encode(clip)) and a.weights_sha256 != b.weights_sha256
    index["weight_map"][next(iter(state))] = "../a-1.safetensors"
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="is no file in"):
        load_vae(tmp_path)


def _drop_a_tensor(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop(sorted(state)[0])
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


class _Canary:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "a mapping expected"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: _edit(f, _class_name="StableDiffusionPipeline"), "_class_name: expected one of Auto"),
        (lambda f: _edit(f, _class_name=["x"]), "_class_name"),
        (lambda f: _edit(f, latent_channels=7), "doesn't load as|keys between"),
        (lambda f: _edit(f, num_layers="many"), "doesn't load as"),
        (lambda f: _edit(f, latents_mean=["a"] * 4, latents_std=[1.0] * 4), "Cosmos can.t have"),
        (lambda f: _edit(f, latents_mean=[0.0] * 4, latents_std=[0.0] * 4), "above 0, expected"),
        (lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"), "one of them expected"),
        (_drop_a_tensor, "missing keys between config.json and weights: 1"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 100), "doesn't load as"),
        (lambda f: torch.save({"x": _Canary()}, f / WEIGHTS), "doesn't load as"),
        (lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), "safetensors only"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_one_line_that_names_the_key(
    cosmos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object, word: str
) -> None:
    for path in cosmos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=word) as caught:
        load_vae(tmp_path)
    assert str(caught.value).startswith("vae.path: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("factor", [0, None, "x"])
def test_a_scaling_factor_that_is_none_is_one_line(tmp_path: Path, factor: object) -> None:
    built = build_vae(*ZOO["HunyuanVideo"][:2])
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    _edit(tmp_path, scaling_factor=factor)
    for where in ("vae.path", "train_vae.init"):
        with pytest.raises(
            ConfigError, match=rf"^{where}: {tmp_path}: values that AutoencoderKLHunyuanVideo can't have: [^\n]*$"
        ):
            load_vae(tmp_path, where=where)


def test_a_scale_among_the_weights_that_is_none_is_one_line(tmp_path: Path) -> None:
    built = build_vae(*ZOO["Open-Sora"][:2])
    state = built.module.state_dict()
    save_vae(built, {**state, "scale": torch.zeros_like(state["scale"])}, tmp_path, torch.float32)
    with pytest.raises(ConfigError, match=rf"^vae.path: {tmp_path}: values that OpenSoraVae can't have: [^\n]*above 0"):
        load_vae(tmp_path)


def test_a_missing_folder_is_one_line_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"^vae.path: no folder /nowhere/vae; expected a local diffusers autoencoder"):
        load_vae("/nowhere/vae")


def test_a_config_that_lies_about_its_stride_is_found_at_the_first_clip(tmp_path: Path) -> None:
    built = build_vae(*ZOO["LTX"][:2])
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    _edit(tmp_path, temporal_compression_ratio=4)
    with pytest.raises(ConfigError, match=r"vae\.path: .*where its config says"):
        load_vae(tmp_path).encode(noise_clip(9, 64, 64))


@pytest.mark.parametrize("name", ZOO)
def test_the_same_arguments_are_the_same_config_whether_their_defaults_are_spelled_out_or_not(
    name: str, tmp_path: Path
) -> None:
    cls, arch, *_ = ZOO[name]
    built = build_vae(cls, arch)
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    spelled = json.loads((tmp_path / "config.json").read_text())
    assert len(spelled) > len(arch) + 1
    found = {built.config_sha256, load_vae(tmp_path).config_sha256, load_vae(tmp_path / WEIGHTS).config_sha256}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": cls, **arch, "_diffusers_version": "0.1"}))
    found.add(load_vae(tmp_path).config_sha256)
    assert len(found) == 1 and re.fullmatch("[0-9a-f]{64}", *found)


def test_a_diffusers_of_more_arguments_has_the_same_config_as_long_as_they_are_as_by_default() -> None:
    class Old:
        def __init__(self, width: int = 8, strides: tuple[int, ...] = (1, 2), act: str = "silu") -> None:
            self.config = {"width": width, "strides": strides, "act": act, "_use_default_values": ["act"]}

    class Younger:
        def __init__(self, width: int = 8, strides: tuple[int, ...] = (1, 2), act: str = "silu", more: int = 0) -> None:
            self.config = {"width": width, "strides": strides, "act": act, "more": more, "_class_name": "Younger"}

    old = _config_sha256(Old(16, (2, 2)))
    assert old == _config_sha256(Old(16, [2, 2])) == _config_sha256(Younger(16, (2, 2)))  # type: ignore[arg-type]
    others = [Old(16), Old(8, (2, 2)), Old(16, (2, 2), "relu"), Younger(16, (2, 2), more=1)]
    assert len({old, *map(_config_sha256, others)}) == 5


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("HunyuanVideo", "act_fn", "relu"),
        ("HunyuanVideo", "norm_num_groups", 4),
        ("CogVideoX", "norm_eps", 1e-2),
        ("EasyAnimate", "spatial_group_norm", False),
        ("LTX", "encoder_causal", False),
        ("Mochi", "act_fn", "relu"),
    ],
)
def test_an_argument_by_which_the_same_weights_give_other_latents_is_another_config(
    name: str, argument: str, value: object, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    built = build_vae(*ZOO[name][:2])
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    before, clip = load_vae(tmp_path), noise_clip(ZOO[name][3] + 1, 64, 64)
    assert dict(before.module.config)[argument] != value
    _edit(tmp_path, **{argument: value})
    after = load_vae(tmp_path)
    assert not torch.equal(before.encode(clip), after.encode(clip))
    assert after.weights_sha256 == before.weights_sha256 and after.config_sha256 != before.config_sha256


def test_a_wrong_class_or_arch_to_train_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^train_vae.class_name: expected one of .*found 'AutoencoderKL'"):
        build_vae("AutoencoderKL", {})
    with pytest.raises(ConfigError, match=r"^train_vae.arch: AutoencoderKLCosmos refuses it"):
        build_vae("AutoencoderKLCosmos", {"latent_chanels": 4})
    assert "AutoencoderKLWan" in CLASSES


# ---------------------------------------------------------------------------------------------------------------------
# Single files


def _authors_name(name: str) -> str:
    """Of a tensor of Wan's autoencoder as its authors save it, from its name in diffusers."""
    name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)",
                  lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}", name)  # fmt: skip
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}", name)
    for ours, theirs in {
        "encoder.down_blocks": "encoder.downsamples", "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.1", "mid_block.resnets.1": "middle.2", "norm_out": "head.0",
        "conv_out": "head.2", "conv_in": "conv1", "conv_shortcut": "shortcut", "post_quant_conv": "conv2",
        "quant_conv": "conv1",
    }.items():  # fmt: skip
        name = name.replace(ours, theirs)
    if re.search(r"(samples\.\d+|middle\.[02])\.(norm|conv)\d", name):
        for ours, theirs in {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3",
                             "conv2": "residual.6"}.items():  # fmt: skip
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def test_a_single_file_loads_in_diffusers_names_and_in_the_authors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = build_vae("AutoencoderKLWan", {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4]})
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    state = load_file(tmp_path / WEIGHTS)
    theirs = {_authors_name(name): value for name, value in state.items()}
    assert len(theirs) == len(state) and not theirs.keys() & state.keys()
    save_file(theirs, tmp_path / "wan_vae.safetensors")
    clip = noise_clip(5, 32, 32)
    z = load_vae(tmp_path).encode(clip)
    assert torch.equal(load_vae(tmp_path / WEIGHTS).encode(clip), z)
    other = load_vae(tmp_path / "wan_vae.safetensors")
    assert torch.equal(other.encode(clip), z) and other.module.training is False
    theirs.pop("conv2.weight")
    save_file(theirs, tmp_path / "wan_vae.safetensors")
    with pytest.raises(ConfigError, match=r"wan_vae.safetensors: missing keys .*: 1, such as post_quant_conv.weight"):
        load_vae(tmp_path / "wan_vae.safetensors")


def test_a_single_file_that_can_not_be_read_is_one_line(cosmos: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((cosmos / "config.json").read_bytes())
    save_file({"encoder.strange": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 64)
    torch.save({"x": _Canary()}, tmp_path / "c.pth")
    for name, word in {
        "a.safetensors": "don't have diffusers' names, and AutoencoderKLCosmos can't be translated",
        "b.safetensors": "doesn't load as AutoencoderKLCosmos",
        "c.pth": "weights are read from safetensors only",
        "d.safetensors": "no file",
    }.items():
        with pytest.raises(ConfigError, match=word) as caught:
            load_vae(tmp_path / name)
        assert str(caught.value).startswith("vae.path: ") and "\n" not in str(caught.value)
