"""A step of an autoencoder's training: its terms, what it starts from, and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import COSMOS
from vae_trainings import WAN_TINY, all_terms, spec_of, write_lpips, write_wan

from sorahpc.configfile import load_config
from sorahpc.data.batches import Batches
from sorahpc.data.clips import ClipCache
from sorahpc.data.toyworld import render, scene_of
from sorahpc.errors import ConfigError, NumericsError
from sorahpc.models.vae import WEIGHTS, Vae, build_vae
from sorahpc.models.vae_start import start_vae
from sorahpc.models.vae_training import Coder, Trainer


class InMemory:
    """A ClipCache of what is there."""

    def __init__(self, frames: list[np.ndarray]) -> None:
        self.cache = ClipCache(lambda i: frames[i], 1 << 30, 1)

    def ask(self, i: int) -> Future[Any]:
        return self.cache.ask(i)


@pytest.fixture(autouse=True)
def alone() -> Any:
    """A world of one rank, for a Trainer that no job has made; jobs make their own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trainer_of(frames: list[np.ndarray], **train: object) -> tuple[Trainer, Vae]:
    from sorahpc.distributed.mesh import init_process_group

    device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(0, 1, device)
    spec = spec_of(**train)
    vae = start_vae(spec)
    shapes = {i: clip.shape[:3] for i, clip in enumerate(frames)}
    return Trainer(vae, Batches(InMemory(frames), shapes, vae, spec), spec, device), vae  # type: ignore[arg-type]


def test_training_lowers_the_error_on_whole_frames_and_on_crops() -> None:
    frames = [render(scene_of(2, i, frames=[9], sizes=[(64, 64)])) for i in range(4)]
    shipped = load_config("toy_vae").train_vae
    assert shipped is not None and shipped.arch is not None
    for name, arch, crop in (("AutoencoderKLCosmos", COSMOS, None), (shipped.class_name, shipped.arch, 32)):
        trainer, _ = trainer_of(frames, class_name=name, arch=arch, steps=30, crop_px=crop)
        assert trainer.batches.sizes == [(5, crop or 64, crop or 64)]
        errors = [trainer.train_step()["mse"] for _ in range(30)]
        assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:5]), (name, errors)


def test_a_loss_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    trainer, vae = trainer_of([render(scene_of(2, 0, frames=[9], sizes=[(64, 64)]))])
    with torch.no_grad():
        next(vae.module.decoder.parameters()).fill_(float("nan"))
    before = {k: v.clone() for k, v in vae.module.state_dict().items()}
    with pytest.raises(NumericsError, match=r"train_vae: loss nan at step 0; lower train_vae.lr \(now 0.03\)"):
        trainer.train_step()
    assert trainer.step == 0
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in vae.module.state_dict().items())


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    trainer, vae = trainer_of([render(scene_of(2, 0, frames=[9], sizes=[(64, 64)]))])
    before = {k: v.clone() for k, v in vae.module.state_dict().items()}
    next(vae.module.decoder.parameters()).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NumericsError, match=r"train_vae: gradient norm (inf|nan) at step 0; lower train_vae.lr"):
        trainer.train_step()
    assert trainer.step == 0 and all(torch.equal(v, before[k]) for k, v in vae.module.state_dict().items())


def test_the_kl_is_that_of_the_posterior_to_a_unit_normal_mean_per_value() -> None:
    torch.manual_seed(0)
    vae = build_vae(*WAN_TINY.values())  # type: ignore[arg-type]
    x, noise = torch.rand(2, 3, 5, 32, 32) * 2 - 1, torch.randn(2, 4, 2, 4, 4)
    with torch.no_grad():
        posterior = vae.module.encode(x).latent_dist
        unit = torch.distributions.Normal(0.0, 1.0)
        for sigma, std in ((None, posterior.std), (0.3, torch.full_like(posterior.mean, 0.3))):
            y, kl = Coder(vae, sigma)(x, noise)
            expected = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, std), unit)
            torch.testing.assert_close(kl, expected.mean())
            torch.testing.assert_close(y, vae.module.decode(posterior.mean + std * noise).sample)


