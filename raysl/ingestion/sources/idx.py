"""IDX files, the format of MNIST and Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), packed with gzip or not.

A folder holds `train-images-idx3-ubyte` with `train-labels-idx1-ubyte`, and `t10k-...` for the test split. Images are
grey, uint8.
"""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from raysl.errors import UserError
from raysl.ingestion import png
from raysl.ingestion.listing import File, files_below, is_folder, stamp
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split
from raysl.storage import filesystem

SUMMARY = "IDX files: fashion-mnist#train (as Debian's dataset-fashion-mnist installs it), mnist/#test"

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_NAME = re.compile(r"(?P<split>.+)-(?P<what>images|labels)[-.]idx\d-ubyte(\.gz)?")
_BATCH = 1024


def recognise(place: Place) -> Confidence:
    if place.uri == "fashion-mnist" or (is_folder(place.uri) and _splits(place.uri)):
        return Confidence.IS
    return Confidence.NO


def _splits(uri: str) -> dict[str, dict[str, File]]:
    """For every split its file of images and, where there is one, its file of labels."""
    splits: dict[str, dict[str, File]] = {}
    # Sorted, so that a file comes before its packed copy.
    for file in files_below(uri, 1):
        if match := _NAME.fullmatch(file.path):
            split = "test" if match["split"] == "t10k" else match["split"]
            splits.setdefault(split, {}).setdefault(match["what"], file)
    return {split: files for split, files in splits.items() if "images" in files}


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = True

    def __init__(self, place: Place) -> None:
        self._root = place.uri
        if place.uri == "fashion-mnist":
            self._root = str(FASHION_MNIST)
            if not FASHION_MNIST.is_dir():
                raise UserError(
                    f"Fashion-MNIST is not at {self._root}. Install it with `apt-get install dataset-fashion-mnist`, "
                    "or name the folder that holds its IDX files."
                )
        splits = _splits(self._root)
        split = choose_split(place, sorted(splits))
        self._files = [splits[split][what] for what in ("images", "labels") if what in splits[split]]
        self.name = str(Place(self._root, split))
        self.labelled = len(self._files) > 1
        fashion = "fashion" in self._root.lower()
        self.classes: tuple[str, ...] | None = _FASHION_CLASSES if fashion and self.labelled else None

    def stamp(self) -> str:
        return stamp(self._files)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        paths = [file.path for file in self._files]
        sizes = []
        for path, axes in zip(paths, (3, 1), strict=False):
            with _opened(self._root, path) as stream:
                sizes.append(_shape(stream, axes, path))
        num_images = sizes[0][0]
        if any(shape[0] != num_images for shape in sizes):
            raise UserError(
                f"{self.name!r} has {num_images} images but {sizes[1][0]} labels. Get the files again."
            )
        for first in range(0, num_images, size.num_images):
            count = min(size.num_images, num_images - first)
            yield Unit(count, {"root": self._root, "paths": paths, "first": first, "count": count})


@contextmanager
def _opened(root: str, path: str) -> Iterator[Any]:
    fs, folder = filesystem(root)
    try:
        with fs.open_input_file(f"{folder}/{path}") as raw:
            yield gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    except (EOFError, OSError) as error:
        raise UserError(f"Cannot read the IDX file {root}/{path}: {error}. Get it again.") from error


def _shape(stream: Any, axes: int, path: str) -> tuple[int, ...]:
    """Reads the head of a file of uint8 with so many axes."""
    head = stream.read(4 + 4 * axes)
    if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
        raise UserError(f"{path!r} is not an IDX file of uint8 with {axes} axes. Get it again.")
    return struct.unpack(f">{axes}I", head[4:])


def _take(stream: Any, count: int, path: str) -> bytes:
    data: bytes = stream.read(count)
    if len(data) < count:
        raise UserError(f"The IDX file {path!r} ends too early. Get it again.")
    return data


def read(unit: Unit) -> Iterator[Row]:
    spec = unit.spec
    first, count = spec["first"], spec["count"]
    labels: list[int | None] = [None] * count
    if len(spec["paths"]) > 1:
        with _opened(spec["root"], spec["paths"][1]) as stream:
            _shape(stream, 1, spec["paths"][1])
            stream.seek(first, 1)
            labels = list(_take(stream, count, spec["paths"][1]))
    path = spec["paths"][0]
    with _opened(spec["root"], path) as stream:
        _, height, width = _shape(stream, 3, path)
        stream.seek(first * height * width, 1)
        for start in range(0, count, _BATCH):
            size = min(_BATCH, count - start)
            pixels = np.frombuffer(_take(stream, size * height * width, path), np.uint8)
            for i, image in enumerate(png.encode(pixels.reshape(size, height, width, 1)), start):
                yield Row(image, labels[i], f"{path}, image {first + i}")
