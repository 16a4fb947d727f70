"""Open tables of any format in groups of rows: Parquet, Arrow (file and stream, Feather), CSV, TSV and JSON lines."""

from __future__ import annotations

import codecs
import csv
import io
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from raysl.errors import UserError, explained
from raysl.ingestion.found import printable
from raysl.storage import Folder

TEXT = (".csv", ".tsv", ".jsonl", ".ndjson")
# Arrow crashes on such a line.
_NULL = re.compile(rb"^\s*null\b", re.MULTILINE)
_PADDED = re.compile(rb"(?:^|[,;|\t\"])\s*-?0\d", re.MULTILINE)
SUFFIXES = (".parquet", ".arrow", ".feather", *TEXT)
# The beginning of a file that Excel writes: ZIP (.xlsx), or OLE (.xls).
_SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
_FILE_NAMES = (
    "file_name filename file path filepath file_path image_path image_file image_file_name image_filename image img "
    "image_name img_path"
).split()
# Columns that may name files without their suffixes, as the tables of competitions do.
ID_NAMES = ("id", "image_id", "img_id", "photo_id", "id_code", "uuid")
_SPLITS = ("split", "subset", "partition", "fold")
_BATCH_ROWS = 256
_real = lru_cache(4096)(os.path.realpath)
_TEXT_ROWS = 4096
# A small file may claim more than any memory holds. A page is unpacked at once, a batch of rows is copied.
_MOST_GROUP_BYTES = 8 << 30
_MOST_RATIO = 1000
_BATCH_BYTES, _USUAL_BYTES = 4 << 30, 64 << 20


@dataclass(frozen=True)
class Table:
    """An opened table."""

    schema: pa.Schema
    groups: list[tuple[int, int]]  # the rows, also those that are not read, and bytes of each group of rows
    _file: Any
    only: tuple[str, str] | None = None  # a column and the value, as text, of the rows that are read

    def read(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a group, a few rows at a time."""
        for batch, _ in self.numbered(group, columns):
            yield batch

    def numbered(self, group: int, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, Sequence[int]]]:
        """Yield some columns of a group, a few rows at a time, and the numbers of these rows in the whole group."""
        column, value = self.only or ("", "")
        first = 0
        for batch in self._read(group, list(dict.fromkeys([*columns, *([column] if column else [])]))):
            numbers: Sequence[int] = range(first, first + batch.num_rows)
            first += batch.num_rows
            if column:
                is_read = pc.equal(as_texts(batch.column(column)), value).fill_null(False)
                batch = batch.filter(is_read).select(columns)
                numbers = [number for number, one in zip(numbers, is_read.to_pylist(), strict=True) if one]
            yield batch, numbers

    def counted(self) -> list[tuple[int, int]]:
        """Return the groups with the rows that are read, for which `only` reads a column of the whole table."""
        if self.only is None:
            return self.groups
        column = [self.only[0]]
        return [
            (sum(batch.num_rows for batch in self.read(number, column)), size)
            for number, (_, size) in enumerate(self.groups)
        ]

    def _read(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if isinstance(self._file, pq.ParquetFile):
            batches = self._file.iter_batches(self._batch_rows(group), row_groups=[group], columns=columns)
        elif isinstance(self._file, pa.RecordBatchFileReader):
            batches = iter([self._file.get_batch(group).select(columns)])
        else:
            batches = iter([self._file[group].select(columns)])
        for batch in batches:
            # Arrow itself reads text that is not in UTF-8, and the false offsets of a damaged file.
            batch.validate(full=True)
            yield batch.cast(without_views(batch.schema))

    def column(self, name: str) -> Iterator[pa.Array]:
        """Yield the values of a column, a few rows at a time."""
        for group in range(len(self.groups)):
            for batch in self.read(group, [name]):
                yield batch.column(name)

    def _batch_rows(self, group: int) -> int:
        """Return how many rows are read at once: few of videos."""
        metadata = self._file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        # A value of a dictionary may be large and occur in every row.
        sizes = [chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page]
        largest = max(sizes, default=1)
        fitting = int(_USUAL_BYTES * metadata.num_rows / max(metadata.total_byte_size, 1))
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(largest, 1), fitting))


@contextmanager
def opened(root: str, path: str, only: tuple[str, str] | None = None) -> Iterator[Table]:
    """Open a table; for `only` see `Table`. Raises UserError if it is damaged, or claims more than any memory."""
    place = f"{root}/{path}".rstrip("/")
    name = place.lower()
    what = f"Cannot read the {'Parquet file' if name.endswith('.parquet') else 'table'} {printable(place)!r}"
    remedy = "Download or copy it again, then run the same command."
    with explained(what, remedy, pa.ArrowException, OSError, OverflowError, UnicodeDecodeError):
        with Folder(root).open(path) as stream:
            if name.endswith(TEXT):
                text = read_table(stream.read(), place)
                table = _in_memory(text.to_batches(_TEXT_ROWS), text.schema)
            else:
                table = _arrow(stream) if name.endswith((".arrow", ".feather")) else _parquet(stream, place)
            _check_names(table.schema.names, place)
            yield replace(table, schema=without_views(table.schema), only=only)


def as_texts(values: pa.Array) -> pa.Array:
    """Return values as texts without white space around them; null for lists and the like."""
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    try:
        return pc.utf8_trim_whitespace(values.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(values), pa.string())


def without_views(schema: pa.Schema) -> pa.Schema:
    """Return a schema with the ordinary types of texts and bytes, for the files of polars."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    fields = [field.with_type(plain.get(field.type, field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def _check_names(names: list[str], path: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"The table {printable(path)!r} has several columns called {twice[0]!r}. Rename them, so that each has a "
            "name of its own."
        )