def test_the_adversarial_term_pulls_at_the_last_layer_as_strongly_as_the_reconstruction() -> None:
    """Equation 7 of VQGAN, from gradients of each term by itself."""
    frames = [render(scene_of(2, i, frames=[9], sizes=[(64, 64)])) for i in range(2)]
    adversarial = {"start_step": 0, "channels": 8, "layers": 2, "weight": 1.0}
    trainer, vae = trainer_of(frames, **WAN_TINY, adversarial=adversarial)
    assert trainer.last_weight is vae.module.decoder.conv_out.weight and trainer.judge is not None
    x = trainer._pixels(trainer.batches.next(0))
    y, _ = trainer.coder(x, trainer._noise(x))
    likeness, fooled = (y - x).square().mean(), -trainer.judge.module(y).mean()
    weight = trainer._balance(likeness, fooled)
    pulls = [
        torch.autograd.grad(term, vae.module.decoder.conv_out.weight, retain_graph=True)[0].norm()
        for term in (likeness, weight.detach() * fooled)
    ]
    assert float(pulls[0]) == pytest.approx(float(pulls[1]), rel=1e-3)
    found = trainer.train_step()
    assert found["loss"] == pytest.approx(
        found["mse"] + 1e-4 * found["kl"] + found["balance"] * found["adversarial"], rel=1e-4
    )
    assert 0.5 < found["discriminator"] < 1.5  # it knows nothing yet: 1


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "published")


def test_what_was_trained_with_a_fixed_variance_goes_on_with_it_and_what_is_published_with_its_own(
    published: Path,
) -> None:
    frames = [render(scene_of(2, 0, frames=[9], sizes=[(64, 64)]))]
    assert trainer_of(frames, init=str(published))[0].learned is True
    (published / "train_vae.json").write_text(json.dumps({"posterior": "fixed"}))  # nothing has taught it its own
    assert trainer_of(frames, init=str(published))[0].learned is False
    assert trainer_of(frames, init=str(published / WEIGHTS))[0].learned is False
    assert trainer_of(frames, init=str(published), posterior="learned")[0].learned is True


def test_what_does_not_fit_init_is_one_line(published: Path, tmp_path: Path) -> None:
    start_vae(spec_of(init=str(published), class_name="AutoencoderKLWan", arch={"z_dim": 4, "dim_mult": [1, 1, 1, 1]}))
    for train, message in (
        (
            {"class_name": "AutoencoderKLCosmos"},
            r"train_vae.class_name: .*holds AutoencoderKLWan, found Auto",
        ),
        ({"arch": {"z_dim": 8}}, r"train_vae.arch.z_dim: .* has 4, found 8; leave class_name and arch out"),
        ({"arch": {"zdim": 4}}, r"train_vae.arch.zdim: .* has null, found 4"),
        ({"init": str(tmp_path / "nowhere")}, r"train_vae.init: no folder .*nowhere"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}") as caught:
            start_vae(spec_of(**{"init": str(published), **train}))
        assert "\n" not in str(caught.value)
    frames = [render(scene_of(2, 0, frames=[9], sizes=[(64, 64)]))]
    with pytest.raises(ConfigError, match=r"^train_vae.posterior: AutoencoderKLCosmos gives no variance, so fixed"):
        trainer_of(frames, posterior="learned")


def test_terms_that_the_frames_are_too_small_for_are_refused_in_one_line(tmp_path: Path) -> None:
    write_lpips(tmp_path)
    frames = [render(scene_of(2, 0, frames=[9], sizes=[(64, 64)]))]
    with pytest.raises(ConfigError, match=r"^train_vae.perceptual: frames of 16 px or more expected, .* have 8"):
        trainer_of(frames, **{**all_terms(tmp_path), "crop_px": 8})
    with pytest.raises(ConfigError, match=r"^train_vae.adversarial.layers: 4 need frames of 48 px or more, .* have 32"):
        trainer_of(frames, crop_px=32, adversarial={"layers": 4})


def test_ranks_that_do_not_divide_the_batch_and_a_training_from_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_vae.batch_clips: .*multiple of the number of ranks 3"):
        spec_of(batch_clips=4, resources={"tasks_per_node": 3})
    for missing in ("class_name", "arch"):
        with pytest.raises(ConfigError, match=rf"train_vae.{missing}: .*or `init` to start from"):
            spec_of(**{missing: None})
