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
import torch
from torch import Tensor

from raysl import extraction, rng
from raysl.backbone import norm
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.extraction import Encode
from raysl.fields import Bounds
from raysl.probes import (
    REESTIMATED,
    Floats,
    Integers,
    Labelled,
    Row,
    Settings,
    Subject,
    check_labels,
    common_labels,
)
from raysl.probes._corruptions import CORRUPTIONS, SEVERITIES, corrupt
from raysl.probes._dense import batches
from raysl.probes._task import device, run_tasks
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
        classifier: "knn" with 20 neighbours, or "linear", with their default protocols on the mean over places.
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


class Robustness:
    """Mean top-1 over corruptions and severities, the primary metric; each corruption; and the clean accuracy."""

    primary_metric = "top1_corrupted"
    learns = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield accuracies of each layer. Runs one Ray task, on a GPU if there are any.

        Raises:
            UserError: the data have no labels, no class in common, or one class, or the sets are the same.
        """
        train_n, _ = labels = common_labels(subject.train, subject.test)
        same = subject.train.manifest.fingerprint == subject.test.manifest.fingerprint
        check_labels("robustness", train_n, same=same)
        (rows,) = run_tasks(measure, [(subject, self.config, labels)])
        yield from rows


def measure(subject: Subject, config: Config, labels: tuple[Integers, Integers]) -> list[Row]:
    """Return the rows of each layer; see `Robustness.examine`."""
    train_k, test_k = (
        _sample(data, most)
        for data, most in ((subject.train, config.max_train), (subject.test, config.max_test))
    )
    if len(train_k) < 2:
        raise UserError("The probe robustness needs at least two train images and has one. Give more images.")
    encode = _encoder(subject, train_k)
    learned = features(encode, _batches(subject.train, train_k, subject.image_size))
    found: dict[str, dict[str, list[float]]] = {layer: {} for layer in subject.layers}
    cases = [("", 0), *((name, level) for name in config.corruptions for level in config.severities)]
    for name, severity in cases:
        views = _batches(subject.test, test_k, subject.image_size, name, severity)
        for layer, values_nd in features(encode, views).items():
            known = Labelled(learned[layer], labels[0][train_k])
            value = _top1(known, Labelled(values_nd, labels[1][test_k], "corrupted"), config)
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


def _top1(train: Labelled, test: Labelled, config: Config) -> float:
    probe = Knn(KnnConfig()) if config.classifier == "knn" else Linear(LinearConfig(dims=0))
    return next(row.value for row in probe.run(train, test) if row.name == probe.primary_metric)


def _sample(data: DataSet, most: int) -> Integers:
    """Return the indices of a random sample, sorted: int64 (k,)."""
    order_n = rng.generator("robustness").permutation(data.num_images)
    return np.sort(order_n[:most]).astype(np.int64)


def _encoder(subject: Subject, train_k: Integers) -> Encode:
    if subject.bn_statistics != REESTIMATED:
        return subject.encoder.load(device(), subject.layers)
    some_k = train_k[: norm.STATISTICS_IMAGES]
    views = _batches(subject.train, some_k, subject.image_size)
    return extraction.load_reestimated(subject.encoder, views, device(), list(subject.layers))


def _batches(
    data: DataSet, indices_k: Integers, size: int, name: str = "", severity: int = 0
) -> Iterator[Tensor]:
    """Yield images in the evaluation view, corrupted if there is a name, uint8 (b, 3, size, size)."""
    for some in batches(len(indices_k)):
        files = data.read(indices_k[some], ("image",)).column("image").to_pylist()
        images_bchw = decode.centre(files, size)
        numbers = ImageRng(0, np.zeros(len(files), np.int64), indices_k[some], "robustness")
        yield corrupt(name, images_bchw, severity, numbers) if name else images_bchw


def features(encode: Encode, views: Iterator[Tensor]) -> dict[str, Floats]:
    """Return float32 (n, d) of every image by layer."""
    made: dict[str, list[Floats]] = {}
    for images_bchw in views:
        with torch.inference_mode():
            for layer, values_bd in encode(images_bchw.to(device())).items():
                made.setdefault(layer, []).append(values_bd.float().cpu().numpy())
    return {layer: np.concatenate(parts) for layer, parts in made.items()}
