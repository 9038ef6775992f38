"""Clips in parts: aligned to the place, blended without a seam, and refused where a class can't be cut."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import COSMOS, WAN, ZOO

from sorahpc.config import TilingConfig, shipped_dir
from sorahpc.configfile import parse_config
from sorahpc.data.cache import check_info
from sorahpc.data.toyworld import render, scene_of
from sorahpc.errors import ConfigError, DataError
from sorahpc.jobs import encode
from sorahpc.models.lengths import Lengths
from sorahpc.models.tiling import Cut, in_parts
from sorahpc.models.vae import Vae, build_vae, load_vae

CPU = torch.device("cpu")


def smooth_clip(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [T,H,W,3]: a moving picture of blobs, since real frames aren't noise. More than one blob: of a frame of one
    colour a norm over its places leaves rounding alone, which is another on each CPU."""
    coarse = max(frames // 4, 2), max(height // 16, 2), max(width // 16, 2)
    x = torch.rand(1, 3, *coarse, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(x, size=(frames, height, width), mode="trilinear")
    return (x[0] * 255).byte().permute(1, 2, 3, 0).numpy()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_parts_cover_an_axis_in_equal_sizes_share_what_was_asked_and_weigh_1_in_all(data: st.DataObject) -> None:
    size, length = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20))
    overlap = data.draw(st.integers(0, length - 1))
    stride = data.draw(st.integers(1, 8))
    cut = Cut.of(size, length, overlap)
    assert cut.starts[0] == 0 and cut.starts[-1] + cut.length == size
    assert all(a < b <= a + cut.length - overlap for a, b in zip(cut.starts, cut.starts[1:], strict=False))
    if len(cut.starts) > 1:
        assert cut.length == length and len(cut.starts) == -(-(size - overlap) // (length - overlap))
    # Without a shared place, a cut in frames would leave frames to nobody; overlap_frames is 1 at least.
    for c in (cut, cut.pixels(stride), *([cut.frames(stride)] if overlap else [])):
        total = torch.zeros(c.size)
        for start, row in zip(c.starts, c.weights(), strict=True):
            assert row.min() >= 0 and len(row) == c.length
            total[start : start + c.length] += row
        torch.testing.assert_close(total, torch.ones(c.size))


def test_an_overlap_as_long_as_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap: 0 to 3, not 4"):
        Cut.of(9, 4, 4)


@pytest.mark.parametrize("grid", [(1, 4, 4), (7, 9, 5), (12, 10, 10)])
@pytest.mark.parametrize(("chunk", "shared", "tile", "overlap"), [(3, 1, 4, 0), (4, 2, 4, 3), (None, 1, 3, 1)])
def test_a_coder_that_sees_no_neighbour_gives_the_same_in_parts_to_the_last_place(
    grid: tuple[int, int, int], chunk: int | None, shared: int, tile: int, overlap: int
) -> None:
    """Means over strides: latent k of a clip is the mean of frames (k-1)t+1 to kt, and the first of frame 0 alone."""
    t, h = 4, 2

    def means(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.avg_pool3d(x, (1, h, h))
        rest = x[:, 1:].reshape(len(x), -1, t, *x.shape[2:]).mean(2)
        return torch.cat([x[:, :1], rest], 1)

    def repeat(z: torch.Tensor) -> torch.Tensor:
        z = torch.cat([z[:, :1], z[:, 1:].repeat_interleave(t, 1)], 1)
        return z.repeat_interleave(h, 2).repeat_interleave(h, 3)

    cuts = (Cut.of(grid[0], chunk, shared), Cut.of(grid[1], tile, overlap), Cut.of(grid[2], tile, overlap))
    pixels = (cuts[0].frames(t), cuts[1].pixels(h), cuts[2].pixels(h))
    clip = torch.randn(3, *(c.size for c in pixels), generator=torch.Generator().manual_seed(0))
    latent = torch.randn(5, *grid, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(in_parts(clip, pixels, cuts, means), means(clip))
    torch.testing.assert_close(in_parts(latent, cuts, pixels, repeat), repeat(latent))


def test_tiles_of_wan_are_those_of_diffusers_own_tiling() -> None:
    """An independent implementation, along one axis and as far as both cut alike: theirs ends with a narrow tile."""
    torch.manual_seed(0)
    module = build_vae("AutoencoderKLWan", WAN).module.eval()
    ours = Vae(module, "", torch.float32, CPU, TilingConfig(tile_px=64, overlap_px=16))
    clip = smooth_clip(5, 48, 208)  # ours begin at 0, 48, 96, 144; theirs also at 192
    z = ours.encode(clip)
    back = ours.decode(z)
    module.enable_tiling(64, 64, 48, 48)
    theirs = Vae(module, "", torch.float32, CPU)
    torch.testing.assert_close(z[..., :24], theirs.encode(clip)[..., :24], rtol=1e-4, atol=1e-5)
    assert np.abs(back.astype(int) - theirs.decode(z))[:, :, :192].max() <= 1  # of 255: where the rounding falls


# Relative RMS error (encode, decode) of tiles of 6 places that share 4, on a clip of 4 x 8, and of chunks of 2 units
# that share 1, of a clip of 4 units: as measured, and 15 % more. With random weights nothing is small: every place sees
# the whole clip. What the numbers hold is that parts lie where they belong (misplaced by one place they are near 1.4)
# and what each class loses; those that go through a clip by themselves have no chunks.
TILES = {
    "Cosmos": (0.03, 0.06), "Wan 2.1": (0.17, 0.09), "Wan 2.2": (0.13, 0.19), "HunyuanVideo": (0.27, 0.73),
    "HunyuanVideo 1.5": (0.27, 0.19), "CogVideoX": (0.4, 0.13), "EasyAnimate": (0.53, 0.71), "LTX": (0.32, 0.24),
    "Mochi": (0.53, 0.39), "Qwen-Image": (0.17, 0.09), "KVAE": (0.75, 0.36), "Open-Sora": (0.29, 0.78),
}  # fmt: skip
CHUNKS = {
    "Cosmos": (0.012, 0.001), "HunyuanVideo": (0.6, 0.9), "HunyuanVideo 1.5": (0.72, 0.79),
    "EasyAnimate": (0.88, 0.03), "LTX": (0.82, 0.51), "Mochi": (0.82, 0.52),
}  # fmt: skip


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    module = build_vae(*ZOO[name][:2]).module.eval().requires_grad_(False)
    for own in ("use_framewise_encoding", "use_framewise_decoding"):
        if hasattr(module, own):
            setattr(module, own, False)
    return module


def error(module: torch.nn.Module, clip: np.ndarray, *tilings: TilingConfig) -> list[tuple[float, float]]:
    """(encode, decode) of each tiling, relative to the whole clip's."""
    whole = Vae(module, "", torch.float32, CPU)
    z = whole.encode(clip)
    x = whole.decode(z).astype(float)
    out = []
    for tiling in tilings:
        vae = Vae(module, "", torch.float32, CPU, tiling)
        a, b = vae.encode(clip), vae.decode(z)
        assert a.shape == z.shape and b.shape == x.shape
        rms = (np.square(b - x).mean() / x.var()) ** 0.5
        out.append((float((a - z).square().mean().sqrt() / z.std()), float(rms)))
    return out


@pytest.mark.parametrize("name", ZOO)
def test_every_class_in_tiles_comes_nearer_to_the_whole_clip_with_more_overlap(name: str) -> None:
    _, _, (_, h, _), unit = ZOO[name]
    tilings = (TilingConfig(tile_px=n * h, overlap_px=k * h) for n, k in ((4, 1), (6, 4)))
    few, many = error(built(name), smooth_clip(unit + 1, 4 * h, 8 * h), *tilings)
    assert many[0] < 0.8 * few[0] and many[1] < 0.8 * few[1]
    assert many[0] < TILES[name][0] and many[1] < TILES[name][1], many


@pytest.mark.parametrize("name", CHUNKS)
def test_every_class_in_chunks_is_as_near_to_the_whole_clip_as_is_said(name: str) -> None:
    _, _, (_, h, _), unit = ZOO[name]
    how = TilingConfig(chunk_frames=2 * unit + 1, overlap_frames=unit + 1)
    (found,) = error(built(name), smooth_clip(4 * unit + 1, 2 * h, 2 * h), how)
    assert found[0] < CHUNKS[name][0] and found[1] < CHUNKS[name][1], found


def test_a_class_that_goes_through_a_clip_by_itself_refuses_chunks_in_one_line() -> None:
    for name in sorted(ZOO.keys() - CHUNKS.keys()):
        with pytest.raises(ConfigError, match=r"^vae.tiling.chunk_frames: \w+ goes through .*expected null, found 17$"):
            Vae(built(name), "", torch.float32, CPU, TilingConfig(chunk_frames=17))


def test_on_trained_weights_tiles_and_chunks_hardly_show() -> None:
    """The toy VAE: latents within 7 %, frames at 40 dB of those decoded whole, which are at 28 dB of the clip."""
    clip = render(scene_of(990901, 1, sizes=[(64, 96)], frames=[33]))
    whole = load_vae(shipped_dir() / "vae/toy")
    parts = load_vae(
        shipped_dir() / "vae/toy",
        tiling=TilingConfig(tile_px=48, overlap_px=24, chunk_frames=17, overlap_frames=9),
    )
    z, cut = whole.encode(clip), parts.encode(clip)
    relative = float((cut - z).square().mean().sqrt() / z.std())
    x = whole.decode(z).astype(float)
    psnr = 10 * np.log10(255**2 / np.square(parts.decode(z) - x).mean())
    assert relative < 0.08 and psnr > 39, (relative, psnr)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (
            {"tile_px": 60, "overlap_px": 8},
            r"^vae\.tiling\.tile_px: AutoencoderKLCosmos has a stride of 8 px: .* found 60",
        ),
        ({"tile_px": 64, "overlap_px": 9}, r"^vae\.tiling\.overlap_px: .*expected a multiple, found 9"),
        (
            {"chunk_frames": 16, "overlap_frames": 5},
            r"^vae\.tiling\.chunk_frames: .* takes 4k\+1 frames, found 16; nearest below: 13",
        ),
        (
            {"chunk_frames": 17, "overlap_frames": 8},
            r"^vae\.tiling\.overlap_frames: .*expected 4k\+1, found 8; nearest below: 5",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_class_are_one_line_each(tiling: dict[str, int], message: str) -> None:
    module = build_vae("AutoencoderKLCosmos", COSMOS).module
    with pytest.raises(ConfigError, match=message) as caught:
        Vae(module, "", torch.float32, CPU, TilingConfig(**tiling))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"tile_px": 64, "overlap_px": 64}, r"^vae\.tiling\.overlap_px: expected less than tile_px = 64, not 64"),
        ({"chunk_frames": 9}, r"^vae\.tiling\.overlap_frames: expected less than chunk_frames = 9, not 9"),
        ({"tile": 64}, r"vae\.tiling\.tile: .*tile_px"),
    ],
)
def test_a_tiling_that_no_class_could_have_is_refused_by_the_config(override: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"run": "r", "vae": {"path": "vae", "tiling": override}})


