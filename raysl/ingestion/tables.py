"""Open tables of any format in groups of rows: Parquet, Arrow (file and stream, Feather), CSV, TSV and JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysl.errors import UserError
from raysl.ingestion.found import shown
from raysl.ingestion.metadata import read_table
from raysl.storage import filesystem, retry

TEXT = (".csv", ".tsv", ".jsonl", ".ndjson")
SUFFIXES = (".parquet", ".arrow", ".feather", *TEXT)
_BATCH_ROWS = 256
_TEXT_ROWS = 4096
# A small file may claim more than any memory holds. A page is unpacked at once, a batch of rows is copied.
_MOST_GROUP_BYTES = 8 << 30
_MOST_RATIO = 1000
_BATCH_BYTES = 4 << 30


@dataclass(frozen=True)
class Table:
    """An opened table.

    Args:
        schema: of its columns.
        groups: rows and bytes of each group of rows.
    """

    schema: pa.Schema
    groups: list[tuple[int, int]]
    _file: Any

    def read(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a group, a few rows at a time."""
        if isinstance(self._file, pq.ParquetFile):
            rows = self._batch_rows(group)
            yield from self._file.iter_batches(rows, row_groups=[group], columns=columns)
        elif isinstance(self._file, pa.RecordBatchFileReader):
            yield self._file.get_batch(group).select(columns)
        else:
            yield self._file[group].select(columns)

    def _batch_rows(self, group: int) -> int:
        """Return how many rows are read at once. A value of a dictionary may be large and occur in every row."""
        metadata = self._file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        largest = max(
            (chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page), default=1
        )
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(largest, 1)))


@contextmanager
def opened(root: str, path: str) -> Iterator[Table]:
    """Open a table.

    Raises:
        UserError: it is damaged, or claims to hold more than any memory.
    """
    fs, folder = filesystem(root)
    place = f"{folder}/{path}".rstrip("/")
    name = place.lower()
    try:
        with retry(place, "read", lambda: fs.open_input_file(place)) as stream:
            if name.endswith(TEXT):
                yield _in_memory(read_table(stream.read(), name).to_batches(_TEXT_ROWS))
            elif name.endswith((".arrow", ".feather")):
                yield _arrow(stream)
            else:
                yield _parquet(stream, place)
    except (pa.ArrowException, OSError, OverflowError) as error:
        kind = "Parquet file" if name.endswith(".parquet") else "table"
        raise UserError(
            f"Cannot read the {kind} {shown(place)!r}: {error}. Download or copy it again, then run the same command."
        ) from error


def _in_memory(batches: list[pa.RecordBatch], schema: pa.Schema | None = None) -> Table:
    if schema is None:
        schema = batches[0].schema if batches else pa.schema([])
    return Table(schema, [(batch.num_rows, batch.nbytes) for batch in batches], batches)


def _arrow(stream: Any) -> Table:
    """Open an Arrow file, or the stream that Hugging Face's `save_to_disk` writes."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream)
        sizes = [file.get_batch(i) for i in range(file.num_record_batches)]
        return Table(file.schema, [(batch.num_rows, batch.nbytes) for batch in sizes], file)
    if magic[:4] == b"FEA1":
        raise UserError(
            "Feather files of version 1 are not read. Write it again with pyarrow.feather.write_feather."
        )
    reader = pa.ipc.open_stream(stream)
    return _in_memory(list(reader), reader.schema)


def _parquet(stream: Any, place: str) -> Table:
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    groups = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        packed = max(sum(group.column(i).total_compressed_size for i in range(group.num_columns)), 1)
        if group.total_byte_size > _MOST_GROUP_BYTES or group.total_byte_size > _MOST_RATIO * packed + (
            1 << 28
        ):
            raise UserError(
                f"The Parquet file {shown(place)!r} unpacks {packed:,} bytes to {group.total_byte_size:,} in one row "
                "group, which may not fit into memory. Write it again with smaller row groups."
            )
        groups.append((group.num_rows, group.total_byte_size))
    return Table(file.schema_arrow, groups, file)
