"""Probes: measure a frozen representation. Each probe is one file and is found by its name.

A file `probes/foo_bar.py` defines the probe `foo_bar` with

    @dataclass(frozen=True)
    class Config(Settings):              the protocol, with the bounds of its fields; see `raysl.fields`
        version: ClassVar[int] = 1       raised whenever the same settings give another number
    class FooBar:                        the probe: its constructor takes a Config, and it has a `primary_metric`

and gets the command line, the tables and the contract tests without another edit. The method of the class says what
the probe needs:

    run(train, test)      features of one layer of two labeled data sets; see `LabeledProbe`
    measure(features_nd)  features of one layer, no labels; see `FeatureProbe`
    examine(subject)      the encoder and the images; see `EncoderProbe`

A method `check_data(train, test)`, if there is one, refuses data sets before features are computed and Ray starts. A
class with `learns = True` is refused where the train set and the test set are the same images. A class with
`own_images = True` uses only images that its Config names. A Config may define `settings()`, which returns the JSON
value that its protocol hash is made of; see `settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysl import plugins
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import Encoder
from raysl.fields import Checked, FieldError, flag, prefix
from raysl.storage import Folder

# Where BatchNorm takes its statistics from when features are computed.
KEPT: Final = "kept"
REESTIMATED: Final = "reestimated"
# Test classes are unbalanced when the largest has more than this many times the images of the smallest.
_UNBALANCED = 2
# Features that take a larger share of the GPU's memory, in which scores and gradients need room too, stay in the memory
# of the host. Tiles of an eighth of this share are sent whenever they are needed. Results differ by rounding only.
_SHARE = 0.5


class Settings(Checked):
    """Base of the Config of a probe: a new instance checks its fields, and a tuple needs at least one value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if value == ():
                raise FieldError(flag(prefix(type(self)) + name), value, "it needs at least one value")


@dataclass(frozen=True)
class Labeled:
    """The features and the labels of a data set.

    Args:
        features_nd: float32 (n, d), in index order.
        labels_n: int64 (n,), >= 0. If an image can show several classes: int64 (n, c), 1 for a class that the image
            shows, 0 for a class that it does not show, -1 for a class that is not judged ("difficult" in PASCAL VOC).
        fingerprint: fingerprint of the data set; empty if it has none.
    """

    features_nd: NDArray[np.float32]
    labels_n: NDArray[np.int64]
    fingerprint: str = ""


@dataclass(frozen=True)
class Row:
    """One result of a probe.

    Args:
        name: name of the measure, such as "top1".
        value: finite; shares are in 0 .. 1.
        layer: the layer it belongs to; empty for the layer whose features the probe received.
    """

    name: str
    value: float
    layer: str = ""


@dataclass(frozen=True)
class Subject:
    """The input of an `EncoderProbe`. Small and picklable.

    Args:
        encoder: turns images into features; a `raysl.extraction.NetworkEncoder` can also be trained.
        layers: the requested layers.
        image_size: side of the evaluation view in pixels.
        train: images to learn from.
        test: images to score.
        seed: seed of the run, for all random choices of the probe.
        folder: folder for files that a report reads; each encoder, data set and protocol has its own.
        bn_statistics: "kept" or "reestimated"; see `raysl.evaluation.options.ProbeConfig`.
    """

    encoder: Encoder
    layers: tuple[str, ...]
    image_size: int
    train: DataSet
    test: DataSet
    seed: int
    folder: Folder
    bn_statistics: str = KEPT


@runtime_checkable
class LabeledProbe(Protocol):
    """A deterministic measurement of frozen features with labels.

    Attributes:
        primary_metric: name of the row that stands for the probe in tables; more is better, unless the class has
            `is_score = False`: then no verdict follows from it. Such a class may have a static method `finding` (see
            `finding`).
        dims: maximum number of features of a layer, whose feature map is averaged into a grid; 0 for the mean over all
            positions.
    """

    primary_metric: str
    dims: int

    def run(self, train: Labeled, test: Labeled) -> Iterator[Row]:
        """Learn from `train` and score on `test`; only classes of `train` are predicted. Raises as `check`."""
        ...


@runtime_checkable
class FeatureProbe(Protocol):
    """A deterministic measurement of frozen features without labels. For attributes see `LabeledProbe`."""

    primary_metric: str
    dims: int

    def measure(self, features_nd: NDArray[np.float32]) -> Iterator[Row]:
        """Measure the features of the test images, float32 (n, d). Raises UserError as `check_features`."""
        ...


