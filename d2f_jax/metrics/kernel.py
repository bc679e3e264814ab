"""The kernel distance (KID) between two sets of features: an unbiased squared maximum mean discrepancy.

    MMD² = mean k(x, x') over x != x' + mean k(y, y') over y != y' - 2 mean k(x, y),    k(x, y) = (x·y / F + 1)³

Bińkowski et al. (2018). Unlike the Fréchet distance its expectation does not depend on the number of samples; around
zero it may be negative.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class FeatureRows:
    """The features themselves, gathered batch by batch, each with its example's number.

    `FeatureRows().add(numbers, features)` in every process, then `distributed.merged`: `sorted()` is the same however
    the examples were batched and spread. 2048 features of 50,000 pictures take 400 MB.
    """

    parts: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def add(self, index_N: np.ndarray, features_NxF: np.ndarray) -> "FeatureRows":
        """`index_N` are integers, one for each row."""
        if len(index_N) != len(features_NxF):
            raise ValueError(f"{len(index_N)} examples' numbers for {len(features_NxF)} rows of features")
        return FeatureRows((*self.parts, (np.asarray(index_N), np.asarray(features_NxF, np.float32))))

    def merge(self, other: "FeatureRows") -> "FeatureRows":
        return FeatureRows(self.parts + other.parts)

    def sorted(self) -> np.ndarray:
        """float32 [N, F], by the examples' numbers; raises `ValueError` naming one that comes twice."""
        if not self.parts:
            raise ValueError("no features were gathered")
        index_N = np.concatenate([index for index, _ in self.parts])
        order = np.argsort(index_N, kind="stable")
        again = np.flatnonzero(np.diff(index_N[order]) == 0)
        if len(again):
            raise ValueError(
                f"example {index_N[order][again[0]]} was counted twice; spread the examples without overlap"
            )
        return np.concatenate([features for _, features in self.parts])[order]


class KernelDistance(NamedTuple):
    """`mean` and `std` (of the population, ddof 0) over the subsets."""

    mean: float
    std: float


def kernel_distance(
    a_NxF: np.ndarray, b_MxF: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """KID over random subsets of both sets, float64; the defaults and the draws are torch-fidelity's.

    Raises `ValueError` for sets smaller than a subset.
    """
    smaller = min(len(a_NxF), len(b_MxF))
    if not 2 <= subset_size <= smaller:
        raise ValueError(f"subset_size={subset_size} must be from 2 to the size of the smaller set, {smaller}")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        a, b = (x[random.choice(len(x), subset_size, replace=False)] for x in (a_NxF, b_MxF))
        values.append(squared_mmd(a, b))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def squared_mmd(a_NxF: np.ndarray, b_MxF: np.ndarray) -> float:
    """MMD² of the module's docstring, between all of both sets."""
    a, b = np.asarray(a_NxF, np.float64), np.asarray(b_MxF, np.float64)

    def within(x: np.ndarray) -> float:
        kernel = _kernel(x, x)
        return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def _kernel(x_NxF: np.ndarray, y_MxF: np.ndarray) -> np.ndarray:
    linear_NxM = x_NxF @ y_MxF.T / x_NxF.shape[1] + 1
    return linear_NxM * linear_NxM * linear_NxM  # in an eighth of the time of NumPy's power
