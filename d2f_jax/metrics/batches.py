"""A network over many pictures, in batches of one shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def in_batches(apply: Callable[[jax.Array], jax.Array], rows_NxX: np.ndarray, size: int) -> np.ndarray:
    """`apply` of N rows of anything, `size` at a time: the last batch is filled up, so that each size compiles once.

    In full float32 on accelerators too, whose default rounds products to fewer bits and moves a Fréchet distance.
    """
    count = len(rows_NxX)
    parts = []
    for start in range(0, count, size):
        batch = rows_NxX[start : start + size]
        batch = np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
        with jax.default_matmul_precision("highest"):
            parts.append(np.asarray(apply(jnp.asarray(batch))))
    return np.concatenate(parts)[:count]


def check_pictures(images_NxHxWx3: np.ndarray) -> None:
    """Raises `ValueError` unless they are uint8 [N, H, W, 3] with N > 0."""
    if images_NxHxWx3.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8, not {images_NxHxWx3.dtype}")
    if images_NxHxWx3.ndim != 4 or images_NxHxWx3.shape[-1] != 3 or not len(images_NxHxWx3):
        raise ValueError(f"pictures must be [N, H, W, 3] with N > 0, not {list(images_NxHxWx3.shape)}")
