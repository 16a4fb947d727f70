"""Rows of features on disk: Parquet files with the columns `index` and one list of numbers for each layer.

Rows are counted over the files in the order of their names; "position" means that count. A shard is a range of
positions, read in pieces that never cross a row group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raysl.errors import UserError, unknown
from raysl.storage import Folder

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]

MANIFEST = "features.json"
BEGUN = "source.json"
# Squares of larger numbers, summed over a row, leave float32.
_LARGEST = 1e15
_PARALLEL = 16
# Of a file, read at once.
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Group:
    """A row group: its file, its number inside, the position of its first row, and how many rows it has."""

    file: str
    number: int
    start: int
    num_rows: int


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `end` of a row group."""

    group: Group
    first: int
    end: int

    @property
    def start(self) -> int:
        """Position of its first row."""
        return self.group.start + self.first

    @property
    def num_rows(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Rows:
    """Features that were found on disk. Small and picklable: it holds none of them.

    Args:
        folder: where the files are.
        column: the layer.
        dim: numbers in a row.
        itemsize: bytes of a number in memory: 2 for float16, else 4.
        groups: every row group, in order.
        facts: what `raysl features` wrote about them; empty for files of another origin.
    """

    folder: Folder
    column: str
    dim: int
    itemsize: int
    groups: tuple[Group, ...]
    facts: dict[str, Any]

    @staticmethod
    def open(uri: str, column: str = "") -> Rows:
        """Finds the features at `uri`; reads the ends of the files only.

        Args:
            column: the layer; may be left out where there is one.

        Raises:
            UserError: there are none, they are unfinished, a file is damaged or has no rows, there is no such layer,
                or the rows of two files differ in length.
        """
        folder = Folder(uri)
        names = [name for name in folder.list() if name.endswith(".parquet")]
        if not folder.exists(MANIFEST) and (folder.exists(BEGUN) or not names):
            raise UserError(
                f"No finished features at {uri!r}. Make them with `raysl features CKPT --data DATA --out {uri}`; the "
                "same command again completes features that were interrupted."
            )
        facts = folder.read_json(MANIFEST) if folder.exists(MANIFEST) else {}
        with ThreadPoolExecutor(_PARALLEL) as pool:
            files = list(pool.map(lambda name: _footer(folder, name), names))
        schemas = [schema for schema, _ in files]
        column = column or _only(schemas[0], uri)
        kinds = [_kind(schema, column, f"{uri}/{name}") for schema, name in zip(schemas, names, strict=True)]
        groups: list[Group] = []
        start = 0
        for name, (_, metadata) in zip(names, files, strict=True):
            if metadata.num_rows == 0:
                raise UserError(
                    f"The features file {uri}/{name} has no rows: it is empty, or was cut short. Delete it, or make "
                    "the features again."
                )
            for number in range(metadata.num_row_groups):
                num_rows = metadata.row_group(number).num_rows
                groups.append(Group(name, number, start, num_rows))
                start += num_rows
        found = Rows(folder, column, kinds[0][0], max(size for _, size in kinds), tuple(groups), facts)
        lengths = {
            name: length or found.first_length(name) for name, (length, _) in zip(names, kinds, strict=True)
        }
        odd = next((name for name in names if lengths[name] != lengths[names[0]]), None)
        if odd is not None:
            raise UserError(
                f"The features at {uri!r} have rows of different lengths: {lengths[names[0]]} in {names[0]}, "
                f"{lengths[odd]} in {odd}. Give features of one layer of one network."
            )
        return Rows(folder, column, lengths[names[0]], found.itemsize, found.groups, facts)

    @property
    def num_rows(self) -> int:
        return self.groups[-1].start + self.groups[-1].num_rows

    def first_length(self, file: str) -> int:
        """Numbers in the first row of a file whose schema does not tell."""
        group = next(group for group in self.groups if group.file == file)
        return len(next(self._decoded(group, 1)).column(self.column)[0].as_py() or ())

    def identity(self) -> str:
        """A hash that equal features share: of what made them, or of the files where that is not known."""
        made = {
            key: self.facts[key]
            for key in ("encoder", "fingerprint", "protocol", "form")
            if key in self.facts
        }
        value: Any = made or [(g.file, g.num_rows) for g in self.groups] + [str(self.folder)]
        return hashlib.blake2b(
            json.dumps([value, self.column], sort_keys=True).encode(), digest_size=8
        ).hexdigest()

    def divide(self, shards: int) -> list[tuple[Piece, ...]]:
        """Pieces of `shards` ranges of positions whose lengths differ by one row at most.

        Raises:
            UserError: there are more shards than rows.
        """
        if shards > self.num_rows:
            raise UserError(
                f"{shards} actors cannot share {self.num_rows} rows: a shard would be empty. Use fewer actors."
            )
        edges = [self.num_rows * i // shards for i in range(shards + 1)]
        return [tuple(self._between(a, b)) for a, b in pairwise(edges)]

    def _between(self, first: int, end: int) -> Iterator[Piece]:
        for group in self.groups:
            low, high = max(first - group.start, 0), min(end - group.start, group.num_rows)
            if low < high:
                yield Piece(group, low, high)

    def batches(self, piece: Piece, num_bytes: int = 4 << 20) -> Iterator[tuple[Integers, Floats]]:
        """A piece, a few rows at a time: indices, int64 (b,), and rows, float16 or float32 (b, dim).

        Args:
            num_bytes: of a batch, about; reading takes some times as much, however large the row group is.

        Raises:
            UserError: the file is damaged, or a row has another length.
        """
        place = 0
        for batch in self._decoded(piece.group, max(1, num_bytes // (4 * self.dim))):
            low, high = max(piece.first - place, 0), min(piece.end - place, batch.num_rows)
            if low < high:
                yield self._numbers(piece.group, batch.slice(low, high - low))
            place += batch.num_rows
            if place >= piece.end:
                return

    def _numbers(self, group: Group, batch: pa.RecordBatch) -> tuple[Integers, Floats]:
        column = batch.column(self.column)
        values = column.flatten()
        lengths_differ = (
            pa.types.is_list(column.type) and (np.diff(column.offsets.to_numpy()) != self.dim).any()
        )
        if lengths_differ or len(values) != self.dim * batch.num_rows or values.null_count:
            raise UserError(
                f"Row group {group.number} of {self.folder}/{group.file} has rows that are not {self.dim} numbers "
                "long, as the first one is. Give features of one layer of one network."
            )
        numbers = values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        indices = batch.column("index").to_numpy().astype(np.int64)
        return indices, numbers if numbers.dtype == np.float16 else numbers.astype(np.float32, copy=False)

    def check(self, piece: Piece, indices: Integers, numbers: Floats) -> None:
        """Raises UserError when a row holds NaN, an infinity, or a number whose square leaves float32."""
        bad = ~(np.abs(numbers).max(axis=1).astype(np.float64) < _LARGEST)
        if bad.any():
            raise UserError(
                f"The features at {str(self.folder)!r} hold NaN, an infinity or a number above {_LARGEST:g}; the first "
                f"such row is that of index {indices[bad.argmax()]} in {piece.group.file}. A network that diverged "
                "gives such features: choose an earlier checkpoint."
            )

    def _decoded(self, group: Group, num_rows: int) -> Iterator[pa.RecordBatch]:
        try:
            # As pieces of the file: a list column that is read at once takes eight times its size.
            file = pq.ParquetFile(self.folder.open(group.file), pre_buffer=False, buffer_size=_BUFFER_BYTES)
            yield from file.iter_batches(num_rows, row_groups=[group.number], columns=["index", self.column])
        except (OSError, pa.ArrowException) as error:
            raise _damaged(f"{self.folder}/{group.file}", error) from error


def sample(total: int, count: int, key: int) -> Integers:
    """int64 (count,): positions chosen without replacement, sorted. A pure function of its arguments."""
    generator = np.random.Generator(np.random.Philox(key=key))
    return np.sort(generator.choice(total, count, replace=False, shuffle=False)).astype(np.int64)


def _footer(folder: Folder, name: str) -> tuple[pa.Schema, Any]:
    """Schema and metadata of a file, which is closed again: a data set may have thousands."""
    try:
        with folder.open(name) as stream:
            file = pq.ParquetFile(stream)
            return file.schema_arrow, file.metadata
    except (OSError, pa.ArrowException) as error:
        raise _damaged(f"{folder}/{name}", error) from error


def _damaged(place: str, error: Exception) -> UserError:
    return UserError(
        f"The features file {place} is damaged: {error}. Delete its folder and make the features again."
    )


def _only(schema: pa.Schema, uri: str) -> str:
    names = _layers(schema)
    if len(names) != 1:
        raise UserError(
            f"The features at {uri!r} have {len(names)} columns of lists of numbers, one for each layer: "
            f"{', '.join(names) or 'none'}. Name one with --layer."
        )
    return names[0]


def _layers(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if _is_list(field.type)]


def _is_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _kind(schema: pa.Schema, column: str, place: str) -> tuple[int, int]:
    """Length of the rows, 0 where the schema does not tell, and bytes of a number in memory."""
    if column not in _layers(schema):
        raise unknown(f"layer of the features at {place}", column, _layers(schema))
    if "index" not in schema.names:
        raise UserError(
            f"The features file {place} has no column 'index', by which clusters find their images."
        )
    kind = schema.field(column).type
    length = kind.list_size if pa.types.is_fixed_size_list(kind) else 0
    return length, 2 if pa.types.is_float16(kind.value_type) else 4


def disjoint(bounds: Sequence[tuple[int, int]]) -> bool:
    """Whether ranges of indices, (smallest, largest) of each, have nothing in common."""
    ordered = sorted(bounds)
    return all(a[1] < b[0] for a, b in pairwise(ordered))
