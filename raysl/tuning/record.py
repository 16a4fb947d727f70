"""A sweep as it lies in its folder, whether it is over or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig
from raysl.tuning.journal import NAME, Journal
from raysl.tuning.space import Dimension, Space
from raysl.tuning.standing import Standing


@dataclass(frozen=True)
class Record:
    """What a journal says.

    Args:
        folder: of the sweep.
        journal: its rows.
        base: the configuration, but for what varies.
        standing: where the sweep stands, with the trials that have begun.
        uris: where the labelled data were, as "train" and "test".
    """

    folder: Folder
    journal: Journal
    base: Pretraining
    standing: Standing
    uris: dict[str, str]

    @staticmethod
    def open(uri: str) -> Record:
        """The sweep at `uri`. Raises UserError when there is none, or its journal is damaged."""
        folder = Folder(uri)
        if not folder.exists(NAME):
            raise UserError(
                f"No sweep at {uri!r}: there is no {NAME}. Make one with `raysl sweep --out {uri}`."
            )
        journal = Journal(folder)
        header = journal.header
        dimensions = tuple(_dimension(value) for value in header["space"])
        begun = [row["trial"] for row in journal.of("trial")]
        # Only population based training fixes the number of its samples.
        settings = {"samples": max(begun, default=0) + 1, **header["config"]}
        settings["seeds"] = tuple(settings["seeds"])
        names = tuple(dimension.name for dimension in dimensions)
        config = SweepConfig(uri, header["uris"]["test"], names, **settings)
        base = Pretraining.from_json({**header["base"], "run": "-"})
        return Record(
            folder, journal, base, Standing(config, Space(dimensions), journal.rows), header["uris"]
        )

    def best(self) -> Pretraining | None:
        """The configuration of the best finished trial, for its first seed; None while none is finished."""
        best = self.standing.best()
        if best is None:
            return None
        values = self.standing.values(best, self.standing.num_rungs - 1)
        return self.standing.space.configured(self.base, values or {})


def _dimension(value: dict[str, Any]) -> Dimension:
    return Dimension(**{**value, "path": tuple(value["path"]), "values": tuple(value["values"])})
