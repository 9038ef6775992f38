"""The critic of an autoencoder's adversarial term."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., "Image-to-image translation with conditional adversarial networks", 2017) over time too.

    `layers` convolutions halve height and width, two more keep them; all see one frame to each side, and none skips
    frames, so that any length goes. Group norms in the place of batch norms: a clip's verdict does not depend on what
    else is in the batch, hence not on how a batch is split over ranks.

    Args:
        channels: of the first layer; they double up to eight-fold. A multiple of 8.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        body: list[nn.Module] = [self._conv(3, widths[0], halve=True), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(itertools.pairwise(widths), 1):
            norm = nn.GroupNorm(8, width)
            body += [self._conv(before, width, halve=i < layers, bias=False), norm, nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, self._conv(widths[-1], 1, halve=False))
        for module in self.body:
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    @staticmethod
    def _conv(channels: int, out: int, halve: bool, bias: bool = True) -> nn.Conv3d:
        stride = 2 if halve else 1
        return nn.Conv3d(channels, out, (3, 4, 4), (1, stride, stride), padding=1, bias=bias)

    @staticmethod
    def min_side_px(layers: int) -> int:
        """Smallest height and width that leave a patch."""
        return 3 * int(2**layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels [B,3,T,H,W] in [-1, 1] -> logits [B,1,T,h,w], high where a patch seems real."""
        y: torch.Tensor = self.body(x)
        return y


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's, from its logits (Lim and Ye, "Geometric GAN", 2017): 0.5 (E max(0, 1 - real) + E max(0, 1 +
    fake)). The generator's is -E fake."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balance(reconstruction: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """Weight of the adversarial term by which it pulls as strongly as the reconstruction's.

    Esser, Rombach, Ommer, "Taming transformers for high-resolution image synthesis", 2021, equation 7: the ratio of
    the norms of both terms' gradients at the decoder's last layer, at most 10,000 as in the authors' code.

    Args:
        reconstruction, adversarial: gradients at that layer, of the whole batch.
    """
    return (reconstruction.norm() / (adversarial.norm() + 1e-6)).clamp(max=1e4)
