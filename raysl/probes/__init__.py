"""Probes: one file each, found by its name. What a frozen representation is worth, as numbers.

A file `probes/foo_bar.py` describes the probe `foo_bar` with

    @dataclass(frozen=True)
    class Config: ...                    the protocol as data, with a field `version: int`
    class FooBar:                        the probe: its constructor takes a Config, and it has a `headline`

and gets the command line, the tables and the contract tests without another edit. Which method the class has says what
it needs, and is the whole difference between the kinds of probes:

    run(train, test)      the features of one layer, of two labelled sets; see `LabelledProbe`
    measure(features_nd)  the features of one layer, no labels; see `FeatureProbe`
    examine(subject)      the encoder and the images themselves; see `EncoderProbe`

A class that says `learns = True` is refused where it would be scored on the images that it has learned from. One that
says `own_images = True` looks at images that its Config names, and at no others.

All of them yield rows. `version` is raised whenever the same settings come to give another number, so that old rows
never stand beside new ones; `tests/probes/test_contract.py` holds a hash of every default, and the constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl import plugins
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import Encoder
from raysl.storage import Folder

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Labelled:
    """The features of a data set, with its labels.

    Args:
        features_nd: float32 (n, d), in index order.
        labels_n: int64 (n,), 0 or more. Or, where an image may show several classes, int64 (n, c): 1 for a class that
            it shows, 0 for one that it does not, -1 for one that is not to be judged ("difficult" in PASCAL VOC). Only
            the probes that look at one class at a time take those.
        fingerprint: of the data set; empty when there is none.
    """

    features_nd: Floats
    labels_n: npt.NDArray[np.int64]
    fingerprint: str = ""


@dataclass(frozen=True)
class Row:
    """One number that a probe found.

    Args:
        name: such as "top1".
        value: finite; shares are in 0 .. 1.
        layer: that it is about; where it is empty, the layer whose features the probe was handed.
    """

    name: str
    value: float
    layer: str = ""


@dataclass(frozen=True)
class Subject:
    """What a probe of a whole encoder works on. Small and picklable; Ray runs.

    Args:
        encoder: turns images into features; `raysl.extraction.Trainable` tells whether it can be trained further.
        layers: those that were asked for and that the encoder has.
        image_size: side in pixels of the evaluation view.
        train: images to learn from, if anything is learned.
        test: images to be judged on.
        seed: of the run; what a probe draws hangs on it and on nothing else.
        folder: for files that a report draws from. The probe's own, for this encoder and these images.
    """

    encoder: Encoder
    layers: tuple[str, ...]
    image_size: int
    train: DataSet
    test: DataSet
    seed: int
    folder: Folder


@runtime_checkable
class LabelledProbe(Protocol):
    """A measurement of frozen features by labels. Deterministic.

    Attributes:
        headline: name of the row that stands for the probe where there is room for one number; more is better.
        dims: how many numbers of a layer it wants at most, with their places; 0 for the mean over places.
    """

    headline: str
    dims: int

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Learns from `train` and is scored on `test`. A class that only `test` has is never predicted.

        Raises:
            UserError: the features or the labels do not suit the probe; see `check`.
        """
        ...


@runtime_checkable
class FeatureProbe(Protocol):
    """A measurement of frozen features that needs no labels. Deterministic. Attributes as `LabelledProbe`."""

    headline: str
    dims: int

    def measure(self, features_nd: Floats) -> Iterator[Row]:
        """Looks at the features of the test images, float32 (n, d).

        Raises:
            UserError: the features do not suit the probe; see `check_features`.
        """
        ...


