"""Depth up to scale and shift against measured depth, as Marigold evaluates it (Ke et al., CVPR 2024).

A prediction is aligned to the measured depth by least squares on the valid pixels, clipped to the data set's range,
and compared there; measures are means over pixels, then over pictures (`Means`). Depths are in metres; on the host, in
float64. Letters: H height, W width.
"""

from typing import Literal, NamedTuple

import numpy as np

from d2f_jax.metrics.depth_protocols import DepthProtocol

DepthSpace = Literal["linear", "log"]
_SMALLEST = 1e-6  # metres; what the logarithm needs, as in Marigold's evaluation


class DepthErrors(NamedTuple):
    """Of one picture; p is the prediction, d the measured depth, means are over the valid pixels."""

    abs_rel: float  # mean |p - d| / d
    sq_rel: float  # metres; mean (p - d)² / d
    rmse: float  # metres
    rmse_log: float  # of natural logarithms
    log10: float  # mean |log10 p - log10 d|
    delta1: float  # share of pixels with max(p/d, d/p) < 1.25
    delta2: float  # ... < 1.25²
    delta3: float  # ... < 1.25³
    silog: float  # 100 times the standard deviation of log p - log d


def depth_errors(
    protocol: DepthProtocol,
    prediction_HxW: np.ndarray,
    depth_HxW: np.ndarray,
    *,
    space: DepthSpace = "linear",
    given_mask_HxW: np.ndarray | None = None,
) -> DepthErrors:
    """Of a prediction at the measured depth's size, affine in depth or, with `space="log"`, in its logarithm.

    `given_mask_HxW` is the data set's own, where the protocol asks for one. Raises `ValueError` for other sizes, for a
    prediction that is not finite and for a picture without a valid pixel.
    """
    valid_HxW = protocol.valid(depth_HxW, given_mask_HxW)
    aligned_HxW = align(prediction_HxW, depth_HxW, valid_HxW, space=space, fit_size=protocol.fit_size)
    low = max(protocol.min_depth, _SMALLEST)
    return compare(aligned_HxW.clip(low, protocol.max_depth), depth_HxW, valid_HxW)


def align(
    prediction_HxW: np.ndarray,
    depth_HxW: np.ndarray,
    valid_HxW: np.ndarray,
    *,
    space: DepthSpace = "linear",
    fit_size: int | None = None,
) -> np.ndarray:
    """float64 [H, W]: `scale*prediction + shift`, or its exponential, whose squared error on the valid pixels is least.

    The error is that of the depth or of its logarithm. A constant prediction becomes the mean. `fit_size` bounds the
    width that is looked at (`DepthProtocol.fit_size`). Raises `ValueError` as `depth_errors`.
    """
    if not prediction_HxW.shape == depth_HxW.shape == valid_HxW.shape or depth_HxW.ndim != 2:
        shapes = ", ".join(str(list(x.shape)) for x in (prediction_HxW, depth_HxW, valid_HxW))
        raise ValueError(f"prediction, depth and mask must be [H, W] of one size, not {shapes}")
    if not np.isfinite(prediction_HxW).all():
        count = np.size(prediction_HxW) - np.isfinite(prediction_HxW).sum()
        raise ValueError(f"the prediction is not finite at {count} of {np.size(prediction_HxW)} pixels")
    height, width = depth_HxW.shape
    seen = (slice(None), _thinned(height, width, fit_size))
    fitted_HxW = valid_HxW[seen]
    if not fitted_HxW.any():
        raise ValueError("the picture has no valid pixel; leave it out by name")
    p_N = np.asarray(prediction_HxW[seen][fitted_HxW], np.float64)
    d_N = np.asarray(depth_HxW[seen][fitted_HxW], np.float64)
    d_N = np.log(d_N) if space == "log" else d_N
    # Normal equations about the means, so that no precision is lost where these are far from zero.
    centred_N = p_N - p_N.mean()
    variance = centred_N @ centred_N
    scale = centred_N @ (d_N - d_N.mean()) / variance if variance > 0 else 0.0
    aligned_HxW = scale * (np.asarray(prediction_HxW, np.float64) - p_N.mean()) + d_N.mean()
    if space == "log":
        with np.errstate(over="ignore"):  # infinitely far; the range of the data set clips it
            return np.exp(aligned_HxW)
    return aligned_HxW


def compare(prediction_HxW: np.ndarray, depth_HxW: np.ndarray, valid_HxW: np.ndarray) -> DepthErrors:
    """Of a prediction in metres, above zero where it is looked at."""
    p_N, d_N = (np.asarray(x[valid_HxW], np.float64) for x in (prediction_HxW, depth_HxW))
    difference_N, log_ratio_N = p_N - d_N, np.log(p_N) - np.log(d_N)
    ratio_N = np.maximum(p_N / d_N, d_N / p_N)
    return DepthErrors(
        abs_rel=float(np.mean(np.abs(difference_N) / d_N)),
        sq_rel=float(np.mean(np.square(difference_N) / d_N)),
        rmse=float(np.sqrt(np.mean(np.square(difference_N)))),
        rmse_log=float(np.sqrt(np.mean(np.square(log_ratio_N)))),
        log10=float(np.mean(np.abs(log_ratio_N)) / np.log(10)),
        delta1=float(np.mean(ratio_N < 1.25)),
        delta2=float(np.mean(ratio_N < 1.25**2)),
        delta3=float(np.mean(ratio_N < 1.25**3)),
        silog=float(100 * np.std(log_ratio_N)),
    )


def _thinned(height: int, width: int, fit_size: int | None) -> np.ndarray:
    """The columns that the fit looks at, as `torch.nn.Upsample(scale_factor=..., mode="nearest")` picks them."""
    scale = 1.0 if fit_size is None else min(fit_size / height, fit_size / width, 1.0)
    count = int(width * scale)
    return np.minimum(np.arange(count) * np.float32(1 / scale), width - 1).astype(np.int64)