def test_the_tiling_is_part_of_what_made_a_cache() -> None:
    def info(**vae: object) -> dict[str, object]:
        config = parse_config({"run": "r", "vae": {"path": "vae", **vae}, "text": {"path": "t5"}})
        model = SimpleNamespace(identity={"id": "x"}, channels=4, stride=(4, 8, 8), lengths=Lengths(4, 4))
        texts = SimpleNamespace(info=lambda: {"text": {"id": "x", "weights_sha256": "0"}})
        return encode.cache_info(config, model, texts, (1, 1, 1))  # type: ignore[arg-type]

    whole, tiled = info(), info(tiling={"tile_px": 256})
    assert whole["tiling"] is None
    assert tiled["tiling"] == {"tile_px": 256, "overlap_px": 64, "chunk_frames": None, "overlap_frames": 9}
    path = shipped_dir() / "cache.json"
    check_info(path, tiled, tiled)
    with pytest.raises(DataError, match=r"field `tiling`: expected null, found \{"):
        check_info(path, tiled, whole)
    with pytest.raises(DataError, match=r"field `tiling.tile_px`: expected 256, found null"):
        check_info(path, whole, tiled)
    with pytest.raises(DataError, match=r"field `tiling.tile_px`: expected 512, found 256"):
        check_info(path, tiled, info(tiling={"tile_px": 512}))


def test_statistics_far_from_those_of_the_published_models_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sorahpc")
    vae = Vae(build_vae("AutoencoderKLWan", {**WAN, "z_dim": 16}).module, "", torch.float32, CPU)
    assert vae.native is not None
    mean, std = (v[:, 0] for v in vae.native)
    encode._compare(vae, mean + 0.1 * std, 0.9 * std)
    encode._compare(vae, mean, 0.01 * std)
    encode._compare(vae, mean + 10, std)
    encode._compare(Vae(build_vae("AutoencoderKLCosmos", COSMOS).module, "", torch.float32, CPU), mean, std)
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "WARNING"]
    assert "mean 0.10 to 0.10 and std 0.90 to 0.90" in caplog.records[0].message
