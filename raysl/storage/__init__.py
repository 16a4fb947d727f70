"""Read and write files at any URI: a local path, `s3://`, `gs://`, `hf://`, or anything Arrow or fsspec can open.

Writes are atomic. A local file is written beside its destination and renamed; for an object store the file is
spooled locally and uploaded when it is complete. A request that fails for a while (a time-out, a lost connection, an
overloaded store) is repeated with growing pauses; only then a `UserError` names the file and the time spent.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

from raysl.errors import UserError, explained, path_text
from raysl.storage.causes import as_os_error, is_transient, reason
from raysl.storage.remote_file import RemoteFile

_log = logging.getLogger("raysl.storage")
T = TypeVar("T")

# How long a failing request is repeated, in seconds; the environment variable replaces the default.
RETRY_VARIABLE = "RAYSL_STORAGE_RETRY_S"
_RETRY_S = 90.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
# How long to wait for a missing file to appear again, while its file system answers.
_ABSENT_S = 2.0
# A file for an object store is spooled in memory up to this size, and on disk beyond.
_SPOOL_BYTES = 64 << 20
# Arrow's object stores: opening a file is a request for its size, and an open file holds nothing but this size.
KEPT_OPEN = ("s3", "gcs", "abfs")
# The Hub calls a private repository missing.
HUB_LOGIN = "A private or gated repository needs `hf auth login`, or a token in HF_TOKEN."

_SECRET_QUERY = re.compile(r"[?&][^=&]*(secret|token|password|key)[^=&]*=", re.IGNORECASE)


class StorageError(UserError):
    """A file cannot be read or written, after all retries."""


def retry(path: str, doing: str, action: Callable[[], T], *, is_gone: Callable[[], bool] | None = None) -> T:
    """Return `action()`, repeated while it fails for a reason that may pass.

    Args:
        doing: "open", "read", "write", "list" or "delete", for messages.
        is_gone: for a file that existed before; it may be absent only because its file system does not answer. Returns
            True if the file was deleted, so that waiting does not help.

    Raises:
        FileNotFoundError: the file does not exist, and `is_gone` is None.
        StorageError: any other failure, or the same failure for longer than `RAYSL_STORAGE_RETRY_S` (90 s).
    """
    text = os.environ.get(RETRY_VARIABLE, str(_RETRY_S))
    with explained(f"{RETRY_VARIABLE} is {text!r}", "Give seconds, such as 90, or unset it.", ValueError):
        retry_s = float(text)
    started_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Exception as raised:
            error = as_os_error(path, raised)
            if error is None:
                raise
            absent = isinstance(error, FileNotFoundError | NotADirectoryError)
            if absent and is_gone is None:
                raise FileNotFoundError(f"{path} does not exist") from error
            tried_s = time.monotonic() - started_s
            if absent and is_gone is not None and tried_s >= _ABSENT_S and is_gone():
                raise StorageError(
                    f"Cannot {doing} {path}: the file was deleted. Restore it, and run the same command again."
                ) from raised
            if not (is_transient(path, error) or absent) or tried_s + pause_s > retry_s:
                raise failure(path, doing, error, tried_s) from raised
            if pause_s == _FIRST_PAUSE_S:
                again = f"Trying again for about {retry_s:.0f} s ({RETRY_VARIABLE})."
                _log.warning("Cannot %s %s (%s). %s", doing, path, reason(error), again)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def failure(path: str, doing: str, error: OSError, tried_s: float = 0.0) -> StorageError:
    """Return the error that tells a user why `path` could not be read or written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return StorageError(
            f"No space left to {doing} {path}. What was complete before is intact. Free some space, and run the same "
            "command again: it goes on from the last complete state, if there is one."
        )
    advice = "Check that it exists and that you have permission."
    if tried_s >= 1:
        # Without credentials, Google's client asks a host that only Google's machines know.
        what = "the network and your credentials" if path.startswith(("gs://", "gcs://")) else "the network"
        advice = (
            f"Tried for {tried_s:.0f} s. Check {what}; the same command resumes once the storage answers."
        )
    elif path.startswith("hf://"):
        as_in = " It reads as hf://datasets/OWNER/NAME." if error.errno == errno.EINVAL else f" {HUB_LOGIN}"
        advice = f"Check the name.{as_in}"
    elif "://" in path:
        advice = "Check the address, the bucket and your credentials."
    elif error.errno == errno.EROFS:
        advice = "The file system is read-only. Choose another folder."
    elif os.path.isdir(path) and doing in ("open", "read"):
        advice = "Name a file in it."
    elif isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
        advice = "A file and a folder have the same name. Choose another folder, or move the obstacle away."
    return StorageError(f"Cannot {doing} {path}: {reason(error)}. {advice}")