@runtime_checkable
class EncoderProbe(Protocol):
    """A measurement that needs the encoder and images. For `primary_metric` see `LabeledProbe`."""

    primary_metric: str

    def examine(self, subject: Subject) -> Iterator[Row]:
        """Yield rows, each with its layer. Raises UserError if the encoder or the images do not suit the probe."""
        ...


Probe = LabeledProbe | FeatureProbe | EncoderProbe


def names() -> list[str]:
    """Return the names of all probes: files of this package, and probes of plugins."""
    return plugins.names(__name__)


def config_type(name: str) -> type[Any]:
    """Return the Config of a probe. Raises UserError if there is no probe of that name."""
    return plugins.config_type(__name__, name, "probe")


def load(name: str) -> tuple[type[Any], type[Any]]:
    """Return the Config and the class of a probe. Raises UserError if there is no probe of that name."""
    return plugins.load(__name__, name, "probe")


def is_score(name: str) -> bool:
    """Return False if more is not always better for the primary metric of a probe; True for an unknown probe."""
    with suppress(UserError):
        return bool(getattr(load(name)[1], "is_score", True))
    return True


def finding(name: str, layer: str, values: Mapping[str, float]) -> str:
    """Return the sentence that a probe has for the values of a layer; empty for most probes, which have none."""
    with suppress(UserError):
        if said := getattr(load(name)[1], "finding", None):
            return str(said(layer, values))
    return ""


def required(name: str) -> list[str]:
    """Return the flags of a probe that have no usable default, such as a folder. Raises UserError as `load`."""
    config = config_type(name)()
    unset = [field.name for field in fields(config) if getattr(config, field.name) == ""]
    return [f"--{name}.{field}".replace("_", "-") for field in unset]


def learns(name: str) -> bool:
    """Return True if a probe must be scored on other images than it learns from. Raises UserError as `load`."""
    return bool(getattr(load(name)[1], "learns", False))


def settings(config: Any) -> dict[str, Any]:
    """Return all settings of a protocol as a JSON value: `config.settings()`, or its fields and its version."""
    return config.settings() if hasattr(config, "settings") else field_values(config)