def file_column(names: Sequence[str]) -> str:
    """Return the column that is named like one of names of files; "" if there is none."""
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in _FILE_NAMES if name in lower), "")


def normal(name: str) -> str:
    """Return the name of a file without ".", and with "/" between its parts where Windows wrote "\\"."""
    return name if "://" in name else posixpath.normpath(name if "/" in name else name.replace("\\", "/"))


def read_table(data: bytes, path: str) -> pa.Table:
    """Return a table of text: CSV, TSV or JSON lines by the end of its name, or Parquet."""
    what, remedy = f"Cannot read the table {printable(path)!r}", "Correct it or remove it."
    with explained(what, remedy, pa.ArrowException, OSError, UnicodeDecodeError):
        table = _read_table(data, path.lower())
        table.validate(full=True)  # As in Table.read.
        _check_names(table.column_names, path)
        return table.cast(without_views(table.schema))


def _read_table(data: bytes, name: str) -> pa.Table:
    if name.endswith(".parquet"):
        return pq.ParquetFile(io.BytesIO(data)).read()
    if data.startswith(b"\x1f\x8b"):
        raise pa.ArrowInvalid("it is compressed with gzip: unpack it first")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16").encode()
    # Text in UTF-16 without a mark at its beginning has a zero in about every other byte.
    zeros = max(data[start:4096:2].count(0) for start in (0, 1))
    if data.startswith(_SPREADSHEETS) or 3 * zeros > len(data[:4096]):
        raise pa.ArrowInvalid(
            "it is not a text in UTF-8 but, for example, a spreadsheet: save it as CSV in UTF-8"
        )
    if name.endswith((".jsonl", ".ndjson")):
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise pa.ArrowInvalid(f"it is not in UTF-8 ({error}): save the table in UTF-8") from error
        if _NULL.search(data):
            raise pa.ArrowInvalid("a line is null, and each must be an object")
        if data.lstrip()[:1] == b"[":
            raise pa.ArrowInvalid(
                "it is one JSON list: write each object of it on a line of its own, without the list"
            )
        return pajson.read_json(io.BytesIO(data))
    table = _read_csv(data, name)
    if strange := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
        raise pa.ArrowInvalid(f"the column {strange[0]!r} is not in UTF-8: save the table in UTF-8")
    for number, field in enumerate(table.schema):
        if field.name != field.name.strip() and pa.types.is_string(field.type):
            table = table.set_column(number, field.name, pc.utf8_trim_whitespace(table.column(number)))
    return table.rename_columns([column.strip() for column in table.column_names])


def _read_csv(data: bytes, name: str) -> pa.Table:
    """Return a table in which a column of numbers is text if it writes one number in several ways, as 1 and 01.

    So is a column that is named like one of files and has a number that begins with 0.
    """
    options = {
        "read_options": pacsv.ReadOptions(autogenerate_column_names=name.endswith(".txt")),
        "parse_options": pacsv.ParseOptions(delimiter=_delimiter(data, name), newlines_in_values=True),
    }
    table = pacsv.read_csv(io.BytesIO(data), **options)
    numbers = {field.name: pa.string() for field in table.schema if pa.types.is_integer(field.type)}
    if not numbers or not _PADDED.search(data) or len(set(table.column_names)) < table.num_columns:
        return table
    kinds = pacsv.ConvertOptions(column_types=numbers, include_columns=[*numbers], strings_can_be_null=True)
    written = pacsv.read_csv(io.BytesIO(data), **options, convert_options=kinds)
    for column in numbers:
        texts = pc.utf8_trim_whitespace(written[column])
        # Negative numbers are no labels.
        texts = pc.if_else(pc.less(table[column], 0), pa.scalar(None, pa.string()), texts)
        texts = pc.replace_substring_regex(texts, "^-0+$", "0")
        of_files = column.strip().lower() in (*_FILE_NAMES, *ID_NAMES)
        if of_files or pc.count_distinct(texts).as_py() > pc.count_distinct(table[column]).as_py():
            table = table.set_column(table.column_names.index(column), column, texts)
    return table


def _delimiter(data: bytes, name: str) -> str:
    """Return the character between the columns, which the first line tells for CSV."""
    if name.endswith((".tsv", ".txt")):
        return "\t"
    first = data.split(b"\n", 1)[0].decode("utf-8", "replace")
    try:
        return csv.Sniffer().sniff(first, ",;\t|").delimiter
    except csv.Error:  # A single column.
        return ","


def _in_memory(batches: list[pa.RecordBatch], schema: pa.Schema) -> Table:
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


def _parquet(stream: Any, path: str) -> Table:
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    groups = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        packed = max(sum(group.column(i).total_compressed_size for i in range(group.num_columns)), 1)
        if group.total_byte_size > min(_MOST_GROUP_BYTES, _MOST_RATIO * packed + (1 << 28)):
            raise UserError(
                f"The Parquet file {printable(path)!r} unpacks {packed:,} bytes to {group.total_byte_size:,} in one "
                "row group, which may not fit into memory. Write it again with smaller row groups."
            )
        groups.append((group.num_rows, group.total_byte_size))
    return Table(file.schema_arrow, groups, file)


def split_column(schema: pa.Schema) -> str:
    """Return the column of a table that names splits, of which `SOURCE#SPLIT` reads one; "" without one."""
    return next((name for name in schema.names if name.lower() in _SPLITS), "")


def leads_out(folder: str, name: str) -> bool:
    """Return True if a link leads from the name of a file in a folder out of the folder."""
    # Links are few, and folders hold many files.
    parent, last = os.path.split(os.path.join(folder, name))
    here = os.path.join(_real(parent), last)
    return not Path(os.path.realpath(here) if os.path.islink(here) else here).is_relative_to(_real(folder))
