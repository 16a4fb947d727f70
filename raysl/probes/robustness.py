"""Robustness: accuracy on corrupted test images of a classifier that has seen clean ones.

Noise, blur, pixels, JPEG, contrast, brightness and saturation as in ImageNet-C (Hendrycks and Dietterich 2019,
"Benchmarking neural network robustness to common corruptions and perturbations"); see `raysl.probes._corruptions`,
which is part of the version of this protocol. The evaluation view is corrupted. The classifier, kNN or the linear
probe, is fitted on the features of clean training images. ImageNet-C divides errors by those of AlexNet; here
accuracies are given as they are, with the share of the clean accuracy that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raysl import rng
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.fields import Bounds
from raysl.probes import Labeled, Row, Settings, Subject, check_labels, common_labels, primary
from raysl.probes._corruptions import CORRUPTIONS, SEVERITIES, corrupt
from raysl.probes._images import batches, features, load, sample
from raysl.probes._task import TaskProbe
from raysl.probes.knn import Config as KnnConfig
from raysl.probes.knn import Knn
from raysl.probes.linear import Config as LinearConfig
from raysl.probes.linear import Linear
from raysl.rng import ImageRng
from raysl.stream import decode


@dataclass(frozen=True)
class Config(Settings):
    """Protocol of robustness.

    Args:
        classifier: "knn" with 20 neighbors, or "linear", with their default protocols on the mean over places.
        corruptions: names of corruptions.
        severities: severities, 1 to 5.
        max_train: largest number of train images, sampled at random.
        max_test: largest number of test images, sampled at random; every corruption has all of them.
    """

    version: ClassVar[int] = 1
    classifier: Literal["knn", "linear"] = "knn"
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[Annotated[int, Bounds(1, SEVERITIES)], ...] = (1, 3, 5)
    max_train: Annotated[int, Bounds(2, 10**7)] = 10_000
    max_test: Annotated[int, Bounds(1, 10**7)] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise unknown("corruption", name, CORRUPTIONS)


class Robustness(TaskProbe[Config]):
    """Mean top-1 over corruptions and severities, the primary metric; each corruption; and the clean accuracy."""

    primary_metric = "top1_corrupted"
    learns = True

    def check_data(self, train: DataSet, test: DataSet) -> None:
        """Raise UserError if there are no labels, no class in common, one class, one image, or the sets are equal."""
        same = train.manifest.fingerprint == test.manifest.fingerprint
        check_labels("robustness", common_labels(train, test)[0], same=same)
        if train.num_images < 2:
            raise UserError(
                "The probe robustness needs at least two train images and has one. Give more images."
            )

    def rows(self, subject: Subject) -> list[Row]:
        """Return the accuracies of each layer."""
        config, size = self.config, subject.image_size
        train_n, test_n = common_labels(subject.train, subject.test)
        train_k = rng.sample(len(train_n), config.max_train, "robustness")
        test_k = rng.sample(len(test_n), config.max_test, "robustness")
        encode = load(subject, _views(subject.train, train_k[sample(len(train_k))], size))
        learned = features(encode, _views(subject.train, train_k, size))
        found: dict[str, dict[str, list[float]]] = {layer: {} for layer in subject.layers}
        cases = [("", 0), *((name, level) for name in config.corruptions for level in config.severities)]
        probe = Knn(KnnConfig()) if config.classifier == "knn" else Linear(LinearConfig(dims=0))
        for name, severity in cases:
            views = _views(subject.test, test_k, size, name, severity)
            for layer, values_nd in features(encode, views).items():
                known = Labeled(learned[layer], train_n[train_k])
                value = primary(probe, known, Labeled(values_nd, test_n[test_k], "corrupted"))
                found[layer].setdefault(name, []).append(value)
        return [row for layer, values in found.items() for row in _rows(layer, values)]


def _rows(layer: str, values: dict[str, list[float]]) -> Iterator[Row]:
    """Yield the rows of a layer from the accuracies of each corruption, by severity; "" is no corruption."""
    (clean,) = values[""]
    means = {name: float(np.mean(one)) for name, one in values.items() if name}
    mean = float(np.mean(list(means.values())))
    yield Row("top1_corrupted", mean, layer)
    yield Row("top1_clean", clean, layer)
    if clean:
        yield Row("kept_share", mean / clean, layer)
    for name, value in means.items():
        yield Row(f"top1/{name}", value, layer)


def _views(
    data: DataSet, indices_k: NDArray[np.int64], size: int, name: str = "", severity: int = 0
) -> Iterator[Tensor]:
    """Yield images in the evaluation view, corrupted if there is a name, uint8 (b, 3, size, size)."""
    for some in batches(len(indices_k)):
        files = data.read(indices_k[some], ("image",)).column("image").to_pylist()
        images_bchw = decode.evaluation_views(files, size)
        numbers = ImageRng(0, np.zeros(len(files), np.int64), indices_k[some], "robustness")
        yield corrupt(name, images_bchw, severity, numbers) if name else images_bchw
