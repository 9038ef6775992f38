"""Which samples make a step: a pure function of (seed, samples consumed), the same for any number of ranks.

A global batch is `packs_per_step` packs, each whole samples of any grid within a token budget, with no padding. The
stream of samples is one permutation of the cache an epoch. A batch takes from the stream what fits, and lays it into
packs of even cost. A rank of dp then computes its share of the packs one after the other, so the batch, and the
gradient up to summation order, do not depend on how many ranks there are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from sorahpc.errors import DataError


@dataclass(frozen=True)
class GlobalBatch:
    """`packs[p]` lists (sample index, visit); `consumed` is the position in the stream after this batch."""

    packs: list[list[tuple[int, int]]]
    consumed: int


class Packer:
    """Cuts the endless stream of samples into global batches.

    Args:
        tokens: int64 [N], tokens a sample.
        order: int64 [N], any key a sample; a pack's samples are sorted by it, so that equal shapes lie together.
        seed: of the permutations.
        packs_per_step, tokens_per_pack: size of a global batch.
        dim: model dim M, for the cost of a sample: L (6 M + L), linear layers plus quadratic attention.

    Raises:
        DataError: no samples, or one that no pack can hold.
    """

    def __init__(
        self, tokens: np.ndarray, order: np.ndarray, *, seed: int, packs_per_step: int, tokens_per_pack: int, dim: int
    ) -> None:
        if not len(tokens):
            raise DataError("the cache has no samples to train on")
        worst = int(np.argmax(tokens))
        if tokens[worst] > tokens_per_pack:
            raise DataError(
                f"train.tokens_per_pack: {tokens_per_pack}, but sample {worst} of the cache has {tokens[worst]} tokens;"
                f" raise it to at least that, or encode with clip.max_tokens of at most that"
            )
        self.tokens, self.order, self.seed = tokens, order, seed
        self.packs_per_step, self.tokens_per_pack = packs_per_step, tokens_per_pack
        self.cost = tokens.astype(np.float64) * (6.0 * dim + tokens)
        self._permutations: dict[int, np.ndarray] = {}

    def next(self, consumed: int) -> GlobalBatch:
        """The batch that starts at stream position `consumed`."""
        budget = self.packs_per_step * self.tokens_per_pack
        taken: list[tuple[int, int]] = []
        total = 0
        while True:
            sample, visit = self._at(consumed + len(taken))
            total += int(self.tokens[sample])
            if total > budget:
                break
            taken.append((sample, visit))
        while True:  # whole samples rarely fill every pack to the brim: hand back what found no place, and lay again
            packs, unplaced = self._lay(taken)
            if not unplaced:
                return GlobalBatch(packs, consumed + len(taken))
            taken = taken[:-unplaced]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, i = divmod(position, len(self.tokens))
        if epoch not in self._permutations:
            rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)))
            # a batch reaches into the next epoch, seldom further
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = rng.permutation(len(self.tokens))
        return int(self._permutations[epoch][i]), epoch

    def _lay(self, taken: list[tuple[int, int]]) -> tuple[list[list[tuple[int, int]]], int]:
        """Longest processing time first: the costliest sample to the cheapest pack with room. Also counts misfits."""
        packs: list[list[tuple[int, int]]] = [[] for _ in range(self.packs_per_step)]
        room = [self.tokens_per_pack] * self.packs_per_step
        heap = [(0.0, p) for p in range(self.packs_per_step)]
        unplaced = 0
        for sample, visit in sorted(taken, key=lambda s: (-self.cost[s[0]], s)):
            full = []
            while heap and room[heap[0][1]] < self.tokens[sample]:
                full.append(heapq.heappop(heap))
            if heap:
                cost, p = heapq.heappop(heap)
                packs[p].append((sample, visit))
                room[p] -= int(self.tokens[sample])
                heapq.heappush(heap, (cost + self.cost[sample], p))
            else:
                unplaced += 1
            for entry in full:
                heapq.heappush(heap, entry)
        return [sorted(pack, key=lambda s: (int(self.order[s[0]]), s)) for pack in packs], unplaced
