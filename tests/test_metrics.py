"""The embedded world's metrics: laws of the Fréchet distance, and a judge that sees what is there."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from d2f_jax import metrics
from d2f_jax.data import shapes
from d2f_jax.metrics.captions import caption_hits, presence
from d2f_jax.metrics.classifier import NUM_FEATURES, PAIRS
from d2f_jax.metrics.frechet import FeatureStatistics, frechet_distance


def gaussian(mean, covariance) -> FeatureStatistics:
    return FeatureStatistics(101, np.asarray(mean, float), np.asarray(covariance, float) * 100)


def random_covariance(seed: int, width: int = 12) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(width, width))
    return a @ a.T


def test_statistics_are_mean_and_covariance():
    x = np.random.default_rng(0).normal(3, 2, (50, 4))
    statistics = FeatureStatistics.of(x)
    np.testing.assert_allclose(statistics.mean_F, x.mean(0))
    np.testing.assert_allclose(statistics.covariance_FxF, np.cov(x, rowvar=False))


def test_batches_merge_to_the_statistics_of_all():
    x = 1e4 + np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)
    a, b, c = (FeatureStatistics.of(part) for part in np.split(x, [7, 30]))
    whole = FeatureStatistics.of(x)
    for merged in (a.merge(b).merge(c), a.merge(c.merge(b))):
        assert merged.count == 60
        np.testing.assert_allclose(merged.mean_F, whole.mean_F, rtol=1e-12)
        np.testing.assert_allclose(merged.covariance_FxF, whole.covariance_FxF, rtol=1e-6, atol=1e-9)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least two samples, not 1"):
        _ = FeatureStatistics.of(np.zeros((1, 3))).covariance_FxF


def test_distance_of_one_dimensional_gaussians():
    # (mu_a - mu_b)² + (sigma_a - sigma_b)²
    assert frechet_distance(gaussian([1], [[4]]), gaussian([4], [[25]])) == pytest.approx(9 + 9)


def test_distance_of_gaussians_that_share_their_axes():
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    a, b = (q * np.square(s) @ q.T for s in ([1, 2, 3], [4, 2, 0.5]))
    assert frechet_distance(gaussian([0, 0, 0], a), gaussian([1, 2, 2], b)) == pytest.approx(9 + 9 + 0 + 6.25)


def test_distance_agrees_with_the_matrix_square_root():
    a, b = random_covariance(0), random_covariance(1)
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(gaussian(np.zeros(12), a), gaussian(np.zeros(12), b)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_zero_to_itself_and_ignores_rotation():
    a, b = gaussian(np.arange(12), random_covariance(2)), gaussian(np.zeros(12), random_covariance(3))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    q, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(12, 12)))
    turned = [gaussian(q @ s.mean_F, q @ s.covariance_FxF @ q.T) for s in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_distance_of_singular_covariances():
    few = FeatureStatistics.of(np.random.default_rng(5).normal(size=(4, 30)))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    flat = gaussian(np.zeros(2), np.diag([1, 0]))
    assert frechet_distance(flat, gaussian(np.zeros(2), np.diag([0, 4]))) == pytest.approx(1 + 4)


@pytest.mark.parametrize("counts", [(9, 40), (40, 9), (25, 25), (60, 7), (1, 1)])
def test_distance_of_few_samples_is_by_the_singular_values_of_their_products(counts):
    """They sum to tr (C_a C_b)^(1/2) for X_a X_b^T, X being centred samples by the root of one less than they are."""
    random = np.random.default_rng(6)
    x, y = (random.normal(i, 1 + i, (1 + n, 30)) for i, n in enumerate(counts))
    centred = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + sum(np.square(z).sum() for z in centred) - 2 * cross
    assert frechet_distance(*map(FeatureStatistics.of, (x, y))) == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_point():
    point, other = FeatureStatistics.of(np.ones((5, 3))), gaussian([2, 1, 1], np.diag([1, 4, 9]))
    assert frechet_distance(point, point) == 0
    assert frechet_distance(point, other) == frechet_distance(other, point) == pytest.approx(1 + 14)


def test_distance_of_what_is_not_finite_is_not_a_number():
    broken = np.random.default_rng(7).normal(size=(20, 12))
    broken[3, 5] = np.nan
    for count in (8, 20, 300):
        pair = [FeatureStatistics.of(x) for x in (broken, np.random.default_rng(8).normal(size=(count, 12)))]
        assert np.isnan(frechet_distance(*pair)) and np.isnan(frechet_distance(*pair[::-1]))


def test_captions_are_parsed_in_order():
    text = "a small red cube, a large orange sphere and a white cone on snow at night"
    assert metrics.caption_pairs(text) == [("red", "cube"), ("orange", "sphere"), ("white", "cone")]
    assert metrics.caption_pairs("") == metrics.caption_pairs("a photo of a cat") == []
    assert presence([text, ""]).sum(1).tolist() == [3, 0]


def test_caption_accuracy_counts_named_solids_among_the_likeliest():
    texts = ["a red cube", "a red cube left of a blue cone"]
    perfect = presence(texts)
    assert metrics.caption_accuracy(perfect, texts) == 1
    assert metrics.caption_accuracy(-perfect, texts) == 0
    half = perfect.copy()
    half[1, PAIRS.index(("blue", "cone"))] = 0
    half[1, PAIRS.index(("blue", "cube"))] = 1  # the right colour alone is not enough
    np.testing.assert_array_equal(caption_hits(half, texts), [True, True, False])
    second = perfect.copy()
    second[0, PAIRS.index(("green", "cone"))] = 2  # likelier than what is named
    np.testing.assert_array_equal(caption_hits(second, texts), [False, True, True])


def test_accuracy_needs_a_named_solid():
    with pytest.raises(ValueError, match="no caption names a solid"):
        metrics.caption_accuracy(np.zeros((1, 32)), ["a photo"])


@pytest.fixture(scope="module")
def classifier():
    return metrics.load_classifier()


@pytest.fixture(scope="module")
def validation():
    scenes = [shapes.sample_scene(1, i) for i in range(150)]
    return np.stack([shapes.render(s, 64).image for s in scenes]), [s.caption for s in scenes]


def test_the_judge_takes_any_size(classifier):
    for size in (48, 64, 96):
        features, logits = classifier(jnp.zeros((2, size, size, 3)))
        assert features.shape == (2, NUM_FEATURES) and logits.shape == (2, len(PAIRS))


def test_real_pictures_score_well_and_wrong_ones_badly(classifier, validation):
    images, captions = validation
    reference = metrics.feature_statistics(classifier, images[75:])
    real = metrics.shapes_scores(classifier, images[:75], prompts=captions[:75], reference=reference)
    assert real.caption_accuracy > 0.93
    other = metrics.shapes_scores(classifier, images[:75], prompts=captions[75:], reference=reference)
    assert other.caption_accuracy < 0.3
    noise = np.random.default_rng(0).integers(0, 256, images[:75].shape, np.uint8)
    noisy = metrics.shapes_scores(classifier, noise, prompts=captions[:75], reference=reference)
    assert noisy.frechet_distance > 3 * real.frechet_distance
    assert noisy.caption_accuracy < 0.3


def test_the_distance_grows_with_the_damage(classifier, validation):
    images, captions = validation
    reference = metrics.feature_statistics(classifier, images)
    distances = []
    for noise in (0, 40, 90):
        damaged = images + np.random.default_rng(0).normal(0, noise, images.shape)
        scores = metrics.shapes_scores(
            classifier, damaged.clip(0, 255).astype(np.uint8), prompts=captions, reference=reference
        )
        distances.append(scores.frechet_distance)
    assert distances[0] < 1e-4 < distances[1] < distances[2]


def test_scores_do_not_depend_on_the_batches(classifier, validation):
    images, _ = validation
    parts = [metrics.feature_statistics(classifier, part) for part in (images[:13], images[13:])]
    whole = metrics.feature_statistics(classifier, images)
    np.testing.assert_allclose(parts[0].merge(parts[1]).mean_F, whole.mean_F, rtol=1e-4, atol=1e-5)


def test_pictures_must_be_bytes(classifier):
    with pytest.raises(ValueError, match="must be uint8, not float32"):
        metrics.feature_statistics(classifier, np.zeros((2, 8, 8, 3), np.float32))
