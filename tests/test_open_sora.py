"""Open-Sora 1.2's autoencoder: its published names and size, its pieces of 17 frames, its arithmetic over time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ZOO
from safetensors.torch import load_file, save_file

from sorahpc.errors import ConfigError
from sorahpc.models import open_sora
from sorahpc.models.lengths import Lengths
from sorahpc.models.open_sora import OpenSoraVae, TemporalVae
from sorahpc.models.vae import build_vae, load_vae, read_rule, save_vae

# config.json of huggingface.co/hpcai-tech/OpenSora-VAE-v1.2 at 291a6d24d6599d11b047735c5d036797371ee834, whose
# model.safetensors has sha256 057f368f538ca04540c0728a6b8ef80ff529077c5a1c4ba810eb8ba017b8d7c9 and this size.
PUBLISHED = {
    "architectures": ["VideoAutoencoderPipeline"], "cal_loss": False, "freeze_vae_2d": False, "from_pretrained": None,
    "micro_frame_size": 17, "model_type": "VideoAutoencoderPipeline", "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98], "torch_dtype": "float32", "transformers_version": "4.36.2",
    "vae_2d": {
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "local_files_only": False,
        "micro_batch_size": 4, "subfolder": "vae", "type": "VideoAutoencoderKL",
    },
    "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
}  # fmt: skip
PUBLISHED_BYTES = 1_573_430_548

# What VAE_Temporal of the authors' code gives in the test of the temporal part: means a channel, and a frame.
MOMENTS = [-0.128217, -0.087619, 0.226622, -0.047783, -0.389711, -0.115087, -0.343247, -0.245403]
DECODED = [-0.091833, -0.026426, -0.161514, -0.043173, -0.183227, 0.143441, -0.213422, -0.154315, -0.056202]


def noise_clip(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def size_as_safetensors(shapes: dict[str, list[int]]) -> int:
    """Bytes of a float32 safetensors file of these tensors: length, header padded to 8 bytes, values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(shapes):
        end = at + 4 * int(np.prod(shapes[name], dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [at, end]}
        at = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + at


def test_the_file_of_our_names_and_shapes_has_the_published_size_to_the_byte(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        module = OpenSoraVae(AutoencoderKL)
    shapes = {name: list(t.shape) for name, t in module.state_dict().items()}
    assert size_as_safetensors(shapes) == PUBLISHED_BYTES
    few = {"b": [2, 3], "a": [1]}
    save_file({name: torch.zeros(shape) for name, shape in few.items()}, tmp_path / "x", metadata={"format": "pt"})
    assert size_as_safetensors(few) == (tmp_path / "x").stat().st_size  # the size is counted right


def test_names_and_shapes_are_those_of_the_authors_layers() -> None:
    """opensora/models/vae at v1.2.0: vae.py names the parts, vae_temporal.py the layers (VAE_Temporal_SD)."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        module = OpenSoraVae(AutoencoderKL)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for name, shape in {
        "scale": (1, 4, 1, 1, 1),
        "shift": (1, 4, 1, 1, 1),
        "spatial_vae.module.encoder.conv_in.weight": (128, 3, 3, 3),
        "spatial_vae.module.decoder.mid_block.attentions.0.to_out.0.bias": (512,),
        "spatial_vae.module.quant_conv.weight": (8, 8, 1, 1),
        "temporal_vae.encoder.conv_in.conv.weight": (128, 4, 3, 3, 3),
        "temporal_vae.encoder.block_res_blocks.1.0.conv3.conv.weight": (256, 128, 1, 1, 1),
        "temporal_vae.encoder.block_res_blocks.3.3.norm2.bias": (512,),
        "temporal_vae.encoder.conv_blocks.1.conv.bias": (256,),
        "temporal_vae.encoder.conv_blocks.2.conv.weight": (256, 256, 3, 3, 3),
        "temporal_vae.encoder.conv2.conv.weight": (8, 512, 1, 1, 1),
        "temporal_vae.quant_conv.conv.weight": (8, 8, 1, 1, 1),
        "temporal_vae.post_quant_conv.conv.weight": (4, 4, 1, 1, 1),
        "temporal_vae.decoder.conv1.conv.weight": (512, 4, 3, 3, 3),
        "temporal_vae.decoder.block_res_blocks.2.0.conv3.conv.weight": (256, 512, 1, 1, 1),
        "temporal_vae.decoder.conv_blocks.2.conv.weight": (1024, 512, 3, 3, 3),
        "temporal_vae.decoder.conv_blocks.1.conv.bias": (512,),
        "temporal_vae.decoder.conv_out.conv.weight": (4, 128, 3, 3, 3),
    }.items():
        assert shapes.get(name) == shape, name
    absent = ("encoder.conv_blocks.0.", "decoder.conv_blocks.0.", "conv_in.conv.bias", "conv1.conv.bias")
    assert not [n for n in shapes if n.startswith("temporal_vae.encoder") and n.endswith(absent[2:])]
    assert not [n for n in shapes if any(f"temporal_vae.{part}" in n for part in absent[:2])]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """As published, but small."""
    arch = ZOO["Open-Sora"][1]
    for ours, change in ((open_sora.SPATIAL, arch["spatial"]), (open_sora.TEMPORAL, arch["temporal"])):
        for name, value in change.items():
            monkeypatch.setitem(ours, name, value)


@pytest.fixture
def published(tiny: None, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    built = build_vae("OpenSoraVae", {})
    save_file(built.module.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path


def test_the_authors_folder_and_its_single_file_load_and_what_is_saved_loads_again(
    published: Path, tmp_path: Path
) -> None:
    vae = load_vae(published)
    assert (vae.id, vae.stride, vae.channels) == ("OpenSoraVae", (4, 8, 8), 4)
    assert read_rule(published) == (vae.stride, vae.lengths) and vae.lengths.restart == 17
    assert vae.native is not None
    mean, std = vae.native
    torch.testing.assert_close(mean[:, 0], torch.tensor([-0.1, 0.34, 0.27, 0.98]))
    torch.testing.assert_close(std[:, 0], torch.tensor([3.85, 2.32, 2.33, 3.06]))
    clip = noise_clip(5, 16, 24)
    z = vae.encode(clip)
    single = load_vae(published / "model.safetensors")
    assert torch.equal(single.encode(clip), z) and single.weights_sha256 == vae.weights_sha256
    save_vae(vae, vae.module.state_dict(), tmp_path / "saved", torch.float32)
    assert torch.equal(load_vae(tmp_path / "saved").encode(clip), z)


def test_a_folder_that_is_not_the_published_one_is_one_line(published: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    for change, word in (
        ({"vae_temporal": {"type": "VAE_Temporal"}}, r"doesn't load as OpenSoraVae: .*VAE_Temporal_SD expected, found"),
        ({"vae_2d": None}, "doesn't load as OpenSoraVae"),
        ({"micro_frame_size": 16}, r"doesn't load as OpenSoraVae: micro_frame_size: 4k\+1 expected, found 16"),
        ({"shift": [0.0]}, "doesn't load as OpenSoraVae: as many latent channels everywhere expected"),
        ({"scale": "x"}, "doesn't load as OpenSoraVae"),
    ):
        (published / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=word) as caught:
            load_vae(published)
        assert str(caught.value).startswith("vae.path: ") and "\n" not in str(caught.value)
    (published / "config.json").write_text(json.dumps(config))
    state = load_file(published / "model.safetensors")
    state["temporal_vae.extra"] = state.pop("temporal_vae.quant_conv.conv.bias")
    save_file(state, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing keys .*: 1, such as temporal_vae.quant_conv.conv.bias"):
        load_vae(published)


def test_every_17_frames_it_begins_anew(published: Path) -> None:
    vae = load_vae(published)
    assert [vae.floor_frames(n) for n in (1, 16, 17, 18, 21, 22, 33, 34, 50)] == [1, 13, 17, 18, 18, 22, 30, 34, 47]
    clip = noise_clip(39, 16, 16)
    z = vae.encode(clip)
    assert tuple(z.shape) == vae.latent_shape(39, 16, 16) == (4, 12, 2, 2)
    pieces = [clip[:17], clip[17:34], clip[34:]]
    torch.testing.assert_close(z, torch.cat([vae.encode(piece) for piece in pieces], dim=1))
    back = vae.decode(z)
    assert back.shape == clip.shape
    parts = np.concatenate([vae.decode(part) for part in z.split(5, dim=1)])
    assert np.abs(back.astype(int) - parts).max() <= 1  # of 255: where the rounding falls
    with pytest.raises(ConfigError, match=r"takes clips of 17j or 17j \+ 4k\+1 .*found 37 frames .*below: 35 frames"):
        vae.encode(noise_clip(37, 16, 16))


def test_the_temporal_part_computes_what_the_authors_code_does() -> None:
    """Figures of VAE_Temporal at v1.2.0, run with these weights (torch 2.13, float32)."""
    arch = {**open_sora.TEMPORAL, "filters": 8, "num_res_blocks": 1, "num_groups": 2}
    module = TemporalVae(arch).eval()
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in sorted(module.state_dict().items())}
    module.load_state_dict(state)
    x = torch.randn(2, 4, 9, 5, 6, generator=generator)
    with torch.inference_mode():
        moments = module.encode(x)
        y = module.decode(moments[:, :4])
    assert moments.shape == (2, 8, 3, 5, 6) and y.shape == x.shape
    assert MOMENTS == pytest.approx([float(v) for v in moments.double().mean(dim=(0, 2, 3, 4))], abs=1e-5)
    assert DECODED == pytest.approx([float(v) for v in y.double().mean(dim=(0, 1, 3, 4))], abs=1e-5)


@given(st.integers(1, 4), st.integers(1, 3), st.one_of(st.none(), st.integers(0, 6)), st.integers(1, 80))
def test_lengths_and_latent_frames_are_one_to_one(stride: int, times: int, pieces: int | None, frames: int) -> None:
    unit = stride * times
    lengths = Lengths(stride, unit, None if pieces is None else unit * pieces + 1)
    taken = [n for n in range(1, 100) if lengths.floor(n) == n]
    near = lengths.floor(frames)
    assert near in taken and near <= frames and not [n for n in taken if near < n <= frames]
    assert [lengths.clip(lengths.latent(n)) for n in taken] == taken
    latents = [lengths.latent(n) for n in taken]
    assert latents == sorted(set(latents)) and latents[0] == 1
    with pytest.raises(ValueError, match="restart"):
        Lengths(stride, unit, unit + 1 + unit + (unit > 1)) if unit > 1 else Lengths(1, 1, 0)
