"""A folder of image files, with class folders or without, at any URI.

When every image lies exactly one folder deep, the folders are the classes, in sorted order; else the images have no
labels. A folder whose only folders are splits (train, val, ...) is read one split at a time. Files whose names do not
end like an image's are listed with the images that cannot be decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from raysl.errors import UserError
from raysl.ingestion.listing import SPLITS, File, files_below, folders_in, is_folder, stamp
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split
from raysl.storage import filesystem
from raysl.stream.formats import EXTENSIONS, describe

SUMMARY = "a folder of images, in class folders or not: photos/, s3://bucket/photos, photos/#train"

# Object stores answer slowly and in parallel: this many reads are under way at a time, in windows of four times.
_READERS = 16


def recognise(place: Place) -> Confidence:
    return Confidence.COULD_BE if is_folder(place.uri) else Confidence.NO


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = False

    def __init__(self, place: Place) -> None:
        self._root = place.uri
        split = choose_split(place, _splits(place.uri))
        if split:
            self._root = f"{place.uri}/{split}"
        self.name = str(Place(place.uri, split))
        self.labelled = False
        self.classes: tuple[str, ...] | None = ()

    def stamp(self) -> str:
        # A note beside the images that is written to is no reason to ingest them again; a new one is listed.
        files = files_below(self._root)
        return stamp(file if _is_image(file.path) else File(file.path, 0, 0) for file in files)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes: list[str] = []
        one_deep = True
        paths: list[str] = []
        labels: list[int] = []
        num_bytes = 0
        if not any(_is_image(file.path) for file in files_below(self._root)):
            return
        for file in files_below(self._root):
            if paths and (len(paths) >= size.num_images or num_bytes + file.num_bytes > size.num_bytes):
                yield self._unit(paths, labels)
                paths, labels, num_bytes = [], [], 0
            if _is_image(file.path):
                folders = file.path.split("/")[:-1]
                one_deep = one_deep and len(folders) == 1
                # The walk is sorted: all images of a class come one after another.
                if one_deep and classes[-1:] != folders:
                    classes += folders
                num_bytes += file.num_bytes
            paths.append(file.path)
            labels.append(len(classes) - 1)
        if paths:
            yield self._unit(paths, labels)
        self.labelled = one_deep
        self.classes = tuple(classes) if one_deep else ()

    def _unit(self, paths: list[str], labels: list[int]) -> Unit:
        return Unit(len(paths), {"root": self._root, "paths": paths, "labels": labels})


def _splits(uri: str) -> list[str]:
    """The splits of a folder in which all images lie in folders that are named like splits."""
    folders = folders_in(uri)
    if not all(name.lower() in SPLITS for name in folders):
        return []
    return [] if any(_is_image(file.path) for file in files_below(uri, depth=1)) else folders


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def read(unit: Unit) -> Iterator[Row]:
    fs, root = filesystem(unit.spec["root"])
    paths, labels = unit.spec["paths"], unit.spec["labels"]

    def load(path: str, label: int) -> Row:
        try:
            with fs.open_input_file(f"{root}/{path}") as file:
                if not _is_image(path):
                    return Row(None, label, path, f"is not named as an image: {describe(file.read(1024))}")
                return Row(file.read(), label, path)
        except (FileNotFoundError, PermissionError) as error:
            return Row(None, label, path, f"cannot be read: {type(error).__name__}")
        except OSError as error:
            raise UserError(
                f"Cannot read {unit.spec['root']}/{path}: {error}. Run the same command again."
            ) from error

    window = 4 * _READERS
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(paths), window):
            yield from pool.map(load, paths[start : start + window], labels[start : start + window])
