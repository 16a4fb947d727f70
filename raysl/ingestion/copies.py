"""The copies in the cache of ingested sources: list them, and remove those that a change of their source superseded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from raysl.dataset import CACHED, MANIFEST, SHARDS, Manifest
from raysl.errors import UserError
from raysl.ingestion.cache import canonical, root, stamp
from raysl.ingestion.journal import Journal
from raysl.ingestion.sources import SourceLocation, open_source
from raysl.storage import Folder, failure
from raysl.storage.lock import DriverLock
from raysl.storage.records import verified

# A removal renames a copy first, so that no half of it is taken for a data set.
_REMOVED = ".removed"

State = Literal["current", "superseded", "source not found", "not known"]


@dataclass(frozen=True)
class Copy:
    """A folder of the cache that raysl made of a source."""

    folder: Folder
    source: str
    num_images: int  # 0 if its ingest has not finished
    num_bytes: int  # size of the shards, 0 likewise
    # When its images were read last, in seconds since 1970, as the disk knows it: most update the time once a day, and
    # some never. 0 if it is not known.
    used_s: float
    # "superseded" if the source has changed since, or if a removal was interrupted; "not known" for a copy of an older
    # version, which does not tell.
    state: State


def copies(cache: Path | None = None) -> Iterator[Copy]:
    """Yield the copies in the cache, `$RAYSL_CACHE` or ~/.cache/raysl; what raysl did not make is left out."""
    current = lru_cache(None)(_current)
    for name in root(cache).list():
        folder = root(cache) / name
        if not CACHED.fullmatch(name.removesuffix(_REMOVED)):
            continue
        with suppress(UserError, OSError, ValueError, KeyError, TypeError):  # It is damaged, or of others.
            source, then, num_images, num_bytes = _content(folder)
            state = "superseded" if not source else _state(then, current(source))
            yield Copy(folder, source, num_images, num_bytes, _used_s(folder), state)


def remove(copy: Copy) -> None:
    """Delete a copy. Raises UserError if a process ingests into it, or it cannot be deleted."""
    with DriverLock(copy.folder, "data set"):
        aside = copy.folder
        if not aside.is_local:
            aside.delete(MANIFEST)
        elif not str(aside).endswith(_REMOVED):
            aside = Folder(f"{aside}{_REMOVED}")
            aside.delete()
            try:
                os.rename(str(copy.folder), str(aside))
            except OSError as error:
                raise failure(str(copy.folder), "delete", error) from error
        aside.delete()


def _content(folder: Folder) -> tuple[str, str, int, int]:
    """Return the source of a copy, "" for the rest of a removal, the state of its files then, and the number of images
    and of bytes. Raises ValueError if raysl did not make it.
    """
    if str(folder).endswith(_REMOVED):
        return "", "", 0, 0
    if folder.exists(MANIFEST):
        manifest = Manifest.from_json(verified(folder.read_json(MANIFEST)))
        return manifest.source, manifest.stamp, manifest.num_images, manifest.num_bytes
    if (header := Journal(folder).header()) is None:
        raise ValueError("no data set and no journal")
    return header.source, header.stamp, 0, 0


def _current(source: str) -> str:
    """Return the state of the files of a source now; "" if it cannot be opened."""
    try:
        return stamp(open_source(canonical(SourceLocation.parse(source))))
    except (UserError, OSError):
        return ""


def _state(then: str, now: str) -> State:
    if not now:
        return "source not found"
    if not then:
        return "not known"
    return "current" if then == now else "superseded"


def _used_s(folder: Folder) -> float:
    """Return when a shard was read or written last; 0 if that is not known. The manifest is read to list the copies."""
    if not folder.is_local:
        return 0.0
    with suppress(OSError), os.scandir(str(folder / SHARDS)) as shards:
        return max(
            (max(info.st_atime, info.st_mtime) for info in (one.stat() for one in shards)), default=0.0
        )
    return 0.0
