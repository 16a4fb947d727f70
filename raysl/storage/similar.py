"""Find what a user may have meant by the name of a folder that does not exist."""

from __future__ import annotations

import difflib
from contextlib import suppress

from raysl.storage import Folder, StorageError

# Folders that are looked at, and that are named.
_MOST, _SHOWN = 100, 5


def similar_folder(missing: str, marker: str) -> str:
    """Return a sentence that names folders in the one that was given, or one with a similar name; "" if there is none.

    Args:
        missing: the name that was given, a path or a URI. Its siblings and what is in `runs/` are looked at too.
        marker: a file that the folder must hold, such as the metadata of a run.
    """
    if missing.startswith(("http://", "https://")):  # Few web servers list their folders.
        return ""
    with suppress(OSError, StorageError):
        there = [f"{missing.rstrip('/')}/{name}" for name in Folder(missing).list()[:_MOST]]
        if inside := [repr(folder) for folder in there if Folder(folder).exists(marker)]:
            more = ", ..." if len(inside) > _SHOWN else ""
            return f"It holds {', '.join(inside[:_SHOWN])}{more}: name one of them. "
    place, slash, last = missing.rstrip("/").rpartition("/")
    for folder in dict.fromkeys((place or slash or ".", "runs")):
        with suppress(OSError, StorageError):
            for name in difflib.get_close_matches(last, Folder(folder).list(), n=3):
                found = name if folder == "." else f"{folder.rstrip('/')}/{name}"
                if Folder(found).exists(marker):
                    return f"Did you mean {found!r}? "
    return ""
