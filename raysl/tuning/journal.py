"""`sweep.jsonl`: the scores, failures and decisions of a sweep, in the order in which they happened.

A sweep that is continued runs in a new process with a new Tuner, and takes from the journal the results that are
already known. Since decisions depend on results and not on time, it decides as an uninterrupted sweep.

    {"event": "sweep", ...}      the first row: space, scheduler, base configuration, fingerprints of the data
    {"event": "trial", ...}      the values of a trial; again at a rung where population based training changed them
    {"event": "score", ...}      one seed of a trial reached a rung: its score, and what that cost
    {"event": "decision", ...}   whether a trial continues from a rung, and the trial that it copies there
    {"event": "failed", ...}     a trial failed, and why
    {"event": "retry", ...}      a failed trial is run again
    {"event": "baseline", ...}   the score of the untrained network or of raw pixels
    {"event": "test", ...}       a score of the chosen trial, or of a baseline, on the test images
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from raysl.config import run_folder
from raysl.errors import explained
from raysl.storage import Folder
from raysl.storage.records import signed_lines, verified_lines

NAME = run_folder.SWEEP_JOURNAL
# Version of the rows above. Sweeps of raysl 0.1 have no such number.
FORMAT = 2

_log = logging.getLogger("raysl.tuning")
# The keys that identify a row of a kind.
_KEYS = ("event", "trial", "seed", "rung", "encoder")


class Journal:
    """The rows of a sweep's journal, in memory and in its file.

    Args:
        folder: folder of the sweep.
        check: called before a row is written; raises when another driver works on the sweep.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: Folder, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._check = check
        self.rows: list[dict[str, Any]] = []
        # The first row of each kind, by `_KEYS`.
        self._first: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        if folder.exists(NAME):
            what = f"The journal {folder}/{NAME} is damaged"
            remedy = "Restore it from a copy, or give another folder to --out."
            with explained(what, remedy, ValueError, TypeError, KeyError, IndexError, show=repr):
                self.rows = [json.loads(line) for line in verified_lines(folder.read(NAME).splitlines())]
                if self.rows[0]["event"] != "sweep":
                    raise ValueError("the first row does not begin a sweep")
        # The content of the file, so that a new row costs no new checksums of all others.
        self._content = signed_lines(self.rows)
        for row in self.rows:
            self._first.setdefault(_key(row), row)

    @property
    def header(self) -> dict[str, Any]:
        """The first row; empty when nothing was written yet."""
        return self.rows[0] if self.rows else {}

    @property
    def method_values(self) -> dict[str, dict[str, Any]]:
        """Values of the trials of each method; see `raysl.tuning.preparation.TrialContext`."""
        return dict(self.header.get("method_values", {}))

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row. The file is written as a whole, so that it never ends in half a row.

        Raises:
            UserError: it cannot be written; the row is then not added.
        """
        self._check()
        content = self._content + signed_lines([row])
        self.folder.write(NAME, content)
        self._content = content
        self.rows.append(dict(row))
        self._first.setdefault(_key(row), self.rows[-1])

    def is_new(self, row: Mapping[str, Any]) -> bool:
        """Return True unless there is a row of the same kind for the same trial, seed and rung."""
        there = self._first.get(_key(row), row)
        if any(there.get(name) != row.get(name) for name in ("goes_on", "copies", "values")):
            _log.warning("Trial %s was decided differently before: %s, now %s.", row["trial"], there, row)
        return there is row

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the rows of one kind."""
        return [row for row in self.rows if row["event"] == event]

    def failures(self) -> dict[int, str]:
        """Return the reasons of the trials that failed and were not run again."""
        found: dict[int, str] = {}
        for row in self.rows:
            if row["event"] == "failed":
                found[row["trial"]] = row["reason"]
            elif row["event"] == "retry":
                found.pop(row["trial"], None)
        return found


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEYS)
