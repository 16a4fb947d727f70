"""Check the destination of an ingest before anything is written."""

from __future__ import annotations

from pathlib import Path

from raysl.dataset import MANIFEST, SHARDS, DataSet
from raysl.errors import UserError
from raysl.ingestion import images, objects
from raysl.ingestion.journal import JOURNAL, Journal
from raysl.ingestion.sources import Place
from raysl.storage import Folder
from raysl.stream.pixels import DecodeConfig


def finished(dest: Folder, name: str, decoding: DecodeConfig) -> DataSet | None:
    """Return the data set at `dest` if it is finished; None if `dest` is free for this source.

    Raises:
        UserError: `dest` holds something else.
    """
    if not dest.exists():
        return None
    if dest.exists(MANIFEST):
        data_set = DataSet.open(str(dest))
        if data_set.manifest.source != name:
            raise UserError(
                f"{str(dest)!r} already holds a data set of another source, {data_set.manifest.source!r}, and not "
                f"of {name!r}. Choose another destination, or delete that folder."
            )
        made_with = {key: data_set.manifest.decoding.get(key) for key in images.settings(decoding)}
        if made_with != images.settings(decoding):
            changed = [key for key, value in images.settings(decoding).items() if made_with[key] != value]
            raise UserError(
                f"{str(dest)!r} already holds this source, ingested with another --{changed[0].replace('_', '-')}: "
                f"{made_with[changed[0]]}. Choose another destination, or delete that folder."
            )
        # An interruption between the last two steps leaves the journal behind.
        Journal(dest).delete()
        return data_set
    if dest.is_local and Path(str(dest)).is_file():
        raise UserError(f"The destination {str(dest)!r} is a file. Name a folder.")
    content = [entry for entry in dest.list() if not entry.endswith(".tmp")]
    header = Journal(dest).header()
    if header is None and set(content) - {JOURNAL, objects.FOLDER}:
        raise UserError(
            f"The destination {str(dest)!r} is not empty and holds no data set of raysl (the first entry is "
            f"{content[0]!r}). Choose a new folder."
        )
    if header is not None and header.source != name:
        raise UserError(
            f"{str(dest)!r} holds an unfinished data set of another source, {header.source!r}, and not of {name!r}. "
            "Finish that one, choose another destination, or delete the folder."
        )
    return None


def check_free(dest: Folder) -> None:
    """Raise UserError if a folder cannot take the rows of an object."""
    others = set(dest.list()) - {JOURNAL, objects.FOLDER, SHARDS}
    if others:
        raise UserError(
            f"The destination {str(dest)!r} is not empty: it holds {sorted(others)[0]!r}. Choose a new folder."
        )


def check_apart(dest: Folder, place: Place) -> None:
    source = Folder(place.uri)
    if dest.is_local and source.exists() and Path(str(dest)).is_relative_to(str(source)):
        raise UserError(
            f"The destination {str(dest)!r} lies inside the source {str(source)!r}, which would then contain it. "
            "Choose a folder elsewhere."
        )
