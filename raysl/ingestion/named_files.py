"""The files that tables name: their places, their states, and their content."""

from __future__ import annotations

import errno
import os
import posixpath
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from raysl.ingestion import tables
from raysl.ingestion.found import printable
from raysl.ingestion.listing import File, read_bytes
from raysl.ingestion.sources import Row

_LONGEST_NAME = 4096
# Errors of a name that no file can have, and of links that lead in a circle.
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ELOOP)
# How JPEG, PNG, GIF, WebP and data URIs begin in Base64.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "data:image/")


def folder_of(root: str, path: str) -> str:
    """Return the folder of a table, which the names of files in it start from."""
    return (f"{root}/{path}" if path else root).rpartition("/")[0] or "/"


def file_states(folder: str, names: list[str]) -> list[File]:
    """Return files that a table in a folder names, as they are now."""
    found = []
    for name in names:
        path, state = posixpath.join(folder, tables.normal(name)), (0, 0)
        if "://" not in path:
            with suppress(OSError, ValueError):
                info = os.stat(path)
                state = info.st_size, info.st_mtime_ns
        found.append(File(path, *state))
    return found


def read_named(spec: Mapping[str, Any], name: str | None, label: str | None) -> Row:
    """Read an image that a table names; `spec` has the table's folder in "root", its file in "path", "follow_links"."""
    if not name:
        return Row(None, label, spec["path"], "the table names no file in this row")
    if len(name) > _LONGEST_NAME or (len(name) > 64 and name.startswith(_BASE64)):
        why = "is no name of a file: write images in Base64 as bytes first"
        return Row(None, label, f"{printable(name[:40])}...", why)
    if name.startswith(("http://", "https://")):
        why = "is on the web: download the images first, for example with img2dataset"
        return Row(None, label, printable(name), why)
    name = tables.normal(name)
    folder = folder_of(spec["root"], spec["path"])
    outside = name.startswith(("/", "../")) or "://" in name or "\0" in name
    links = not (outside or spec["follow_links"] or "://" in folder)
    if (outside and not spec["follow_links"]) or (links and tables.leads_out(folder, name)):
        why = "lies outside of the table's folder: --follow-links reads it"
        return Row(None, label, printable(name), why)
    try:
        return Row(_read("" if name.startswith("/") else folder, name), label, printable(name))
    except FileNotFoundError:
        return Row(None, label, printable(name), "does not exist")
    except (PermissionError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        return Row(None, label, printable(name), f"cannot be read: {type(error).__name__}")
    except OSError as error:
        if error.errno not in _IMPOSSIBLE:
            raise
        return Row(None, label, printable(name), f"cannot be read: {error.strerror}")


def _read(folder: str, name: str) -> bytes:
    """Return the content of a file, also if its name has its accents apart from their letters, as on a Mac."""
    for form in dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))):
        with suppress(FileNotFoundError):
            return read_bytes(folder, form)
    raise FileNotFoundError(name)
