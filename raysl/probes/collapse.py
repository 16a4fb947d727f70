"""Measures of collapse: how much of its space a representation uses. No labels, nothing learned.

The measures, on the features of at most `max_images` test images:

effective_rank: exp of the entropy of the normalized singular values of the *centered* features (Roy and Vetterli 2007,
    "The effective rank: a measure of effective dimensionality", definition 1).
rankme: RankMe (Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained self-supervised
    representations by their rank", equation 1): the same entropy of the singular values of the features *as they are*,
    p_k = s_k / sum(s) + 1e-7. The paper computes it on 25,600 images; see --collapse.max-images.
alpha_req: alpha-ReQ (Agrawal et al. 2022, "alpha-ReQ: assessing representation quality in self-supervised learning by
    measuring eigenspectrum decay"): the exponent alpha of the power law lambda_j ~ j^-alpha that fits the eigenvalues
    of the covariance, by least squares of log(lambda_j) on log(j). The paper finds good generalization near 1.
spread: mean standard deviation of the components of the unit vectors, times sqrt(d) (SimSiam, Chen and He 2021,
    section 4.1): 1 on a uniformly filled sphere, 0 if all features are equal.
uniformity: log of the mean of exp(-2 distance^2) over pairs of unit vectors (Wang and Isola 2020, "Understanding
    contrastive representation learning", equation 2): 0 if all are equal, near -4 if they fill the sphere.
constant: share of the features that are constant.

`raysl probe` says that features have collapsed if their effective rank is below 2 and below half of the largest
possible one (one direction holds nearly all that differs between images), if their spread is below 0.01, or if more
than half of them are constant. A higher rank does not mean better features, and the ranks of networks of different
widths do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysl import rng
from raysl.errors import UserError
from raysl.fields import Bounds
from raysl.probes import Row, Settings, check_features

# Smaller singular values, relative to the largest, are rounding errors of float32 features.
_ROUNDING = 1e-6
_RANKME_EPS = 1e-7
# Features beyond these have collapsed.
_LEAST_RANK, _LEAST_SHARE, _LEAST_SPREAD, _MOST_CONSTANT = 2.0, 0.5, 0.01, 0.5


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of the measures of collapse.

    Args:
        max_images: largest number of images, sampled at random. RankMe is published for 25,600.
    """

    version: ClassVar[int] = 1
    max_images: Annotated[int, Bounds(2, 10**6)] = 4096


class Collapse:
    """Six measures; the primary metric is the effective rank, between 0 (all features are equal) and their number."""

    primary_metric = "effective_rank"
    is_score = False
    dims = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def measure(self, features_nd: NDArray[np.float32]) -> Iterator[Row]:
        """Yield the measures, and the effective rank as a share of the largest possible rank."""
        check_features(features_nd, "test")
        if len(features_nd) < 2:
            raise UserError("The probe collapse compares images and has only one. Give more images.")
        chosen_n = rng.sample(len(features_nd), self.config.max_images, "collapse")
        wide_nd: NDArray[np.float64] = features_nd[chosen_n].astype(np.float64)
        unit_nd = wide_nd / np.maximum(np.linalg.norm(wide_nd, axis=1, keepdims=True), 1e-12)
        centered_k = np.linalg.svd(wide_nd - wide_nd.mean(0), compute_uv=False)
        if centered_k[0] <= _ROUNDING * np.linalg.norm(wide_nd):
            centered_k = np.zeros(1)
        rank, most = effective_rank(centered_k), min(len(wide_nd) - 1, wide_nd.shape[1])
        yield Row("effective_rank", rank)
        yield Row("effective_rank_share", rank / most)
        yield Row("rankme", rankme(np.linalg.svd(wide_nd, compute_uv=False)))
        if (alpha := alpha_req(centered_k**2)) is not None:
            yield Row("alpha_req", alpha)
        yield Row("spread", float(unit_nd.std(0).mean() * np.sqrt(wide_nd.shape[1])))
        yield Row("constant", float((wide_nd.std(0) <= _ROUNDING * (np.abs(wide_nd.mean(0)) + 1)).mean()))
        yield Row("uniformity", uniformity(unit_nd))

    @staticmethod
    def finding(layer: str, values: Mapping[str, float]) -> str:
        """Return a sentence that says if the features of a layer have collapsed, by what `measure` yields."""
        if not {"effective_rank", "effective_rank_share", "spread", "constant"} <= values.keys():
            return ""  # Rows of an earlier version.
        rank, share, constant = (
            values[name] for name in ("effective_rank", "effective_rank_share", "constant")
        )
        most = f" of {rank / share:.0f}" if share else ""
        close, flat = values["spread"] < _LEAST_SPREAD, rank < _LEAST_RANK and share < _LEAST_SHARE
        have = "have" if close or flat or constant > _MOST_CONSTANT else "have not"
        found = f"effective rank {rank:.3g}{most}" + (f", spread {values['spread']:.4f}" if close else "")
        percent = f"{100 * constant:.0f}" if constant >= 0.1 else f"{100 * constant:.2g}"
        are = f"{percent} % constant features" if constant else "no constant features"
        return f"The {layer} features {have} collapsed: {found} and {are}."


def effective_rank(singular_k: NDArray[Any]) -> float:
    """Return the effective rank of a matrix with these singular values, descending; 0 if all are 0."""
    if singular_k[0] == 0:
        return 0.0
    kept_k = singular_k[singular_k > _ROUNDING * singular_k[0]]
    share_k = kept_k / kept_k.sum()
    return float(np.exp(-(share_k * np.log(share_k)).sum()))


def rankme(singular_k: NDArray[Any]) -> float:
    """Return RankMe of a matrix with these singular values; 0 if all are 0."""
    if not singular_k.any():
        return 0.0
    share_k = singular_k / singular_k.sum() + _RANKME_EPS
    return float(np.exp(-(share_k * np.log(share_k)).sum()))


def alpha_req(eigenvalues_k: NDArray[Any]) -> float | None:
    """Return the exponent of the power law of descending eigenvalues; None if fewer than three exceed rounding."""
    kept_k = eigenvalues_k[eigenvalues_k > _ROUNDING**2 * eigenvalues_k[0]]
    if len(kept_k) < 3:
        return None
    slope, _ = np.polyfit(np.log(np.arange(1, len(kept_k) + 1)), np.log(kept_k), 1)
    return float(-slope)


def uniformity(unit_nd: NDArray[np.float64]) -> float:
    """Return the uniformity of unit vectors (n, d), over all pairs. Vectors of zeros are equal to one another."""
    n, square_n = len(unit_nd), np.square(unit_nd).sum(1)
    close_nn = np.exp(-2 * (square_n[:, None] + square_n - 2 * (unit_nd @ unit_nd.T)))
    return float(np.log((close_nn.sum() - np.trace(close_nn)) / (n * (n - 1))))
