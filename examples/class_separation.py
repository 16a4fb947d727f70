"""Class separation: a probe of your own in one file. It measures how tightly classes cluster, without training.

Kornblith, Chen, Lee and Norouzi 2021, "Why do better loss functions lead to less transferable features?", arXiv
2010.16402. With d(x, y) = 1 - cosine similarity of the features of two test images,

    R^2 = 1 - (mean over classes of the mean d within a class) / (mean over pairs of classes of the mean d between them)

where both means include an image with itself, and a class with itself. R^2 is 1 if all features of a class point in one
direction, and 0 if classes do not differ. The paper finds that higher values go with worse transfer.

    raysl probe RUN --train TRAIN --test TEST --plugin examples/class_separation.py --probes class_separation

The probe, the class and the flags have the name of the file. `raysl/probes/__init__.py` lists what else a probe may
have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, check


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of class separation.

    Args:
        min_images: smallest number of test images of a class; smaller classes are left out.
    """

    version: ClassVar[int] = 1  # raise it whenever the same settings give another number
    min_images: Annotated[int, Bounds(1, 10**6)] = 2


class ClassSeparation:
    """R^2 of the test images; the train images are not used."""

    primary_metric = "r2"
    is_score = False  # More is not better, so reports give no verdict.
    dims = 0  # The probe gets the mean of a layer over all positions.

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Yield R^2; 0 if all features have one direction, or if fewer than two classes are left."""
        check("class_separation", train, test)
        lengths_n1 = np.linalg.norm(test.features_nd, axis=1, keepdims=True)
        unit_nd = test.features_nd.astype(np.float64) / np.maximum(lengths_n1, 1e-12)
        classes = [
            c for c in np.unique(test.labels_n) if (test.labels_n == c).sum() >= self.config.min_images
        ]
        if len(classes) < 2:
            yield Row("r2", 0.0)
            return
        # The mean cosine similarity of two sets of unit vectors is the dot product of their means.
        mean_cd = np.stack([unit_nd[test.labels_n == c].mean(axis=0) for c in classes])
        within, total = 1 - (mean_cd**2).sum(axis=1).mean(), 1 - (mean_cd.mean(axis=0) ** 2).sum()
        yield Row("r2", float(1 - within / total) if total > 1e-12 else 0.0)
