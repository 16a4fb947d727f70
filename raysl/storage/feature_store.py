"""Read features from disk: Parquet files with one row of numbers for each image.

    _features.json                           written last: the origin of the features
    features-0000000000-0000004096.parquet   `index` (int64), `path` (string, if the data set knows the file of every
                                             image), and a list of numbers that is named after the layer

Parquet files of other programs are read too, if they have an integer column `index` and a column of lists of numbers;
a column `path` of anything but text is not read. They are known by their names, sizes and times.
Rows are counted over the files in the order of their names; "position" means that count. Pages carry checksums.
This module does not import torch, because FAISS crashes in a process that holds both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysl.errors import UserError, counted, unknown
from raysl.storage import Folder, filesystem, retry
from raysl.storage.feature_files import FINISHED, STARTED, part_file
from raysl.storage.records import read_record, short_hash

Numbers = NDArray[np.floating[Any]]
T = TypeVar("T")

# Squares of larger numbers, summed over a row, do not fit float32.
_LARGEST = 1e15
_THREADS = 16
_BUFFER_BYTES = 4 << 20
_ORIGIN = ("encoder", "fingerprint", "protocol", "form")
_REMEDY = "Delete the folder and make the features again."


@dataclass(frozen=True)
class RowGroup:
    """A row group: its file, its number in the file, the position of its first row, and its number of rows."""

    file: str
    number: int
    start: int
    num_rows: int


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `end` of a row group."""

    group: RowGroup
    first: int
    end: int

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.group.start + self.first

    @property
    def num_rows(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class FeatureStore:
    """Features of one layer in a folder. Small and picklable: it holds no rows."""

    folder: Folder
    layer: str  # column of the features
    dim: int  # numbers in a row
    itemsize: int  # bytes of a number in memory: 2 for float16, 4 otherwise
    has_paths: bool  # whether every file has the column `path`, of text
    groups: tuple[RowGroup, ...]  # all row groups, in the order of positions
    metadata: dict[str, Any]  # content of _features.json; empty for files of other programs
    stamps: tuple[tuple[str, int | None, int | None], ...] = ()  # of files of other programs: see `_stamps`

    def __repr__(self) -> str:
        rows = counted(self.num_rows, "row")
        return f"FeatureStore({str(self.folder)!r}: {rows} of {counted(self.dim, 'number')}, layer {self.layer!r})"

    @staticmethod
    def open(uri: str, layer: str = "") -> FeatureStore:
        """Find the features in the folder `uri`, of the only layer if none is named. Reads only the footers of files.

        Raises:
            UserError: the features are missing, unfinished, damaged or empty, have no such layer or no column
                `index`, or rows of different lengths.
        """
        folder = Folder(uri)
        metadata, names = _files(folder)
        # Before the footers: files that are written now have a later time.
        stamps = () if _origin(metadata) else _stamps(folder, names)
        with ThreadPoolExecutor(_THREADS) as pool:
            schemas, footers = zip(*pool.map(partial(_footer, folder), names), strict=True)
        layer = layer or _only_layer(schemas[0], uri)
        places = [f"{uri}/{name}" for name in names]
        kinds = [_row_kind(*found, layer) for found in zip(schemas, places, strict=True)]
        has_paths = all(map(_has_paths, schemas))
        groups, start = [], 0
        for name, footer in zip(names, footers, strict=True):
            if not footer.num_rows:
                raise UserError(
                    f"The features file {uri}/{name} has no rows. Delete it, or make the features again."
                )
            for number in range(footer.num_row_groups):
                groups.append(RowGroup(name, number, start, footer.row_group(number).num_rows))
                start += groups[-1].num_rows
        itemsize = max(size for _, size in kinds)
        store = FeatureStore(folder, layer, 1, itemsize, has_paths, tuple(groups), metadata, stamps)
        dims = {name: dim or store._first_dim(name) for name, (dim, _) in zip(names, kinds, strict=True)}
        first = names[0]
        if odd := next((name for name in names if dims[name] != dims[first]), ""):
            raise UserError(
                f"The features at {uri!r} have rows of different lengths: {dims[first]} in {first}, {dims[odd]} in "
                f"{odd}. Give features of one layer of one network."
            )
        return replace(store, dim=dims[first])

    @property
    def num_rows(self) -> int:
        return self.groups[-1].start + self.groups[-1].num_rows

    @property
    def num_values(self) -> int:
        """Numbers in all rows."""
        return self.num_rows * self.dim

    def identity(self) -> str:
        """Return a hash that equal features share: of their origin, or else of the files as `open` found them."""
        value: Any = _origin(self.metadata) or [*self.stamps, str(self.folder)]
        text = json.dumps([value, self.layer], sort_keys=True)
        return short_hash(text.encode())

    def load(self) -> NDArray[np.float32]:
        """Return all rows in the order of positions, float32 (n, dim). Raises UserError if a file is damaged."""
        rows_nd = np.empty((self.num_rows, self.dim), np.float32)
        (pieces,) = self.shards(1)
        for piece in pieces:
            first = piece.start
            for _, rows_bd in self.batches(piece, 32 << 20):
                rows_nd[first : first + len(rows_bd)] = rows_bd
                first += len(rows_bd)
        return rows_nd

    def shards(self, count: int) -> list[tuple[Piece, ...]]:
        """Divide the rows into `count` ranges of positions that differ by at most one row in length."""
        if count > self.num_rows:
            share = f"{count} actors cannot share {self.num_rows} rows"
            raise UserError(f"{share}: a shard would be empty. Use fewer actors.")
        edges = [self.num_rows * i // count for i in range(count + 1)]
        return [tuple(self._between(a, b)) for a, b in pairwise(edges)]

    def _between(self, first: int, end: int) -> Iterator[Piece]:
        for group in self.groups:
            low, high = max(first - group.start, 0), min(end - group.start, group.num_rows)
            if low < high:
                yield Piece(group, low, high)

    def batches(self, piece: Piece, num_bytes: int = 4 << 20) -> Iterator[tuple[NDArray[np.int64], Numbers]]:
        """Yield a piece in batches of about `num_bytes`: indices, int64 (b,), and rows, float16 or float32 (b, dim)."""
        num_rows = max(1, num_bytes // (4 * self.dim))
        for batch in self._slices(piece, num_rows, ["index", self.layer]):
            yield self._indices(piece, batch.column("index")), self._numbers(piece, batch)

    def paths(self, pieces: Sequence[Piece]) -> pa.ChunkedArray | None:
        """Return the paths of the images of some pieces; None if the features have none."""
        if not self.has_paths:
            return None
        batches = (batch for piece in pieces for batch in self._slices(piece, 1 << 16, ["path"]))
        return pa.chunked_array([batch.column("path") for batch in batches]).cast(pa.string())

    def _slices(self, piece: Piece, num_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        place = 0
        for batch in self._decoded(piece.group, num_rows, columns):
            low, high = max(piece.first - place, 0), min(piece.end - place, batch.num_rows)
            if low < high:
                yield batch.slice(low, high - low)
            place += batch.num_rows
            if place >= piece.end:
                return
        raise _damaged(f"{self.folder}/{piece.group.file}", "it ends early")

    def _decoded(self, group: RowGroup, num_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        def read() -> Iterator[pa.RecordBatch]:
            file = pq.ParquetFile(
                self.folder.open(group.file),
                # Without these two, a list column takes eight times its size in memory.
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                page_checksum_verification=True,
            )
            return file.iter_batches(num_rows, row_groups=[group.number], columns=columns)  # type: ignore[no-any-return]

        path = f"{self.folder}/{group.file}"
        batches = _checked(path, read)
        while (batch := _checked(path, lambda: next(batches, None))) is not None:
            yield batch

    def _indices(self, piece: Piece, column: pa.Array) -> NDArray[np.int64]:
        whole = column.cast(pa.int64(), safe=False)  # Numbers of 64 bits become negative.
        if whole.null_count or (whole.to_numpy() < 0).any():
            raise UserError(
                f"The column 'index' of {self.folder}/{piece.group.file} has nulls, negative numbers or numbers "
                "of more than 63 bits. It must number the images from 0."
            )
        return whole.to_numpy().copy()  # type: ignore[no-any-return]

    def _numbers(self, piece: Piece, batch: pa.RecordBatch) -> Numbers:
        column = batch.column(self.layer)
        column = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
        lengths_b = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        odd_b = lengths_b != self.dim
        values = column.flatten()
        if column.null_count:
            odd_b |= column.is_null().to_numpy(zero_copy_only=False)
        if odd_b.any():
            at = int(odd_b.argmax())
            found = f"{lengths_b[at]} numbers" if column[at].is_valid else "no numbers (null)"
            raise UserError(
                f"The row with index {batch.column('index')[at]} of {self.folder}/{piece.group.file} has {found} in "
                f"place of {self.dim}. Give features of one layer of one network."
            )
        if values.null_count:
            raise UserError(
                f"The features file {self.folder}/{piece.group.file} has null in place of a number. Remove these rows."
            )
        rows_bd: Numbers = values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        return rows_bd if rows_bd.dtype == np.float16 else rows_bd.astype(np.float32, copy=False)

    def _first_dim(self, file: str) -> int:
        """Return the length of the first row of a file that does not state the length in its schema."""
        group = next(group for group in self.groups if group.file == file)
        row = next(self._decoded(group, 1, [self.layer])).column(0)[0]
        if not row.is_valid or not len(row):
            raise UserError(
                f"The first row of the features file {self.folder}/{file} has no numbers. Remove such rows."
            )
        return len(row)

    def check(self, piece: Piece, indices_b: NDArray[np.int64], rows_bd: Numbers) -> None:
        """Raise UserError if a row holds NaN, an infinity, or a number with a square that does not fit float32."""
        bad_b = ~(np.abs(rows_bd).max(axis=1).astype(np.float64) < _LARGEST)
        if bad_b.any():
            raise UserError(
                f"The features at {str(self.folder)!r} hold NaN, an infinity or a number above {_LARGEST:g}; the first "
                f"such row has index {indices_b[bad_b.argmax()]} in {piece.group.file}. A diverged network gives such "
                "features: choose an earlier checkpoint."
            )


def _files(folder: Folder) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a folder of features, and the names of its files."""
    fs, path = filesystem(str(folder))
    if retry(str(folder), "read", lambda: fs.get_file_info([path])[0].is_file):
        raise UserError(
            f"{str(folder)!r} is a file. Give the folder that holds the Parquet files of the features."
        )
    listed = folder.list()
    names = [name for name in listed if name.endswith(".parquet")]
    if FINISHED not in listed and (STARTED in listed or not names):
        raise UserError(
            f"No finished features at {str(folder)!r}. Make them with `raysl features CKPT --data DATA --out "
            f"{folder}`; the same command completes interrupted features."
        )
    metadata = read_record(folder, FINISHED, _REMEDY) if FINISHED in listed else {}
    try:
        expected = [part_file((int(first), int(end))) for first, end in metadata.get("parts", [])]
    except (TypeError, ValueError) as error:
        raise UserError(f"The file {folder}/{FINISHED} is damaged: it lists no parts. {_REMEDY}") from error
    if missing := sorted(set(expected) - set(names)):
        raise _damaged(f"{folder}/{missing[0]}", "it is missing")
    if not (expected or names):
        raise _damaged(f"{folder}/{FINISHED}", "there are no features beside it")
    return metadata, expected or names


def _origin(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies features of raysl; empty for those of other programs."""
    return {key: metadata[key] for key in _ORIGIN if key in metadata}


def _stamps(folder: Folder, names: Sequence[str]) -> tuple[tuple[str, int | None, int | None], ...]:
    """Return name, size and time of each file, in ns since 1970; None for what a store does not tell."""
    fs, path = filesystem(str(folder))
    found = retry(str(folder), "list", lambda: fs.get_file_info(pafs.FileSelector(path)))
    by_name = {info.base_name: (info.base_name, info.size, info.mtime_ns) for info in found}
    return tuple(by_name[name] for name in names if name in by_name)


def _footer(folder: Folder, name: str) -> tuple[pa.Schema, Any]:
    """Return the schema and the metadata of a file, and close it: a data set may have thousands."""

    def read() -> tuple[pa.Schema, Any]:
        with folder.open(name) as stream:
            file = pq.ParquetFile(stream)
            return file.schema_arrow, file.metadata

    return _checked(f"{folder}/{name}", read)


def _checked(path: str, read: Callable[[], T]) -> T:
    """Return `read()`. Raises UserError if the file is damaged."""
    try:
        return read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(path, " ".join(str(error).split())) from error


def _damaged(path: str, why: str) -> UserError:
    return UserError(f"The features file {path} is damaged: {why}. {_REMEDY}")


def _layers(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return the columns of lists of numbers, with the types of the lists."""
    found = {}
    for field in schema:
        kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
            found[field.name] = kind
    return found


def _has_paths(schema: pa.Schema) -> bool:
    """Return True if a file has one column `path`, of text."""
    kinds = [field.type for field in schema if field.name == "path"]
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    return len(kinds) == 1 and str(kinds[0]) in ("string", "large_string", "string_view")


def _only_layer(schema: pa.Schema, uri: str) -> str:
    names = list(_layers(schema))
    if not names:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"The features at {uri!r} have no column of lists of numbers, one list for each image. Their columns: "
            f"{columns}."
        )
    if len(names) > 1:
        raise UserError(
            f"The features at {uri!r} have several layers: {', '.join(names)}. Choose one with --layer."
        )
    return names[0]


def _row_kind(schema: pa.Schema, path: str, layer: str) -> tuple[int, int]:
    """Return the length of the rows, 0 if the schema does not state it, and the bytes of a number in memory."""
    layers = _layers(schema)
    if layer not in layers:
        raise unknown(f"layer of the features at {path}", layer, layers)
    if twice := {name for name in ("index", layer) if schema.names.count(name) > 1}:
        raise UserError(
            f"The features file {path} has several columns called {min(twice)!r}. Write it again with one of them."
        )
    if "index" not in schema.names or not pa.types.is_integer(schema.field("index").type):
        found = f"is {schema.field('index').type}" if "index" in schema.names else "is missing"
        raise UserError(
            f"The column 'index' of the features file {path} {found}. It must hold the number of every image, an "
            "integer, by which clusters find their images."
        )
    kind = layers[layer]
    dim = kind.list_size if pa.types.is_fixed_size_list(kind) else 0
    return dim, 2 if pa.types.is_float16(kind.value_type) else 4
