"""Tables with a row for each image: Parquet, Arrow, Feather, CSV, TSV, JSON lines, and Hugging Face's `save_to_disk`.

The image column holds encoded files (binary, or a struct of bytes and path as Hugging Face writes it) or names of files
beside the table. The splits come from the names of its files (`train-00000-of-00002.parquet`, `test.parquet`,
`validation/0000.parquet`), or else from a column such as "split". Labels are joined by the names of the classes over
all files.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raysl.errors import UserError
from raysl.ingestion import image_columns, labels, tables, video
from raysl.ingestion.found import join_names, printable
from raysl.ingestion.listing import ARCHIVE, IMAGE, TABLE, File, stamp
from raysl.ingestion.named_files import Place, file_states, folder_of, names_in, read_named
from raysl.ingestion.sources import (
    Confidence,
    Row,
    SourceLocation,
    Unit,
    UnitSize,
    choose_split,
    files_ending,
    in_units,
    read_split,
)
from raysl.storage import Folder

SUMMARY = "tables of images or of names of files (Parquet, Arrow, Feather, CSV, TSV, JSON lines)"

_BINARY = (".parquet", ".arrow", ".feather")
_IN_PARALLEL, _AT_ONCE = 16, 64


def recognize(location: SourceLocation) -> Confidence:
    if not location.is_folder:
        is_table = location.uri.lower().endswith(tables.SUFFIXES) and Folder(location.uri).exists()
        return Confidence.IS if is_table else Confidence.NO
    survey, _ = location.survey
    files = _files(location) if TABLE in survey.others().kinds else []
    if not files or survey.num_bytes[IMAGE] >= sum(file.num_bytes for file in files):
        return Confidence.NO
    if not survey.images():
        # Archives of images with a table of captions, as img2dataset leaves them, are archives.
        archives = survey.others().kinds.get(ARCHIVE, (0, ""))[0]
        return Confidence.COULD_BE if archives else Confidence.IS
    try:
        with tables.opened(location.uri, files[0].path) as table:
            return Confidence.IS if image_columns.encoded(table.schema) else Confidence.NO
    except UserError:
        return Confidence.NO


def _files(location: SourceLocation) -> list[File]:
    # Hugging Face leaves "cache-..." beside the files of a data set that it changed.
    files = files_ending(location, _BINARY)
    return [file for file in files if not file.path.rpartition("/")[2].startswith("cache-")]


class Columns(NamedTuple):
    """The columns of a file."""

    image: str
    label: str  # "" for none
    names: list[str] | None  # of the classes that labels are numbers of; None without names
    is_file_name: bool  # the column `image` holds names of files
    constant: str | None = None  # label of all rows, where a folder ("label=cat") states it; "" for none
    is_video: bool = False
    places: tuple[Place, ...] = ()  # of the files that the column `image` names


class Source:
    """See `raysl.ingestion.sources.Source`."""

    def __init__(self, location: SourceLocation) -> None:
        self._location = location
        self._files, self.found = read_split(location, _files(location), TABLE)
        self._only: tuple[str, str] | None = None
        kinds = {file.path.rpartition(".")[2] or location.uri.rpartition(".")[2] for file in self._files}
        many = "one table" if len(self._files) == 1 else f"{len(self._files):,} tables"
        self.found.layout = "" if location.called else f"{many} ({', '.join(sorted(kinds))})"
        with ThreadPoolExecutor(_IN_PARALLEL) as pool:
            columns, of_splits = zip(*pool.map(self._columns_of, self._files), strict=True)
        names = labels.as_classes_of_folders([one.constant for one in columns])
        self._columns = [one._replace(constant=name) for one, name in zip(columns, names, strict=True)]
        if places := {f"{before}*{behind}" for one in columns for before, behind in one.places}:
            self.found.layout += f" of names of files, read as {join_names(sorted(places), 6)}"
        self._reconcile()
        self._choose_rows({*of_splits})
        self.name = location.called or str(replace(location, split=self.found.split))
        self.encoded_here = self._columns[0].is_video
        self.clips: dict[str, Any] = {}
        self._sampling: list[float] = []
        if self.encoded_here:
            self.clips, self._sampling = video.sampled(location.config)
            self.found.noun = "videos"

    def _where(self, file: File) -> str:
        return self._location.called or file.path or self._location.uri

    def _columns_of(self, file: File) -> tuple[Columns, str]:
        """Return the columns of a file, and its column that names splits; "" for none."""
        config, where = self._location.config, self._where(file)
        with self._opened(file) as table:
            schema, of_splits = table.schema, tables.split_column(table.schema)
            image, is_file_name, places = image_columns.find(
                table, folder_of(self._location.uri, file.path), where, config.image_column
            )
            is_video = image_columns.is_video(table, image, is_file_name, places)
        parts = dict(part.split("=", 1) for part in file.path.split("/")[:-1] if "=" in part)
        label = ""
        if config.labels != "none":
            label = labels.find([*schema.names, *parts], config.label_column, f"The table {where!r}")
        if label in parts and label not in schema.names:
            return Columns(image, label, None, is_file_name, parts[label], is_video, places), of_splits
        names = labels.names_in(schema, label) if label else None
        return Columns(image, label, names, is_file_name, None, is_video, places), of_splits

    def _opened(self, file: File) -> AbstractContextManager[tables.Table]:
        return tables.opened(self._location.uri, file.path, self._only)

    def _choose_rows(self, of_splits: set[str]) -> None:
        """Read the rows of one split, if a column tells it and no name of a file does; without a split, all rows.

        Args:
            of_splits: the columns that name splits, "" for a file without one.
        """
        if not self.found.splits and len(of_splits) == 1:
            self.found.split_column = of_splits.pop()
        if self._location.split and not self.found.split:
            self._name_splits()
            self.found.split = choose_split(self._location, [*self.found.splits])
            self._only = self.found.split_column, self.found.split

    def _name_splits(self) -> None:
        """Read the values of the column of splits, if there is one, of all files."""
        if self.found.split_column:
            with ThreadPoolExecutor(_IN_PARALLEL) as pool:
                values = set[str | None]().union(*pool.map(self._splits_of, self._files))
            self.found.splits = tuple(sorted(filter(None, values)))

    def _splits_of(self, file: File) -> set[str | None]:
        with self._opened(file) as table:
            parts = table.column(self.found.split_column)
            return set[str | None]().union(*(tables.as_texts(part).unique().to_pylist() for part in parts))

    def _reconcile(self) -> None:
        """Raise UserError, which names two files, if not all files have the same columns."""
        first = self._columns[0]
        for file, columns in zip(self._files[1:], self._columns[1:], strict=True):
            disagree = f"The tables {self._where(self._files[0])!r} and {self._where(file)!r} disagree"
            if columns != first._replace(
                names=columns.names, constant=columns.constant, places=columns.places
            ):
                raise UserError(
                    f"{disagree}: {_told(first)} in the first, {_told(columns)} in the second. Name the columns that "
                    "all tables have with --image-column and --label-column, use --labels none, or ingest them apart."
                )
            if (columns.names is None) != (first.names is None):
                raise UserError(
                    f"{disagree}: one names its classes in the column {first.label!r} and the other does not. Write "
                    "them alike, or ingest them apart."
                )

    def stamp(self) -> str:
        """See `Source.stamp`. Of the files that a table names, only local ones count: the state of each file of an
        object store would take a request. The table of an object counts by its rows.
        """
        state = self._location.state
        files = [File(state, 0, 0)] if state else self._files
        return stamp(chain(files, self._named_files())) + self._location.config.flags()

    def _named_files(self) -> Iterator[File]:
        """Yield the local files that tables name as they are now; one that cannot be read has no size and no time."""
        if "://" in self._location.uri:
            return
        with ThreadPoolExecutor(_IN_PARALLEL) as pool:
            for file, columns, names in self._names():
                some = [names[first : first + _AT_ONCE] for first in range(0, len(names), _AT_ONCE)]
                folder = folder_of(self._location.uri, file.path)
                states = pool.map(partial(file_states, folder, columns.places), some)
                yield from chain.from_iterable(states)

    def _names(self) -> Iterator[tuple[File, Columns, list[str]]]:
        """Yield the names in tables of file names, some at a time, each time with the file and columns of the table."""
        for file, columns in zip(self._files, self._columns, strict=True):
            if columns.is_file_name:
                with self._opened(file) as table:
                    for values in table.column(columns.image):
                        yield file, columns, names_in(values)

    def units(self, size: UnitSize) -> Iterator[Unit]:
        self._check_file_names()
        if not self._only:
            self._name_splits()
        classes = self._count_classes()
        self.found.images = 0
        for file, columns in zip(self._files, self._columns, strict=True):
            with self._opened(file) as table:
                groups = table.counted()
            spec = {
                "root": self._location.uri,
                "path": file.path,
                "columns": list(columns._replace(label=columns.label if classes else "")),
                "follow_links": self._location.config.follow_links,
                "is_object": bool(self._location.called),
                "sampling": self._sampling,
                "only": self._only,
            }
            for some in in_units(enumerate(groups), size, lambda group: group[1]):
                rows = sum(rows for _, (rows, _) in some)
                self.found.images += rows
                if rows:
                    yield Unit(rows, {**spec, "groups": [some[0][0], some[-1][0] + 1]})

    def _check_file_names(self) -> None:
        """Raise UserError if tables of file names name a file twice: an image of several classes, or a mistake."""
        seen: set[str] = set()
        for file, _, names in self._names():
            folder = folder_of(self._location.uri, file.path)
            for name in names:
                place = tables.normal(name)
                if "://" not in place:
                    place = posixpath.normpath(posixpath.join(folder, place))
                if place in seen:
                    raise UserError(
                        f"The table {self._where(file)!r} names the file {printable(name)!r} in several rows. A "
                        "data set holds an image once and with one class: keep one row for each file."
                    )
                seen.add(place)

    def _count_classes(self) -> bool:
        """Read the column of labels of all files; return True if it holds classes."""
        column, first = self._columns[0].label, printable(self._where(self._files[0]))
        with tables.opened(self._location.uri, self._files[0].path) as table:
            names = table.schema.names
        if not column:
            self.found.labels = (
                f"none, because no column of {first} is named like a label; its columns are {join_names(names)} "
                "(--label-column names one)"
            )
            if self._location.config.labels == "none":
                self.found.labels = "none, because --labels none was given"
            elif self._location.called and len(names) == 1:
                self.found.labels = "none, because none were given"
            return False
        classes = labels.Classes()
        kinds: dict[str, str] = {}
        try:
            with ThreadPoolExecutor(_IN_PARALLEL) as pool:
                found = pool.map(self._labels_of, self._files, self._columns)
                for file, (values, kind) in zip(self._files, found, strict=True):
                    classes.add(values, self._where(file))
                    if kind:
                        kinds.setdefault(kind, self._where(file))
        except labels.NoClassesError as error:
            if self._location.config.label_column:
                raise UserError(
                    f"The column {column!r}, which --label-column names, {error}. Name another, or use --labels none."
                ) from error
            self.found.labels = f"none, because the column {column!r} of {first} {error}"
            return False
        if len(kinds) > 1:
            (one, here), (other, there), *_ = kinds.items()
            raise UserError(
                f"The tables {here!r} and {there!r} disagree: the column {column!r} holds {one} in the first and "
                f"{other} in the second. Write them alike, or ingest them apart."
            )
        classes.names = list(dict.fromkeys(name for columns in self._columns for name in columns.names or ()))
        if why := classes.why_none():
            self.found.labels = f"none, although there is a column {column!r}: {printable(why)}"
            return False
        is_pair = self._location.called and len(names) == 2
        self.found.labels = "given with the images" if is_pair else f"the column {column!r} of {first}"
        self.found.classes = classes.ordered()
        return True

    def _labels_of(self, file: File, columns: Columns) -> tuple[list[str | None], str]:
        """Return the labels of a file, and what they are called: numbers, names or truth values."""
        found: list[str | None] = []
        with self._opened(file) as table:
            if columns.constant is not None:
                return [columns.constant or None] * sum(rows for rows, _ in table.counted()), "names"
            for values in table.column(columns.label):
                found += labels.as_classes(values, columns.names).to_pylist()
            kind = table.schema.field(columns.label).type
            return found, _kind(kind, columns.names) if any(found) else ""


def _kind(kind: pa.DataType, names: list[str] | None) -> str:
    while pa.types.is_dictionary(kind) or hasattr(kind, "value_field"):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "truth values"
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return "numbers" if is_number and names is None else "names"


def _told(columns: Columns) -> str:
    what = "names of files" if columns.is_file_name else "videos" if columns.is_video else "images"
    label = f"labels in {columns.label!r}" if columns.label else "no labels"
    return f"{what} in the column {columns.image!r} and {label}"


def read(unit: Unit) -> Iterator[Row]:
    spec, columns, sampling = unit.spec, Columns(*unit.spec["columns"]), unit.spec.get("sampling")
    has_label = columns.label and columns.constant is None
    wanted = list(dict.fromkeys([columns.image, *([columns.label] if has_label else [])]))
    place = spec["path"] or spec["root"].rpartition("/")[2]
    only = spec.get("only")
    with tables.opened(spec["root"], spec["path"], tuple(only) if only else None) as table:
        for group in range(*spec["groups"]):
            first, where = 0, f"{place}, row group {group}, row"
            if spec.get("is_object"):
                first, where = sum(rows for rows, _ in table.groups[:group]), "item"
            for batch, numbers in table.numbered(group, wanted):
                for found in _rows(batch, columns, spec, [f"{where} {first + number}" for number in numbers]):
                    yield from video.clips(found, video.Sampling(*sampling)) if sampling else [found]


def _rows(batch: pa.RecordBatch, columns: Columns, spec: dict[str, Any], places: list[str]) -> Iterator[Row]:
    images = batch.column(columns.image)
    classes = [(columns.label and columns.constant) or None] * len(images)
    if columns.label and columns.constant is None:
        classes = labels.as_classes(batch.column(columns.label), columns.names).to_pylist()
    if columns.is_file_name:
        for name, label in zip(images.cast(pa.string()).to_pylist(), classes, strict=True):
            yield read_named(spec, name, label, columns.places)
        return
    names: list[str | None] = [None] * len(images)
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            names = pc.struct_field(images, "path").to_pylist()
        images = pc.struct_field(images, "bytes")
    for image, label, name, place in zip(images, classes, names, places, strict=True):
        if name and not image.is_valid and spec["follow_links"]:
            yield read_named(spec, name, label)
            continue
        path = place + (f" ({name})" if name else "")
        yield Row(image.as_py(), label, path, "the image column has no bytes in this row")
