"""A linear classifier on frozen features: how much of the classes can be read off by a plane.

The default is multinomial logistic regression on features standardised by the train set, minimised to its optimum with
L-BFGS (as Kornblith et al. 2019, "Do better ImageNet models transfer better?", and the CLIP protocol), so that no
learning rate stands between two representations. The weight decay is chosen on a tenth of the train set that is held
out, from the strongest on until a weaker one is worse, and the classifier is then fitted again on all of it.

The other schedules are those of Goyal et al. 2019 ("Scaling and benchmarking self-supervised visual representation
learning"), which PIRL and VISSL use: SGD with Nesterov momentum 0.9, batches of 256, a learning rate of 0.01 and three
drops. Two things differ: the images are the evaluation views, where theirs are cropped and mirrored anew in every
epoch, and features are standardised number by number over the train set, where theirs pass a BatchNorm by channel.

A layer is seen as a grid of at most 9,216 numbers, as there; see `raysl.extraction.encoders`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from raysl import rng
from raysl.errors import UserError, unknown
from raysl.probes import Labelled, Row, check, rank, same_images, topk_rows
from raysl.probes._span import in_span
from raysl.rng import ImageRng

_BATCH = 256


@dataclass(frozen=True)
class Sgd:
    """A schedule.

    Args:
        epochs: visits to every image.
        drops: epochs after which the learning rate is a tenth of what it was.
        lr: at the beginning.
        weight_decay: of the weights, not of the bias.
    """

    epochs: int
    drops: tuple[int, ...]
    lr: float = 0.01
    weight_decay: float = 5e-4


SCHEDULES = {
    "imagenet": Sgd(28, (8, 16, 24)),
    "places205": Sgd(14, (4, 8, 12)),
    "inat18": Sgd(84, (24, 48, 72)),
    "fast": Sgd(7, (2, 4, 6)),
}


@dataclass(frozen=True)
class Config:
    """Protocol of the linear probe.

    Args:
        schedule: "optimum" is L-BFGS; the others are SGD, as on ImageNet, Places205 and iNaturalist 2018; "fast" is a
            quarter of the first.
        dims: numbers of a layer that it sees at most, with their places; 0 for means over places.
        weight_decays: of "optimum": candidates for w of: mean cross-entropy + w / 2 * |weights|^2.
        held_out: of "optimum": share of the train images that choose among them, drawn by index.
        max_iterations: of L-BFGS, for each fit.
        tolerance: of the largest entry of the gradient, in the coordinates of `Fit`, where a fit stops.
        version: see `raysl.probes`.
    """

    schedule: Literal["optimum", "imagenet", "places205", "inat18", "fast"] = "optimum"
    dims: int = 9216
    weight_decays: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    held_out: float = 0.1
    max_iterations: int = 200
    tolerance: float = 1e-4
    version: int = 2

    def __post_init__(self) -> None:
        if self.schedule != "optimum" and self.schedule not in SCHEDULES:
            raise unknown("schedule of the linear probe", self.schedule, ["optimum", *SCHEDULES])
        if self.dims < 0:
            raise UserError(f"linear.dims is {self.dims}; it must be a number of features, or 0 for means.")
        if not self.weight_decays or min(self.weight_decays) <= 0:
            raise UserError(f"linear.weight_decays is {self.weight_decays}; it must hold numbers above 0.")
        if not 0 < self.held_out < 1:
            raise UserError(f"linear.held_out is {self.held_out}; it must be above 0 and below 1.")


class Linear:
    """Logistic regression; its headline is top-1."""

    headline = "top1"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dims = config.dims

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Yields top-1, top-5 where there are more than five classes, and the weight decay."""
        check(train, test)
        if same_images(train, test):
            raise UserError(
                "The linear probe was given one data set to learn from and to be scored on, which would measure how "
                "well it remembers. Give another test set; the probe knn can use one set for both."
            )
        if len(np.unique(train.labels_n)) < 2:
            raise UserError("The linear probe needs a train set of at least two classes, and this has one.")
        # Images that choose the weight decay go last, so that the others are a view and no copy.
        indices = np.arange(len(train.labels_n), dtype=np.int64)
        held_n = ImageRng(0, np.zeros_like(indices), indices).chance("held out", self.config.held_out).numpy()
        order_n = np.argsort(held_n, kind="stable")
        train_nd = torch.from_numpy(train.features_nd[order_n])
        labels_n = torch.from_numpy(train.labels_n[order_n])
        std_d, mean_d = torch.std_mean(train_nd, dim=0, correction=0)
        # A feature that never changes says nothing; dividing by its rounding errors would make it speak.
        scale_d = torch.where(std_d > 1e-6 * (mean_d.abs() + 1), 1 / std_d, 0.0)
        train_nd.sub_(mean_d).mul_(scale_d)
        test_nd = (torch.from_numpy(test.features_nd) - mean_d).mul_(scale_d)
        if self.config.schedule == "optimum":
            train_nd, test_nd = in_span(train_nd, test_nd)
            chosen, solution = self._optimum(train_nd, labels_n, int((~held_n).sum()))
        else:
            schedule = SCHEDULES[self.config.schedule]
            chosen, solution = schedule.weight_decay, descend(train_nd, labels_n, schedule)
        found_n = rank(solution.scores(test_nd), torch.from_numpy(test.labels_n))
        yield from topk_rows(found_n, solution.classes)
        yield Row("weight_decay", chosen)

    def _optimum(self, train_nd: Tensor, labels_n: Tensor, fitted: int) -> tuple[float, Solution]:
        """The weight decay that is best on the held-out images, the stronger of equals, and the solution.

        Args:
            fitted: number of images, the first ones, that are not held out.
        """
        fit = Fit(train_nd, int(labels_n.max()) + 1, self.config)
        strongest_first = sorted(self.config.weight_decays, reverse=True)
        best = solution = fit.zero()
        chosen, most = strongest_first[0], -1
        if fitted < len(labels_n) and len(labels_n[:fitted].bincount().nonzero()) > 1:
            for weight_decay in strongest_first:
                # Each fit begins where the one before ended.
                solution = fit(train_nd[:fitted], labels_n[:fitted], weight_decay, solution)
                right = int((rank(solution.scores(train_nd[fitted:]), labels_n[fitted:]) == 0).sum())
                if right < most:
                    # The weaker it gets, the longer a fit takes and the more it remembers.
                    break
                if right > most:
                    chosen, most, best = weight_decay, right, solution
        return chosen, fit(train_nd, labels_n, chosen, best)


