"""Ridge regression from sums over rows, so that any number of rows takes one pass and constant memory.

The loss is the mean squared error plus penalty * |weights|^2, of features that are standardized by their own mean and
standard deviation; the offset has no penalty. The minimum is exact, so there is no learning rate and no seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The penalties that are tried, the strongest first. Features are standardized, so they mean the same for every network.
PENALTIES = (1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# The share of the images, by their place in a random order, that chooses the penalty.
HELD_OUT = 0.1
# A feature that varies less than this, relative to its mean, is constant but for rounding.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Readout:
    """A linear map from features to targets: weights (d, k) and offset (k,), float32."""

    weights_dk: Tensor
    offset_k: Tensor

    def __call__(self, features_nd: Tensor) -> Tensor:
        """Return targets (n, k)."""
        return features_nd @ self.weights_dk + self.offset_k


class Moments:
    """Sums over rows of features (d) and targets (k), in float64: all that a ridge regression needs."""

    def __init__(self, d: int, k: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        # One more column is constant, for the mean and the offset.
        self.features_dd = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)
        self.targets_dk = torch.zeros(d + 1, k, dtype=torch.float64, device=device)
        self.squares_k = torch.zeros(k, dtype=torch.float64, device=device)

    def add(self, features_nd: Tensor, targets_nk: Tensor) -> None:
        """Add rows."""
        # Products of float32 would make a covariance that is not positive definite.
        wide_nd = torch.cat([features_nd, features_nd.new_ones(len(features_nd), 1)], 1).double()
        self.rows += len(features_nd)
        self.features_dd += wide_nd.T @ wide_nd
        self.targets_dk += wide_nd.T @ targets_nk.double()
        self.squares_k += targets_nk.double().square().sum(0)

    def __add__(self, other: Moments) -> Moments:
        made = Moments(len(self.features_dd) - 1, len(self.squares_k), self.squares_k.device)
        made.rows = self.rows + other.rows
        made.features_dd = self.features_dd + other.features_dd
        made.targets_dk = self.targets_dk + other.targets_dk
        made.squares_k = self.squares_k + other.squares_k
        return made

    def solve(self, penalty: float) -> Readout:
        """Return the minimum of the loss; see the docstring of the module."""
        mean_d, mean_k = self.features_dd[-1, :-1] / self.rows, self.targets_dk[-1] / self.rows
        covariance_dd = self.features_dd[:-1, :-1] / self.rows - mean_d[:, None] * mean_d
        cross_dk = self.targets_dk[:-1] / self.rows - mean_d[:, None] * mean_k
        std_d = covariance_dd.diagonal().clamp(min=0).sqrt()
        scale_d = torch.where(std_d > _CONSTANT * (mean_d.abs() + 1), 1 / std_d, 0.0)
        standard_dd = covariance_dd * scale_d * scale_d[:, None]
        standard_dd.diagonal().add_(penalty)
        weights_dk = torch.cholesky_solve(cross_dk * scale_d[:, None], torch.linalg.cholesky(standard_dd))
        weights_dk = weights_dk * scale_d[:, None]
        return Readout(weights_dk.float(), (mean_k - mean_d @ weights_dk).float())

    def error(self, readout: Readout) -> float:
        """Return the mean squared error of a readout on these rows, summed over the targets."""
        wide_dk = torch.cat([readout.weights_dk, readout.offset_k[None]]).double()
        fitted = (wide_dk * (self.features_dd @ wide_dk)).sum() - 2 * (wide_dk * self.targets_dk).sum()
        return float(fitted + self.squares_k.sum()) / self.rows


def fit(fitted: Moments, held_out: Moments) -> tuple[Readout, float]:
    """Return the readout of all rows with the penalty that is best on the held-out rows, and that penalty.

    Without fitted or held-out rows the strongest penalty is used.
    """
    best = PENALTIES[0]
    if fitted.rows and held_out.rows:
        best = min(PENALTIES, key=lambda penalty: held_out.error(fitted.solve(penalty)))
    return (fitted + held_out).solve(best), best
