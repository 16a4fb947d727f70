"""Linear support vector machines, one for each class, scored by average precision: the protocol of PASCAL VOC 2007.

Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning", as VISSL does it: rows of
unit length in float64, the squared hinge loss with L2, positives weighted twice, and for each class the cost with the
best average precision in three-fold cross-validation. An image that is "difficult" for a class counts as a negative
when the class is learned and is left out when it is scored. The average precision is the area under the monotone
envelope of precision, as VOC has it since 2010, and not the mean at 11 points. ResNet-50 pretrained on ImageNet: PIRL
81.1, Jigsaw 64.5, supervised 87.5 (in %, best layer).

The solver is scikit-learn's, of the extra `eval`. It works on the dual, whose time grows faster than the number of
images: of more than as many as VOC07 has, so many are drawn.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysl import rng
from raysl.errors import UserError
from raysl.probes import Floats, Labelled, Row, check, presence, same_images
from raysl.probes._span import in_span

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_FOLDS = 3
_NO_LENGTH = 1e-5
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Config:
    """Protocol of the support vector machines.

    Args:
        costs: candidates for C.
        dims: numbers of a layer that they see at most, with their places; 0 for means over places.
        max_images: that they learn from, drawn by index; VOC07 has 5,011.
        version: see `raysl.probes`.
    """

    costs: tuple[float, ...] = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    dims: int = 9216
    max_images: int = 5011
    version: int = 2

    def __post_init__(self) -> None:
        if not self.costs or min(self.costs) <= 0:
            raise UserError(f"svm.costs is {self.costs}; it must hold numbers above 0.")
        if self.dims < 0:
            raise UserError(f"svm.dims is {self.dims}; it must be a number of features, or 0 for means.")
        if self.max_images < 2:
            raise UserError(f"svm.max_images is {self.max_images}; it must be at least 2.")


class Svm:
    """One machine for each class that the test set shows; takes images with several classes. Its headline is mAP."""

    headline = "mAP"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dims = config.dims

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Yields the mean over classes of the average precision. A class that the train set never shows has 0."""
        check(train, test, several=True)
        if same_images(train, test):
            raise UserError(
                "The probe svm was given one data set to learn from and to be scored on, which would measure how well "
                "it remembers. Give another test set; the probe knn can use one set for both."
            )
        classes = _classes(train, test)
        kept = rng.generator("svm").permutation(len(train.labels_n))[: self.config.max_images]
        units = unit_rows(train.features_nd[np.sort(kept)]), unit_rows(test.features_nd)
        train_nd, test_nd = (one.numpy() for one in in_span(*map(torch.from_numpy, units)))
        shown_nc = presence(train.labels_n, classes)[np.sort(kept)]
        wanted_nc = presence(test.labels_n, classes)
        judged = [c for c in range(classes) if (wanted_nc[:, c] == 1).any()]
        if not judged:
            raise UserError("No image of the test set shows a class. Give a test set with labels.")

        def precision(c: int) -> float:
            scores_n = self._scores(train_nd, np.where(shown_nc[:, c] == 1, 1, -1), test_nd)
            sure_n = wanted_nc[:, c] >= 0
            return average_precision(scores_n[sure_n], wanted_nc[sure_n, c]) if scores_n.any() else 0.0

        with settling():
            found = [precision(c) for c in judged]
        yield Row("mAP", float(np.mean(found)))

    def _scores(self, train_nd: Doubles, sign_n: Integers, test_nd: Doubles) -> Doubles:
        """float64 (n,) of the test images by the best cost; zeros where the class is shown by no train image."""
        fewest = min((sign_n == 1).sum(), (sign_n == -1).sum())
        if not fewest:
            return np.full(len(test_nd), float(sign_n[0] == 1))
        cost = choose(train_nd, sign_n, self.config.costs) if fewest > 1 else 1.0
        return fitted(train_nd, sign_n, cost, test_nd)


def _classes(train: Labelled, test: Labelled) -> int:
    """Number of classes of either set."""
    if train.labels_n.ndim != test.labels_n.ndim:
        raise ValueError("labels of two forms")
    if train.labels_n.ndim == 2:
        return int(train.labels_n.shape[1])
    return int(max(train.labels_n.max(), test.labels_n.max())) + 1


def _solver() -> Any:
    """scikit-learn's modules. Raises UserError when it is not installed."""
    try:
        from sklearn import model_selection, svm
    except ImportError as error:
        raise UserError(
            "Support vector machines need scikit-learn, which is not installed: pip install 'raysl[eval]'. The probe "
            "linear needs nothing more."
        ) from error
    return svm, model_selection


def _machine(cost: float) -> Any:
    svm, _ = _solver()
    weights = {1: 2, -1: 1}
    return svm.LinearSVC(
        C=cost,
        dual=True,
        max_iter=2000,
        tol=1e-4,
        class_weight=weights,
        intercept_scaling=1.0,
        random_state=0,
    )


def unit_rows(features_nd: Floats) -> Doubles:
    """float64 (n, d): every row divided by its length plus 1e-5."""
    wide_nd = features_nd.astype(np.float64)
    wide_nd /= np.linalg.norm(wide_nd, axis=1, keepdims=True) + _NO_LENGTH
    return wide_nd


def choose(train_nd: Doubles, sign_n: Integers, costs: tuple[float, ...]) -> float:
    """The cost with the best average precision in cross-validation, the smallest of equals.

    Args:
        sign_n: int64 (n,), 1 or -1; at least two of each, and as many folds as there are of the fewer, at most three.
    """
    _, selection = _solver()
    folds = int(min(_FOLDS, (sign_n == 1).sum(), (sign_n == -1).sum()))

    def score(cost: float) -> float:
        parts = selection.cross_val_score(
            _machine(cost), train_nd, sign_n, cv=folds, scoring="average_precision"
        )
        return float(parts.mean())

    found = {cost: score(cost) for cost in sorted(costs)}
    return max(found, key=lambda cost: found[cost])


def fitted(train_nd: Doubles, sign_n: Integers, cost: float, test_nd: Doubles) -> Doubles:
    """float64 (n,): the scores of test images by a machine with one cost."""
    scores_n: Doubles = _machine(cost).fit(train_nd, sign_n).decision_function(test_nd)
    return scores_n


@contextmanager
def settling() -> Iterator[None]:
    """Without scikit-learn's warnings: the protocol stops after 2,000 iterations, arrived or not. One thread at a time:
    all share liblinear's generator of random numbers, and results would depend on who comes first."""
    with _ALONE, warnings.catch_warnings(action="ignore"):
        yield


def average_precision(scores_n: Doubles, shown_n: Integers) -> float:
    """The area under the envelope of precision over recall: at every recall the best precision at that or a higher one.

    Args:
        scores_n: more is likelier. Images of equal score pass the threshold together: none is ranked by its place
            in the data set, where classes may be sorted.
        shown_n: int64 (n,), 1 where the class is shown; at least one is.
    """
    order_n = np.argsort(-scores_n, kind="stable")
    ends_t = np.append(np.flatnonzero(np.diff(scores_n[order_n])), len(order_n) - 1)
    found_t = np.cumsum(shown_n[order_n] == 1)[ends_t]
    envelope_t = np.maximum.accumulate((found_t / (ends_t + 1))[::-1])[::-1]
    return float(envelope_t @ np.diff(found_t, prepend=0) / found_t[-1])
