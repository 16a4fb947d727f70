"""Low-shot learning: linear support vector machines on k images of each class.

After Goyal et al. 2019, "Scaling and benchmarking self-supervised visual representation learning": the machines of the
probe `svm` on k images of each class, for several samples of the train set; mean and standard deviation over the
samples. Two differences: the cost is fixed, while they report the cost that is best on the test set, and the score is
top-1, because every image has one class: the class of the machine with the highest score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from raysl import rng
from raysl.errors import UserError
from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, check, multi_hot, sample_each_class
from raysl.probes.svm import fitted, one_solver, unit_rows


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of low-shot learning.

    Args:
        ks: images of each class, the number of the primary metric first; a number that some class does not reach is
            left out.
        samples: number of random samples of the train set.
        cost: C of the machines.
        dims: maximum number of features of a layer, whose feature map is averaged into a grid; 0 for the mean over all
            positions.
    """

    version: ClassVar[int] = 1
    ks: tuple[Annotated[int, Bounds(1, 10**6)], ...] = (16, 1, 2, 4, 8)
    samples: Annotated[int, Bounds(2, 10**4)] = 5
    cost: Annotated[float, Bounds(1e-9, 1e9)] = 1.0
    dims: Annotated[int, Bounds(0, 10**6)] = 0


class Lowshot:
    """Top-1 from k images of each class; the primary metric is the mean for the first k."""

    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.primary_metric = f"top1/k={config.ks[0]}"
        self.dims = config.dims

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Yield mean and standard deviation over the samples for every k."""
        check("lowshot", train, test, learns=True)
        fewest = int(np.unique(train.labels_n, return_counts=True)[1].min())
        if fewest < self.config.ks[0]:
            raise UserError(
                f"--lowshot.ks begins with {self.config.ks[0]}, and a class of the train set has {fewest} images. Give "
                f"numbers of at most {fewest}."
            )
        train_nd, test_nd = unit_rows(train.features_nd), unit_rows(test.features_nd)
        for k in self.config.ks:
            if k > fewest:
                continue
            found = []
            for sample in range(self.config.samples):
                rows = chosen(train.labels_n, k, sample)
                predicted_n = self._predicted(train_nd[rows], train.labels_n[rows], test_nd)
                found.append(float((predicted_n == test.labels_n).mean()))
            yield Row(f"top1/k={k}", float(np.mean(found)))
            yield Row(f"top1_std/k={k}", float(np.std(found, ddof=1)))

    def _predicted(
        self, train_nd: NDArray[np.float64], labels_n: NDArray[np.int64], test_nd: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Return int64 (n,): for each test image the class of the machine with the highest score."""
        classes = np.unique(labels_n)
        sign_nc = 2 * multi_hot(labels_n, int(classes[-1]) + 1)[:, classes] - 1
        with one_solver():
            scores = [fitted(train_nd, sign_nc[:, c], self.config.cost, test_nd) for c in range(len(classes))]
        best_n: NDArray[np.int64] = classes[np.argmax(scores, axis=0)]
        return best_n


def chosen(labels_n: NDArray[np.int64], k: int, sample: int) -> NDArray[np.int64]:
    """Return int64 (k * classes,), sorted: k images of each class."""
    order_n = rng.generator("lowshot", sample).permutation(len(labels_n))
    return sample_each_class(order_n, labels_n, lambda count: k)
