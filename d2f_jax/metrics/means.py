"""Means over examples, gathered in parts."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Means:
    """Means of named values, each example of the same weight, in float64.

    `Means().add({"psnr": psnr_B, "ssim": ssim_B})` batch by batch in every process, then `distributed.merged`: neither
    the batches nor how they lie on processes changes the result, to rounding (1e-15 or so).
    """

    count: int = 0
    totals: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def add(self, values: Mapping[str, ArrayLike]) -> "Means":
        """A value for each example: arrays [B], or numbers of a single one. Raises `ValueError` where names differ."""
        arrays = {name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in values.items()}
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise ValueError(f"the values are not of the same examples: { ({n: len(a) for n, a in arrays.items()}) }")
        return self.merge(Means(counts.pop(), {name: float(array.sum()) for name, array in arrays.items()}))

    def merge(self, other: "Means") -> "Means":
        if not self.count or not other.count:
            return self if self.count else other
        if set(self.totals) != set(other.totals):
            raise ValueError(f"{sorted(self.totals)} cannot be merged with {sorted(other.totals)}")
        return Means(self.count + other.count, {n: total + other.totals[n] for n, total in self.totals.items()})

    def means(self) -> dict[str, float]:
        """Raises `ValueError` if there were no examples: no number stands for none."""
        if not self.count:
            raise ValueError("no examples were gathered")
        return {name: total / self.count for name, total in self.totals.items()}
