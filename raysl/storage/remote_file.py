"""Files for reading: of a known size, and of an object store, whose reads are repeated while it does not answer."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Seekable(io.RawIOBase):
    """A file for reading of a known size. A subclass reads at `_at`, and moves it."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes, self._at = num_bytes, 0

    def size(self) -> int:
        """Return the number of bytes, as files of Arrow do."""
        return self._num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._num_bytes)[whence])
        return self._at


class RemoteFile(Seekable):
    """A seekable file for reading. After a read that fails, the file of Arrow is opened again.

    Each read is one request, so that readers of Parquet decide on the size of the requests. `repeat` calls a function
    again after errors that may pass; see `raysl.storage.retry`.
    """

    def __init__(self, open_file: Callable[[], Any], repeat: Callable[[Callable[[], Any]], Any]) -> None:
        self._open_file = open_file
        self._repeat = repeat
        self._file: Any = None
        super().__init__(int(repeat(lambda: self._call(lambda file: file.size()))))

    def _call(self, function: Callable[[Any], Any]) -> Any:
        """Return `function(file)`; forget the file after an error."""
        try:
            if self._file is None:
                self._file = self._open_file()
            return function(self._file)
        except Exception:  # fsspec also raises errors that are no OSError
            self._forget()
            raise

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def read(self, size: int | None = -1) -> bytes:
        if self.closed:
            raise ValueError("read of a closed file")
        left = max(0, self._num_bytes - self._at)
        length = left if size is None or size < 0 else min(size, left)
        if not length:
            return b""
        data = bytes(self._repeat(lambda: self._call(lambda file: file.read_at(length, self._at))))
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._forget()
        super().close()
