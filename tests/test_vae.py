"""The VAE adapter and the toy VAE that is shipped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import COSMOS, write_vae
from safetensors.torch import load_file, save_file

from sorahpc.config import Config, load_config, parse_config, shipped_dir
from sorahpc.data.decode import decode, plan_clip, probe
from sorahpc.data.manifest import Video
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import COLOURS, SIZES_PX, render, scene_of
from sorahpc.errors import ConfigError
from sorahpc.models.vae import CLASSES, WEIGHTS, build_vae, load_vae, save_vae
from sorahpc.runs import Task

FOUR = {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1}
ZOO = {
    "AutoencoderKLCosmos": (COSMOS, (4, 8, 8), 4),
    "AutoencoderKLWan": ({"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}, (4, 8, 8), 4),
    "AutoencoderKLHunyuanVideo": ({**FOUR, "norm_num_groups": 2}, (4, 8, 8), 4),
    "AutoencoderKLCogVideoX": ({**FOUR, "norm_num_groups": 2}, (4, 8, 8), 8),
    "AutoencoderKLMagvit": ({**FOUR, "norm_num_groups": 2}, (4, 8, 8), 4),
    "AutoencoderKLLTXVideo": (
        {"latent_channels": 4, "block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4,
         "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5}, (8, 32, 32), 8,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cosmos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae"))


def noise_clip(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ZOO)
def test_each_class_round_trips_by_its_own_rule(name: str, tmp_path: Path) -> None:
    arch, stride, unit = ZOO[name]
    torch.manual_seed(0)
    built = build_vae(name, arch)
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    vae = load_vae(tmp_path)
    assert (vae.id, vae.stride, vae.channels) == (name, stride, 4) and len(vae.weights_sha256) == 64
    assert [vae.floor_frames(n) for n in (1, unit, unit + 1, 2 * unit)] == [1, 1, unit + 1, unit + 1]
    frames, height, width = unit + 1, 64, 96
    z = vae.encode(noise_clip(frames, height, width))
    assert z.dtype == torch.float32 and tuple(z.shape) == vae.latent_shape(frames, height, width)
    clip = vae.decode(z)
    assert clip.dtype == np.uint8 and clip.shape == (frames, height, width, 3)
    assert torch.equal(vae.encode(noise_clip(frames, height, width)), z)  # the posterior's mean, not a draw from it


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
    built = build_vae("AutoencoderKLWan", ZOO["AutoencoderKLWan"][0])
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    a, b = load_vae(tmp_path).encode(clip), load_vae(tmp_path, dtype="bfloat16").encode(clip)
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.1 * a.abs().max()
    with pytest.raises(ConfigError, match=r"^vae.dtype: AutoencoderKLCosmos can't compute in torch.bfloat16 on cpu"):
        load_vae(cosmos, dtype="bfloat16").encode(clip)


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


def test_a_missing_folder_is_one_line_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"^vae.path: no folder /nowhere/vae; expected a local diffusers autoencoder"):
        load_vae("/nowhere/vae")


def test_a_config_that_lies_about_its_stride_is_found_at_the_first_clip(tmp_path: Path) -> None:
    built = build_vae("AutoencoderKLLTXVideo", ZOO["AutoencoderKLLTXVideo"][0])
    save_vae(built, built.module.state_dict(), tmp_path, torch.float32)
    _edit(tmp_path, temporal_compression_ratio=4)
    with pytest.raises(ConfigError, match=r"vae\.path: .*where its config says"):
        load_vae(tmp_path).encode(noise_clip(9, 64, 64))


def test_a_wrong_class_or_arch_to_train_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^train_vae.class_name: expected one of .*found 'AutoencoderKL'"):
        build_vae("AutoencoderKL", {})
    with pytest.raises(ConfigError, match=r"^train_vae.arch: AutoencoderKLCosmos refuses it"):
        build_vae("AutoencoderKLCosmos", {"latent_chanels": 4})
    assert "AutoencoderKLWan" in CLASSES


# ---------------------------------------------------------------------------------------------------------------------
# The toy VAE


def _through_h264(frames: np.ndarray, fps: float, folder: Path) -> np.ndarray:
    """What a pipeline on files sees of a clip."""
    path = folder / "clip.mp4"
    write_mp4(path, frames, fps, crf=12)
    found = probe(path)
    video = Video("0" * 16, str(path), "", found.frames, found.fps, found.width, found.height, found.codec,
                  found.duration_s, path.stat().st_size, 0, "ok", "")  # fmt: skip
    clip = load_config("toy_vae").clip
    plan = plan_clip(video, clip, stride=(4, 8, 8), patch_hw=(2, 2), floor_frames=lambda n: (n - 1) // 4 * 4 + 1)
    return decode(path, plan)


def test_the_shipped_toy_vae_reaches_28_db_on_unseen_clips_of_every_size_with_the_right_colours(tmp_path: Path) -> None:
    vae = load_vae(shipped_dir() / "vae/toy")
    assert vae.stride == (4, 8, 8)
    assert sum(p.stat().st_size for p in (shipped_dir() / "vae/toy").iterdir()) < 1_000_000
    psnr: dict[tuple[int, int], list[float]] = {size: [] for size in SIZES_PX}
    latents = []
    for i in range(24):  # world 990901 is in no config
        scene = scene_of(990901, i, sizes=[SIZES_PX[i % 3]])
        clip = _through_h264(render(scene), scene.fps, tmp_path)
        assert clip.shape == (scene.frames, scene.height, scene.width, 3)
        z = vae.encode(clip)
        latents.append(z.flatten(1))
        again = vae.decode(z)
        error = np.square(again.astype(float) - clip).mean()
        psnr[SIZES_PX[i % 3]].append(10 * np.log10(255**2 / error))
        x, y = scene.position(0.0)
        patch = again[0, int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].reshape(-1, 3).mean(0)
        if scene.bar is None:
            nearest = min(COLOURS, key=lambda c: float(np.abs(patch - COLOURS[c]).sum()))
            assert nearest == scene.colour, (i, patch)
    means = {size: float(np.mean(values)) for size, values in psnr.items()}
    assert min(means.values()) >= 28, means
    assert min(min(values) for values in psnr.values()) >= 25, psnr
    std = torch.cat(latents, dim=1).std(dim=1)
    assert std.min() > 0.2 and std.max() < 3, std  # near unit scale, no dead channel


def test_a_decoded_clip_hardly_changes_when_its_latent_is_off_a_little(tmp_path: Path) -> None:
    """A sampler's latents are never exact: 5 % of noise must not show."""
    vae = load_vae(shipped_dir() / "vae/toy")
    scene = scene_of(990901, 30)
    z = vae.encode(render(scene))
    off = z + 0.05 * z.std() * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    a, b = vae.decode(z).astype(float), vae.decode(off).astype(float)
    assert 10 * np.log10(255**2 / np.square(a - b).mean()) > 28


