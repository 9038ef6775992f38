"""A caption's embeddings, by name, as the encoders give them, a cache keeps them and the model takes them.

    text          [L, dim]    T5's of the caption's tokens, by cross-attention
    clip_text     [Lc, dim]   CLIP's of its tokens, beside them
    clip_pooled   [1, dim]    CLIP's of the whole caption, added to the timestep's

A sample may have a second, detailed caption, whose embeddings in a cache have the same names after `detailed_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TEXTS = ("text", "clip_text", "clip_pooled")
DETAILED = "detailed_"
Texts = Mapping[str, Tensor]


class PackTexts(NamedTuple):
    """Those of a pack's samples, one after the other: the last arguments of `DiT.forward`."""

    text: Tensor  # [sum of text_lens, dim]
    text_lens: list[int]  # at least one each
    clip_text: Tensor | None = None  # [sum of clip_lens, dim]; None without CLIP, like the two below
    clip_lens: list[int] | None = None
    clip_pooled: Tensor | None = None  # [S, dim]


def join_texts(texts: Sequence[Texts]) -> PackTexts:
    """The embeddings of S captions, which all have the same names, as a pack's."""
    text = [each["text"] for each in texts]
    if "clip_text" not in texts[0]:
        return PackTexts(torch.cat(text), [len(e) for e in text])
    clip = [each["clip_text"] for each in texts]
    pooled = torch.cat([each["clip_pooled"] for each in texts])
    return PackTexts(torch.cat(text), [len(e) for e in text], torch.cat(clip), [len(e) for e in clip], pooled)
