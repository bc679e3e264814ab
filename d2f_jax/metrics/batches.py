"""A network over many pictures, in batches of one shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def in_batches(apply: Callable[[jax.Array], jax.Array], rows_NxX: np.ndarray, size: int) -> np.ndarray:
    """`apply` of N rows of anything, `size` at a time. A last batch is filled up to a power of two: few are compiled.

    In full float32 on accelerators too, whose default rounds products to fewer bits and moves a Fréchet distance.
    """
    count = len(rows_NxX)
    parts = []
    for start in range(0, count, size):
        batch = rows_NxX[start : start + size]
        filled = min(size, 1 << (len(batch) - 1).bit_length())
        padded = np.pad(batch, [(0, filled - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
        with jax.default_matmul_precision("highest"):
            parts.append(np.asarray(apply(jnp.asarray(padded)))[: len(batch)])
    return np.concatenate(parts)


def check_pictures(images_NxHxWx3: np.ndarray) -> None:
    """Raises `ValueError` unless they are uint8 [N, H, W, 3] with N > 0."""
    if images_NxHxWx3.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8, not {images_NxHxWx3.dtype}")
    if images_NxHxWx3.ndim != 4 or images_NxHxWx3.shape[-1] != 3 or not len(images_NxHxWx3):
        raise ValueError(f"pictures must be [N, H, W, 3] with N > 0, not {list(images_NxHxWx3.shape)}")
