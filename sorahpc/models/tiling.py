"""A clip in parts that overlap: chunks in time, tiles in space, blended where they meet.

An autoencoder's memory grows with frames x height x width; cut into parts, it grows with a part. What it costs: each
part is seen without what lies beyond it, so values near a cut differ from those of the whole clip, and overlaps are
computed twice. One implementation for every class, since those of the classes differ, and some do nothing.

All cuts are counted in latent places. In time the first place of a clip covers 1 frame and every other one a stride of
frames, so a chunk's own first place knows one frame where the whole clip's knows several: it has weight 0 wherever
another chunk covers it. All parts of an axis have the same size, the last one being moved back to end with the clip:
a remainder of a few pixels would be seen without any context.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cut:
    """One axis of `size` places, cut into parts of `length` places that begin at `starts`."""

    size: int
    length: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, size: int, length: int | None, overlap: int) -> Cut:
        """The fewest parts of at most `length` places (None: no cut) of which two neighbours share at least `overlap`.

        Raises:
            ValueError: overlap isn't in 0 .. length - 1.
        """
        if length is None or length >= size:
            return cls(size, size, (0,))
        if not 0 <= overlap < length:
            raise ValueError(f"overlap: 0 to {length - 1}, not {overlap}")
        return cls(size, length, (*range(0, size - length, length - overlap), size - length))

    def pixels(self, stride: int) -> Cut:
        """The same axis in pixels: a place covers `stride` of them."""
        return Cut(self.size * stride, self.length * stride, tuple(s * stride for s in self.starts))

    def frames(self, stride: int) -> Cut:
        """The same axis in frames: the first place of a clip, and of a part, covers 1, the others `stride`."""
        return Cut((self.size - 1) * stride + 1, (self.length - 1) * stride + 1, tuple(s * stride for s in self.starts))

    def weights(self) -> torch.Tensor:
        """Float32 [parts, length]: the share of each part in each of its places, rising from 0 over an overlap.

        Over the parts that cover a place they sum to 1.
        """
        at = torch.arange(self.length, dtype=torch.float64)
        total = torch.zeros(self.size, dtype=torch.float64)
        rows = []
        for k, start in enumerate(self.starts):
            row = torch.ones(self.length, dtype=torch.float64)
            if k and (shared := self.starts[k - 1] + self.length - start):
                row *= (at / shared).clamp(max=1)
            if k + 1 < len(self.starts) and (shared := start + self.length - self.starts[k + 1]):
                row *= 1 - ((at - (self.length - shared)) / shared).clamp(min=0)
            total[start : start + self.length] += row
            rows.append(row)
        return torch.stack([row / total[s : s + self.length] for s, row in zip(self.starts, rows, strict=True)]).float()


def in_parts(
    x: torch.Tensor, cuts: tuple[Cut, Cut, Cut], out: tuple[Cut, Cut, Cut], f: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """f of each part, blended.

    Args:
        x: [C,T,H,W], cut as `cuts` says; their sizes are its T, H, W.
        out: the cuts of the result; as many parts an axis.
        f: [C,t,h,w] -> [C',t',h',w'], with the lengths of `cuts` and of `out`.

    Returns:
        Float32 [C',T',H',W'] on f's device; f(x) itself where nothing is cut.

    Raises:
        ValueError: f's result isn't of that size.
    """
    if all(len(cut.starts) == 1 for cut in cuts):
        return f(x).float()
    whole: torch.Tensor | None = None
    weights = [cut.weights() for cut in out]
    for place in itertools.product(*(range(len(cut.starts)) for cut in cuts)):
        at = [slice(c.starts[k], c.starts[k] + c.length) for c, k in zip(cuts, place, strict=True)]
        to = [slice(c.starts[k], c.starts[k] + c.length) for c, k in zip(out, place, strict=True)]
        part = f(x[:, at[0], at[1], at[2]]).float()
        if list(part.shape[1:]) != [c.length for c in out]:
            raise ValueError(f"a part of {[c.length for c in out]} expected, found {list(part.shape[1:])}")
        if whole is None:
            whole = part.new_zeros((part.shape[0], *(c.size for c in out)))
            weights = [w.to(part.device) for w in weights]  # once: each time a GPU would be waited for
        t, h, w = (weights[axis][k] for axis, k in enumerate(place))
        whole[:, to[0], to[1], to[2]] += part * t[:, None, None] * h[:, None] * w
    assert whole is not None
    return whole