@dataclass(frozen=True)
class Solution:
    """A fitted classifier: weights (c, d) and bias (c,)."""

    weights_cd: Tensor
    bias_c: Tensor

    @property
    def classes(self) -> int:
        return len(self.bias_c)

    def scores(self, features_nd: Tensor) -> Tensor:
        """Logits (n, c)."""
        scores_nc: Tensor = linear(features_nd, self.weights_cd, self.bias_c)
        return scores_nc


class Fit:
    """Minimises the loss with L-BFGS, in coordinates in which it is about equally curved in all directions.

    The second derivative of the loss is close to covariance / c + weight decay, c being the number of classes. Without
    the change of coordinates correlated features take ten times the iterations.

    Args:
        features_nd: standardised; their covariance is used, estimated from 2 d of them where there are more.
        classes: c.
        config: see `Config`.
    """

    def __init__(self, features_nd: Tensor, classes: int, config: Config) -> None:
        some_nd = features_nd[:: max(1, len(features_nd) // (2 * features_nd.shape[1]))]
        self._curvature_dd = (some_nd.T @ some_nd).double() / (len(some_nd) * classes)
        self._classes = classes
        self._config = config

    def zero(self) -> Solution:
        """Where a first fit begins."""
        return Solution(torch.zeros(self._classes, len(self._curvature_dd)), torch.zeros(self._classes))

    def _coordinates(self, weight_decay: float) -> Tensor:
        """The upper triangular matrix (d, d) R whose product with weights gives the new coordinates."""
        # A little more than zero, for features that repeat each other. It moves the path and not the minimum.
        floor = weight_decay + 1e-5 / self._classes
        raised_dd = self._curvature_dd + floor * torch.eye(len(self._curvature_dd), dtype=torch.float64)
        upper_dd: Tensor = torch.linalg.cholesky(raised_dd).T.float()
        return upper_dd

    def __call__(
        self, features_nd: Tensor, labels_n: Tensor, weight_decay: float, begin: Solution
    ) -> Solution:
        """The solution for one weight decay."""
        back_dd = self._coordinates(weight_decay)
        place_dc = (back_dd @ begin.weights_cd.T).requires_grad_()
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

        def there() -> Solution:
            weights_dc = torch.linalg.solve_triangular(back_dd, place_dc, upper=True)
            # Classes first: MKL takes 25 times as long for the gradient of weights (d, c).
            return Solution(weights_dc.T.contiguous(), bias_c)

        def loss() -> Tensor:
            solver.zero_grad()
            now = there()
            decay = weight_decay / 2 * now.weights_cd.square().sum()
            value = cross_entropy(now.scores(features_nd), labels_n) + decay
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
        found = there()
        return Solution(found.weights_cd.detach(), found.bias_c.detach())


def descend(features_nd: Tensor, labels_n: Tensor, schedule: Sgd) -> Solution:
    """The classifier that a schedule of SGD arrives at, from weights of zero.

    Args:
        features_nd: standardised.
        labels_n: int64 (n,).
    """
    classes = int(labels_n.max()) + 1
    weights_cd = torch.zeros(classes, features_nd.shape[1], requires_grad=True)
    bias_c = torch.zeros(classes, requires_grad=True)
    groups = [
        {"params": [weights_cd], "weight_decay": schedule.weight_decay},
        {"params": [bias_c], "weight_decay": 0.0},
    ]
    solver = torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True)
    drops = torch.optim.lr_scheduler.MultiStepLR(solver, schedule.drops, gamma=0.1)
    for epoch in range(schedule.epochs):
        order_n = torch.from_numpy(rng.generator("linear probe", epoch).permutation(len(labels_n)))
        for rows_b in torch.split(order_n, _BATCH):
            solver.zero_grad()
            scores_bc = linear(features_nd[rows_b], weights_cd, bias_c)
            cross_entropy(scores_bc, labels_n[rows_b]).backward()  # type: ignore[no-untyped-call]
            solver.step()
        drops.step()
    return Solution(weights_cd.detach(), bias_c.detach())
