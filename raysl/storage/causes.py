"""Tell errors of a file system from others, and those that may pass from those that stay."""

from __future__ import annotations

import errno
import re
from pathlib import PurePosixPath

# Errors of a network file system that does not answer for a moment. Waiting does not help against other local errors.
_TRANSIENT = {getattr(errno, name) for name in "EIO ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN EAGAIN EBUSY".split()}
# What an object store says when waiting does not help.
_PERMANENT_TEXT = re.compile(
    r"access.?denied|forbidden|\b(301|40[0134]|410)\b|too.?skewed|no.?such.?bucket|bucket (does not exist|not found)|"
    r"credential|invalid.?access.?key|signature|not authorized|permission|path does not exist|no such file|"
    r"offline mode|authenticat|param.?validation",
    re.IGNORECASE,
)
# Errors of these packages are mistakes of raysl, or are handled where they arise.
_OWN = ("builtins", "raysl", "pyarrow", "numpy")


def as_os_error(path: str, error: Exception) -> OSError | None:
    """Return an error as one of the file system of `path`; None if it is another, such as a mistake of raysl.

    Arrow and the disk raise OSError. Packages that fsspec loads also raise classes of their own, as httpx and
    huggingface_hub do for hf://. They are recognized by the package that defines or raises them, without importing it.
    """
    if isinstance(error, OSError):
        return error
    home, is_final = type(error).__module__, isinstance(error, ValueError | NotImplementedError)
    if home == "builtins" and is_final:
        home = _raised_in(error)
    if "://" not in path or home.partition(".")[0] in _OWN:
        return None
    text = str(error) or type(error).__name__
    # An address that the package refuses is refused again.
    return OSError(errno.EINVAL, text) if is_final else OSError(text)


def _raised_in(error: Exception) -> str:
    """Return the name of the module that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace else "builtins"


def is_transient(path: str, error: OSError) -> bool:
    """Return True if the same request may succeed later."""
    if "://" not in path:
        return error.errno in _TRANSIENT
    # Names of buckets and files may hold "400" or "signature".
    bucket, _, key = path.partition("://")[2].partition("/")
    names = "|".join(map(re.escape, (bucket, key, *map(str, PurePosixPath(key).parents))))
    text = re.sub(rf"['\"](?:{names})/?['\"]\s*|\S*/\S*", "", str(error))
    is_final = isinstance(error, PermissionError) or error.errno == errno.EINVAL
    # Without a network, Google's client says UNAVAILABLE, and that it has no token to authenticate with.
    return not is_final and ("(UNAVAILABLE" in text or not _PERMANENT_TEXT.search(text))


def reason(error: OSError) -> str:
    """Return what an error says, on one line without the full stop, and without the place, which messages name."""
    text = " ".join((error.strerror or str(error)).split())
    text = re.sub(r".*Detail: \[errno \d+\] |.*(?=is a directory$)", "", text)  # as Arrow words them
    return text[:300].rstrip(".")


def web_answer(uri: str) -> str:
    """Return why a server does not give a file. Whether a file exists, fsspec tells without the reason."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(uri)
        system.cat_file(path, 0, 1)
    except FileNotFoundError:
        return "the server has no such file"
    except Exception as error:  # raised by the package that fsspec loads for the scheme
        return str(error).partition(", url=")[0].strip() or type(error).__name__
    return "the server did not answer the first request"
