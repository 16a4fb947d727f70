"""Probes: one file each, found by its name. What a frozen representation is worth, as numbers.

A file `probes/foo_bar.py` describes the probe `foo_bar` with

    @dataclass(frozen=True)
    class Config: ...                    the protocol as data, with a field `version: int`
    class FooBar:                        the probe; see `Probe`

and gets the command line, the tables and the contract tests without another edit. `version` is raised whenever the
same settings come to give another number, so that old rows never stand beside new ones.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.errors import UserError, unknown


@dataclass(frozen=True)
class Labelled:
    """The features of a data set, with its labels.

    Args:
        features_nd: float32 (n, d), in index order.
        labels_n: int64 (n,), 0 or more.
        fingerprint: of the data set; empty when there is none.
    """

    features_nd: npt.NDArray[np.float32]
    labels_n: npt.NDArray[np.int64]
    fingerprint: str = ""


@dataclass(frozen=True)
class Row:
    """One number that a probe found.

    Args:
        name: such as "top1".
        value: finite; shares are in 0 .. 1.
    """

    name: str
    value: float


class Probe(Protocol):
    """A measurement of frozen features. Deterministic.

    Attributes:
        headline: name of the row that stands for the probe where there is room for one number; more is better.
    """

    headline: str

    def __init__(self, config: Any) -> None: ...

    def run(self, train: Labelled, test: Labelled) -> Iterator[Row]:
        """Learns from `train` and is scored on `test`. A class that only `test` has is never predicted.

        Raises:
            UserError: the features or the labels do not suit the probe; see `check`.
        """
        ...


def names() -> list[str]:
    """Every probe there is: the files of this package, and of folders added to its `__path__`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> tuple[type[Any], type[Any]]:
    """The Config and the class of a probe. Raises UserError when there is none of that name."""
    if name not in names():
        raise unknown("probe", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    return module.Config, getattr(module, "".join(word.capitalize() for word in name.split("_")))


def same_images(train: Labelled, test: Labelled) -> bool:
    """Whether the test set is the train set, so that an image would meet itself."""
    return train is test or bool(train.fingerprint and train.fingerprint == test.fingerprint)


def check(train: Labelled, test: Labelled) -> None:
    """What every probe needs.

    Raises:
        UserError: a set is empty, or features are not finite.
    """
    for kind, data in (("train", train), ("test", test)):
        if len(data.features_nd) != len(data.labels_n) or data.features_nd.ndim != 2:
            raise ValueError(
                f"{kind} features of shape {data.features_nd.shape}, {len(data.labels_n)} labels"
            )
        if not len(data.labels_n):
            raise UserError(f"The {kind} set of the probe has no images. Give one that has some.")
        if not np.isfinite(data.features_nd).all():
            raise UserError(
                f"The features of the {kind} set are not all finite: the weights have diverged. Probe an earlier "
                "checkpoint, or train again with a lower --optim.lr."
            )


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
