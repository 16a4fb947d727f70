"""Files of arrays of pixels: the MNIST family (IDX), CIFAR-10 and CIFAR-100 (Krizhevsky 2009), and NumPy's .npz.

IDX files are read as they are or from gzip: MNIST, Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), KMNIST, EMNIST and
QMNIST, in a folder of their own or as torchvision stores them. Pixels stay as stored, so those of EMNIST are
transposed, as they are in torchvision.
"""

from __future__ import annotations

import io
import lzma
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from raysl.errors import UserError, counted, explained
from raysl.ingestion import idx, labels, png
from raysl.ingestion.found import Found
from raysl.ingestion.listing import files_below, is_folder, stamp
from raysl.ingestion.sources import Confidence, ReadConfig, Row, SourceLocation, Unit, UnitSize, choose_split
from raysl.storage import Folder

SUMMARY = "arrays (MNIST's IDX files, CIFAR-10 and -100, .npz)"

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10 = {"test": ["test_batch"], "train": [f"data_batch_{i}" for i in range(1, 6)]}
_IDX = re.compile(
    r"(?:qmnist-|emnist-)?(?P<split>.+)-(?P<what>images|labels)[-.]idx\d-(?:ubyte|int)(?:\.gz)?"
)
_NPZ = (
    re.compile(r"(?:(?P<split>train|test|val)_)?(?P<what>images|labels|data|targets|x|y)", re.IGNORECASE),
    re.compile(r"(?P<what>images|labels|x|y)_(?P<split>train|test|val)", re.IGNORECASE),
)
_PIXELS = ("images", "data", "x")
_LAYOUTS = {"idx": "IDX files (the MNIST family)", "cifar": "CIFAR in Python's form", "npz": "NumPy arrays"}
_BATCH = 1024
_MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Part:
    """A file, or the arrays of one split in a file."""

    how: Literal["idx", "cifar", "npz"]
    path: str
    labels: str = ""  # path of a file, or name of an array; "" for none
    images: str = ""  # name of an array


def recognize(location: SourceLocation) -> Confidence:
    if location.uri == "fashion-mnist":
        return Confidence.SIGNATURE
    if not location.is_folder:
        is_npz = location.uri.lower().endswith(".npz") and Folder(location.uri).exists()
        return Confidence.IS if is_npz else Confidence.NO
    found = any(_splits(root, location.config) for root in _roots(location.uri))
    return Confidence.SIGNATURE if found else Confidence.NO


def _roots(uri: str) -> Iterator[str]:
    """Yield the folder and those inside it that torchvision makes."""
    yield uri
    for name in ("raw", "cifar-10-batches-py", "cifar-100-python"):
        if is_folder(f"{uri}/{name}"):
            yield f"{uri}/{name}"
    for name in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST"):
        if is_folder(f"{uri}/{name}/raw"):
            yield f"{uri}/{name}/raw"


def _splits(root: str, config: ReadConfig) -> dict[str, list[Part]]:
    """Return the parts of every split that lie in a folder or a file."""
    if root.lower().endswith(".npz"):
        return _npz_splits(root)
    there = {file.path for file in files_below(root, 1, follow_links=config.follow_links)}
    if "meta" in there and there & {"train", "test"}:
        return {split: [Part("cifar", split)] for split in ("test", "train") if split in there}
    cifar10 = {split: files for split, files in _CIFAR10.items() if there & set(files)}
    if cifar10:
        return {split: [Part("cifar", file) for file in files] for split, files in cifar10.items()}
    splits: dict[str, dict[str, str]] = {}
    # Sorted, so that a file comes before its packed copy.
    for path in sorted(there):
        if match := _IDX.fullmatch(path):
            split = "test" if match["split"] == "t10k" else match["split"]
            splits.setdefault(split, {}).setdefault(match["what"], path)
    found = {split: files for split, files in splits.items() if "images" in files}
    return {split: [Part("idx", files["images"], files.get("labels", ""))] for split, files in found.items()}


