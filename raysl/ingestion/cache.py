"""Data by name: a finished data set is opened, any other source is ingested once and kept."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingestion.pipeline import IngestConfig, ingest
from raysl.ingestion.progress import Reporter, Terminal
from raysl.ingestion.sources import Place, open_source
from raysl.storage import Folder


def resolve(data: str, cache: Path | None = None, progress: Reporter | None = None) -> DataSet:
    """The data set that `data` names: one that is finished, or a source. Ray must be running for a source.

    A source is ingested into a folder of the cache whose name hangs on the source and on the sizes and times of
    its files, so that a source that has changed is ingested again.

    Args:
        data: folder of a data set, or anything that `ingest` takes.
        cache: where ingested sources are kept: `$RAYSL_CACHE`, or else ~/.cache/raysl. On a cluster it must be a
            place that all nodes see.

    Raises:
        UserError: as `ingest`.
    """
    if DataSet.is_one(data):
        return DataSet.open(data)
    dest = _place(data, cache)
    if DataSet.is_one(dest):
        return DataSet.open(dest)
    progress = progress or Terminal()
    progress.say(
        f"Ingesting {data} into {dest}, once. `raysl ingest` makes a data set at a place of your own."
    )
    return ingest(data, dest, IngestConfig(), progress)


def find(data: str) -> DataSet | None:
    """Return the data set that `data` names, or None for a source that has not been ingested into the cache.

    Raises:
        UserError: there is neither a data set nor a source.
    """
    place = data if DataSet.is_one(data) else _place(data, None)
    return DataSet.open(place) if DataSet.is_one(place) else None


def _place(data: str, cache: Path | None) -> str:
    """Return the folder of a source in the cache."""
    _, source = open_source(Place.parse(data))
    try:
        key = hashlib.blake2b(f"{source.name}\n{source.stamp()}".encode(), digest_size=8).hexdigest()
    except OSError as error:
        raise UserError(
            f"Cannot read the source {source.name!r}: {error}. Check the place and your access."
        ) from error
    root = Folder(str(cache or os.environ.get("RAYSL_CACHE") or Path.home() / ".cache" / "raysl"))
    # The readable part is for people who clean up the cache.
    stem = re.sub(r"\W+", "-", source.name.rstrip("/").rpartition("/")[2]).strip("-")[:40]
    return str(root / f"{stem}-{key}")


def splits(data: str) -> tuple[str, str]:
    """What `data` offers to learn from and to be judged on: its splits "train" and "test", if that is what it has, or
    all of it for both. Drawn images are judged on a thousand others.

    Args:
        data: as `resolve` takes it, without a split.
    """
    if data.startswith("shapes:"):
        return f"{data}#train", "shapes:1000#test"
    if DataSet.is_one(data):
        return data, data
    try:
        open_source(Place.parse(data))
    except UserError:  # several splits, or nothing there, which the first to resolve it says
        return f"{data}#train", f"{data}#test"
    return data, data
