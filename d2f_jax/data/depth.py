"""Depth maps: from a distance, cut as a benchmark is, and as a network learns them."""

import numpy as np

KITTI_SIZE = (352, 1216)
"""Height and width that KITTI's benchmark of depth has, whose real pictures differ by some pixels."""


def cut(x_HxWx: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Picture, depth or mask [H, W, ...] cut to height and width `size`: its bottom, in the middle of the width.

    Raises `ValueError` for one that is smaller.
    """
    (height, width), (tall, wide) = x_HxWx.shape[:2], size
    if height < tall or width < wide:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be cut to {tall} x {wide}")
    left = (width - wide) // 2
    return x_HxWx[height - tall :, left : left + wide]


def distance_to_depth(distance_HxW: np.ndarray, focal: float) -> np.ndarray:
    """float32 [H, W]: depth along the camera's axis, of distances from the camera's centre in the same unit.

    `focal` is the focal length in pixels. The axis meets the picture in its middle: z = d f / sqrt(x² + y² + f²).
    """
    height, width = distance_HxW.shape
    x_W = np.arange(width, dtype=np.float32) - (width - 1) / 2
    y_H = np.arange(height, dtype=np.float32) - (height - 1) / 2
    return distance_HxW.astype(np.float32) * (focal / np.sqrt(x_W**2 + y_H[:, None] ** 2 + focal**2))


def measured(depth_HxW: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the depths that are positive and finite, and 0 elsewhere."""
    return np.where(np.isfinite(depth_HxW) & (depth_HxW > 0), depth_HxW, 0).astype(np.float32)


def normalised(depth_HxW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [H, W] in [-1, 1], and bool [H, W] which pixels are valid: those with a depth, positive and finite.

    The logarithm of depth, moved and scaled so that the 1st percentile of the valid pixels' depths becomes -1 and the
    99th becomes 1, and clipped there; so neither the unit of depth nor a power of it makes a difference. The others
    become 1, far as the sky is. Where both percentiles coincide, valid pixels become 0.
    """
    valid_HxW = measured(depth_HxW) > 0
    y_HxW = np.ones(depth_HxW.shape, np.float32)
    if valid_HxW.any():
        depth_N = depth_HxW[valid_HxW]
        near, far = np.log(np.percentile(depth_N, (1, 99)))
        y_HxW[valid_HxW] = 0 if near == far else (2 * (np.log(depth_N) - near) / (far - near) - 1).clip(-1, 1)
    return y_HxW, valid_HxW