def _npz_splits(uri: str) -> dict[str, list[Part]]:
    with _npz(uri) as arrays:
        names = list(arrays.files)
    splits: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _NPZ[0].fullmatch(name) or _NPZ[1].fullmatch(name):
            what = "images" if match["what"].lower() in _PIXELS else "labels"
            splits.setdefault((match["split"] or "").lower(), {}).setdefault(what, name)
    splits = {split: found for split, found in splits.items() if "images" in found}
    if not splits and len(names) == 1:
        splits = {"": {"images": names[0]}}
    if not splits:
        raise UserError(
            f"The arrays of {uri!r} are called {', '.join(names)}; those of images must be called images, x or data, "
            "and those of labels labels, y or targets, with a split such as train_images or x_train where there are "
            "some."
        )
    return {split: [Part("npz", "", one.get("labels", ""), one["images"])] for split, one in splits.items()}


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = True

    def __init__(self, location: SourceLocation) -> None:
        root = location.uri
        if location.uri == "fashion-mnist":
            root = str(FASHION_MNIST)
            if not FASHION_MNIST.is_dir():
                raise UserError(
                    f"Fashion-MNIST is not at {root}. Install it with `apt-get install dataset-fashion-mnist`, "
                    "or name the folder that holds its IDX files."
                )
        self._root = next((one for one in _roots(root) if _splits(one, location.config)), root)
        splits = _splits(self._root, location.config)
        named = sorted(splits.keys() - {""})
        split = choose_split(location, named)
        self._parts = splits[split]
        self.name = str(replace(location, uri=self._root, split=split))
        self.found = Found(_LAYOUTS[self._parts[0].how], splits=tuple(named), split=split)
        self._files = {file.path: file for file in files_below(self._root, 1, follow_links=True)}
        missing = [name for name in _CIFAR10.get(split, ()) if name not in self._files]
        if self._parts[0].how == "cifar" and "meta" not in self._files and missing:
            raise UserError(
                f"CIFAR-10 at {self._root!r} lacks {', '.join(missing)}. Unpack its archive again."
            )
        self._names = self._class_names()
        self._config = location.config

    def stamp(self) -> str:
        used = {path for part in self._parts for path in (part.path, part.labels)}
        return stamp(file for path, file in self._files.items() if path in used) + self._parts[0].images

    def _class_names(self) -> list[str] | None:
        if self._parts[0].how == "cifar":
            if "meta" in self._files:
                meta = _unpickled(self._root, "meta")
                return [str(name) for name in meta.get("fine_label_names", meta.get("label_names", []))]
            return list(_CIFAR10_CLASSES)
        # The name of the data set is that of its folder, or of the one above it in torchvision's "FashionMNIST/raw".
        parts = [part for part in self._root.split("/") if part != "raw"]
        is_fashion = re.fullmatch(r"fashion[-_ ]?mnist", parts[-1], re.IGNORECASE)
        return list(_FASHION_CLASSES) if self._parts[0].how == "idx" and is_fashion else None

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes, refused = labels.Classes(names=self._names or []), ""
        self.found.images = 0
        for part in self._parts:
            count, values = _measured(self._root, part)
            names: list[str | None] = [None] * count
            if values is not None and self._config.labels != "none":
                if len(values) != count:
                    mismatch = f"{counted(count, 'image')} but {counted(len(values), 'label')}"
                    raise UserError(f"{self.name!r} has {mismatch}. Get the files again.")
                try:
                    names = _classes(values, self._names)
                except labels.NoClassesError as error:
                    refused = f"the array of labels, {part.labels or part.path}, {error}"
            classes.add(names, part.path or self.name)
            for first in range(0, count, size.num_images):
                end = min(first + size.num_images, count)
                self.found.images += end - first
                spec = {**vars(part), "root": self._root, "first": first, "names": names[first:end]}
                yield Unit(end - first, spec)
        if why := refused or classes.why_none():
            has_file = self._parts[0].labels or self._parts[0].how == "cifar"
            self.found.labels = f"none, because {why if has_file else 'there is no file or array of labels'}"
        else:
            self.found.labels = f"the labels in {self._parts[0].labels or self._parts[0].path}"
            self.found.classes = classes.ordered()


def _classes(values: NDArray[Any], names: list[str] | None) -> list[str | None]:
    """Return the class of each label. Raises `labels.NoClassesError`."""
    values = values.astype(values.dtype.newbyteorder("="))  # Arrow takes no other order of bytes.
    if values.ndim > 2:
        raise labels.NoClassesError(labels.SEVERAL)
    try:
        column = pa.array(list(values) if values.ndim > 1 else values)
    except (pa.ArrowException, ValueError):
        raise labels.NoClassesError(f"is of type {values.dtype}") from None
    return labels.as_classes(column, names).to_pylist()  # type: ignore[no-any-return]


