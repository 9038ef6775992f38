"""Exponential moving average of the weights, in float32, split over dp like the optimizer's master weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sorahpc.distributed import megatron
from sorahpc.distributed.mesh import Mesh


class Ema:
    """Holds, for each parameter, the average of the slice whose master weight lives on this rank.

    The update is local; only saving gathers whole parameters, one at a time over dp.
    """

    def __init__(self, model: nn.Module, optimizer: Any, mesh: Mesh, decay: float) -> None:
        self.mesh, self.decay = mesh, decay
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.mains = {
            self.names[parameter]: (main, start, end) for parameter, main, start, end in megatron.main_shards(optimizer)
        }
        self.slices = {name: main.detach().clone() for name, (main, _, _) in self.mains.items()}

    @torch.no_grad()
    def update(self) -> None:
        """average += (1 - decay) (weight - average), after each optimizer step."""
        averages = list(self.slices.values())
        torch._foreach_lerp_(averages, [self.mains[name][0] for name in self.slices], 1.0 - self.decay)

    def gather(self) -> dict[str, Tensor]:
        """Name -> whole float32 average of this tp rank's part of each parameter. Collective over dp.

        On the CPU, where they are written from: a GPU that has just room for a step has none for a second model.
        """
        out = {}
        for parameter, name in self.names.items():
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if name in self.mains:
                _, start, end = self.mains[name]
                whole[start:end] = self.slices[name]
            dist.all_reduce(whole, group=self.mesh.dp_group)
            out[name] = whole.view(parameter.shape).cpu()
        return out

    @torch.no_grad()
    def load(self, whole: dict[str, Tensor]) -> None:
        """Take this rank's slices of what `gather` gave."""
        for name, (_, start, end) in self.mains.items():
            self.slices[name].copy_(whole[name].flatten()[start:end])
