"""Files of an object store that answers only at times."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl import storage
from raysl.storage import Folder, StorageError


class Store:
    """A file system of Arrow with one file, of which some requests fail.

    Args:
        data: the file.
        fails: whether request n fails.
    """

    def __init__(self, data: bytes, fails: Callable[[int], bool]) -> None:
        self.data, self.fails = data, fails
        self.requests = self.opened = 0

    def open_input_file(self, path: str) -> Any:
        self.opened += 1
        file = pa.BufferReader(self.data)

        def read_at(length: int, at: int) -> bytes:
            self.requests += 1
            if self.fails(self.requests):
                raise OSError("AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush")
            return bytes(file.read_at(length, at))

        return SimpleNamespace(size=file.size, read_at=read_at, close=file.close)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.0)

    def open_(data: bytes, fails: Callable[[int], bool] = lambda n: n % 2 == 1) -> tuple[Any, Store]:
        store = Store(data, fails)
        monkeypatch.setattr(storage, "filesystem", lambda uri: (store, "bucket/folder"))
        return Folder("s3://bucket/folder").open("file"), store

    return open_


def test_reads_are_those_of_a_file_in_memory(opened: Callable[..., Any]) -> None:
    data = bytes(range(256)) * 4
    (file, store), expected = opened(data), io.BytesIO(data)
    assert file.size() == len(data)
    for offset, whence, size in ((10, 0, 5), (3, 1, 0), (-20, 2, 100), (0, 0, -1), (2000, 0, 4), (5, 0, 7)):
        assert file.seek(offset, whence) == expected.seek(offset, whence)
        assert file.read(size) == expected.read(size)
        assert file.tell() == expected.tell()
    assert store.opened == 1 + store.requests // 2  # opened again after each failure
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_parquet_and_archives_are_read_through_failures(opened: Callable[..., Any]) -> None:
    table = pa.table({"x": np.arange(1000), "y": [f"row {n}" for n in range(1000)]})
    raw = io.BytesIO()
    pq.write_table(table, raw, row_group_size=100)
    assert pq.ParquetFile(opened(raw.getvalue())[0]).read() == table
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    with tarfile.open(fileobj=opened(raw.getvalue())[0]) as archive:
        assert archive.getnames() == ["empty"]


def test_patience_ends_with_a_sentence(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.RETRY_VARIABLE, "0")
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    file, store = opened(b"abc", lambda n: True)
    with pytest.raises(StorageError, match="Cannot read s3://bucket/folder/file: AWS Error INTERNAL_FAILURE"):
        file.read()
    assert store.requests == 1
    # Readers of Parquet pass the error on as it is.
    with pytest.raises(StorageError, match="s3://bucket/folder/file"):
        pq.ParquetFile(opened(b"PAR1" * 10, lambda n: True)[0])
