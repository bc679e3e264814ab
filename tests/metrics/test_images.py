"""PSNR and SSIM against scipy and scikit-image."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import skimage.metrics

from d2f_jax.metrics import psnr, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = scipy.ndimage.gaussian_filter(rng.uniform(0, 255, (3, 40, 31, 3)), (0, 2, 2, 0)) * 3 - 255
    images = targets + rng.normal(0, 12, targets.shape)
    return images.clip(0, 255).astype(np.uint8), targets.clip(0, 255).astype(np.uint8)


def ssim_by_scipy(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """One channel; the window as a matrix, convolved in one go."""
    row = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(row, row) / np.outer(row, row).sum()

    def blurred(z: np.ndarray) -> np.ndarray:
        return scipy.signal.convolve2d(z, window, mode="valid")

    x, y = x.astype(float), y.astype(float)
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_ssim_is_scipy_s_and_scikit_image_s(pair) -> None:
    images, targets = pair
    ours = ssim(images, targets, data_range=255)
    channels = [[ssim_by_scipy(x[..., c], y[..., c], 255) for c in range(3)] for x, y in zip(*pair, strict=True)]
    np.testing.assert_allclose(ours, np.mean(channels, 1), rtol=1e-12)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    theirs = [
        skimage.metrics.structural_similarity(x, y, channel_axis=-1, **options) for x, y in zip(*pair, strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert 0.3 < ours.min() < ours.max() < 0.95


def test_psnr_is_scikit_image_s(pair) -> None:
    theirs = [skimage.metrics.peak_signal_noise_ratio(y, x, data_range=255) for x, y in zip(*pair, strict=True)]
    np.testing.assert_allclose(psnr(*pair, data_range=255), theirs, rtol=1e-12)


def test_laws(pair) -> None:
    images, targets = pair
    np.testing.assert_allclose(ssim(images, images, data_range=255), 1, rtol=1e-12)
    assert np.isposinf(psnr(images, images, data_range=255)).all()
    for measure in (psnr, ssim):
        here = measure(images, targets, data_range=255)
        np.testing.assert_allclose(measure(targets, images, data_range=255), here, rtol=1e-12)
        np.testing.assert_allclose(measure(images / 255, targets / 255, data_range=1), here, rtol=1e-9)
        np.testing.assert_allclose(measure(images[1:2], targets[1:2], data_range=255), here[1:2], rtol=1e-12)
    # An error of one level everywhere.
    assert psnr(targets + 1.0, targets, data_range=255)[0] == pytest.approx(20 * np.log10(255))


def test_what_cannot_be_measured_is_refused(pair) -> None:
    images, targets = pair
    with pytest.raises(ValueError, match="must both be"):
        psnr(images, targets[:, :-1], data_range=255)
    with pytest.raises(ValueError, match="window of 11 pixels does not fit into 10 x 31"):
        ssim(images[:, :10], targets[:, :10], data_range=255)