def _measured(root: str, part: Part) -> tuple[int, NDArray[Any] | None]:
    """Return the number of images of a part, and its labels."""
    if part.how == "idx":
        return idx.count(root, part.path), idx.labels(root, part.labels) if part.labels else None
    if part.how == "cifar":
        pixels, fine = _cifar(root, part.path)
        return len(pixels), fine
    with _npz(root) as arrays:
        count = len(_pixels(arrays[part.images], part.images))
        if not part.labels:
            return count, None
        values = np.atleast_1d(arrays[part.labels])
        return count, values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


class _Arrays(pickle.Unpickler):
    """Unpickles NumPy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        of_numpy = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if of_numpy and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of CIFAR")


def _unpickled(root: str, path: str) -> dict[str, Any]:
    try:
        value = _Arrays(io.BytesIO(Folder(root).read(path)), encoding="latin1").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value[key] for key in value}
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"Cannot read {root}/{path}: {error}. Unpack the archive again.") from error


def _cifar(root: str, path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Return the pixels of a batch, uint8 (n, 32, 32, 3), and its labels, the fine ones of CIFAR-100."""
    batch = _unpickled(root, path)
    values = batch.get("fine_labels", batch.get("labels"))
    what = f"Cannot read {root}/{path}"
    with explained(what, "Unpack the archive again.", KeyError, TypeError, ValueError):
        pixels = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return pixels, None if values is None else np.array([int(value) for value in values], np.int64)


# NotImplementedError, a RuntimeError, is an unknown compression; RuntimeError is an encrypted archive.
_NPZ_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(ValueError, EOFError, OSError, AttributeError, RuntimeError),
)


@contextmanager
def _npz(uri: str) -> Iterator[Any]:
    try:
        with Folder(uri).open("") as stream, np.load(stream, allow_pickle=False) as arrays:
            size = sum(info.file_size for info in arrays.zip.infolist())
            if size > _MOST_BYTES:
                raise UserError(
                    f"The arrays of {uri!r} take {size >> 30} GB of memory, and at most {_MOST_BYTES >> 30} GB are "
                    "read. Write their images as PNG files or as Parquet first."
                )
            for info in arrays.zip.infolist():
                if info.filename.endswith(".npy"):
                    _check_npy(arrays.zip, info)
            yield arrays
    except _NPZ_DAMAGE as error:
        advice = "Write the file again with numpy.savez."
        raise UserError(f"Cannot read the arrays of {uri!r}: {error}. {advice}") from error


def _check_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise ValueError if an array claims more values than its file holds; NumPy would take memory for all of them."""
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"the head of {info.filename!r} says {shape} values, and the file ends too early")


def _pixels(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return images as uint8 (n, h, w, c), where c is 1 or 3."""
    if array.ndim == 3 and array.shape[2] in (3, 4) and min(array.shape[:2]) >= 8:
        raise UserError(
            f"The array {name!r} has the shape {array.shape}, which is that of one image. Images must be stacked along "
            "a first axis, as (n, height, width, 3)."
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        raise UserError(
            f"The array {name!r} has the type {array.dtype} and the shape {array.shape}. Images must be uint8 from 0 "
            "to 255, of the shape (n, height, width), (n, height, width, 3) or (n, 3, height, width)."
        )
    return array


def _batches(spec: dict[str, Any], count: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels of a unit, uint8 (b, h, w, c), some at a time."""
    root, path, first = spec["root"], spec["path"], spec["first"]
    if spec["how"] == "idx":
        yield from idx.batches(root, path, first, count)
        return
    if spec["how"] == "cifar":
        pixels, _ = _cifar(root, path)
    else:
        with _npz(root) as arrays:
            pixels = _pixels(arrays[spec["images"]], spec["images"])
    for start in range(first, first + count, _BATCH):
        yield np.ascontiguousarray(pixels[start : min(start + _BATCH, first + count)])


def read(unit: Unit) -> Iterator[Row]:
    spec = unit.spec
    name = spec["path"] or spec["root"].rpartition("/")[2]
    images = chain.from_iterable(map(png.encode, _batches(spec, len(spec["names"]))))
    for number, (image, label) in enumerate(zip(images, spec["names"], strict=True), start=spec["first"]):
        yield Row(image, label, f"{name}, image {number}")
