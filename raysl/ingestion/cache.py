"""Data by name: a finished data set is opened, any other source is ingested once and kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingestion.found import names_checked, unreadable
from raysl.ingestion.pipeline import ingest
from raysl.ingestion.sources import Opened, SourceLocation, open_source
from raysl.storage import Folder
from raysl.stream.formats import needed_package

_log = logging.getLogger("raysl.ingestion")

# Drawn sets, and how many of each are for testing.
_DRAWN_TESTS = {"shapes": 1000, "clips": 200}


@names_checked()
def open_or_ingest(data: str | Opened, cache: Path | None = None) -> DataSet:
    """Return the data set that `data` names: a finished one, or a source.

    A source is ingested into a folder of the cache. The name of the folder depends on the source and on the sizes and
    times of its files, so that a source that has changed is ingested again. So is one with images that could not be
    read without an optional package, once the package is installed.

    Args:
        data: folder of a data set, or anything that `ingest` takes.
        cache: folder of ingested sources: `$RAYSL_CACHE`, or else ~/.cache/raysl. On a cluster all nodes must see it.

    Raises:
        UserError: as `ingest`.
    """
    if isinstance(data, str) and (folder := finished_folder(data)):
        return DataSet.open(folder)
    opened = open_source(canonical(SourceLocation.parse(data))) if isinstance(data, str) else data
    name, now, packages = opened.source.name, stamp(opened), set[str]()
    while DataSet.exists_at(dest := _place(name, now, cache, packages)):
        data_set = DataSet.open(dest)
        if (known := packages | _now_installed(data_set)) == packages:
            return data_set
        packages = known
    advice = "`raysl ingest` makes a data set in a folder that you choose."
    _log.info("Ingesting %s into the cache, %s, once. %s", opened.source.name, dest, advice)
    return ingest(opened, dest, wait=True)


def finished_folder(data: str) -> str:
    """Return the folder of the finished data set that `data` names, from here or in `$RAYSL_DATA`; "" for a source."""
    if DataSet.exists_at(data):
        return data
    location = SourceLocation.parse(data)
    is_finished = not location.split and location.uri != data and DataSet.exists_at(location.uri)
    return location.uri if is_finished else ""


def on_local_disk(data: str) -> bool:
    """Return True if the data set that `data` names, or that it will be ingested into, lies on a disk and not in an
    object store.
    """
    return Folder(finished_folder(data) or str(root(None))).is_local


def root(cache: Path | None) -> Folder:
    """Return the folder of all ingested sources."""
    return Folder(str(cache or os.environ.get("RAYSL_CACHE") or Path.home() / ".cache" / "raysl"))


def canonical(location: SourceLocation) -> SourceLocation:
    """Return a place without ".." in its path, so that all paths of a folder that differ in it have one copy."""
    # If the path does not exist, the error repeats what the user gave.
    if ".." not in (parts := Path(location.uri).parts) or not location.uri.startswith("/"):
        return location
    path = Path("/")
    for part in parts[1:]:
        # ".." behind a link leads to the folder above its target.
        path = path / part if part != ".." else (path.resolve() if path.is_symlink() else path).parent
    return replace(location, uri=str(path))


def _now_installed(data_set: DataSet) -> set[str]:
    """Return the optional packages that images of a data set were left out for, and that are installed now."""
    found = set()
    if data_set.manifest.num_bad:
        with suppress(UserError):  # The images do not depend on a damaged list of bad ones.
            found = {needed_package(row["reason"]) for row in data_set.bad_images()}
    return {name for name in found if name and any(importlib.metadata.distributions(name=name))}


def stamp(opened: Opened) -> str:
    """Return the state of the files of a source. Raises UserError if it cannot be read."""
    try:
        return opened.source.stamp()
    except OSError as error:
        raise unreadable(opened.source.name, error) from error


def _place(name: str, state: str, cache: Path | None, packages: set[str]) -> str:
    """Return the folder of a source in the cache, for a source that was read before some packages were installed."""
    key = hashlib.blake2b("\n".join([name, state, *sorted(packages)]).encode(), digest_size=8).hexdigest()
    # The readable part is for people who clean up the cache.
    stem = re.sub(r"\W+", "-", name.rstrip("/").rpartition("/")[2]).strip("-")[:40]
    return str(root(cache) / f"{stem}-{key}")


@names_checked()
def splits(data: str) -> tuple[str, str]:
    """Return the images to learn from and to test on: the splits "train" and "test" if the source has them, or all of
    it for both. Of drawn sets, others are for testing: a thousand images, or two hundred clips.
    """
    kind, _, rest = data.partition(":")
    if kind in _DRAWN_TESTS:
        options = rest[rest.index("?") :] if "?" in rest else ""
        return f"{data}#train", f"{kind}:{_DRAWN_TESTS[kind]}{options}#test"
    if finished_folder(data):
        return data, data
    try:
        found = open_source(SourceLocation.parse(data)).source.found
    except UserError:  # There are several splits, or nothing, which the first call of `open_or_ingest` says.
        return f"{data}#train", f"{data}#test"
    # A table with a column of splits is also read without one; its values are read when a split is named.
    if found.split_column:
        with suppress(UserError):
            found = open_source(SourceLocation.parse(data, "train")).source.found
    if {"train", "test"} <= {*map(str.lower, found.splits)}:
        return f"{data}#train", f"{data}#test"
    return data, data
