"""Whether pictures of ShapesWorld show what their captions name."""

import re
from collections.abc import Sequence

import numpy as np

from d2f_jax.data.shapes import COLOURS, SHAPES
from d2f_jax.metrics.classifier import PAIRS


def caption_pairs(text: str) -> list[tuple[str, str]]:
    """(colour, shape) of every solid that the caption names, in its order."""
    return _NAMED.findall(text)


def presence(texts: Sequence[str]) -> np.ndarray:
    """float32 [B, P]: 1 for every pair of `PAIRS` that the caption names."""
    named_BxP = np.zeros((len(texts), len(PAIRS)), np.float32)
    for row, text in zip(named_BxP, texts, strict=True):
        row[[PAIRS.index(pair) for pair in caption_pairs(text)]] = 1
    return named_BxP


def caption_hits(logits_BxP: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """bool [number of named solids, all captions in a row]: is the pair among the k likeliest of its picture?

    k is the number of solids that the caption names: for a single one, colour and shape must both come first.
    """
    hits = []
    for logits, text in zip(logits_BxP, texts, strict=True):
        named = caption_pairs(text)
        likeliest = {PAIRS[p] for p in np.argsort(-logits)[: len(named)]}
        hits += [pair in likeliest for pair in named]
    return np.array(hits, bool)


def caption_accuracy(logits_BxP: np.ndarray, texts: Sequence[str]) -> float:
    """The share of the named solids that the classifier finds (`caption_hits`); chance is about 1/32."""
    hits = caption_hits(logits_BxP, texts)
    if not len(hits):
        raise ValueError("no caption names a solid of ShapesWorld")
    return float(hits.mean())


_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
