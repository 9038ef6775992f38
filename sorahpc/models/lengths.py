"""Which clip lengths an autoencoder takes, and how many latent frames they make."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Lengths in frames, and their latent frames: one to one.

    Attributes:
        stride: frames of a latent frame; the first latent frame covers one.
        unit: a clip has unit x k + 1 frames; a multiple of the stride.
        restart: frames after which the autoencoder begins anew, as if a clip began there, itself such a length; None:
            never. A clip is then any number of such pieces, or such pieces and a shorter clip.

    Raises:
        ValueError: restart is no such length.
    """

    stride: int
    unit: int
    restart: int | None = None

    def __post_init__(self) -> None:
        if self.restart is not None and (self.restart < 1 or (self.restart - 1) % self.unit):
            raise ValueError(f"restart: {self.unit}k+1 frames, not {self.restart}")

    def __str__(self) -> str:
        """As `4k+1`, or `17j or 17j + 4k+1 (under 17j+17)`."""
        last, whole = f"{self.unit}k+1", f"{self.restart}j"
        return last if self.restart is None else f"{whole} or {whole} + {last} (under {whole}+{self.restart})"

    def floor(self, frames: int) -> int:
        """The longest length of at most `frames` (>= 1)."""
        whole, rest = divmod(max(frames, 1), self.restart) if self.restart else (0, max(frames, 1))
        return whole * (self.restart or 0) + ((rest - 1) // self.unit * self.unit + 1 if rest else 0)

    def latent(self, frames: int) -> int:
        """Latent frames of a clip of such a length."""
        whole, rest = divmod(frames, self.restart) if self.restart else (0, frames)
        return whole * (((self.restart or 1) - 1) // self.stride + 1) + (rest - 1) // self.stride + 1

    def clip(self, latent: int) -> int:
        """Frames of the clip that `latent` (>= 1) latent frames decode to."""
        piece = ((self.restart - 1) // self.stride + 1) if self.restart else None
        whole, rest = divmod(latent, piece) if piece else (0, latent)
        return whole * (self.restart or 0) + ((rest - 1) * self.stride + 1 if rest else 0)
