"""Collapse: how much of its space a representation uses. No labels, nothing learned.

Effective rank: the exponential of the entropy of the singular values of the centred features (Roy and Vetterli 2007,
"The effective rank"; RankMe, Garrido et al. 2023, foretells linear probes by it). Spread: the standard deviation of a
number of the unit vectors, times the root of their length, which is 1 on a sphere that is filled and 0 where all
features are one (SimSiam, Chen and He 2021). Uniformity: log of the mean of exp(-2 distance^2) over pairs of unit
vectors (Wang and Isola 2020, "Understanding contrastive representation learning", equation 2); 0 when all are one,
near -4 when they fill the sphere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysl import rng
from raysl.errors import UserError
from raysl.probes import Floats, Row, check_features

# Of the largest singular value; smaller ones are rounding errors of float32 features.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Config:
    """Protocol of the measures of collapse.

    Args:
        max_images: that are looked at, drawn by index.
        version: see `raysl.probes`.
    """

    max_images: int = 4096
    version: int = 1

    def __post_init__(self) -> None:
        if self.max_images < 2:
            raise UserError(f"collapse.max_images is {self.max_images}; it must be at least 2.")


class Collapse:
    """The headline is the effective rank, between 0 (all features are one) and their number."""

    headline = "effective_rank"
    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def measure(self, features_nd: Floats) -> Iterator[Row]:
        """Yields effective rank, its share of what is possible, spread, share of numbers that never change, and
        uniformity."""
        check_features(features_nd, "test")
        if len(features_nd) < 2:
            raise UserError("The probe collapse compares images and was given one. Give more.")
        chosen = rng.generator("collapse").permutation(len(features_nd))[: self.config.max_images]
        wide_nd = features_nd[np.sort(chosen)].astype(np.float64)
        unit_nd = wide_nd / np.maximum(np.linalg.norm(wide_nd, axis=1, keepdims=True), 1e-12)
        rank, most = effective_rank(wide_nd), min(len(wide_nd) - 1, wide_nd.shape[1])
        yield Row("effective_rank", rank)
        yield Row("effective_rank_share", rank / most)
        yield Row("spread", float(unit_nd.std(0).mean() * np.sqrt(wide_nd.shape[1])))
        yield Row("constant", float((wide_nd.std(0) <= _NOTHING * (np.abs(wide_nd.mean(0)) + 1)).mean()))
        yield Row("uniformity", uniformity(unit_nd))


def effective_rank(features_nd: npt.NDArray[np.float64]) -> float:
    """Of the features about their mean; 0 when all are one."""
    centred_nd = features_nd - features_nd.mean(0)
    values = np.linalg.svd(centred_nd, compute_uv=False)
    if values[0] <= _NOTHING * np.linalg.norm(features_nd):
        return 0.0
    share = values[values > _NOTHING * values[0]] / values[values > _NOTHING * values[0]].sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def uniformity(unit_nd: npt.NDArray[np.float64]) -> float:
    """Of unit vectors (n, d), over all pairs of two."""
    n = len(unit_nd)
    close_nn = np.exp(-2 * (2 - 2 * (unit_nd @ unit_nd.T)))
    return float(np.log((close_nn.sum() - np.trace(close_nn)) / (n * (n - 1))))
