"""List the members of tar archives, and read them, with every kind of damage an error.

Python's `tarfile` ends silently at a damaged header and at the end of a file that was cut between two members. Here an
archive must end with its end mark, and nothing but zeros may follow.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa

from raysl.errors import UserError, counted
from raysl.ingestion.found import printable
from raysl.storage import Folder

# How compressed files begin, and how they are opened.
_PACKED: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda stream: gzip.GzipFile(fileobj=stream)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", lambda stream: pa.CompressedInputStream(stream, "zstd")),
}
_AHEAD_BYTES = 1 << 20
# Bytes behind the end mark that must be zeros; tar pads archives to 10 kB.
_AFTER_END = 1 << 20
_DAMAGE = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error, ValueError, OverflowError)


class _DamagedError(tarfile.TarError):
    """The archive is damaged."""


class _StrictInfo(tarfile.TarInfo):
    """A header whose damage is an error, also behind the first member."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise _DamagedError("it ends without its end mark, so it was probably cut off") from error
        except tarfile.HeaderError as error:
            raise _DamagedError(f"the header of the next member is damaged ({error})") from error


@contextmanager
def opened(root: str, path: str) -> Iterator[tuple[Any, str]]:
    """Open the file of an archive, unpacked if it is compressed; yield it with the kind of compression, "" or "zip"."""
    with Folder(root).open(path) as file:
        # Archives are read in small pieces, one after the other, and each read of a remote file is a request.
        stream: Any = io.BufferedReader(file, _AHEAD_BYTES) if isinstance(file, io.RawIOBase) else file
        head = stream.read(8)
        stream.seek(0)
        for magic, (kind, unpack) in _PACKED.items():
            if head.startswith(magic):
                yield unpack(stream), kind
                return
        yield stream, "zip" if head.startswith((b"PK\3\4", b"PK\5\6")) else ""


def members(root: str, path: str) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """Yield every member of an archive in order, with a function that reads its content.

    The content must be read before the next member is asked for. Raises UserError, which names the last member before
    the damage, if the archive is damaged or cut off.
    """
    count, last = 0, ""

    def content(member: tarfile.TarInfo) -> Any:
        try:
            return archive.extractfile(member).read()
        except _DAMAGE as error:
            raise _damaged(root, path, count, last, error) from error

    try:
        with opened(root, path) as (stream, packed):
            mode = "r|" if packed else "r:"
            with tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictInfo) as archive:  # type: ignore[call-overload]
                for member in archive:
                    # tarfile remembers every member; forgetting them keeps the memory that of one.
                    archive.members = []
                    yield member, partial(content, member)
                    count, last = count + 1, member.name
                if not packed:
                    stream.seek(archive.offset)
                if any(archive.fileobj.read(_AFTER_END)):
                    raise _DamagedError("data follow its end mark, so several archives were joined")
    except _DAMAGE as error:
        raise _damaged(root, path, count, last, error) from error


def _damaged(root: str, path: str, count: int, last: str, error: BaseException) -> UserError:
    """Return the error for an archive that is damaged after `count` members, of which `last` is the last."""
    after = f"after {counted(count, 'member')}, the last of which is {printable(last)!r}"
    where = after if count else "at its beginning"
    return UserError(
        f"The archive {printable(f'{root}/{path}'.rstrip('/'))!r} is damaged {where}: {error}. Nothing of it is used. "
        "Download or copy it again, then run the same command."
    )
