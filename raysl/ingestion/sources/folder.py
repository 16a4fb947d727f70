"""A folder of image files at any URI; `raysl.ingestion.layout` recognises its splits and classes.

Labels come from class folders, or from a file that the layout names: `metadata.csv` or `.jsonl` as Hugging Face's
ImageFolder has it, or `val_annotations.txt` of Tiny ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, repeat

from raysl.errors import UserError
from raysl.ingestion import layout, metadata
from raysl.ingestion.found import shown
from raysl.ingestion.labels import Classes
from raysl.ingestion.listing import files_below, read_bytes
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize, choose_split

SUMMARY = "a folder of images, in class folders or not: photos/, s3://bucket/photos, photos/#train"

# Object stores answer slowly and in parallel: this many threads read at a time, each a few files for one hand-over.
_READERS = 16
_FILES_AT_ONCE = 4
_MOST_BYTES = 1 << 30


def recognise(place: Place) -> Confidence:
    return Confidence.COULD_BE if place.is_folder and place.survey[0].images() else Confidence.NO


class Source:
    """See `raysl.ingestion.sources.Source`."""

    encoded_here = False

    def __init__(self, place: Place) -> None:
        self._place = place
        self._survey, left_out = place.survey
        labels = place.config.labels
        self._layout = layout.recognise(
            self._survey, lambda splits: choose_split(place, splits), labels, left_out
        )
        self.found = self._layout.found
        if labels == "auto":
            metadata.apply(
                partial(read_bytes, place.uri), self._survey, self._layout, place.config.label_column
            )
        self.name = str(replace(place, split=self.found.split))

    def stamp(self) -> str:
        return self._survey.digest

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes = Classes()
        missing = dict.fromkeys(self._layout.class_of or ())
        paths: list[str] = []
        runs: list[tuple[str | None, int]] = []
        num_bytes = 0
        self.found.images = 0
        for path, file_bytes, label in self._images():
            if paths and (len(paths) >= size.num_images or num_bytes + file_bytes > size.num_bytes):
                yield self._unit(paths, runs)
                paths, runs, num_bytes = [], [], 0
            classes.add((label,), path)
            missing.pop(path, None)
            if runs and runs[-1][0] == label:
                runs[-1] = (label, runs[-1][1] + 1)
            else:
                runs.append((label, 1))
            num_bytes += file_bytes
            paths.append(path)
            self.found.images += 1
        if paths:
            yield self._unit(paths, runs)
        if gone := [path for path in missing if layout.join_within(path, self._layout.base)]:
            self.found.left_out.add("labels of files that are not there", gone[0], len(gone))
        if self._layout.class_of is None:
            self.found.classes = dict(sorted(classes.counts.items()))
        elif why := classes.why_none():
            self.found.labels = f"none, although they are {self.found.labels}: {shown(why)}"
        else:
            self.found.classes = classes.ordered()

    def _images(self) -> Iterator[tuple[str, int, str | None]]:
        """Yield the path, the size and the label of every image, in the order of the indices."""
        place = self._place
        files = self._survey.all_files() or files_below(
            place.uri, follow_links=place.config.follow_links, base=self._layout.base
        )
        for file in files:
            if self._survey.is_image(file.path):
                try:
                    yield file.path, file.num_bytes, self._layout.label(file.path)
                except layout.Skip as skip:
                    if skip.args:
                        self.found.left_out.add(skip.args[0], file.path)

    def _unit(self, paths: list[str], runs: list[tuple[str | None, int]]) -> Unit:
        return Unit(len(paths), {"root": self._place.uri, "paths": paths, "labels": runs})


def read(unit: Unit) -> Iterator[Row]:
    root, paths = unit.spec["root"], unit.spec["paths"]
    labels = chain.from_iterable(repeat(label, count) for label, count in unit.spec["labels"])
    few = [paths[start : start + _FILES_AT_ONCE] for start in range(0, len(paths), _FILES_AT_ONCE)]
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(few), _READERS):
            loaded = pool.map(
                lambda some: [_load(root, path) for path in some], few[start : start + _READERS]
            )
            for path, image in zip(chain(*few[start : start + _READERS]), chain(*loaded), strict=True):
                reason = image if isinstance(image, str) else ""
                yield Row(None if reason else image, next(labels), shown(path), reason)  # type: ignore[arg-type]


def _load(root: str, path: str) -> bytes | str:
    """Return the content of an image file, or the reason why it cannot be read."""
    try:
        data = read_bytes(root, path, _MOST_BYTES + 1)
    except (FileNotFoundError, PermissionError) as error:
        return f"cannot be read: {type(error).__name__}"
    except OSError as error:
        raise UserError(f"Cannot read {root}/{shown(path)}: {error}. Run the same command again.") from error
    return f"is larger than {_MOST_BYTES >> 20} MB" if len(data) > _MOST_BYTES else data