def field_values(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, and its version if it has one; dataclasses inside become dictionaries."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    version = {"version": config.version} if hasattr(config, "version") else {}
    return {key: field_values(item) if is_dataclass(item) else item for key, item in values.items()} | version


def primary(probe: LabeledProbe, train: Labeled, test: Labeled) -> float:
    """Return the primary metric of a probe. Raises UserError as `LabeledProbe.run`."""
    return next(row.value for row in probe.run(train, test) if row.name == probe.primary_metric)


def same_images(train: Labeled, test: Labeled) -> bool:
    """Return True if both sets hold the same images, so that an image would find itself."""
    return train is test or bool(train.fingerprint and train.fingerprint == test.fingerprint)


def common_labels(train: DataSet, test: DataSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the labels of both sets, int64 (n,), numbered as in the train set; classes are matched by name.

    A class that only the test set has gets a number above the numbers of the train set. Raises UserError if a set has
    no labels, or the sets have no class in common.
    """
    train_n, test_n = train.labels(), test.labels()
    numbers = {name: number for number, name in enumerate(train.manifest.classes)}
    if not numbers.keys() & set(test.manifest.classes):
        raise UserError(
            f"The train set {train.name!r} and the test set {test.name!r} have no class in common: their "
            f"first classes are {', '.join(train.manifest.classes[:3])} and {', '.join(test.manifest.classes[:3])}. "
            "Give two sets with the same classes."
        )
    mapped = [numbers.setdefault(name, len(numbers)) for name in test.manifest.classes]
    return train_n, np.array(mapped, dtype=np.int64)[test_n]


def check(name: str, train: Labeled, test: Labeled, *, several: bool = False, learns: bool = False) -> None:
    """Check the input of a probe with labels.

    Raises UserError if a set is empty, features are not finite, the train set shows one class, images show `several`
    classes and the probe does not accept them, or the sets are the same and the probe `learns`.
    """
    for kind, data in (("train", train), ("test", test)):
        check_features(data.features_nd, kind)
        if data.labels_n.ndim != 1 and not several:
            raise UserError(
                f"The probe {name} needs images of one class each, and images of the {kind} set can show several "
                "classes. Use the probe svm or retrieval."
            )
    check_labels(name, train.labels_n, same=learns and same_images(train, test))


def check_labels(name: str, train_labels_n: NDArray[np.int64], *, same: bool) -> None:
    """Raise UserError if the train set shows one class, or is the `same` as the test set of a probe that learns."""
    if same:
        raise UserError(
            f"The probe {name} would learn from and be scored on the same images, which measures memory and not the "
            "representation. Give another test set, or data with the splits train and test; the probe knn can use one "
            "set for both."
        )
    if train_labels_n.ndim == 1 and len(np.unique(train_labels_n)) < 2:
        raise UserError(
            f"The probe {name} needs a train set of at least two classes, and every image of this train set has the "
            "same class: any network would be right. Give labeled data with more classes."
        )


def check_features(features_nd: NDArray[np.float32], kind: str) -> None:
    """Raise UserError if there are no features, or if they are not finite.

    Args:
        features_nd: float32 (n, d).
        kind: "train" or "test", for messages.
    """
    if not len(features_nd):
        raise UserError(f"The {kind} set of the probe has no images. Give a data set that has images.")
    if not np.isfinite(features_nd).all():
        raise UserError(
            f"The features of the {kind} set are not all finite: training has diverged. Probe an earlier checkpoint, "
            "or train again with a lower --optim.lr."
        )


def sample_each_class(
    order_n: NDArray[np.int64], labels_n: NDArray[np.int64], count_of: Callable[[int], int]
) -> NDArray[np.int64]:
    """Return some images of each class: int64, sorted indices.

    Args:
        order_n: int64 (n,), a random order of the images; the first of each class are taken.
        labels_n: int64 (n,).
        count_of: returns the number of images to take of a class, from the number that it has. A smaller number takes
            a subset of the images of a larger one.
    """
    taken = []
    for c in np.unique(labels_n):
        members = order_n[labels_n[order_n] == c]
        taken.append(members[: count_of(len(members))])
    return np.sort(np.concatenate(taken))


def multi_hot(labels_n: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return labels of either form of `Labeled.labels_n` as int64 (n, classes)."""
    if labels_n.ndim == 2:
        return labels_n
    shown_nc: NDArray[np.int64] = (labels_n[:, None] == np.arange(classes)).astype(np.int64)
    return shown_nc


def accuracy_rows(rank_n: Tensor, labels_n: Tensor, classes: int, suffix: str = "") -> Iterator[Row]:
    """Yield top-1, top-5 if there are more than five classes, and the balanced accuracy of unbalanced test sets.

    The balanced accuracy is the mean over the classes of the test set of the top-1 of their images.

    Args:
        rank_n: see `rank`.
        labels_n: int64 (n,), labels of the test set.
        classes: number of classes in the train set.
        suffix: appended to the names of the rows.
    """
    rank_n, labels_n = rank_n.cpu(), labels_n.cpu()
    for k in (1, 5) if classes > 5 else (1,):
        yield Row(f"top{k}{suffix}", (rank_n < k).double().mean().item())
    count_c = labels_n.bincount()
    seen_c = count_c > 0
    if count_c.max() > _UNBALANCED * count_c[seen_c].min():
        right_c = labels_n.bincount(weights=(rank_n < 1).double(), minlength=len(count_c))
        yield Row(f"balanced{suffix}", (right_c[seen_c] / count_c[seen_c]).mean().item())


def rank(scores_nc: Tensor, labels_n: Tensor) -> Tensor:
    """Return int64 (n,): the number of classes that rank before the right one; c if the right one is not predicted.

    Args:
        scores_nc: float (n, c), higher is likelier; a class at -inf is not predicted. Equal scores rank by class
            number.
        labels_n: int64 (n,) on the same device; a label >= c is never predicted.
    """
    classes = scores_nc.shape[1]
    safe_n = labels_n.clamp(max=classes - 1)
    right_n1 = scores_nc.gather(1, safe_n[:, None])
    before = torch.arange(classes, device=scores_nc.device)[None] < safe_n[:, None]
    ahead_nc = (scores_nc > right_n1) | ((scores_nc == right_n1) & before)
    possible_n = (labels_n < classes) & (right_n1[:, 0] > -torch.inf)
    return torch.where(possible_n, ahead_nc.sum(1), classes)


def tile_rows(features_nd: NDArray[np.float32], device: torch.device) -> int:
    """Return how many rows of features lie on a device at a time: all if they fit, and on the CPU; at least 1."""
    if device.type == "cpu":
        return len(features_nd)
    allowed_bytes = _SHARE * torch.cuda.mem_get_info(device)[1]
    if features_nd.nbytes <= allowed_bytes:
        return len(features_nd)
    return max(1, int(allowed_bytes / 8 / features_nd[0].nbytes))


@dataclass(frozen=True)
class Tiles:
    """Send features to a device in tiles of rows."""

    device: torch.device
    rows: int

    def __call__(self, features_nd: Tensor) -> Iterator[Tensor]:
        """Yield tiles (rows, d) on the device; no copies of what is there already."""
        return (tile_nd.to(self.device) for tile_nd in torch.split(features_nd, self.rows))