@runtime_checkable
class EncoderProbe(Protocol):
    """A measurement that needs the encoder and images, such as one of views that no data set holds. `headline` as
    `LabelledProbe`."""

    headline: str

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yields rows, each with its layer.

        Raises:
            UserError: the encoder or the images do not suit the probe.
        """
        ...


Probe = LabelledProbe | FeatureProbe | EncoderProbe


def names() -> list[str]:
    """Return the names of all probes."""
    return plugins.names(__name__)


def config_type(name: str) -> type[Any]:
    """Return the Config of a probe. Raises UserError when there is none of that name."""
    return plugins.config_type(__name__, name, "probe")


def load(name: str) -> tuple[type[Any], type[Any]]:
    """Return the Config and the class of a probe. Raises UserError when there is none of that name."""
    return plugins.load(__name__, name, "probe")


def required(name: str) -> list[str]:
    """Flags of a probe without a default that would do: where there is nothing that could be one, such as a folder, the
    default is empty. Raises UserError when there is no such probe."""
    config = config_type(name)()
    unset = [one.name for one in fields(config) if getattr(config, one.name) == ""]
    return [f"--{name}.{field}".replace("_", "-") for field in unset]


def learns(name: str) -> bool:
    """Whether a probe learns from one set and must be scored on another. Raises UserError when there is no such
    probe."""
    return bool(getattr(load(name)[1], "learns", False))


def same_images(train: Labelled, test: Labelled) -> bool:
    """Whether the test set is the train set, so that an image would meet itself."""
    return train is test or bool(train.fingerprint and train.fingerprint == test.fingerprint)


def common_labels(train: DataSet, test: DataSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Labels of both sets, int64 (n,), under the numbers of the train set: classes are matched by their names.

    A class that only the test set has gets a number above those of the train set.

    Raises:
        UserError: a set has no labels, or they have no class in common.
    """
    train_n, test_n = train.labels(), test.labels()
    numbers = {name: number for number, name in enumerate(train.manifest.classes)}
    if not numbers.keys() & set(test.manifest.classes):
        raise UserError(
            f"The train set {str(train.folder)!r} and the test set {str(test.folder)!r} have no class in common: the "
            f"first classes are {', '.join(train.manifest.classes[:3])} and {', '.join(test.manifest.classes[:3])}. "
            "Give two sets with the same classes."
        )
    mapped = [numbers.setdefault(name, len(numbers)) for name in test.manifest.classes]
    return train_n, np.array(mapped, dtype=np.int64)[test_n]


def check(train: Labelled, test: Labelled, several: bool = False) -> None:
    """What every probe needs of labelled features.

    Args:
        several: whether the probe takes images that show several classes.

    Raises:
        UserError: a set is empty, features are not finite, or images show several classes and may not.
    """
    for kind, data in (("train", train), ("test", test)):
        if len(data.features_nd) != len(data.labels_n):
            raise ValueError(
                f"{kind} features of shape {data.features_nd.shape}, {len(data.labels_n)} labels"
            )
        check_features(data.features_nd, kind)
        if data.labels_n.ndim != 1 and not several:
            raise UserError(
                f"The images of the {kind} set may show several classes each, and this probe is for one. Use the "
                "probe svm or retrieval."
            )


def check_features(features_nd: Floats, kind: str) -> None:
    """Raises UserError when there are no features, or they are not finite.

    Args:
        kind: of the set, "train" or "test".
    """
    if features_nd.ndim != 2:
        raise ValueError(f"{kind} features of shape {features_nd.shape}")
    if not len(features_nd):
        raise UserError(f"The {kind} set of the probe has no images. Give one that has some.")
    if not np.isfinite(features_nd).all():
        raise UserError(
            f"The features of the {kind} set are not all finite: the weights have diverged. Probe an earlier "
            "checkpoint, or train again with a lower --optim.lr."
        )


def presence(labels_n: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """int64 (n, classes), as `Labelled.labels_n` with an axis for the classes, of labels of either form."""
    if labels_n.ndim == 2:
        return labels_n
    shown_nc: npt.NDArray[np.int64] = (labels_n[:, None] == np.arange(classes)).astype(np.int64)
    return shown_nc


def topk_rows(rank_n: Tensor, classes: int, suffix: str = "") -> Iterator[Row]:
    """Top-1, and top-5 where there are more than five classes.

    Args:
        rank_n: see `rank`.
        classes: number of classes in the train set.
        suffix: is appended to the names.
    """
    for k in (1, 5) if classes > 5 else (1,):
        yield Row(f"top{k}{suffix}", (rank_n < k).double().mean().item())


def rank(scores_nc: Tensor, labels_n: Tensor) -> Tensor:
    """int64 (n,): how many classes rank before the right one; c when the right one is not predicted at all.

    Args:
        scores_nc: more is likelier; a class at -inf is not predicted. Equal scores rank by class number.
        labels_n: int64 (n,); a label of c or more is never predicted.
    """
    classes = scores_nc.shape[1]
    safe_n = labels_n.clamp(max=classes - 1)
    right_n1 = scores_nc.gather(1, safe_n[:, None])
    before = torch.arange(classes)[None] < safe_n[:, None]
    ahead_nc = (scores_nc > right_n1) | ((scores_nc == right_n1) & before)
    possible_n = (labels_n < classes) & (right_n1[:, 0] > -torch.inf)
    return torch.where(possible_n, ahead_nc.sum(1), classes)
