"""CIFAR-10 (Krizhevsky 2009) in the layout of its Python version, as torchvision unpacks it.

Five training batches and one test batch of 10,000 images, pickled as rows of 3 x 32 x 32 uint8.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from raysl.errors import UserError
from raysl.ingestion import png
from raysl.ingestion.listing import File, files_below, is_folder, stamp
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split
from raysl.storage import Folder

SUMMARY = "CIFAR-10 as torchvision stores it: cifar-10-batches-py/#train"

_FOLDER = "cifar-10-batches-py"
_FILES = {"test": ["test_batch"], "train": [f"data_batch_{i}" for i in range(1, 6)]}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCH_IMAGES = 10_000
_SIDE = 32


def recognise(place: Place) -> Confidence:
    return Confidence.IS if is_folder(place.uri) and _root(place.uri) else Confidence.NO


def _root(uri: str) -> str | None:
    """The folder with the batches: the one named, or the one inside it."""
    for folder in (Folder(uri), Folder(uri) / _FOLDER):
        if any(folder.exists(file) for files in _FILES.values() for file in files):
            return str(folder)
    return None


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = True
    labelled = True
    classes: tuple[str, ...] | None = _CLASSES

    def __init__(self, place: Place) -> None:
        self._root = _root(place.uri) or place.uri
        there = {file.path: file for file in files_below(self._root, 1)}
        splits = [split for split, files in _FILES.items() if any(file in there for file in files)]
        split = choose_split(place, splits)
        self.name = str(Place(self._root, split))
        missing = [file for file in _FILES[split] if file not in there]
        if missing:
            raise UserError(
                f"CIFAR-10 at {self._root!r} lacks {', '.join(missing)}. Unpack its archive again."
            )
        self._files: list[File] = [there[file] for file in _FILES[split]]

    def stamp(self) -> str:
        return stamp(self._files)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        for file in self._files:
            yield Unit(_BATCH_IMAGES, {"root": self._root, "path": file.path})


class _Arrays(pickle.Unpickler):
    """Unpickles NumPy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in (
            *("_reconstruct", "ndarray", "dtype"),
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of CIFAR-10")


def read(unit: Unit) -> Iterator[Row]:
    path = unit.spec["path"]
    try:
        batch = _Arrays(io.BytesIO(Folder(unit.spec["root"]).read(path)), encoding="latin1").load()
        pixels = np.asarray(batch["data"], np.uint8).reshape(-1, 3, _SIDE, _SIDE)
        labels = [int(label) for label in batch["labels"]]
        if len(labels) != len(pixels):
            raise ValueError(f"it has {len(pixels)} images and {len(labels)} labels")
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Cannot read {unit.spec['root']}/{path}: {error}. Unpack the archive again."
        ) from error
    for i, (image, label) in enumerate(zip(png.encode(pixels.transpose(0, 2, 3, 1)), labels, strict=True)):
        yield Row(image, label, f"{path}, image {i}")
