"""A linear classifier on frozen features: how much of the classes can be read off by a plane.

Multinomial logistic regression on features standardised by the train set, minimised to its optimum with L-BFGS (as
Kornblith et al. 2019, "Do better ImageNet models transfer better?", and the CLIP protocol), so that no learning rate
stands between two representations. The weight decay is chosen on a tenth of the train set that is held out, and the
classifier is then fitted again on all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from raysl.errors import UserError
from raysl.probes import Labelled, Row, check, rank, same_images, topk_rows
from raysl.rng import Draws


@dataclass(frozen=True)
class Config:
    """Protocol of the linear probe.

    Args:
        weight_decays: candidates for w of: mean cross-entropy + w / 2 * |weights|^2.
        held_out: share of the train images that choose among them, drawn by index.
        max_iterations: of L-BFGS, for each fit.
        tolerance: of the largest entry of the gradient, in the coordinates of `Fit`, where a fit stops.
        version: see `raysl.probes`.
    """

    weight_decays: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    held_out: float = 0.1
    max_iterations: int = 200
    tolerance: float = 1e-4
    version: int = 1

    def __post_init__(self) -> None:
        if not self.weight_decays or min(self.weight_decays) <= 0:
            raise UserError(f"linear.weight_decays is {self.weight_decays}; it must hold numbers above 0.")
        if not 0 < self.held_out < 1:
            raise UserError(f"linear.held_out is {self.held_out}; it must be above 0 and below 1.")


class Linear:
    """Logistic regression; its headline is top-1."""

    headline = "top1"

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Yields top-1, top-5 where there are more than five classes, and the weight decay that was chosen."""
        check(train, test)
        if same_images(train, test):
            raise UserError(
                "The linear probe was given one data set to learn from and to be scored on, which would measure how "
                "well it remembers. Give another test set; the probe knn can use one set for both."
            )
        if len(np.unique(train.labels_n)) < 2:
            raise UserError("The linear probe needs a train set of at least two classes, and this has one.")
        train_nd, labels_n = torch.from_numpy(train.features_nd), torch.from_numpy(train.labels_n)
        std_d, mean_d = torch.std_mean(train_nd, dim=0, correction=0)
        # A feature that never changes says nothing; dividing by its rounding errors would make it speak.
        scale_d = torch.where(std_d > 1e-6 * (mean_d.abs() + 1), 1 / std_d, 0.0)
        train_nd = (train_nd - mean_d) * scale_d
        fit = Fit(train_nd, int(labels_n.max()) + 1, self.config)
        chosen, begin = self._choose(train_nd, labels_n, fit)
        solution = fit(train_nd, labels_n, chosen, begin)
        test_nd = (torch.from_numpy(test.features_nd) - mean_d) * scale_d
        yield from topk_rows(
            rank(solution.scores(test_nd), torch.from_numpy(test.labels_n)), solution.classes
        )
        yield Row("weight_decay", chosen)

    def _choose(self, train_nd: Tensor, labels_n: Tensor, fit: Fit) -> tuple[float, Solution]:
        """The weight decay that is best on the held-out images, the stronger of equals, and its solution."""
        indices = np.arange(len(labels_n), dtype=np.int64)
        held_n = Draws(0, np.zeros_like(indices), indices).chance("held out", self.config.held_out)
        strongest_first = sorted(self.config.weight_decays, reverse=True)
        best = solution = fit.zero()
        chosen, most = strongest_first[0], -1
        if not held_n.any() or len(np.unique(labels_n[~held_n].numpy())) < 2:
            return chosen, best
        fit_nd, fit_labels_n = train_nd[~held_n], labels_n[~held_n]
        held_nd, held_labels_n = train_nd[held_n], labels_n[held_n]
        for weight_decay in strongest_first:
            # Each fit begins where the one before ended.
            solution = fit(fit_nd, fit_labels_n, weight_decay, solution)
            right = int((rank(solution.scores(held_nd), held_labels_n) == 0).sum())
            if right > most:
                chosen, most, best = weight_decay, right, solution
        return chosen, best


@dataclass(frozen=True)
class Solution:
    """A fitted classifier: weights (d, c) and bias (c,)."""

    weights_dc: Tensor
    bias_c: Tensor

    @property
    def classes(self) -> int:
        return len(self.bias_c)

    def scores(self, features_nd: Tensor) -> Tensor:
        """Logits (n, c)."""
        return torch.addmm(self.bias_c, features_nd, self.weights_dc)


class Fit:
    """Minimises the loss with L-BFGS, in coordinates in which it is about equally curved in all directions.

    The second derivative of the loss is close to covariance / c + weight decay, c being the number of classes. Without
    the change of coordinates correlated features take ten times the iterations.

    Args:
        features_nd: standardised; their covariance is used.
        classes: c.
        config: see `Config`.
    """

    def __init__(self, features_nd: Tensor, classes: int, config: Config) -> None:
        self._curvature_dd = (features_nd.T @ features_nd).double() / (len(features_nd) * classes)
        self._classes = classes
        self._config = config

    def zero(self) -> Solution:
        """Where a first fit begins."""
        return Solution(torch.zeros(len(self._curvature_dd), self._classes), torch.zeros(self._classes))

    def _coordinates(self, weight_decay: float) -> tuple[Tensor, Tensor]:
        """Matrices (d, d) from the new coordinates to weights, and back."""
        identity_dd = torch.eye(len(self._curvature_dd), dtype=torch.float64)
        # A little more than zero, for features that repeat each other. It moves the path and not the minimum.
        floor = weight_decay + 1e-5 / self._classes
        back_dd = torch.linalg.cholesky(self._curvature_dd + floor * identity_dd).T
        there_dd = torch.linalg.solve_triangular(back_dd, identity_dd, upper=True)
        return there_dd.float(), back_dd.float()

    def __call__(
        self, features_nd: Tensor, labels_n: Tensor, weight_decay: float, begin: Solution
    ) -> Solution:
        """The solution for one weight decay."""
        there_dd, back_dd = self._coordinates(weight_decay)
        place_dc = (back_dd @ begin.weights_dc).requires_grad_()
        bias_c = begin.bias_c.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [place_dc, bias_c],
            max_iter=self._config.max_iterations,
            max_eval=2 * self._config.max_iterations,
            tolerance_grad=self._config.tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            solver.zero_grad()
            now = Solution(there_dd @ place_dc, bias_c)
            decay = weight_decay / 2 * now.weights_dc.square().sum()
            value = cross_entropy(now.scores(features_nd), labels_n) + decay
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
        return Solution((there_dd @ place_dc).detach(), bias_c.detach())
