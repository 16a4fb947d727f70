"""The verb `raysl cache`: list the copies of ingested sources, and remove those that are superseded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raysl import checkpoint
from raysl.errors import UserError, counted
from raysl.ingestion import copies
from raysl.ingestion.cache import root
from raysl.run import METADATA, Run
from raysl.storage import Folder
from raysl.stream.plan import num_steps


@dataclass(frozen=True)
class CacheConfig:
    """List the data sets that raysl made of sources that it was given without `raysl ingest`, in $RAYSL_CACHE.

    A copy is superseded if files of its source have changed since: raysl then ingests the source again, and does not
    take the old copy any more, unless it is named, as in --data COPY.

    Args:
        remove_superseded: delete the superseded copies. One that a process writes, or that an unfinished run below
            --runs learns from, is kept. Readers cannot be known: do this when no other work reads these images.
        runs: local folders below which unfinished runs are looked for.
    """

    remove_superseded: bool = False
    runs: tuple[str, ...] = ("runs",)


def cache(config: CacheConfig) -> None:
    """Print the copies in the cache, and remove superseded ones if that is asked for."""
    found = list(copies.copies())
    if not found:
        print(f"The cache {root(None)} holds no copies.")
        return
    needed = _needed(config.runs)
    _print(found, needed)
    superseded = [one for one in found if one.state == "superseded"]
    if not config.remove_superseded:
        size = sum(one.num_bytes for one in superseded)
        if superseded:
            print(f"{_told(superseded)} superseded, {_megabytes(size)}. --remove-superseded deletes them.")
        return
    removed = []
    for one in superseded:
        if run := needed.get(str(one.folder)):
            print(f"Kept {one.folder}: the unfinished run {run} learns from it.")
            continue
        try:
            copies.remove(one)
        except UserError as error:
            print(f"Kept {one.folder}: {error}")
        else:
            removed.append(one)
    print(f"Removed {counted(len(removed), 'folder')}, {_megabytes(sum(one.num_bytes for one in removed))}.")


def _told(some: Sequence[copies.Copy]) -> str:
    return "1 copy is" if len(some) == 1 else f"{len(some):,} copies are"


def _print(found: Sequence[copies.Copy], needed: dict[str, str]) -> None:
    for source, some in itertools.groupby(sorted(found, key=lambda one: (one.source, one.used_s)), _source):
        print(source or "left by a removal that was interrupted")
        for one in some:
            size = f"{counted(one.num_images, 'image')}, {_megabytes(one.num_bytes)}"
            day = time.strftime(", last read %Y-%m-%d", time.localtime(one.used_s)) if one.used_s else ""
            run = needed.get(str(one.folder))
            by = f", needed by {run}" if run else ""
            print(f"  {one.folder}: {one.state}, {size if one.num_images else 'unfinished'}{day}{by}")


def _source(copy: copies.Copy) -> str:
    return copy.source


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _needed(folders: Sequence[str]) -> dict[str, str]:
    """Return the unfinished runs below local folders, each by the data set that it learns from."""
    found: dict[str, str] = {}
    for file in (file for folder in folders for file in Path(folder).rglob(METADATA)):
        run = Run(Folder(str(file.parent)))
        with suppress(UserError, OSError, ValueError, KeyError, TypeError):  # It is damaged, or no run.
            metadata, config = run.metadata(), run.metadata()["config"]
            end = num_steps(metadata["data"]["num_images"], config["batch_size"], config["epochs"])
            if checkpoint.newest_step(run.checkpoints) < end:
                found[metadata["data"]["uri"]] = str(file.parent)
    return found
