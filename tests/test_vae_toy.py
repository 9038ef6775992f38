"""The toy VAE that is shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sorahpc.config import shipped_dir
from sorahpc.configfile import load_config
from sorahpc.data.decode import decode, plan_clip, probe
from sorahpc.data.manifest import Video
from sorahpc.data.mp4 import write_mp4
from sorahpc.data.toyworld import COLOURS, SIZES_PX, render, scene_of
from sorahpc.models.lengths import Lengths
from sorahpc.models.vae import load_vae


def _through_h264(frames: np.ndarray, fps: float, folder: Path) -> np.ndarray:
    """What a pipeline on files sees of a clip."""
    path = folder / "clip.mp4"
    write_mp4(path, frames, fps, crf=12)
    found = probe(path)
    video = Video("0" * 16, str(path), "", found.frames, found.fps, found.width, found.height, found.codec,
                  found.duration_s, path.stat().st_size, 0, "ok", "")  # fmt: skip
    clip = load_config("toy_vae").clip
    plan = plan_clip(video, clip, stride=(4, 8, 8), patch=(1, 2, 2), lengths=Lengths(4, 4))
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
