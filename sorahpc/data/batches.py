"""The batches of an autoencoder's training: windows and crops of clips, as uint8.

Windows and crops are put around moving pixels mostly (`focus`): a still background soon has nothing left to teach.
Where colours are in small objects on grey, an autoencoder learns brightness first and stays blind to colour for
hundreds of steps. A share of the clips, falling to none at the end, therefore has its channels permuted and inverted at
random (`recolour`), so that large areas have colour too.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future

import numpy as np

from sorahpc.config import TrainVaeConfig
from sorahpc.data.clips import Clip, ClipCache
from sorahpc.errors import ConfigError, DataError
from sorahpc.models.vae import Vae

log = logging.getLogger(__name__)

STEPS_AHEAD = 3  # whose clips are being decoded while a step computes


class Batches:
    """This rank's share of each step's batch.

    A bucket of clips of one size by its share of all clips, then clips, then what is cut out of each: drawn from
    streams that (seed, step) and (seed, step, place in the batch) name. So no draw depends on another clip's pixels,
    and a rank decodes its own clips only. A clip that can't be decoded has the next of its bucket in its place.

    Attributes:
        sizes: (T,H,W) of what is cut out of the clips of each bucket. mine: this rank's places in the batch.
    """

    def __init__(
        self,
        clips: ClipCache,
        shapes: dict[int, tuple[int, int, int]],
        vae: Vae,
        spec: TrainVaeConfig,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            shapes: (T,H,W) of the clips to train on, by their number in `clips`: as the class takes them.

        Raises:
            ConfigError: a crop that is too small for the class.
        """
        if spec.crop_px is not None and spec.crop_px < vae.stride[1]:
            raise ConfigError(
                f"train_vae.crop_px: {vae.stride[1]} or more expected, the stride of {vae.id}, found {spec.crop_px}"
            )
        self.clips, self.spec = clips, spec
        share = spec.batch_clips // world_size
        self.mine = range(rank * share, (rank + 1) * share)
        window = vae.floor_frames(spec.window_frames) if spec.window_frames else None
        crop = spec.crop_px // vae.stride[1] * vae.stride[1] if spec.crop_px else None
        buckets: dict[tuple[int, int, int], list[int]] = {}
        for i, (frames, height, width) in shapes.items():
            size = (min(window or frames, frames), min(crop or height, height), min(crop or width, width))
            buckets.setdefault(size, []).append(i)
        self.sizes = sorted(buckets)
        self.buckets = [buckets[size] for size in self.sizes]
        self.broken: set[int] = set()
        self._ahead: dict[int, list[Future[Clip]]] = {}

    def next(self, step: int) -> np.ndarray:
        """uint8 [B,T,H,W,3] of this rank's places.

        Raises:
            DataError: no clip of the bucket can be decoded.
        """
        for later in range(step, min(step + 1 + STEPS_AHEAD, self.spec.steps)):
            if later not in self._ahead:
                _, chosen = self._draw(later)
                self._ahead[later] = [self.clips.ask(i) for i in chosen]  # held, whatever the cache forgets
        bucket, chosen = self._draw(step)
        out = []
        for place, i, future in zip(self.mine, chosen, self._ahead.pop(step), strict=True):
            rng = np.random.default_rng([self.spec.seed, step, place])
            out.append(self._cut(self._usable(bucket, i, future), self.sizes[bucket], rng, step))
        return np.stack(out)

    def _draw(self, step: int) -> tuple[int, list[int]]:
        """(bucket, number of the clip at each of this rank's places)."""
        rng = np.random.default_rng([self.spec.seed, step])
        counts = np.array([len(b) for b in self.buckets], dtype=float)
        k = int(rng.choice(len(counts), p=counts / counts.sum()))
        drawn = rng.integers(len(self.buckets[k]), size=self.spec.batch_clips)
        return k, [self.buckets[k][i] for i in drawn[self.mine.start : self.mine.stop]]

    def _usable(self, k: int, i: int, future: Future[Clip]) -> Clip:
        """The clip i of bucket k, or the next one that can be decoded."""
        try:
            return future.result()
        except DataError as error:
            self._leave_out(i, error)
        bucket = self.buckets[k]
        first = bucket.index(i)
        for number in (bucket[place % len(bucket)] for place in range(first + 1, first + len(bucket))):
            try:
                return self.clips.ask(number).result()
            except DataError as error:
                self._leave_out(number, error)
        size = "x".join(map(str, self.sizes[k]))
        raise DataError(f"train_vae: none of the {len(bucket)} clips of {size} can be decoded; the log says why")

    def _leave_out(self, number: int, error: DataError) -> None:
        if number not in self.broken:
            log.warning("left out: %s", error)
            self.broken.add(number)

    def _cut(self, clip: Clip, size: tuple[int, int, int], rng: np.random.Generator, step: int) -> np.ndarray:
        low, high = np.zeros(3, np.int64), np.subtract(clip.pixels.shape[:3], size)
        if len(clip.moving) and rng.random() < self.spec.focus:
            pixel = clip.moving[rng.integers(len(clip.moving))]
            low, high = np.maximum(low, pixel - size + 1), np.minimum(high, pixel)
        at = rng.integers(low, high + 1)
        t, y, x = (slice(a, a + m) for a, m in zip(at, size, strict=True))
        pixels = clip.pixels[t, y, x]
        pixels = pixels[:, :, ::-1] if rng.random() < 0.5 else pixels
        if rng.random() < self.spec.recolour * (1 - step / self.spec.steps):
            pixels = pixels[..., rng.permutation(3)] ^ (255 * rng.integers(2, size=3)).astype(np.uint8)
        return pixels
