"""The files that tables name: their places, their states, and their content."""

from __future__ import annotations

import errno
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, TypeAlias

import pyarrow as pa

from raysl.errors import UserError
from raysl.ingestion import tables
from raysl.ingestion.found import printable
from raysl.ingestion.listing import IMAGE, VIDEO, File, files_below, kind_of, read_bytes
from raysl.ingestion.sources import Row

# What stands before and behind a name in a table, in the name of its file: ("train/", ".jpg").
Place: TypeAlias = tuple[str, str]

_LONGEST_NAME = 4096
# Names that are looked for as they are, and levels of folders in which files are looked for.
_TRIED, _DEPTH = 16, 3
# Errors of a name that no file can have, and of links that lead in a circle.
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ELOOP)
# How JPEG, PNG, GIF, WebP and data URIs begin in Base64.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "data:image/")


def folder_of(root: str, path: str) -> str:
    """Return the folder of a table, which the names of files in it start from."""
    return (f"{root}/{path}" if path else root).rpartition("/")[0] or "/"


def names_in(values: pa.Array) -> list[str]:
    """Return the names of files in a column of texts or whole numbers, without empty ones."""
    return [*filter(None, values.cast(pa.string()).to_pylist())]


def places_of(folder: str, names: Iterable[str], table: str = "") -> tuple[Place, ...]:
    """Return what stands before and behind the names in a table, where they leave out a folder or a suffix.

    The tables of competitions name `train/7.jpg` "7.jpg" or "7". Returns nothing if one of the first names is that of
    a file, if less than half of the names have files below the folder, if a name may be that of several files, or in
    an object store. Of several, train.csv names those in `train/`.
    """
    first = list(islice(iter(names := iter(names)), _TRIED))
    if "://" in folder or any(
        name.startswith("/") or _is_file(folder, tables.normal(name)) for name in first
    ):
        return ()
    by_name: dict[str, list[str]] = {}
    with suppress(UserError):  # Something here leads out of the folder.
        for file in files_below(folder, _DEPTH):
            if kind_of(file.path) in (IMAGE, VIDEO):
                whole = file.path.rpartition("/")[2]
                for short in (whole, os.path.splitext(whole)[0]):
                    by_name.setdefault(short, []).append(file.path)
    if not by_name:
        return ()
    found = [_places(name, by_name) for name in map(tables.normal, chain(first, names))]
    known = {places[0] for places in found if len(places) == 1}
    if not known:
        stem = os.path.splitext(table.rpartition("/")[2])[0]
        known = {place for places in found for place in places if place[0].startswith(f"{stem}/")}
    matched = [len(known.intersection(places)) for places in found]
    return tuple(sorted(known)) if max(matched, default=0) == 1 and 2 * sum(matched) >= len(matched) else ()


def _places(name: str, by_name: Mapping[str, list[str]]) -> list[Place]:
    """Return the places of the files that have a name, in which "1" may be short for "1.jpg"."""
    last = name.rpartition("/")[2]
    cut = [(path, path.rfind(last)) for path in by_name.get(last, ())]
    ends = [(path[:at], path[at + len(last) :]) for path, at in cut]
    folder = name.removesuffix(last)
    return [(start.removesuffix(folder), end) for start, end in ends if f"/{start}".endswith(f"/{folder}")]


def _is_file(folder: str, name: str) -> bool:
    with suppress(OSError, ValueError):  # The name is not one of a file.
        return os.path.isfile(posixpath.join(folder, name))
    return False


def _placed(folder: str, name: str, places: Sequence[Place]) -> str:
    """Return the name of a file with what a table leaves out of it."""
    whole = (f"{before}{name}{behind}" for before, behind in places)
    return next((one for one in whole if _is_file(folder, one)), name)


def file_states(folder: str, places: Sequence[Place], names: list[str]) -> list[File]:
    """Return files that a table in a folder names, as they are now. For `places` see `places_of`."""
    found = []
    for name in names:
        path, state = posixpath.join(folder, _placed(folder, tables.normal(name), places)), (0, 0)
        if "://" not in path:
            with suppress(OSError, ValueError):
                info = os.stat(path)
                state = info.st_size, info.st_mtime_ns
        found.append(File(path, *state))
    return found


def read_named(
    spec: Mapping[str, Any], name: str | None, label: str | None, places: Sequence[Place] = ()
) -> Row:
    """Read an image that a table names; `spec` has the table's folder in "root", its file in "path", "follow_links".

    For `places` see `places_of`.
    """
    if not name:
        return Row(None, label, spec["path"], "the table names no file in this row")
    if len(name) > _LONGEST_NAME or (len(name) > 64 and name.startswith(_BASE64)):
        why = "is no name of a file: write images in Base64 as bytes first"
        return Row(None, label, f"{printable(name[:40])}...", why)
    if name.startswith(("http://", "https://")):
        why = "is on the web: download the images first, for example with img2dataset"
        return Row(None, label, printable(name), why)
    folder = folder_of(spec["root"], spec["path"])
    name = _placed(folder, tables.normal(name).removeprefix(f"{folder.rstrip('/')}/"), places)
    outside = name.startswith(("/", "../")) or "://" in name or "\0" in name
    links = not (outside or spec["follow_links"] or "://" in folder)
    if (outside and not spec["follow_links"]) or (links and tables.leads_out(folder, name)):
        why = "lies outside of the table's folder: --follow-links reads it"
        if (
            "://" not in f"{folder}{name}"
            and "\0" not in name
            and not os.path.lexists(posixpath.join(folder, name))
        ):
            why = "does not exist"
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
