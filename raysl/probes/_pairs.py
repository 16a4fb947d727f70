"""Read folders of images, each with a file of the same name in another folder that says something about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.storage import Folder

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Pair:
    """An image and its target, which are read when they are used.

    Args:
        image: returns the encoded image.
        target: returns the content of the target.
        target_name: name of the target, for messages; its ending is its format.
    """

    image: Callable[[], bytes]
    target: Callable[[], bytes]
    target_name: str


def pairs(folder: Folder, names: tuple[str, str]) -> list[Pair]:
    """Return the pairs of a split, sorted by name.

    Args:
        folder: folder of the split.
        names: names of the folders of images and of targets in it.

    Raises:
        UserError: there are no images, or an image has no target.
    """
    images, targets = (_by_stem(folder / name) for name in names)
    if not images:
        raise UserError(
            f"There are no images in {str(folder / names[0])!r}. Give a folder with {_layout(names)}."
        )
    if missing := sorted(images.keys() - targets.keys()):
        raise UserError(
            f"{len(missing)} images in {str(folder / names[0])!r} have no file of their name in {names[1]!r}, the "
            f"first being {images[missing[0]]!r}. Add these files, or remove the images."
        )
    read_image, read_target = ((folder / name).read for name in names)
    return [
        Pair(
            partial(read_image, images[stem]),
            partial(read_target, targets[stem]),
            f"{names[1]}/{targets[stem]}",
        )
        for stem in sorted(images)
    ]


def of_columns(data: DataSet, image: str, target: str) -> list[Pair]:
    """Return the pairs of two columns of a data set, in memory; targets are PNG."""
    table = data.read(np.arange(data.num_images, dtype=np.int64), (image, target))
    columns = (table.column(name).to_pylist() for name in (image, target))
    return [
        Pair(partial(bytes, one), partial(bytes, other), f"{target} of row {row}")
        for row, (one, other) in enumerate(zip(*columns, strict=True))
    ]


@lru_cache(maxsize=8)
def fingerprint(folder: Folder, names: tuple[str, str]) -> str:
    """Return a hash of all files of both splits, without decoding them. Raises UserError as `pairs`."""
    digest = hashlib.blake2b(digest_size=16)
    for split in _SPLITS:
        for one in pairs(folder / split, names):
            for part in (split.encode(), one.target_name.encode(), one.image(), one.target()):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _by_stem(folder: Folder) -> dict[str, str]:
    """Return the names of files without their ending, and their full names."""
    return {name.rpartition(".")[0] or name: name for name in folder.list() if not name.startswith(".")}


def _layout(names: tuple[str, str]) -> str:
    return ", ".join(f"{split}/{name}" for split in _SPLITS for name in names)
