"""What an ingest that is under way has written down, so that it can go on after an interruption.

    _journal/source.json        what is ingested and how; written first, before anything else
    _journal/listing.json       counts of all units and names of the classes; written when the listing is complete
    _journal/units/NNNNNN.json  one unit of the listing, for the task that reads it
    _journal/done/NNNNNN.json   what became of a unit; written after its shard

The listing lies here and not in the memory of the driver, and reaches a task without passing the object store.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from raysl.ingestion.images import Treated
from raysl.ingestion.shard import Written
from raysl.ingestion.sources import Unit
from raysl.storage import Folder

JOURNAL = "_journal"
_PARALLEL = 16


@dataclass(frozen=True)
class Header:
    """What must be equal for an ingest to go on where another stopped.

    Args:
        source: full name of the source.
        stamp: hash of its listing.
        shape: sizes of shards and row groups.
        decoding: how images are decoded.
    """

    source: str
    stamp: str
    shape: tuple[int, ...]
    decoding: dict[str, Any]


@dataclass(frozen=True)
class Listed:
    """The complete listing.

    Args:
        counts: images in every unit, as listed.
        labelled: whether images may have labels.
        classes: their names; None when the labels have none.
    """

    counts: tuple[int, ...]
    labelled: bool
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Journal:
    """The journal in a destination. Small and picklable."""

    dest: Folder

    @property
    def _folder(self) -> Folder:
        return self.dest / JOURNAL

    def header(self) -> Header | None:
        """What is under way here; None when nothing is."""
        value = self._json("source.json")
        return value and Header(
            value["source"], value["stamp"], tuple(value["shape"]), value.get("decoding", {})
        )

    def start(self, header: Header) -> None:
        """Forgets all that is here and starts anew."""
        self.delete()
        self._folder.write_json("source.json", asdict(header))

    def listed(self) -> Listed | None:
        """The listing; None when it was not completed."""
        value = self._json("listing.json")
        if value is None:
            return None
        classes = None if value["classes"] is None else tuple(value["classes"])
        return Listed(tuple(value["counts"]), value["labelled"], classes)

    def write_listed(self, listed: Listed) -> None:
        self._folder.write_json("listing.json", asdict(listed))

    def unit(self, number: int) -> Unit:
        value = self._folder.read_json(f"units/{number:06d}.json")
        return Unit(value["num_images"], value["spec"])

    def write_unit(self, number: int, unit: Unit) -> None:
        self._folder.write_json(f"units/{number:06d}.json", asdict(unit))

    def done(self) -> list[int]:
        """Numbers of the units that are done, sorted."""
        names = (self._folder / "done").list()
        return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]

    def written(self, number: int) -> Written:
        value = self._folder.read_json(f"done/{number:06d}.json")
        value["row_groups"] = tuple(value["row_groups"])
        value["labels"] = tuple(value["labels"])
        value["bad"] = tuple((path, reason) for path, reason in value["bad"])
        value["tally"] = {kind: Treated(**treated) for kind, treated in value["tally"].items()}
        value["ranges"] = {kind: (low, high) for kind, (low, high) in value["ranges"].items()}
        return Written(**value)

    def write_done(self, written: Written) -> None:
        self._folder.write_json(f"done/{written.unit:06d}.json", asdict(written))

    def all_written(self) -> Iterator[Written]:
        """What became of every unit, in order; a few at a time in memory."""
        numbers = self.done()
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for start in range(0, len(numbers), _PARALLEL):
                yield from pool.map(self.written, numbers[start : start + _PARALLEL])

    def delete(self) -> None:
        # The header goes last: a folder without it is not known as ours.
        for name in sorted(self._folder.list(), key=lambda name: name == "source.json"):
            self._folder.delete(name)
        self.dest.delete(JOURNAL)

    def _json(self, name: str) -> Any:
        try:
            return self._folder.read_json(name)
        except FileNotFoundError:
            return None