# ---------------------------------------------------------------------------------------------------------------------
# train-vae


def _config(folder: Path, **train: object) -> Config:
    return parse_config(
        {
            "run": "r", "runs_dir": str(folder), "prepare": {"videos": str(folder / "videos")},
            "clip": {"fps": 8, "max_frames": 9, "min_frames": 5, "max_area_px": 4096},
            "train_vae": {
                "out": str(folder / "vae"), "class_name": "AutoencoderKLCosmos", "arch": COSMOS, "steps": 8,
                "batch_clips": 2, "window_frames": 5, "save_every": 4, "holdout_clips": 2, **train,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sorahpc.data.toyworld import write_world
    from sorahpc.jobs import prepare

    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "videos", 12, seed=1)
    config = _config(folder)
    prepare.run(config, Task(config.run_dir, "prepare"))
    return folder


def test_train_vae_writes_what_load_vae_reads_and_a_killed_run_resumes_to_the_same_bits(
    videos: Path, tmp_path: Path
) -> None:
    import shutil

    from sorahpc.errors import DataError, Stopped
    from sorahpc.jobs import train_vae

    outs = []
    for name, stops in (("whole", ()), ("parts", (3, 6))):
        folder = tmp_path / name
        (folder / "r").mkdir(parents=True)
        shutil.copy(videos / "r/manifest.parquet", folder / "r/manifest.parquet")
        config = _config(folder)
        for stop in stops:
            looks = iter(range(10_000))  # 12 of them while reading the clips, then one a step
            task = Task(config.run_dir, "train-vae", stop_requested=lambda looks=looks, n=12 + 3: next(looks) >= n)
            with pytest.raises(Stopped, match=f"step {stop} of 8"):
                train_vae.run(config, task)
        train_vae.run(config, Task(config.run_dir, "train-vae"))
        outs.append((folder / "vae" / WEIGHTS).read_bytes())
        result = json.loads((config.run_dir / "train_vae/result.json").read_text())
        assert result["clips"] == 2 and result["psnr_db"] > 3 and len(result["latent_std"]) == 4
        assert load_vae(folder / "vae").encode(noise_clip(5, 64, 64)).shape == (4, 2, 8, 8)
    assert outs[0] == outs[1]
    with pytest.raises(DataError, match=r"state.safetensors: saved under other train_vae settings"):
        train_vae.run(_config(tmp_path / "whole", lr=0.5), Task(tmp_path / "whole/r", "train-vae"))


def test_training_lowers_the_error_on_whole_frames_and_on_crops() -> None:
    from sorahpc.jobs.train_vae import Trainer

    clips = [render(scene_of(2, i, frames=[9], sizes=[(64, 64)])) for i in range(4)]
    shipped = load_config("toy_vae").train_vae
    assert shipped is not None
    for name, arch, crop in (("AutoencoderKLCosmos", COSMOS, None), (shipped.class_name, shipped.arch, 32)):
        spec = _config(Path("/x"), class_name=name, arch=arch, steps=30, crop_px=crop).train_vae
        assert spec is not None
        torch.manual_seed(0)
        trainer = Trainer(build_vae(name, arch), clips, spec)
        assert trainer.sizes == [(5, crop or 64, crop or 64)]
        errors = [trainer.train_step()[1] for _ in range(30)]
        assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:5]), (name, errors)


def test_moving_pixels_are_those_of_the_object_and_none_in_a_still_clip() -> None:
    from sorahpc.jobs.train_vae import moving_pixels

    scene = next(s for s in (scene_of(2, i, frames=[17]) for i in range(50)) if s.speed == "fast" and s.bar is None)
    clip = render(scene)
    found = moving_pixels(clip)
    assert 0 < len(found) <= 512
    places = np.array([scene.position(t / scene.fps) for t in range(scene.frames)])
    half_w, half_h = scene.half_extents
    low, high = places.min(0) - [half_w + 1, half_h + 1], places.max(0) + [half_w + 1, half_h + 1]
    assert (found[:, 2] >= low[0]).all() and (found[:, 2] <= high[0]).all()
    assert (found[:, 1] >= low[1]).all() and (found[:, 1] <= high[1]).all()
    assert moving_pixels(np.repeat(clip[:1], 9, axis=0)).shape == (0, 3)
