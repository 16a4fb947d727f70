"""A folder of image or video files at any URI, or one video; `raysl.ingestion.layout` finds its splits and classes.

Labels come from class folders, or from a file that the layout names: `metadata.csv` or `.jsonl` as Hugging Face's
ImageFolder has it, or `val_annotations.txt` of Tiny ImageNet. A folder that holds more videos than images is one of
videos; each becomes clips, see `raysl.ingestion.video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, repeat
from typing import Any

from raysl.errors import UserError
from raysl.ingestion import layout, metadata, video
from raysl.ingestion.found import LeftOut, printable
from raysl.ingestion.labels import Classes, composed
from raysl.ingestion.listing import VIDEO, File, Survey, files_below, kind_of, open_file, read_bytes
from raysl.ingestion.sources import Confidence, Row, SourceLocation, Unit, UnitSize, choose_split, in_units

SUMMARY = "a folder of images or videos"

# Object stores answer slowly and in parallel: this many threads read at a time, each a few files for one hand-over.
_READERS = 16
_FILES_AT_ONCE = 4
_MOST_BYTES = 1 << 30


def recognize(location: SourceLocation) -> Confidence:
    there = _holds_videos(location) or (location.is_folder and location.survey[0].images())
    return Confidence.COULD_BE if there else Confidence.NO


def _holds_videos(location: SourceLocation) -> bool:
    if not location.is_folder:
        return kind_of(location.uri) == VIDEO
    survey = location.survey[0]
    return sum(counts[VIDEO] for counts in survey.folders.values()) > survey.images()


class Source:
    """See `raysl.ingestion.sources.Source`."""

    def __init__(self, location: SourceLocation) -> None:
        self._location, self._root = location, location.uri
        self._survey, left_out = location.survey if location.is_folder else (Survey(), LeftOut())
        self.encoded_here = _holds_videos(location)
        if self.encoded_here:
            files = files_below(location.uri, follow_links=location.config.follow_links)
            if not location.is_folder:
                self._root, _, name = location.uri.rpartition("/")
                files = (replace(file, path=name) for file in files)
            self._survey = Survey.of(files, lambda path: b"", about=VIDEO)
        labels, choose = location.config.labels, partial(choose_split, location)
        self._layout = layout.recognize(self._survey, choose, labels, left_out)
        self.found = self._layout.found
        self.clips: dict[str, Any] = {}
        self._sampling: list[float] = []
        if self.encoded_here:
            self.clips, self._sampling = video.sampled(location.config)
            self.found.rename_to_videos()
        elif labels == "auto":
            read = partial(read_bytes, location.uri)
            metadata.apply(read, self._survey, self._layout, location.config.label_column)
        self._check_columns()
        self.name = str(replace(location, split=self.found.split))

    def _check_columns(self) -> None:
        """Raise UserError for columns that are named and of which nothing is read."""
        config, labels = self._location.config, self.found.labels
        unused = config.image_column and f"--image-column {config.image_column!r}"
        if self._layout.class_of is None:
            unused = unused or (config.label_column and f"--label-column {config.label_column!r}")
        if unused:
            raise UserError(
                f"{unused} names a column of a table, and no such column is read of the folder {self._location.uri!r}: "
                f"its labels are {labels}. Leave it out, or give the table as the source."
            )

    def stamp(self) -> str:
        return self._survey.digest

    def units(self, size: UnitSize) -> Iterator[Unit]:
        classes = Classes()
        missing = dict.fromkeys(self._layout.class_of or ())
        self.found.images = 0
        for some in in_units(self._labeled(), size, lambda one: (1, one[0].num_bytes)):
            for file, label in some:
                classes.add((label,), file.path)
                missing.pop(composed(file.path), None)
            self.found.images += len(some)
            runs = [(label, len(list(same))) for label, same in groupby(label for _, label in some)]
            paths = [file.path for file, _ in some]
            spec = {"root": self._root, "paths": paths, "labels": runs, "sampling": self._sampling}
            yield Unit(len(some), spec)
        if gone := [path for path in missing if layout.is_within(path, self._layout.base)]:
            self.found.left_out.add("labels of files that are not there", gone[0], len(gone))
        classes.settle(self.found, self._layout.class_of is None)
        if gone and not classes.counts:
            self.found.labels += (
                f". It names {printable(gone[0])}, which is not there; if its files lie in a folder below it, give "
                "that table as the source"
            )

    def _labeled(self) -> Iterator[tuple[File, str | None]]:
        """Yield every image or video with its label, in the order of the indices."""
        follow, base = self._location.config.follow_links, self._layout.base
        for file in self._survey.all_files() or files_below(self._root, follow_links=follow, base=base):
            if self._survey.is_image(file.path):
                try:
                    yield file, self._layout.label(file.path)
                except layout.Skip as skip:
                    if skip.args:
                        self.found.left_out.add(skip.args[0], file.path)


def read(unit: Unit) -> Iterator[Row]:
    root, paths = unit.spec["root"], unit.spec["paths"]
    labels = chain.from_iterable(repeat(label, count) for label, count in unit.spec["labels"])
    if sampling := unit.spec.get("sampling"):
        for path, label in zip(paths, labels, strict=True):
            yield from _clips(root, path, label, video.Sampling(*sampling))
        return
    few = [paths[start : start + _FILES_AT_ONCE] for start in range(0, len(paths), _FILES_AT_ONCE)]
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(few), _READERS):
            some = few[start : start + _READERS]
            for row in chain(*pool.map(lambda paths: [_load(root, path) for path in paths], some)):
                yield row._replace(label=next(labels))


def _load(root: str, path: str) -> Row:
    """Return an image without its label, or the reason why it cannot be read."""
    try:
        data = read_bytes(root, path, _MOST_BYTES + 1)
    except OSError as error:
        return _unread(root, path, error)
    if len(data) > _MOST_BYTES:
        return Row(None, None, printable(path), f"is larger than {_MOST_BYTES >> 20} MB")
    return Row(data, None, printable(path))


def _clips(root: str, path: str, label: str | None, sampling: video.Sampling) -> Iterator[Row]:
    try:
        yield from video.clips(Row(None, label, printable(path)), sampling, partial(open_file, root, path))
    except OSError as error:
        yield _unread(root, path, error)._replace(label=label)


def _unread(root: str, path: str, error: OSError) -> Row:
    """Return the reason why a file cannot be read. Raises UserError if the same command may be able to later."""
    if isinstance(error, FileNotFoundError):
        return Row(None, None, printable(path), "does not exist")
    if isinstance(error, PermissionError):
        return Row(None, None, printable(path), f"cannot be read: {type(error).__name__}")
    raise UserError(f"Cannot read {root}/{printable(path)}: {error}. Run the same command again.") from error
