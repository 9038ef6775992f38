"""Muon for a model whose matrices are whole on every rank."""

from __future__ import annotations

import torch

from sorahpc.distributed.muon import orthogonalize


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, so that all directions learn equally fast.

    For parameters of two and more axes, read as [first axis, all others]. That of the DiT, whose matrices are cut over
    ranks, is sorahpc.distributed.muon.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]).reshape(1, len(p), -1))[0]
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.sub_(update.reshape(p.shape), alpha=group["lr"] * scale)
