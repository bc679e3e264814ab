"""How close pictures are to given ones, picture by picture: absolute error, PSNR and SSIM. On the host, in float64."""

import numpy as np

_SIZE, _SIGMA = 11, 1.5  # pixels; SSIM's window, as Wang et al. (2004)
_K1, _K2 = 0.01, 0.03


def absolute_error(images_BxHxWxC: np.ndarray, targets_BxHxWxC: np.ndarray) -> np.ndarray:
    """Mean absolute error [B] in the pictures' own unit: levels of 255 for bytes."""
    images, targets = _both(images_BxHxWxC, targets_BxHxWxC)
    return np.abs(images - targets).mean((1, 2, 3))


def psnr(images_BxHxWxC: np.ndarray, targets_BxHxWxC: np.ndarray, *, data_range: float) -> np.ndarray:
    """Peak signal-to-noise ratio [B] in dB, 10 log10(data_range² / mean squared error); infinite for equal pictures.

    `data_range` is the distance from black to white: 255 for bytes.
    """
    images, targets = _both(images_BxHxWxC, targets_BxHxWxC)
    error_B = np.square(images - targets).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / error_B)


def ssim(images_BxHxWxC: np.ndarray, targets_BxHxWxC: np.ndarray, *, data_range: float) -> np.ndarray:
    """Structural similarity [B], at most 1; Wang et al. (2004).

    Gaussian window of 11 x 11 pixels and sigma 1.5, moments of the population, K = (0.01, 0.03); the mean over channels
    and over the places where the window fits into the picture. Raises `ValueError` for pictures under 11 pixels.
    """
    x, y = _both(images_BxHxWxC, targets_BxHxWxC)
    if min(x.shape[1:3]) < _SIZE:
        raise ValueError(f"SSIM's window of {_SIZE} pixels does not fit into {x.shape[1]} x {x.shape[2]}")
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    cov = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blurred(x_BxHxWxC: np.ndarray) -> np.ndarray:
    """By SSIM's window, which is the product of its rows and columns; 10 pixels less on either side."""
    taps = np.exp(-np.square(np.arange(_SIZE) - _SIZE // 2) / (2 * _SIGMA**2))
    taps /= taps.sum()
    height, width = x_BxHxWxC.shape[1] - _SIZE + 1, x_BxHxWxC.shape[2] - _SIZE + 1
    tall = sum(tap * x_BxHxWxC[:, i : i + height] for i, tap in enumerate(taps))
    return sum(tap * tall[:, :, i : i + width] for i, tap in enumerate(taps))  # pyright: ignore


def _both(images: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != targets.shape or images.ndim != 4:
        raise ValueError(f"pictures {list(images.shape)} and targets {list(targets.shape)} must both be [B, H, W, C]")
    return np.asarray(images, np.float64), np.asarray(targets, np.float64)
