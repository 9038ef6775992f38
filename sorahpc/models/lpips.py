"""LPIPS: how different two pictures look, by the features of a classifier.

Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a perceptual metric", 2018,
equation 1, version 0.1 on VGG16: features after the last ReLU of each of five blocks, of unit length over channels;
squared differences weighted by a linear head, mean over places, sum over blocks.

Weights come in two files, both safetensors: VGG16 as trained on ImageNet, in torchvision's names (`features.0.weight`
...; the classifier is not read), and the heads in the names of the authors' vgg.pth (`lin0.model.1.weight` [1,64,1,1]
...), a pickle of 7 kB that has to be rewritten once:

    python -c "import torch, safetensors.torch as s; s.save_file(torch.load('vgg.pth', weights_only=True), 'heads.safetensors')"
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F

from sorahpc.errors import ConfigError
from sorahpc.store import resolve

# torchvision's places of the convolutions in `features`, a block a line; between blocks a maximum of 2 x 2.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's statistics, for pixels in [-1, 1]
MIN_SIDE_PX = 16  # four halvings


class Lpips(nn.Module):
    """Frozen; gradients go to the pictures only."""

    def __init__(self) -> None:
        super().__init__()
        before = [3, *WIDTHS]
        self.features = nn.ModuleDict(
            {
                str(place): nn.Conv2d(before[k] if j == 0 else WIDTHS[k], WIDTHS[k], 3, padding=1)
                for k, places in enumerate(BLOCKS)
                for j, place in enumerate(places)
            }
        )
        self.heads = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distances [N] of pictures [N,3,H,W] in [-1, 1], sides of at least 16 px."""
        both = (torch.cat([x, y]) - self.shift) / self.scale  # type: ignore[operator]
        total = torch.zeros(len(x), device=x.device)
        for k, (places, head) in enumerate(zip(BLOCKS, self.heads, strict=True)):
            both = F.max_pool2d(both, 2) if k else both
            for place in places:
                both = F.relu(self.features[str(place)](both))
            # vector_norm has gradient 0 where no feature answers, and the root of a sum of squares has none.
            unit = both / (torch.linalg.vector_norm(both, dim=1, keepdim=True) + 1e-10)
            a, b = unit.chunk(2)
            total = total + ((a - b).square() * head).sum(dim=1).mean(dim=(1, 2))
        return total


def load_lpips(vgg: Path, heads: Path, where: str = "train_vae.perceptual") -> Lpips:
    """Read the two files.

    Args:
        vgg: a safetensors file, a folder with model.safetensors, or a fetched name. heads: a safetensors file.

    Raises:
        ConfigError: naming `where`.vgg or `where`.heads: no such file, not safetensors, or other tensors. SetupError: a
        name that isn't in the store.
    """
    vgg = resolve(vgg, "vgg", f"{where}.vgg")
    module = Lpips()
    wanted = {f"features.{name}": t for name, t in module.features.state_dict().items()}
    own = {f"lin{k}.model.1.weight": head for k, head in enumerate(module.heads)}
    file = vgg / "model.safetensors" if vgg.is_dir() else vgg
    for path, tensors, key in ((file, wanted, f"{where}.vgg"), (heads, own, f"{where}.heads")):
        for name, value in _read(path, list(tensors), key).items():
            if value.shape != tensors[name].shape:
                raise ConfigError(
                    f"{key}: {path}: {name}: {list(tensors[name].shape)} expected, found {list(value.shape)}"
                )
            tensors[name].copy_(value)
    return module.eval()


def _read(path: Path, names: list[str], where: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ConfigError(f"{where}: no file {path}; expected safetensors")
    try:
        with safe_open(str(path), "pt") as f:
            missing = sorted(set(names) - set(f.keys()))
            if missing:
                raise ConfigError(f"{where}: {path}: {len(missing)} tensors are missing, such as {missing[0]}")
            return {name: f.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{where}: {path} can't be read as safetensors: {str(error).splitlines()[0]}") from None
