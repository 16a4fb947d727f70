"""Learning from k images of each class: how few labels a representation needs.

After Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning": the machines of the
probe `svm`, on k images of each class, for several samples of the train set; mean and spread over the samples. Two
things differ. The cost is fixed, where theirs is the one with the best score on the test set, which is optimistic. And
every image has one class, so that the score is top-1: the class whose machine gives the highest score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysl import rng
from raysl.errors import UserError
from raysl.probes import Labelled, Row, check, presence, same_images
from raysl.probes.svm import Doubles, fitted, settling, unit_rows


@dataclass(frozen=True)
class Config:
    """Protocol of learning from few images.

    Args:
        ks: images of each class, the headline first; a k that is more than the images of some class is left out.
        samples: independent choices of those images.
        cost: C of the machines.
        dims: numbers of a layer that they see at most, with their places; 0 for means over places.
        version: see `raysl.probes`.
    """

    ks: tuple[int, ...] = (16, 1, 2, 4, 8)
    samples: int = 5
    cost: float = 1.0
    dims: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"lowshot.ks is {self.ks}; it must hold numbers of images of at least 1.")
        if self.samples < 2:
            raise UserError(f"lowshot.samples is {self.samples}; a spread needs at least 2.")
        if self.cost <= 0:
            raise UserError(f"lowshot.cost is {self.cost}; it must be above 0.")
        if self.dims < 0:
            raise UserError(f"lowshot.dims is {self.dims}; it must be a number of features, or 0 for means.")


class Lowshot:
    """Top-1 from k images of each class; its headline is the mean for the first k."""

    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.headline = f"top1/k={config.ks[0]}"
        self.dims = config.dims

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Yields mean and standard deviation over the samples for every k."""
        check(train, test)
        if same_images(train, test):
            raise UserError(
                "The probe lowshot was given one data set to learn from and to be scored on. Give another test set; "
                "the probe knn can use one set for both."
            )
        classes, counts = np.unique(train.labels_n, return_counts=True)
        if len(classes) < 2:
            raise UserError("The probe lowshot needs a train set of at least two classes, and this has one.")
        if counts.min() < self.config.ks[0]:
            raise UserError(
                f"lowshot.ks begins with {self.config.ks[0]} and a class of the train set has {counts.min()} images. "
                f"Give --lowshot.ks numbers of at most {counts.min()}."
            )
        train_nd, test_nd = unit_rows(train.features_nd), unit_rows(test.features_nd)
        for k in self.config.ks:
            if k > counts.min():
                continue
            found = []
            for sample in range(self.config.samples):
                rows = chosen(train.labels_n, k, sample)
                predicted_n = self._predicted(train_nd[rows], train.labels_n[rows], test_nd)
                found.append(float((predicted_n == test.labels_n).mean()))
            yield Row(f"top1/k={k}", float(np.mean(found)))
            yield Row(f"top1_std/k={k}", float(np.std(found, ddof=1)))

    def _predicted(
        self, train_nd: Doubles, labels_n: npt.NDArray[np.int64], test_nd: Doubles
    ) -> npt.NDArray[np.int64]:
        """int64 (n,): the class of each test image whose machine gives the highest score."""
        classes = np.unique(labels_n)
        sign_nc = 2 * presence(labels_n, int(classes[-1]) + 1)[:, classes] - 1
        with settling():
            scores = [fitted(train_nd, sign_nc[:, c], self.config.cost, test_nd) for c in range(len(classes))]
        best_n: npt.NDArray[np.int64] = classes[np.argmax(scores, axis=0)]
        return best_n


def chosen(labels_n: npt.NDArray[np.int64], k: int, sample: int) -> npt.NDArray[np.int64]:
    """int64 (k * classes,), sorted: k images of each class. Those of a smaller k are among those of a larger one."""
    order_n = rng.generator("lowshot", sample).permutation(len(labels_n))
    picked = [order_n[labels_n[order_n] == c][:k] for c in np.unique(labels_n)]
    return np.sort(np.concatenate(picked))
