"""Find what a user may have meant by the name of a folder that does not exist."""

from __future__ import annotations

import difflib
from contextlib import suppress

from raysl.storage import Folder, StorageError


def similar_folder(missing: str, marker: str) -> str:
    """Return a sentence that names a folder with a similar name; "" if there is none.

    Args:
        missing: the name that was given, a path or a URI. Its siblings and what is in `runs/` are looked at.
        marker: a file that the folder must hold, such as the metadata of a run.
    """
    place, slash, last = missing.rstrip("/").rpartition("/")
    for folder in dict.fromkeys((place or slash or ".", "runs")):
        with suppress(OSError, StorageError):
            for name in difflib.get_close_matches(last, Folder(folder).list(), n=3):
                found = name if folder == "." else f"{folder.rstrip('/')}/{name}"
                if Folder(found).exists(marker):
                    return f"Did you mean {found!r}? "
    return ""
