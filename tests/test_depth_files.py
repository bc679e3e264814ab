"""The law by which depth is learned."""

import numpy as np
import pytest

from d2f_jax.data.depth import normalised

DEPTH = np.random.default_rng(0).permutation(np.geomspace(0.5, 90, 401))


def with_invalid(depth: np.ndarray, invalid: list[float]) -> np.ndarray:
    return np.concatenate([depth, np.resize(np.array(invalid, np.float32), 99)]).reshape(20, 25)


def test_the_1st_and_99th_percentile_of_valid_pixels_become_the_ends() -> None:
    depth = with_invalid(DEPTH, [0.0])
    y, valid = normalised(depth)
    assert y.dtype == np.float32 and valid.dtype == bool
    np.testing.assert_array_equal(valid, depth > 0)
    ranks = np.argsort(np.argsort(DEPTH))  # 0 nearest, 400 farthest: percentiles 1 and 99 are ranks 4 and 396
    wanted = np.clip((ranks - 4) / 392 * 2 - 1, -1, 1)  # depths are evenly spaced in the logarithm
    np.testing.assert_allclose(y.ravel()[:401], wanted, atol=1e-6)
    np.testing.assert_array_equal(y.ravel()[401:], 1)


@pytest.mark.parametrize("change", [lambda z: z * 1000, lambda z: z / 7, lambda z: z**2, lambda z: z**0.5])
def test_neither_unit_nor_power_of_depth_makes_a_difference(change) -> None:
    np.testing.assert_allclose(normalised(change(DEPTH[None]))[0], normalised(DEPTH[None])[0], atol=1e-6)


def test_what_is_invalid_never_matters() -> None:
    plain = normalised(with_invalid(DEPTH, [0.0]))
    for invalid in ([-3.0], [np.nan], [np.inf, -np.inf], [0.0, np.nan, -1e9]):
        for found, wanted in zip(normalised(with_invalid(DEPTH, invalid)), plain, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_maps_without_a_range() -> None:
    y, valid = normalised(np.array([[0.0, np.nan]]))
    assert y.tolist() == [[1, 1]] and not valid.any()
    y, valid = normalised(np.array([[0.0, 2.5, 2.5]]))
    assert y.tolist() == [[1, 0, 0]] and valid.tolist() == [[False, True, True]]
