"""Read parts of Parquet files in few requests: the footer once in a process, and neighboring parts at once."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from raysl.storage import Folder
from raysl.storage.remote_file import Seekable

# Unused bytes that are read to save a request, which costs a remote store as much as a megabyte or two.
_GAP_BYTES = 256 << 10
# The end of a shard, which holds most footers whole.
_TAIL_BYTES = 64 << 10


def footer(file: BinaryIO) -> bytes:
    """Return the footer of an open Parquet file: its metadata, their length and the magic bytes. Raises ValueError."""
    size = file.seek(0, 2)
    file.seek(max(size - 8, 0))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little") + 8
    if end[4:] != b"PAR1" or length > size:
        raise ValueError("it does not end like a Parquet file")
    file.seek(size - length)
    return file.read(length)


@lru_cache(maxsize=4096)
def metadata(folder: Folder, name: str, num_bytes: int, checksum: int | None) -> pq.FileMetaData:
    """Return the metadata of a file. A process reads many row groups of one file, and the footer only once.

    Raises ValueError if the CRC-32 of the footer is not `checksum`, unless that is None, or if it is damaged otherwise.
    """

    def tail(length: int) -> bytes:
        length = min(length, num_bytes)
        return folder.read_ranges(name, [(num_bytes - length, length)])[0]

    end = tail(_TAIL_BYTES)
    length = int.from_bytes(end[-8:-4], "little") + 8
    end = footer(io.BytesIO(end if length <= len(end) else tail(length)))
    if checksum not in (None, zlib.crc32(end)):
        raise ValueError("the checksum of its footer is not the one in the manifest")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + end))


def spans(metadata: pq.FileMetaData, groups: Iterable[int], columns: Sequence[str]) -> list[tuple[int, int]]:
    """Return (offset, number of bytes) of the parts of a shard that hold columns of row groups, in few pieces."""
    chunks = []
    for group in map(metadata.row_group, groups):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.split(".")[0] in columns:
                start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
                chunks.append((start, start + column.total_compressed_size))
    found: list[tuple[int, int]] = []
    for start, end in sorted(chunks):
        if found and start - sum(found[-1]) <= _GAP_BYTES:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
    return found


class Parts(Seekable):
    """A file of which some parts are in memory, each with its offset."""

    def __init__(self, num_bytes: int, parts: Sequence[tuple[int, bytes]]) -> None:
        super().__init__(num_bytes)
        self._parts = parts

    def read(self, size: int = -1) -> Any:
        for start, content in self._parts:
            if start <= self._at < start + len(content):
                found = memoryview(content)[self._at - start :][: size if size >= 0 else None]
                self._at += len(found)
                return found
        raise ValueError(f"it ends before byte {self._at}")
