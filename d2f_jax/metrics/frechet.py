"""The Fréchet distance between two sets of features, each taken for a Gaussian.

    d² = |mu_a - mu_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

Dowson and Landau (1982); on features of a network, Heusel et al. (2017). Estimated from N samples it is too large by
an amount that grows with the number of features and falls as 1/N: compare only values of the same N.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch; float64 throughout.

    `empty(F).add(batch).add(batch)` in every process, then `distributed.merged`: neither the batches nor how they lie
    on processes changes the result.
    """

    count: int
    mean_F: np.ndarray
    scatter_FxF: np.ndarray  # sum over samples of the outer products of (feature - mean)

    @classmethod
    def empty(cls, num_features: int) -> "FeatureStatistics":
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, features_NxF: np.ndarray) -> "FeatureStatistics":
        features_NxF = np.asarray(features_NxF, np.float64)
        if not len(features_NxF):
            return cls.empty(features_NxF.shape[1])
        mean_F = features_NxF.mean(0)
        centred_NxF = features_NxF - mean_F
        return cls(len(features_NxF), mean_F, centred_NxF.T @ centred_NxF)

    def add(self, features_NxF: np.ndarray) -> "FeatureStatistics":
        return self.merge(FeatureStatistics.of(features_NxF))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Of both sets together (Chan et al., 1979); no precision is lost where a mean is far from zero."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        step_F = other.mean_F - self.mean_F
        between_FxF = np.outer(step_F, step_F) * (self.count * other.count / count)
        return FeatureStatistics(
            count, self.mean_F + step_F * (other.count / count), self.scatter_FxF + other.scatter_FxF + between_FxF
        )

    @property
    def covariance_FxF(self) -> np.ndarray:
        """Unbiased; raises `ValueError` for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples, not {self.count}")
        return self.scatter_FxF / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """d² of the module's docstring, exact for singular covariances too; NaN if a mean or covariance is not finite.

    Told sooner where the smaller set has fewer samples than features.
    """
    cov_a, cov_b = a.covariance_FxF, b.covariance_FxF
    if not all(np.isfinite(x).all() for x in (a.mean_F, b.mean_F, cov_a, cov_b)):
        return math.nan
    fewer, other = (cov_a, cov_b) if a.count <= b.count else (cov_b, cov_a)
    # L L^T C has the eigenvalues of the symmetric L^T C L, and no more of them than L has columns.
    factor_FxR = _factor(fewer)
    product_RxR = factor_FxR.T @ other @ factor_FxR
    cross = np.sqrt(np.linalg.eigvalsh((product_RxR + product_RxR.T) / 2).clip(0)).sum()
    distance = np.square(a.mean_F - b.mean_F).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(0.0, float(distance))  # rounding alone makes it negative


def _factor(covariance_FxF: np.ndarray) -> np.ndarray:
    """L [F, rank] with L L^T the covariance, by Cholesky's method with pivots (Higham, 1990), to rounding."""
    from scipy.linalg import get_lapack_funcs  # half a second of every start

    (dpstrf,) = get_lapack_funcs(("pstrf",), (covariance_FxF,))
    lower_FxF, pivots_F, rank, _ = dpstrf(covariance_FxF, lower=1)
    factor_FxR = np.empty((len(pivots_F), rank))
    factor_FxR[pivots_F - 1] = np.tril(lower_FxF[:, :rank])
    return factor_FxR
