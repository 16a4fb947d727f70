"""`sweep.jsonl`: what was asked, what was scored and what failed, in the order in which it happened.

It is all that a sweep remembers: what to do next follows from it (see `standing`), so a driver that is killed leaves
nothing behind that the next one would miss.

    {"event": "sweep", ...}      the first row: space, scheduler, base configuration, fingerprints of the data
    {"event": "trial", ...}      a trial begins: its number and values
    {"event": "score", ...}      one seed of a trial reached a rung: its score, and what that cost
    {"event": "decision", ...}   a trial goes on or is stopped at a rung; for people, it is worked out anew
    {"event": "failed", ...}     a trial is given up, and why
    {"event": "retry", ...}      it is taken up again
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from raysl.errors import UserError
from raysl.run import jsonl
from raysl.storage import Folder

NAME = "sweep.jsonl"


class Journal:
    """The rows of a sweep's journal, in memory and in its file.

    Args:
        folder: of the sweep.
        check: is called before a row is written, and raises when another driver writes there.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: Folder, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._check = check
        self.rows: list[dict[str, Any]] = []
        if folder.exists(NAME):
            try:
                self.rows = [dict(json.loads(line)) for line in folder.read(NAME).splitlines()]
                assert self.rows[0]["event"] == "sweep"
            except (ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
                raise UserError(
                    f"The journal {folder}/{NAME} is damaged: {error!r}. Restore it from a copy, or give another "
                    "folder to --out."
                ) from error

    @property
    def header(self) -> dict[str, Any]:
        """The first row; empty when nothing was written yet."""
        return self.rows[0] if self.rows else {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row. The file is written whole, so that it never ends in half a row.

        Raises:
            UserError: it cannot be written. The row is then not there either.
        """
        self._check()
        self.folder.write(NAME, jsonl([*self.rows, row]))
        self.rows.append(dict(row))

    def of(self, event: str) -> list[dict[str, Any]]:
        """The rows of one kind."""
        return [row for row in self.rows if row["event"] == event]
