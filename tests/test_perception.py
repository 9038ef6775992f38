"""The terms of an autoencoder's loss that look: LPIPS against its formula written out, and the discriminator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sorahpc.errors import ConfigError, SetupError
from sorahpc.models.discriminator import PatchDiscriminator, balance, hinge_loss
from sorahpc.models.lpips import Lpips, load_lpips

# torchvision's configuration D: widths of convolutions, M a maximum of 2 x 2; a convolution is followed by a ReLU.
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def torchvisions_features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Sequential, list[torch.Tensor], Path]:
    """VGG16 with random weights that keep the scale of what goes through, random heads, and the folder of both."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    vgg = torchvisions_features()
    for layer in vgg:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, 0, 0.1)
    state = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    save_file({**state, "classifier.6.bias": torch.zeros(1000)}, folder / "model.safetensors")
    heads = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    save_file({f"lin{k}.model.1.weight": head for k, head in enumerate(heads)}, folder / "heads.safetensors")
    return vgg, heads, folder


def test_lpips_is_the_papers_formula_on_vgg16s_features(
    files: tuple[nn.Sequential, list[torch.Tensor], Path],
) -> None:
    vgg, heads, folder = files
    module = load_lpips(folder, folder / "heads.safetensors")
    x, y = torch.rand(2, 3, 32, 48) * 2 - 1, torch.rand(2, 3, 32, 48) * 2 - 1
    found = module(x, y)
    expected = np.zeros(2)
    with torch.no_grad():
        features = []
        for picture in (x, y):
            # To [0, 1] and ImageNet's mean and std: what the network was trained on, and nearly what LPIPS's own
            # shift and scale do; those are used to the digits that the authors gave.
            shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
            h, kept = (picture - shift.view(3, 1, 1)) / scale.view(3, 1, 1), []
            for i, layer in enumerate(vgg):
                h = layer(h)
                if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                    kept.append(h.double().numpy())
            features.append(kept)
    for a, b, head in zip(*features, heads, strict=True):
        a, b = (v / (np.sqrt((v**2).sum(1, keepdims=True)) + 1e-10) for v in (a, b))
        expected += ((a - b) ** 2 * head.double().numpy()).sum(1).mean((1, 2))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert not any(p.requires_grad for p in module.parameters())


def test_lpips_is_0_for_equal_pictures_and_its_gradient_is_finite_where_no_feature_answers(
    files: tuple[nn.Sequential, list[torch.Tensor], Path],
) -> None:
    _, _, folder = files
    module = load_lpips(folder, folder / "heads.safetensors")
    x = torch.rand(1, 3, 16, 16)
    assert float(module(x, x)) == 0
    with torch.no_grad():
        for name, value in module.features.named_parameters():
            if name.endswith("bias"):
                value.fill_(-1e3)  # every ReLU is silent
    x.requires_grad_(True)
    module(x, torch.zeros_like(x)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_files_that_are_not_those_of_lpips_are_one_line_with_their_key(
    files: tuple[nn.Sequential, list[torch.Tensor], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, heads, folder = files
    good = folder / "heads.safetensors"
    save_file({"lin0.model.1.weight": heads[0]}, tmp_path / "few")
    save_file({f"lin{k}.model.1.weight": torch.zeros(3) for k in range(5)}, tmp_path / "small")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pickle.pth")
    for vgg, own, message in (
        (tmp_path, good, r"train_vae.perceptual.vgg: no file \S+/model.safetensors"),
        (good, good, r"train_vae.perceptual.vgg: \S+: 26 tensors are missing, such as features.0.bias"),
        (folder, tmp_path / "few", r"train_vae.perceptual.heads: \S+few: 4 tensors are missing, such as lin1"),
        (folder, tmp_path / "small", r"train_vae.perceptual.heads: \S+: lin0.model.1.weight: \[1, 64, 1, 1\] expected"),
        (folder, tmp_path / "pickle.pth", r"train_vae.perceptual.heads: \S+ can't be read as safetensors"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}") as caught:
            load_lpips(vgg, own)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("SORAHPC_STORE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match=r"^train_vae.perceptual.vgg: vgg16 is not in the store"):
        load_lpips(Path("vgg16"), good)
    assert len(Lpips().features) == 13


def test_a_discriminator_judges_patches_of_each_clip_by_itself() -> None:
    torch.manual_seed(0)
    module = PatchDiscriminator(channels=8, layers=2)
    clips = torch.rand(3, 3, 5, 32, 48) * 2 - 1
    logits = module(clips)
    assert logits.shape == (3, 1, 5, 6, 10)
    torch.testing.assert_close(module(clips[1:2]), logits[1:2])
    assert module(clips[:, :, :1]).shape == (3, 1, 1, 6, 10)  # a picture too
    for layers in (1, 2, 3, 4):
        side = PatchDiscriminator.min_side_px(layers)
        judge = PatchDiscriminator(8, layers)
        assert judge(torch.zeros(1, 3, 1, side, side)).shape[-2:] == (1, 1)
        with pytest.raises(RuntimeError):
            judge(torch.zeros(1, 3, 1, side // 2, side // 2))


def test_the_hinge_loss_asks_for_a_margin_of_1_and_no_more() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2))
    assert float(balance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5]))) == pytest.approx(10, rel=1e-4)
    assert float(balance(torch.tensor([3.0, 4.0]), torch.zeros(2))) == 1e4
