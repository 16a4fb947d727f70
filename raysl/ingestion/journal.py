"""The destination of an ingest, and the journal in it, from which an interrupted one resumes.

    _journal/source.json        what is ingested and how; written first
    _journal/listing.json       counts of all units and names of the classes; written when the listing is complete
    _journal/units/NNNNNN.json  one unit of the listing, for the task that reads it
    _journal/done/NNNNNN.json   the result of a unit; written after its shard

The listing is in files and not in the memory of the driver, and tasks read it without passing the object store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysl.dataset import MANIFEST, DataSet
from raysl.errors import UserError
from raysl.ingestion.images import Treated, settings
from raysl.ingestion.objects import FOLDER as OBJECTS
from raysl.ingestion.shard import Written
from raysl.ingestion.sources import SourceLocation, Unit
from raysl.storage import Folder
from raysl.storage.lock import is_lock
from raysl.storage.records import read_record, write_record
from raysl.stream.pixels import DecodeConfig

JOURNAL = "_journal"
_PARALLEL = 16


@dataclass(frozen=True)
class Header:
    """What must be equal for an ingest to resume another."""

    source: str
    stamp: str  # hash of its listing
    shape: tuple[int, ...]  # sizes of shards and row groups
    decoding: dict[str, Any]  # how images are decoded


@dataclass(frozen=True)
class Listed:
    """The complete listing."""

    counts: tuple[int, ...]  # images in every unit
    classes: tuple[str, ...]  # names; empty without labels
    labels: str  # where the labels come from, or why there are none


@dataclass(frozen=True)
class Journal:
    """The journal in a destination. Small and picklable."""

    dest: Folder

    @property
    def _folder(self) -> Folder:
        return self.dest / JOURNAL

    def header(self) -> Header | None:
        """Return the header of the ingest that is under way; None if there is none."""
        if not self._folder.exists("source.json"):
            return None
        value = self._read("source.json")
        return Header(value["source"], value["stamp"], tuple(value["shape"]), value.get("decoding", {}))

    def start(self, header: Header) -> None:
        """Delete the journal and start a new one."""
        self.delete()
        write_record(self._folder, "source.json", asdict(header))

    def listed(self) -> Listed | None:
        """Return the listing; None if it was not completed."""
        if not self._folder.exists("listing.json"):
            return None
        value = self._read("listing.json")
        return Listed(tuple(value["counts"]), tuple(value["classes"]), value["labels"])

    def write_listed(self, listed: Listed) -> None:
        write_record(self._folder, "listing.json", asdict(listed))

    def unit(self, number: int) -> Unit:
        value = self._read(f"units/{number:06d}.json")
        return Unit(value["num_images"], value["spec"])

    def write_unit(self, number: int, unit: Unit) -> None:
        write_record(self._folder, f"units/{number:06d}.json", asdict(unit))

    def done(self) -> list[int]:
        """Return the sorted numbers of the units that are done."""
        names = (self._folder / "done").list()
        return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]

    def written(self, number: int) -> Written:
        value = self._read(f"done/{number:06d}.json")["written"]
        if "unlabelled" in value:  # the name of the field before December 2026
            value["unlabeled"] = value.pop("unlabelled")
        value["row_groups"] = tuple(value["row_groups"])
        value["labels"] = tuple(value["labels"])
        value["bad"] = tuple((path, reason) for path, reason in value["bad"])
        value["tally"] = {kind: Treated(**treated) for kind, treated in value["tally"].items()}
        value["ranges"] = {kind: (low, high) for kind, (low, high) in value["ranges"].items()}
        return Written(**value)

    def write_done(self, written: Written) -> None:
        # A result has a checksum of its own, that of its shard, so it lies inside of the record.
        write_record(self._folder, f"done/{written.unit:06d}.json", {"written": asdict(written)})

    def all_written(self) -> Iterator[Written]:
        """Yield the result of every unit, in order; a few at a time are in memory."""
        numbers = self.done()
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for start in range(0, len(numbers), _PARALLEL):
                yield from pool.map(self.written, numbers[start : start + _PARALLEL])

    def delete(self) -> None:
        # The header is deleted last: without it the folder would look like a stranger's.
        for name in sorted(self._folder.list(), key=lambda name: name == "source.json"):
            self._folder.delete(name)
        self.dest.delete(JOURNAL)

    def _read(self, name: str) -> dict[str, Any]:
        return read_record(self._folder, name, f"Delete the folder {self.dest} and ingest again.")


def finished(dest: Folder, name: str, decoding: DecodeConfig) -> DataSet | None:
    """Return the data set at `dest` if it is finished; None if `dest` is free. Raises UserError for anything else."""
    if not dest.exists():
        return None
    if dest.exists(MANIFEST):
        data_set = DataSet.open(str(dest))
        if data_set.manifest.source != name:
            raise UserError(
                f"{str(dest)!r} already holds a data set of another source, {data_set.manifest.source!r}, and not "
                f"of {name!r}. Choose another destination, or delete that folder."
            )
        made_with = data_set.manifest.decoding
        for key, value in settings(decoding).items():
            if made_with.get(key) != value:
                raise UserError(
                    f"{str(dest)!r} already holds this source, ingested with another --{key.replace('_', '-')}: "
                    f"{made_with.get(key)}. Choose another destination, or delete that folder."
                )
        # An interruption between the last two steps leaves the journal behind.
        Journal(dest).delete()
        return data_set
    if dest.is_local and Path(str(dest)).is_file():
        raise UserError(f"The destination {str(dest)!r} is a file. Name a folder.")
    content = [name for name in _entries(dest) if not name.endswith(".tmp") and not is_lock(name)]
    header = Journal(dest).header()
    if header is None and set(content) - {JOURNAL, OBJECTS}:
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


def _entries(dest: Folder) -> list[str]:
    try:
        return dest.list()
    except UnicodeDecodeError as error:
        raise UserError(
            f"The destination {str(dest)!r} is not empty: it holds a name that is not in UTF-8, {error.object!r}. "
            "Choose a new folder."
        ) from error


def refuse_dest_inside_source(dest: Folder, location: SourceLocation) -> None:
    """Raise UserError if a destination lies inside of its source, also by a link."""
    source = Folder(location.uri)
    if not dest.is_local or not source.is_local or not source.exists():
        return
    if Path(os.path.realpath(str(dest))).is_relative_to(os.path.realpath(str(source))):
        raise UserError(
            f"The destination {str(dest)!r} lies inside the source {str(source)!r}, which would then contain it. "
            "Choose a folder elsewhere."
        )
