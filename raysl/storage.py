"""Files at any URI: a local path, `s3://`, `gs://`, `hf://`, or whatever Arrow or fsspec opens.

Writing is all or nothing. On a local disk a file is written beside its place and renamed into it; object stores
show an object only when its upload is complete.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.fs as pafs

from raysl.errors import UserError


@dataclass(frozen=True)
class Folder:
    """A folder at a URI. Cheap to make and to pickle; nothing is created until something is written.

    Args:
        uri: a local path (made absolute, since Ray workers have another working directory) or any URI.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", self.uri.removeprefix("file://"))
        if "://" not in self.uri:
            object.__setattr__(self, "uri", str(Path(self.uri).expanduser().absolute()))
        else:
            object.__setattr__(self, "uri", self.uri.rstrip("/"))

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether ordinary file calls can open it."""
        return "://" not in self.uri

    def _open(self) -> tuple[Any, str]:
        return filesystem(self.uri)

    def write(self, name: str, data: bytes) -> None:
        """Writes one file, whole or not at all; makes the folders it needs.

        Raises:
            UserError: the disk is full, or the place may not be written to.
        """
        with self.writing(name) as stream:
            stream.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A file to write piece by piece, which is there whole when the block ends without an error.

        On an object store an error may leave the pieces written so far behind under the name.

        Raises:
            UserError: the disk is full, or the place may not be written to.
        """
        fs, root = self._open()
        path = f"{root}/{name}"
        target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else path
        try:
            if self.is_local:
                fs.create_dir(os.path.dirname(path), recursive=True)
            with fs.open_output_stream(target) as stream:
                yield stream
            if self.is_local:
                os.replace(target, path)
        except OSError as error:
            raise write_error(f"{self.uri}/{name}", error) from error
        finally:
            if self.is_local and os.path.exists(target):
                os.unlink(target)

    def write_json(self, name: str, value: object) -> None:
        """Writes `value` as indented JSON with sorted keys."""
        self.write(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError when it is not there."""
        with self.open(name) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        """The file parsed as JSON."""
        return json.loads(self.read(name))

    def open(self, name: str) -> BinaryIO:
        """A seekable file for reading. Raises FileNotFoundError when it is not there."""
        fs, root = self._open()
        try:
            stream: BinaryIO = fs.open_input_file(f"{root}/{name}")
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error
        return stream

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder is there."""
        fs, root = self._open()
        info = fs.get_file_info([f"{root}/{name}".rstrip("/")])[0]
        return bool(info.type != pafs.FileType.NotFound)

    def list(self) -> list[str]:
        """Names of the files and folders directly inside, sorted; empty when the folder is not there."""
        fs, root = self._open()
        try:
            found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        except FileNotFoundError:
            # Another process made the folder between two looks of Arrow's.
            return []
        return sorted(info.base_name for info in found)

    def delete(self, name: str = "") -> None:
        """Deletes a file, or a folder with all that is in it; fine when it is not there."""
        fs, root = self._open()
        path = f"{root}/{name}".rstrip("/")
        kind = fs.get_file_info([path])[0].type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)


# Opening an object store asks it for its region, and a folder is opened for every file.
@lru_cache(maxsize=256)
def filesystem(uri: str) -> tuple[Any, str]:
    """The Arrow file system of a URI and the path inside it.

    Raises:
        UserError: neither Arrow nor fsspec knows the scheme, or its package is missing.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    try:
        return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except Exception as arrow_error:
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"Cannot open {uri!r}: Arrow says {arrow_error}; fsspec says {error}. Give a local path, or a URI "
                "whose scheme Arrow or an installed fsspec package knows (s3://, gs://, hf://, https://)."
            ) from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def write_error(place: str, error: OSError) -> UserError:
    """What to tell a user when `place` could not be written."""
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return UserError(
            f"No space left while writing {place}. What was there before is untouched. Free some space (old "
            "checkpoints are a good start) and run the same command again: it goes on from the last good state."
        )
    return UserError(
        f"Cannot write {place}: {error}. Check that the place exists and that you may write there."
    )
