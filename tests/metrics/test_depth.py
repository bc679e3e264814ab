"""Depth measures: against numpy's least squares and the definitions written out pixel by pixel, and their laws."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_jax import metrics
from d2f_jax.metrics import DEPTH_PROTOCOLS, DepthErrors, Means
from d2f_jax.metrics.depth import align, compare, depth_errors

ANY = metrics.DepthProtocol(0.1, 20.0)


def scene(seed: int, height: int = 9, width: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and depths of which a part is out of range."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.5, 8, (height, width))
    prediction = 0.2 * depth - 1 + 0.1 * rng.normal(size=depth.shape)
    depth[rng.random(depth.shape) < 0.2] = 0
    return prediction.astype(np.float32), depth.astype(np.float32)


def by_definition(prediction: np.ndarray, depth: np.ndarray, valid: np.ndarray) -> DepthErrors:
    pairs = [(float(p), float(d)) for p, d, v in zip(prediction.flat, depth.flat, valid.flat, strict=True) if v]

    def mean(function) -> float:
        return math.fsum(function(p, d) for p, d in pairs) / len(pairs)

    log_bias = mean(lambda p, d: math.log(p / d))
    return DepthErrors(
        abs_rel=mean(lambda p, d: abs(p - d) / d),
        sq_rel=mean(lambda p, d: (p - d) ** 2 / d),
        rmse=mean(lambda p, d: (p - d) ** 2) ** 0.5,
        rmse_log=mean(lambda p, d: math.log(p / d) ** 2) ** 0.5,
        log10=mean(lambda p, d: abs(math.log10(p / d))),
        delta1=mean(lambda p, d: max(p / d, d / p) < 1.25),
        delta2=mean(lambda p, d: max(p / d, d / p) < 1.25**2),
        delta3=mean(lambda p, d: max(p / d, d / p) < 1.25**3),
        silog=100 * mean(lambda p, d: (math.log(p / d) - log_bias) ** 2) ** 0.5,
    )


def test_measures_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 8, (9, 14))
    prediction, valid = depth * np.exp(0.3 * rng.normal(size=depth.shape)), rng.random(depth.shape) < 0.7
    errors = compare(prediction, depth, valid)
    assert 0 < errors.delta1 < errors.delta2 < errors.delta3 <= 1
    np.testing.assert_allclose(errors, by_definition(prediction, depth, valid), rtol=1e-12)


@pytest.mark.parametrize("space", ["linear", "log"])
def test_alignment_is_numpy_s_least_squares(space) -> None:
    prediction, depth = scene(1)
    valid = depth > 0
    target = depth[valid] if space == "linear" else np.log(depth[valid].astype(float))
    matrix = np.stack([prediction[valid].astype(float), np.ones(valid.sum())], -1)
    scale, shift = np.linalg.lstsq(matrix, target, rcond=None)[0]
    expected = scale * prediction.astype(float) + shift
    expected = expected if space == "linear" else np.exp(expected)
    np.testing.assert_allclose(align(prediction, depth, valid, space=space), expected, rtol=1e-10)


@pytest.mark.parametrize("space", ["linear", "log"])
@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(0.01, 100) | st.floats(-100, -0.01),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 1000),
)
def test_scale_and_shift_of_the_prediction_do_not_matter(space, scale: float, shift: float, seed: int) -> None:
    prediction, depth = scene(seed)
    errors = depth_errors(ANY, prediction.astype(float), depth, space=space)
    moved = depth_errors(ANY, scale * prediction.astype(float) + shift, depth, space=space)
    np.testing.assert_allclose(moved, errors, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", DEPTH_PROTOCOLS)
@pytest.mark.parametrize("space", ["linear", "log"])
def test_a_perfect_prediction(name: str, space) -> None:
    protocol = DEPTH_PROTOCOLS[name]
    height, width = protocol.cut_to or (480, 640)
    depth = np.random.default_rng(0).uniform(1, 9, (height, width))
    mask = {"given_mask_HxW": depth > 2} if protocol.own_mask else {}
    prediction = 3 * (depth if space == "linear" else np.log(depth)) - 7
    errors = depth_errors(protocol, prediction, depth, space=space, **mask)
    assert (errors.delta1, errors.delta2, errors.delta3) == (1, 1, 1)
    np.testing.assert_allclose([x for x in errors if x != 1], 0, atol=1e-6)


def test_a_constant_prediction_becomes_the_mean() -> None:
    _, depth = scene(2)
    np.testing.assert_allclose(align(np.full_like(depth, 5), depth, depth > 0), depth[depth > 0].mean(dtype=float))


def test_predictions_are_clipped_to_the_range() -> None:
    depth = np.array([[0.01, 0.5, 1.0, 9.9, 9.9, 9.9]])
    prediction = np.array([[-1.0, 1.0, 1.0, 9.0, 9.0, 12.0]])
    aligned = align(prediction, depth, depth > 0)
    assert aligned.max() > 10 and aligned.min() < 0
    protocol = metrics.DepthProtocol(1e-3, 10.0)
    expected = by_definition(aligned.clip(1e-3, 10), depth, depth > 0)
    np.testing.assert_allclose(depth_errors(protocol, prediction, depth), expected, rtol=1e-12)


def counted(name: str, height: int, width: int) -> np.ndarray:
    """Which pixels count where every depth is in range."""
    return DEPTH_PROTOCOLS[name].valid(np.full((height, width), 5.0))


def test_crops_are_those_of_the_literature() -> None:
    def rectangle(mask: np.ndarray) -> tuple[int, int, int, int]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1

    assert rectangle(counted("nyuv2", 480, 640)) == (45, 471, 41, 601)
    assert rectangle(counted("kitti", 352, 1216)) == (117, 321, 43, 1172)
    assert rectangle(counted("kitti_garg", 352, 1216)) == (143, 349, 43, 1172)
    assert counted("scannet", 48, 64).all() and counted("eth3d", 48, 64).all()


def test_ranges() -> None:
    depth = np.full((480, 640), 5.0)
    depth[100, 100:106] = [0, 1e-3, 1.1e-3, 9.9, 10, np.inf]
    for name in ("nyuv2", "scannet"):
        assert DEPTH_PROTOCOLS[name].valid(depth)[100, 100:106].tolist() == [False, False, True, True, False, False]
    assert DEPTH_PROTOCOLS["eth3d"].valid(depth)[100, 100:106].tolist() == [False, True, True, True, True, False]
    kitti = np.full((352, 1216), 80.0)
    kitti[200, 200:203] = [1e-5, 2e-5, 79.9]
    valid = DEPTH_PROTOCOLS["kitti"].valid(kitti)
    assert valid.sum() == 2 and valid[200, 201:203].all()
    mask = np.zeros_like(depth)
    mask[100, 100:106] = 1  # DIODE: its own mask, whatever the depth, but above zero
    mask[100, 105] = 0
    assert np.flatnonzero(DEPTH_PROTOCOLS["diode"].valid(depth, mask)[100]).tolist() == [101, 102, 103, 104]


def test_kitti_is_cut_at_the_bottom_and_in_the_middle() -> None:
    picture = np.arange(375 * 1242).reshape(375, 1242)
    cut = DEPTH_PROTOCOLS["kitti"].cut(picture)
    assert cut.shape == (352, 1216) and cut[0, 0] == picture[23, 13] and cut[-1, -1] == picture[374, 1228]
    assert DEPTH_PROTOCOLS["nyuv2"].cut(picture) is picture


@pytest.mark.parametrize(("height", "width"), [(4032, 6048), (700, 1100), (1100, 700), (20, 30)])
def test_the_fit_looks_at_the_columns_that_pytorch_would_keep(height: int, width: int) -> None:
    # As Marigold's evaluation calls it: a row of features along the width.
    factor = float(np.min(1024 / np.array([height, width])))
    columns = np.tile(np.arange(width), (2, 1))
    if factor < 1:
        sampler = torch.nn.Upsample(scale_factor=factor, mode="nearest")
        columns = sampler(torch.from_numpy(columns).float()[None]).numpy()[0].astype(int)
    depth = np.zeros((height, width), np.float32)
    depth[:] = np.isin(np.arange(width), columns[0])  # 1 in the columns that are kept, 0 in the others
    aligned = align(np.zeros((height, width), np.int8), depth, np.ones((height, width), bool), fit_size=1024)
    assert aligned[0, 0] == 1
    dropped = np.flatnonzero(depth[0])[len(columns[0]) // 2]
    depth[:, dropped] = 0
    assert align(np.zeros((height, width), np.int8), depth, np.ones((height, width), bool), fit_size=1024)[0, 0] < 1


def test_pictures_weigh_alike_however_they_are_spread() -> None:
    errors = [depth_errors(ANY, *scene(i)) for i in range(7)]
    whole = Means()
    for error in errors:
        whole = whole.add(error._asdict())
    parts = [Means(), Means(), Means()]
    for i, error in enumerate(errors):
        parts[i % 2] = parts[i % 2].add(error._asdict())
    merged = parts[2].merge(parts[1]).merge(parts[0])
    assert merged.count == whole.count == 7
    for name, value in whole.means().items():
        assert value == pytest.approx(np.mean([getattr(error, name) for error in errors]), rel=1e-14)
        assert merged.means()[name] == pytest.approx(value, rel=1e-14)


def test_what_cannot_be_measured_is_refused() -> None:
    prediction, depth = scene(3)
    with pytest.raises(ValueError, match=r"of one size, not \[3, 14\], \[9, 14\], \[9, 14\]"):
        depth_errors(ANY, prediction[:3], depth)
    with pytest.raises(ValueError, match="no valid pixel"):
        depth_errors(ANY, prediction, np.zeros_like(depth))
    prediction[4, 5] = np.nan
    with pytest.raises(ValueError, match="not finite at 1 of 126 pixels"):
        depth_errors(ANY, prediction, depth)
    with pytest.raises(ValueError, match="480 x 640 pixels, not 9 x 14"):
        depth_errors(DEPTH_PROTOCOLS["nyuv2"], prediction, depth)
    with pytest.raises(ValueError, match=r"cut to \(352, 1216\), not \(375, 1242\)"):
        DEPTH_PROTOCOLS["kitti"].valid(np.ones((375, 1242)))
    with pytest.raises(ValueError, match="cannot be cut to 352 x 1216"):
        DEPTH_PROTOCOLS["kitti"].cut(np.ones((352, 640)))
    with pytest.raises(ValueError, match="its own mask: give it"):
        DEPTH_PROTOCOLS["diode"].valid(depth)
    with pytest.raises(ValueError, match="no mask of its own"):
        DEPTH_PROTOCOLS["eth3d"].valid(depth, depth > 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEPTH_PROTOCOLS["eth3d"].min_depth = 0  # pyright: ignore[reportAttributeAccessIssue]
