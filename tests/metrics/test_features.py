"""Feature distances: laws of gathering them in parts, torch-fidelity's numbers, the kernel distance's definition."""

import fidelity
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_jax.metrics import FeatureRows, FeatureStatistics, Means, frechet_distance, kernel_distance
from d2f_jax.metrics.kernel import squared_mmd

COUNT, WIDTH = 60, 7


def features(seed: int = 0, count: int = COUNT, mean: float = 0.4) -> np.ndarray:
    """As those of a network after ReLU and pooling: none below zero, means away from it."""
    return np.random.default_rng(seed).normal(mean, 0.3, (count, WIDTH)).clip(0).astype(np.float32)


cuts = st.lists(st.integers(0, COUNT), max_size=6).map(sorted)


@settings(max_examples=50, deadline=None)
@given(cuts=cuts, first=st.integers(0, 6))
def test_statistics_are_numpy_s_for_any_split(cuts: list[int], first: int) -> None:
    """Empty parts included; two processes, of which the first takes the first `first` parts."""
    x = features()
    processes = [FeatureStatistics.empty(WIDTH), FeatureStatistics.empty(WIDTH)]
    for i, part in enumerate(np.split(x, cuts)):
        processes[i >= first] = processes[i >= first].add(part)
    merged = processes[0].merge(processes[1])
    assert merged.count == COUNT
    np.testing.assert_allclose(merged.mean_F, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        merged.covariance_FxF, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-14
    )
    other = FeatureStatistics.of(features(1, mean=0.5))
    assert frechet_distance(merged, other) == pytest.approx(frechet_distance(FeatureStatistics.of(x), other), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(cuts=cuts, seed=st.integers(0, 100))
def test_rows_are_the_same_however_they_are_spread(cuts: list[int], seed: int) -> None:
    x, order = features(), np.random.default_rng(seed).permutation(COUNT)
    rows = FeatureRows()
    for index in np.split(order, cuts):
        rows = rows.merge(FeatureRows().add(index, x[index]))
    np.testing.assert_array_equal(rows.sorted(), x)


def test_an_example_that_is_counted_twice_is_named() -> None:
    with pytest.raises(ValueError, match="example 3 was counted twice"):
        FeatureRows().add(np.arange(5), features(count=5)).add(np.array([3]), features(count=1)).sorted()


def test_squared_mmd_is_its_definition() -> None:
    x, y = features(0, 11).astype(float), features(1, 8, mean=0.6).astype(float)

    def kernel(a, b) -> float:
        return (sum(float(s) * float(t) for s, t in zip(a, b, strict=True)) / WIDTH + 1) ** 3

    total = 0.0
    for i in range(11):
        for j in range(11):
            total += kernel(x[i], x[j]) / (11 * 10) if i != j else 0
    for i in range(8):
        for j in range(8):
            total += kernel(y[i], y[j]) / (8 * 7) if i != j else 0
    for i in range(11):
        for j in range(8):
            total -= 2 * kernel(x[i], y[j]) / (11 * 8)
    assert squared_mmd(x, y) == pytest.approx(total, rel=1e-10)


@pytest.fixture(scope="module")
def two_sets() -> tuple[np.ndarray, np.ndarray]:
    """Of different sizes, float64; torch-fidelity computes in the features' own precision."""
    return features(0, 1100).astype(np.float64), features(1, 1300, mean=0.6).astype(np.float64)


def test_kid_is_torch_fidelity_s_by_default(two_sets: tuple[np.ndarray, np.ndarray]) -> None:
    """Of the same subsets, or neither their mean nor their deviation would agree so well."""
    theirs = fidelity.kid.kid_features_to_metric(*map(torch.from_numpy, two_sets), verbose=False)
    ours = kernel_distance(*two_sets)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_fid_is_torch_fidelity_s(two_sets: tuple[np.ndarray, np.ndarray]) -> None:
    statistics = [fidelity.fid.fid_features_to_statistics(torch.from_numpy(x)) for x in two_sets]
    theirs = fidelity.fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*map(FeatureStatistics.of, two_sets))
    assert ours == pytest.approx(theirs, rel=1e-9) and ours > 0.1


def test_kernel_distance_is_unbiased_and_grows() -> None:
    same = [squared_mmd(features(2 * i), features(2 * i + 1)) for i in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5 and min(same) < 0 < max(same)
    options = {"num_subsets": 20, "subset_size": 30}
    distances = [kernel_distance(features(0), features(1, mean=mean), **options).mean for mean in (0.4, 0.6, 0.9)]
    assert distances[0] < distances[1] < distances[2]


def test_a_subset_of_everything_is_everything() -> None:
    x, y = features(0), features(1, mean=0.6)
    distance = kernel_distance(x, y, num_subsets=3, subset_size=COUNT)
    assert distance.mean == pytest.approx(squared_mmd(x, y), rel=1e-10) and distance.std < 1e-10
    assert kernel_distance(x, y, num_subsets=5, subset_size=9) == kernel_distance(x, y, num_subsets=5, subset_size=9)


def test_subsets_larger_than_the_set_are_refused() -> None:
    with pytest.raises(ValueError, match="subset_size=1000 must be from 2 to the size of the smaller set, 60"):
        kernel_distance(features(), features())


def test_means_need_examples_and_the_same_names() -> None:
    with pytest.raises(ValueError, match="no examples"):
        Means().means()
    with pytest.raises(ValueError, match=r"\['a'\] cannot be merged with \['b'\]"):
        Means().add({"a": 1.0}).add({"b": 2.0})
    with pytest.raises(ValueError, match="not of the same examples"):
        Means().add({"a": np.zeros(2), "b": np.zeros(3)})
    assert Means().add({"a": [1.0, 2.0]}).add({"a": 6.0}).means() == {"a": 3.0}
