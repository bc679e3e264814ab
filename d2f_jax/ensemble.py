"""Several estimates of one depth map, made one."""

import numpy as np


def merged(estimates_NxHxW: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the median of estimates that each are right up to scale and shift.

    Each is first brought to the mean of all by least squares, in closed form. Marigold (arXiv 2312.02145, section 3.3)
    searches for the scales and shifts by which all pairs agree best, and stretches the result to 0 and 1; of two middle
    values diffusers' `ensemble_depth` takes the lower, this their mean. Up to scale and shift both find the same where
    estimates differ by these alone; noise leaves them apart by up to a quarter of it, this no farther from the truth.
    """
    if len(estimates_NxHxW) == 1:
        return np.asarray(estimates_NxHxW[0], np.float32)
    flat_NxP = np.asarray(estimates_NxHxW, np.float64).reshape(len(estimates_NxHxW), -1)
    target_P = flat_NxP.mean(axis=0)
    centred_NxP, centre_P = flat_NxP - flat_NxP.mean(axis=1, keepdims=True), target_P - target_P.mean()
    variance_N = (centred_NxP**2).sum(axis=1)
    scale_N = np.divide(centred_NxP @ centre_P, variance_N, out=np.zeros_like(variance_N), where=variance_N > 0)
    aligned_NxP = scale_N[:, None] * centred_NxP + target_P.mean()
    return np.median(aligned_NxP, axis=0).reshape(estimates_NxHxW.shape[1:]).astype(np.float32)
