"""The verb `raysl cache`: list the copies of ingested sources, and remove those that are superseded."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from raysl.errors import UserError, counted
from raysl.ingestion import copies
from raysl.ingestion.cache import root
from raysl.run import METADATA, Run
from raysl.storage import Folder
from raysl.tuning import journal


@dataclass(frozen=True)
class CacheConfig:
    """List the copies in $RAYSL_CACHE of sources that were not ingested by `raysl ingest`.

    A copy is superseded if its source has changed since. raysl then makes a new copy, and uses the old one only where
    you give its path as --data.

    Args:
        remove_superseded: delete superseded copies, but keep those that unfinished runs and sweeps in the folders of
            --runs use. raysl does not know which other programs read a copy, so run this when none does.
        runs: local folders that hold your runs and sweeps, also deeper inside.
    """

    remove_superseded: bool = False
    runs: tuple[str, ...] = ("runs",)


def cache(config: CacheConfig) -> None:
    """Print the copies in the cache, and remove superseded ones if `remove_superseded` is set."""
    found = list(copies.copies())
    if not found:
        print(f"The cache {root(None)} holds no copies.")
        return
    missing = [folder for folder in config.runs if not Path(folder).is_dir()]
    if config.remove_superseded and missing:
        raise UserError(
            f"There is no folder {missing[0]!r}. Give --runs the folders that hold your runs and sweeps, so that the "
            "images that unfinished ones use are kept."
        )
    needed = _needed(config.runs)
    _print(found, needed)
    superseded = [
        one for one in found if one.state == "superseded" and os.path.realpath(str(one.folder)) not in needed
    ]
    if not config.remove_superseded:
        if superseded:
            print(f"--remove-superseded deletes {_told(superseded)}.")
        return
    removed = []
    for one in superseded:
        try:
            copies.remove(one)
        except UserError as error:
            print(f"Kept {one.folder}: {error}")
        else:
            removed.append(one)
    print(f"Removed {_told(removed)}.")


def _told(some: Sequence[copies.Copy]) -> str:
    return f"{counted(len(some), 'folder')}, {_megabytes(sum(one.num_bytes for one in some))}"


def _print(found: Sequence[copies.Copy], needed: dict[str, str]) -> None:
    by_source = sorted(found, key=attrgetter("source", "used_s"))
    for source, some in itertools.groupby(by_source, attrgetter("source")):
        print(source or "left by a removal that was interrupted")
        for one in some:
            size = f"{counted(one.num_images, 'image')}, {_megabytes(one.num_bytes)}"
            day = time.strftime(", last read %Y-%m-%d", time.localtime(one.used_s)) if one.used_s else ""
            user = needed.get(os.path.realpath(str(one.folder)))
            by = f", used by {user}" if user else ""
            print(f"  {one.folder}: {one.state}, {size if one.num_images else 'unfinished'}{day}{by}")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _needed(folders: Sequence[str]) -> dict[str, str]:
    """Return the unfinished runs and the sweeps below local folders, each by the data sets that it uses."""
    found: dict[str, str] = {}
    for place in map(Path, folders):
        for file in place.rglob(METADATA):
            run = Run(Folder(str(file.parent)))
            with suppress(UserError, OSError, ValueError, KeyError, TypeError):  # It is damaged, or no run.
                if not run.is_finished():
                    found[os.path.realpath(run.metadata()["data"]["uri"])] = (
                        f"the unfinished run {file.parent}"
                    )
        for file in place.rglob(journal.NAME):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError), file.open() as lines:
                for uri in json.loads(next(lines, "{}"))["uris"].values():
                    found[os.path.realpath(uri)] = f"the sweep {file.parent}"
    return found