@dataclass(frozen=True)
class Folder:
    """A folder at a URI. Cheap to make and to pickle; nothing is created before something is written.

    Args:
        uri: a local path (made absolute, because Ray workers have another working directory) or any URI.

    Raises:
        UserError: the path is empty or holds a NUL, or the URI holds a password or a secret key.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", _normalized(path_text(self.uri)))

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    @property
    def is_local(self) -> bool:
        """True if ordinary file calls can open the folder."""
        return "://" not in self.uri

    def _retried(self, name: str, doing: str, call: Callable[[Any, str], T], *, expected: bool = False) -> T:
        """Return `call(filesystem, path)` for a file or folder inside, with retries."""
        path = f"{self.uri}/{name}".rstrip("/")

        def action() -> T:
            fs, root = filesystem(self.uri)
            return call(fs, f"{root}/{name}".rstrip("/"))

        return retry(path, doing, action, is_gone=(lambda: self._is_deleted(name)) if expected else None)

    def _is_deleted(self, name: str) -> bool:
        """Return True if a file was deleted: its file system still lists other files in its folder, or beside it."""
        parent, _, file = f"{self.uri}/{name}".rpartition("/")
        grandparent, _, folder = parent.rpartition("/")
        with suppress(StorageError):  # Not everyone who may read a file may list its folder.
            if siblings := Folder(parent).list():
                return file not in siblings
            if grandparent.strip(":/") and not grandparent.endswith(":/"):
                return Folder(grandparent).list() not in ([], [folder])
        return False

    def write(self, name: str, data: bytes) -> None:
        """Write one file atomically, and the folders it needs. Raises StorageError if that is not possible."""
        with self.writing(name) as stream:
            stream.write(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """Open a file for writing in pieces. It appears complete when the block ends without an error."""
        if self.is_local:
            with _written_local(f"{self.uri}/{name}") as stream:
                yield stream
            return
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            yield spool

            def upload(fs: Any, path: str) -> None:
                spool.seek(0)
                with fs.open_output_stream(path, compression=None) as stream:
                    shutil.copyfileobj(cast(IO[bytes], spool), stream, 1 << 20)

            self._retried(name, "write", upload)

    def check_writable(self) -> None:
        """Raise StorageError unless files can be written here, before long work whose result would be lost.

        Nothing is left: in a local folder that does not exist yet, the nearest folder above is tried.
        """
        if not self.is_local:
            self.write(".raysl-trial", b"")
            self.delete(".raysl-trial")
            return
        above = next(path for path in (Path(self.uri), *Path(self.uri).parents) if os.path.lexists(path))
        try:
            with tempfile.TemporaryFile(dir=above, buffering=0) as file:
                file.write(bytes(64 << 10))
        except OSError as error:
            raise failure(self.uri, "write", error) from error

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as indented JSON with sorted keys."""
        self.write(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError if it does not exist, or else StorageError."""

        def get(fs: Any, path: str) -> bytes:
            with fs.open_input_file(path) as stream:
                return bytes(stream.read())

        return self._retried(name, "read", get)

    def read_json(self, name: str) -> Any:
        """Return the file parsed as JSON. Raises ValueError if it is not JSON."""
        return json.loads(self.read(name))

    def read_ranges(
        self, name: str, ranges: Sequence[tuple[int, int]], *, expected: bool = True
    ) -> list[bytes]:
        """Return parts of a file that does not change, with one request for each.

        Args:
            ranges: (offset, number of bytes) of each part. A part that exceeds the end of the file is shorter.
            expected: the file existed before. If it is missing, wait for it to appear again, then raise StorageError.

        Raises:
            FileNotFoundError: the file does not exist and was not expected.
            StorageError: it cannot be read.
        """

        def parts_of(file: Any) -> list[bytes]:
            return [file.read_at(length, start) for start, length in ranges]

        def get(fs: Any, path: str) -> list[bytes]:
            if fs.type_name not in KEPT_OPEN:
                with fs.open_input_file(path) as stream:
                    return parts_of(stream)
            try:
                parts = parts_of(_opened(self.uri, name))
                short = sum(map(len, parts)) < sum(length for _, length in ranges)
                if short and fs.get_file_info([path])[0].size != _opened(self.uri, name).size():
                    # The file was replaced by a longer one, and is kept open with the size of the old one.
                    _opened.cache_clear()
                    parts = parts_of(_opened(self.uri, name))
                return parts
            except OSError:
                _opened.cache_clear()
                raise

        return self._retried(name, "read", get, expected=expected)

    def open(self, name: str) -> BinaryIO:
        """Open a seekable file for reading; reads of a remote file are repeated. Raises as `read`."""
        if self.is_local:
            return cast(BinaryIO, self._retried(name, "read", lambda fs, path: fs.open_input_file(path)))
        fs, root = filesystem(self.uri)
        path, place = f"{root}/{name}".rstrip("/"), f"{self.uri}/{name}".rstrip("/")
        return cast(BinaryIO, RemoteFile(lambda: fs.open_input_file(path), partial(retry, place, "read")))

    def exists(self, name: str = "") -> bool:
        """Return True if the file or folder exists."""
        kind = self._retried(name, "read", lambda fs, path: fs.get_file_info([path])[0].type.name)
        return bool(kind != "NotFound")

    def list(self) -> list[str]:
        """Return the sorted names of the files and folders directly inside; none if the folder does not exist."""

        def look(fs: Any, path: str) -> list[str]:
            import pyarrow.fs as pafs

            found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
            return sorted(info.base_name for info in found)

        try:
            return self._retried("", "list", look)
        except FileNotFoundError:
            # Another process created the folder between two system calls of Arrow, or a file has its name.
            return []

    def delete(self, name: str = "") -> None:
        """Delete a file, or a folder and everything in it; a missing one is fine."""

        def remove(fs: Any, path: str) -> None:
            # Another process may delete files of the folder at the same time, so it is looked at again.
            while (kind := fs.get_file_info([path])[0].type.name) in ("Directory", "File"):
                with suppress(FileNotFoundError):
                    (fs.delete_dir if kind == "Directory" else fs.delete_file)(path)
                    return

        self._retried(name, "delete", remove, expected=True)


@contextmanager
def _written_local(path: str) -> Iterator[Any]:
    part = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _open_unnamed(os.path.dirname(path)) or open(part, "wb") as stream:
            yield stream
            stream.flush()
            if not os.path.exists(part):
                # With a descriptor, Python calls linkat, which follows the link to the file.
                os.link(f"/proc/self/fd/{stream.fileno()}", part, src_dir_fd=stream.fileno())
        os.replace(part, path)
    except OSError as error:
        raise failure(path, "write", error) from error
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _open_unnamed(folder: str) -> BinaryIO | None:
    """Open a new file without a name, which vanishes when this process is killed; None where that is not possible."""
    with suppress(OSError):
        if os.path.isdir("/proc/self/fd"):
            return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    return None


def _normalized(uri: str) -> str:
    """Return an absolute path or a URI without its trailing slash."""
    faults = {
        "is empty": not uri.strip(),
        "holds a NUL character": "\0" in uri,
        "names nothing behind ://": re.fullmatch(r"(?!file:///)[^/]*://+", uri),
        "begins with the home of an unknown user": os.path.expanduser(uri.replace("\0", "")).startswith("~"),
    }
    if why := next((why for why, is_so in faults.items() if is_so), ""):
        raise UserError(f"The path {uri!r} {why}. Give a local path or a URI.")
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri.replace("?", "%3F").replace("#", "%23")).path)
    if "://" not in uri:
        return str(Path(uri).expanduser().absolute())
    refuse_credentials(uri)
    return uri.rstrip("/")


def refuse_credentials(uri: str) -> None:
    """Raise UserError if a URI holds a password or a secret, which would end up in metadata and logs."""
    scheme, _, rest = uri.partition("://")
    user, has_user, _ = rest.partition("/")[0].rpartition("@")
    if (has_user and ":" in user) or _SECRET_QUERY.search(rest):
        place = rest.partition("?")[0].rpartition("@")[2]
        raise UserError(
            f"The URI of {scheme}://{place} holds credentials, which would be written to run metadata and reports. "
            "Give them in the environment instead, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )


@lru_cache(maxsize=4096)
def _opened(uri: str, name: str) -> Any:
    fs, root = filesystem(uri)
    return fs.open_input_file(f"{root}/{name}")


# Opening an object store asks it for its region, and a folder is opened for every file.
@lru_cache(maxsize=256)
def filesystem(uri: str, retry_s: int = 5) -> tuple[Any, str]:
    """Return the Arrow file system of a URI and the path inside it. Raises UserError if it cannot be opened.

    Args:
        retry_s: how long the client of gs:// repeats a request without a word, after which `retry` repeats it. Give
            more where the file system is used without `retry`.
    """
    # Loaded late, because `raysl VERB --help` imports this module.
    import pyarrow.fs as pafs

    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    address = uri
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in uri:
        # By default, 15 minutes.
        address += f"{'&' if '?' in uri else '?'}retry_limit_seconds={retry_s}"
    try:
        return retry(uri, "open", lambda: pafs.FileSystem.from_uri(address))  # type: ignore[no-any-return]
    except (ValueError, NotImplementedError, ImportError) as arrow_error:
        why = str(arrow_error)
        fs, path = retry(uri, "open", lambda: _of_fsspec(uri, why))
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def _of_fsspec(uri: str, arrow_says: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URI and the path inside it. Raises UserError for an unknown scheme."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(uri)  # type: ignore[no-any-return]
    except (ValueError, ImportError) as error:
        raise UserError(
            f"Cannot open {uri!r}: Arrow says {arrow_says}; fsspec says {error}. Give a local path, or a URI "
            "whose scheme Arrow or an installed fsspec package knows (s3://, gs://, hf://, https://)."
        ) from error
