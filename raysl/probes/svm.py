"""Linear support vector machines, one for each class, scored by average precision: the protocol of PASCAL VOC 2007.

Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning", as in VISSL: features of
unit length in float64, the squared hinge loss with L2, positives weighted twice, and for each class the cost with the
best average precision in three-fold cross-validation. An image that is "difficult" for a class is a negative in
training and is left out of the score. The average precision is the area under the monotone envelope of precision, as in
VOC since 2010, and not the mean at 11 points. ResNet-50 pretrained on ImageNet (in %, best layer): PIRL 81.1, Jigsaw
64.5, supervised 87.5.

The solver is scikit-learn's, of the extra `eval`. It solves the dual, whose time grows faster than the number of
images, so at most as many images as VOC07 has are used.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from raysl import rng
from raysl.errors import UserError, package
from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, check, multi_hot
from raysl.probes.linear import in_span

_FOLDS = 3
_LENGTH_FLOOR = 1e-5
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of the support vector machines.

    Args:
        costs: candidates for C.
        dims: maximum number of features of a layer, whose feature map is averaged into a grid; 0 for the mean over all
            positions.
        max_images: largest number of train images, sampled at random; VOC07 has 5,011.
    """

    version: ClassVar[int] = 2
    costs: tuple[Annotated[float, Bounds(1e-9, 1e9)], ...] = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    dims: Annotated[int, Bounds(0, 10**6)] = 9216
    max_images: Annotated[int, Bounds(2, 10**9)] = 5011


class Svm:
    """One machine for each class that the test set shows; images may show several. The primary metric is mAP."""

    primary_metric = "mAP"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dims = config.dims

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Yield the mean over classes of the average precision; it is 0 for a class that the train set never shows."""
        check("svm", train, test, several=True, learns=True)
        if train.labels_n.ndim == 2:
            classes = train.labels_n.shape[1]
        else:
            classes = int(max(train.labels_n.max(), test.labels_n.max())) + 1
        kept_n = rng.sample(len(train.labels_n), self.config.max_images, "svm")
        units = unit_rows(train.features_nd[kept_n]), unit_rows(test.features_nd)
        train_nd, test_nd = (one.numpy() for one in in_span(*map(torch.from_numpy, units)))
        shown_nc = multi_hot(train.labels_n, classes)[kept_n]
        wanted_nc = multi_hot(test.labels_n, classes)
        judged = [c for c in range(classes) if (wanted_nc[:, c] == 1).any()]
        if not judged:
            raise UserError("No image of the test set shows a class. Give a test set with labels.")

        def precision(c: int) -> float:
            scores_n = self._scores(train_nd, np.where(shown_nc[:, c] == 1, 1, -1), test_nd)
            sure_n = wanted_nc[:, c] >= 0
            return average_precision(scores_n[sure_n], wanted_nc[sure_n, c]) if scores_n.any() else 0.0

        with one_solver():
            found = [precision(c) for c in judged]
        yield Row("mAP", float(np.mean(found)))

    def _scores(
        self, train_nd: NDArray[np.float64], sign_n: NDArray[np.int64], test_nd: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return float64 (n,): scores of the test images with the best cost; 0 if no train image shows the class."""
        fewest = min((sign_n == 1).sum(), (sign_n == -1).sum())
        if not fewest:
            return np.full(len(test_nd), float(sign_n[0] == 1))
        cost = choose(train_nd, sign_n, self.config.costs) if fewest > 1 else 1.0
        return fitted(train_nd, sign_n, cost, test_nd)


def _sklearn(name: str) -> Any:
    """Return a module of scikit-learn. Raises UserError if it is not installed."""
    what = "A support vector machine"
    return package(f"sklearn.{name}", what, "eval", " The probe linear does not need it.", "scikit-learn")


def machine(cost: float) -> Any:
    """Return an untrained machine with a cost C. Every parameter is part of the protocol."""
    return _sklearn("svm").LinearSVC(
        C=cost,
        dual=True,
        max_iter=2000,
        tol=1e-4,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        random_state=0,
    )


def unit_rows(features_nd: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return float64 (n, d): every row divided by its length plus 1e-5."""
    wide_nd = features_nd.astype(np.float64)
    wide_nd /= np.linalg.norm(wide_nd, axis=1, keepdims=True) + _LENGTH_FLOOR
    return wide_nd


def choose(train_nd: NDArray[np.float64], sign_n: NDArray[np.int64], costs: tuple[float, ...]) -> float:
    """Return the cost with the best average precision in cross-validation, the smallest of equals.

    Args:
        train_nd: float64 (n, d), unit rows.
        sign_n: int64 (n,), 1 or -1, at least two of each. There are three folds, or as many as the rarer sign has.
    """
    folds = int(min(_FOLDS, (sign_n == 1).sum(), (sign_n == -1).sum()))

    def score(cost: float) -> float:
        validated = _sklearn("model_selection").cross_val_score
        parts = validated(machine(cost), train_nd, sign_n, cv=folds, scoring="average_precision")
        return float(parts.mean())

    found = {cost: score(cost) for cost in sorted(costs)}
    return max(found, key=lambda cost: found[cost])


def fitted(
    train_nd: NDArray[np.float64], sign_n: NDArray[np.int64], cost: float, test_nd: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return float64 (n,): scores of the test images by a machine with one cost."""
    scores_n: NDArray[np.float64] = machine(cost).fit(train_nd, sign_n).decision_function(test_nd)
    return scores_n


@contextmanager
def one_solver() -> Iterator[None]:
    """Run solvers in one thread at a time and without warnings.

    All threads share liblinear's random generator, and the protocol stops after 2,000 iterations, converged or not.
    """
    with _ALONE, warnings.catch_warnings(action="ignore"):
        yield


def average_precision(scores_n: NDArray[np.float64], shown_n: NDArray[np.int64]) -> float:
    """Return the area under the envelope of precision over recall: at a recall, the best precision at it or a higher
    one.

    Args:
        scores_n: higher is likelier. Images of equal score pass the threshold together, so that the order of the data
            set, which may be sorted by class, does not matter.
        shown_n: int64 (n,), 1 if the class is shown; at least one is.
    """
    order_n = np.argsort(-scores_n, kind="stable")
    ends_t = np.append(np.flatnonzero(np.diff(scores_n[order_n])), len(order_n) - 1)
    found_t = np.cumsum(shown_n[order_n] == 1)[ends_t]
    envelope_t = np.maximum.accumulate((found_t / (ends_t + 1))[::-1])[::-1]
    return float(envelope_t @ np.diff(found_t, prepend=0) / found_t[-1])
