"""A linear classifier on frozen features.

The default schedule, "optimum", is multinomial logistic regression on features standardized by the train set, minimized
with L-BFGS (as Kornblith et al. 2019, "Do better ImageNet models transfer better?", and CLIP). It has no learning rate
that could favor one representation. The weight decay is chosen on a tenth of the train set, from the strongest to the
first that is worse, and the classifier is then fitted on all of it.

The other schedules are those of Goyal et al. 2019 ("Scaling and benchmarking self-supervised visual representation
learning"), used by PIRL and VISSL: SGD with Nesterov momentum 0.9, batches of 256, a learning rate of 0.01 and three
drops. Two differences: images are evaluation views, not random crops, and features are standardized one by one over the
train set, not by a BatchNorm over channels.

A layer is pooled to a grid of at most 9,216 features, as there; see `raysl.extraction.layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from raysl import optim, rng
from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, Tiles, accuracy_rows, check, rank, tile_rows
from raysl.ray_cluster import gpus
from raysl.rng import ImageRng

_BATCH = 256
# The projection saves time if there are fewer images for each feature than this.
_MAX_IMAGES_PER_FEATURE = 0.75


@dataclass(frozen=True)
class Sgd:
    """A schedule of SGD."""

    epochs: int  # number of passes over the train set
    drops: tuple[int, ...]  # epochs after which the learning rate is divided by ten
    lr: float = 0.01  # initial learning rate
    weight_decay: float = 5e-4  # weight decay of the weights; the bias has none


SCHEDULES = {
    "imagenet": Sgd(28, (8, 16, 24)),
    "places205": Sgd(14, (4, 8, 12)),
    "inat18": Sgd(84, (24, 48, 72)),
    "fast": Sgd(7, (2, 4, 6)),
}


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of the linear probe.

    Args:
        schedule: "optimum" for L-BFGS; the others are SGD with the published schedules for ImageNet, Places205 and
            iNaturalist 2018; "fast" has a quarter of the epochs of "imagenet".
        dims: maximum number of features of a layer, whose feature map is averaged into a grid; 0 for the mean over all
            positions.
        weight_decays: for "optimum": candidates for w in mean cross-entropy + w / 2 * |weights|^2.
        held_out: for "optimum": share of the train images, chosen at random, on which the weight decay is selected.
        max_iterations: maximum number of iterations of L-BFGS in each fit.
        tolerance: a fit stops when every entry of the gradient, in rescaled coordinates, is at most this large.
    """

    version: ClassVar[int] = 2
    schedule: Literal["optimum", "imagenet", "places205", "inat18", "fast"] = "optimum"
    dims: Annotated[int, Bounds(0, 10**6)] = 9216
    weight_decays: tuple[Annotated[float, Bounds(1e-12, 1e6)], ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    held_out: Annotated[float, Bounds(1e-3, 0.9)] = 0.1
    max_iterations: Annotated[int, Bounds(1, 10**6)] = 200
    tolerance: Annotated[float, Bounds(1e-12, 1)] = 1e-4


class Linear:
    """Logistic regression; the primary metric is top-1."""

    primary_metric = "top1"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dims = config.dims

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Yield accuracies (see `raysl.probes.accuracy_rows`) and the weight decay."""
        check("linear", train, test, learns=True)
        # Held-out images go last, so that the others are a view and no copy.
        indices = np.arange(len(train.labels_n), dtype=np.int64)
        held_n = ImageRng(0, np.zeros_like(indices), indices).chance("held out", self.config.held_out).numpy()
        order_n = np.argsort(held_n, kind="stable")
        device = gpus.device()
        tiles = Tiles(device, tile_rows(train.features_nd, device))
        home = device if tiles.rows == len(order_n) else torch.device("cpu")
        train_nd = torch.from_numpy(train.features_nd[order_n]).to(home)
        labels_n = torch.from_numpy(train.labels_n[order_n]).to(device)
        std_d, mean_d = torch.std_mean(train_nd, dim=0, correction=0)
        # A constant feature is dropped; dividing it by its rounding errors would make it count.
        scale_d = torch.where(std_d > 1e-6 * (mean_d.abs() + 1), 1 / std_d, 0.0)
        train_nd.sub_(mean_d).mul_(scale_d)
        test_nd = (torch.from_numpy(test.features_nd).to(home) - mean_d).mul_(scale_d)
        if self.config.schedule == "optimum":
            train_nd, test_nd = in_span(train_nd, test_nd)
            weight_decay, solution = self._optimum(train_nd, labels_n, int((~held_n).sum()), tiles)
        else:
            schedule = SCHEDULES[self.config.schedule]
            weight_decay, solution = schedule.weight_decay, descend(train_nd, labels_n, schedule)
        test_labels_n = torch.from_numpy(test.labels_n)
        rank_n = rank(solution.scores(test_nd, tiles), test_labels_n.to(device))
        yield from accuracy_rows(rank_n, test_labels_n, len(solution.bias_c))
        yield Row("weight_decay", weight_decay)

    def _optimum(
        self, train_nd: Tensor, labels_n: Tensor, num_fitted: int, tiles: Tiles
    ) -> tuple[float, Solution]:
        """Return the weight decay that is best on the held-out images (the stronger of equals), and the solution.

        The first `num_fitted` images are not held out.
        """
        fit = Fit(train_nd, int(labels_n.max()) + 1, self.config, tiles)
        strongest_first = sorted(self.config.weight_decays, reverse=True)
        best = solution = fit.zero()
        chosen, best_right = strongest_first[0], -1
        if num_fitted < len(labels_n) and int((labels_n[:num_fitted].bincount() > 0).sum()) > 1:
            for weight_decay in strongest_first:
                # Each fit starts from the previous solution.
                solution = fit(train_nd[:num_fitted], labels_n[:num_fitted], weight_decay, solution)
                scores_nc = solution.scores(train_nd[num_fitted:], tiles)
                right = int((rank(scores_nc, labels_n[num_fitted:]) == 0).sum())
                if right < best_right:
                    # Weaker decays take longer and overfit more.
                    break
                if right > best_right:
                    chosen, best_right, best = weight_decay, right, solution
        return chosen, fit(train_nd, labels_n, chosen, best)


@dataclass(frozen=True)
class Solution:
    """A fitted classifier: weights (c, d) and bias (c,)."""

    weights_cd: Tensor
    bias_c: Tensor

    def scores(self, features_nd: Tensor, tiles: Tiles) -> Tensor:
        """Return logits (n, c), computed in tiles."""
        return torch.cat([linear(tile_nd, self.weights_cd, self.bias_c) for tile_nd in tiles(features_nd)])


class Fit:
    """Minimize the loss with L-BFGS, in coordinates in which its curvature is about equal in all directions.

    The second derivative of the loss is close to covariance / c + weight decay, where c is the number of classes.
    Without the change of coordinates correlated features take ten times the iterations.

    Args:
        features_nd: standardized features, for their covariance; 2 d of them are used if there are more.
        tiles: how features are sent to the device, where loss and gradient are summed over tiles.
    """

    def __init__(self, features_nd: Tensor, classes: int, config: Config, tiles: Tiles) -> None:
        some_nd = features_nd[:: max(1, len(features_nd) // (2 * features_nd.shape[1]))].to(tiles.device)
        self._curvature_dd = (some_nd.T @ some_nd).double() / (len(some_nd) * classes)
        self._classes = classes
        self._config = config
        self._tiles = tiles

    def zero(self) -> Solution:
        """Return the starting point of a first fit."""
        zeros_cd = self._curvature_dd.new_zeros(self._classes, len(self._curvature_dd), dtype=torch.float32)
        return Solution(zeros_cd, zeros_cd.new_zeros(self._classes))

    def _coordinates(self, weight_decay: float) -> Tensor:
        """Return an upper triangular matrix (d, d); its product with the weights gives the new coordinates."""
        # The small term is for features that repeat each other. It changes the path and not the minimum.
        floor = weight_decay + 1e-5 / self._classes
        raised_dd = self._curvature_dd + floor * torch.eye(
            len(self._curvature_dd), dtype=torch.float64, device=self._curvature_dd.device
        )
        upper_dd: Tensor = torch.linalg.cholesky(raised_dd).T.float()
        return upper_dd

    def __call__(
        self, features_nd: Tensor, labels_n: Tensor, weight_decay: float, start: Solution
    ) -> Solution:
        upper_dd = self._coordinates(weight_decay)
        point_dc = (upper_dd @ start.weights_cd.T).requires_grad_()
        bias_c = start.bias_c.clone().requires_grad_()
        solver = optim.Lbfgs(
            [point_dc, bias_c],
            max_iter=self._config.max_iterations,
            max_eval=2 * self._config.max_iterations,
            tolerance_grad=self._config.tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def current() -> Solution:
            weights_dc = torch.linalg.solve_triangular(upper_dd, point_dc, upper=True)
            # Classes first: MKL takes 25 times as long for the gradient of weights (d, c).
            return Solution(weights_dc.T.contiguous(), bias_c)

        def loss() -> Tensor:
            solver.zero_grad()
            now = current()
            # A tile is freed after its own backward pass, which stops at the weights.
            weights_cd = now.weights_cd.detach().requires_grad_()
            value = torch.zeros((), device=weights_cd.device)
            labels = torch.split(labels_n, self._tiles.rows)
            for tile_nd, tile_n in zip(self._tiles(features_nd), labels, strict=True):
                scores_nc = linear(tile_nd, weights_cd, bias_c)
                part = cross_entropy(scores_nc, tile_n) * (len(tile_n) / len(labels_n))
                part.backward()  # type: ignore[no-untyped-call]
                value += part.detach()
            decay = weight_decay / 2 * weights_cd.square().sum()
            decay.backward()  # type: ignore[no-untyped-call]
            # Equal to `backward(weights_cd.grad)`, which imports sympy.
            (now.weights_cd * weights_cd.grad).sum().backward()  # type: ignore[no-untyped-call,operator]
            return value + decay.detach()

        solver.step(loss)
        found = current()
        return Solution(found.weights_cd.detach(), found.bias_c.detach())


def descend(features_nd: Tensor, labels_n: Tensor, schedule: Sgd) -> Solution:
    """Return the classifier after a schedule of SGD from zero weights, on the device of the labels."""
    classes, device = int(labels_n.max()) + 1, labels_n.device
    weights_cd = torch.zeros(classes, features_nd.shape[1], device=device, requires_grad=True)
    bias_c = torch.zeros(classes, device=device, requires_grad=True)
    groups = [
        {"params": [weights_cd], "weight_decay": schedule.weight_decay},
        {"params": [bias_c], "weight_decay": 0.0},
    ]
    solver = optim.Sgd(groups, lr=schedule.lr, momentum=0.9, nesterov=True)
    drops = torch.optim.lr_scheduler.MultiStepLR(solver, schedule.drops, gamma=0.1)
    for epoch in range(schedule.epochs):
        order_n = torch.from_numpy(rng.generator("linear probe", epoch).permutation(len(labels_n)))
        for rows_b in torch.split(order_n.to(features_nd.device), _BATCH):
            solver.zero_grad()
            features_bd, labels_b = features_nd[rows_b].to(device), labels_n[rows_b.to(device)]
            scores_bc = linear(features_bd, weights_cd, bias_c)
            cross_entropy(scores_bc, labels_b).backward()  # type: ignore[no-untyped-call]
            solver.step()
        drops.step()
    return Solution(weights_cd.detach(), bias_c.detach())


def in_span(train_nd: Tensor, test_md: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets in an orthonormal basis of the span of the first, (n, n) and (m, n); unchanged if n is large.

    The weights of a linear classifier with a penalty on their squared length are sums of its training images
    (Schölkopf, Herbrich and Smola 2001, "A generalized representer theorem"). The basis keeps all products and lengths,
    so the classifier is the same and takes less time to fit.

    Args:
        train_nd: (n, d), floating point.
        test_md: (m, d), of the same dtype. Its part outside of the span is lost; no such classifier depends on it.
    """
    if len(train_nd) > _MAX_IMAGES_PER_FEATURE * train_nd.shape[1]:
        return train_nd, test_md
    basis_dn, _ = torch.linalg.qr(train_nd.T)
    return train_nd @ basis_dn, test_md @ basis_dn
