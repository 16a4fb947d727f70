"""One driver at a time for a run or a sweep: a record in its folder, wherever that lies, which the driver renews.

    driver.json     {"id", "host", "pid", "beat"}, there while a driver works

Clocks of machines are not compared: whoever finds a record watches whether it changes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from raysl.errors import UserError
from raysl.storage import Folder

NAME = "driver.json"
BEAT_S = 10.0
# Beats that a driver may miss before another takes over.
_MISSED = 4


def held_here(folder: Folder) -> bool:
    """Whether this process works on the run or the sweep."""
    there = _recorded(folder) or {}
    return (there.get("host"), there.get("pid")) == (socket.gethostname(), os.getpid())


def _recorded(folder: Folder) -> dict[str, Any] | None:
    if not folder.exists(NAME):
        return None
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(folder.read_json(NAME))
    return None


class DriverLock:
    """A driver's right to write to a run or a sweep, for the time of a `with` block.

    Args:
        folder: of the run or the sweep.
        say: takes a line, when there is something to wait for.
        work: "run" or "sweep", for sentences.
        beat_s: seconds between two renewals.

    Attributes:
        lost: set when another driver was found to have taken over.

    Raises:
        UserError: on entering, another driver works there.
    """

    def __init__(
        self, folder: Folder, say: Callable[[str], None], work: str = "sweep", beat_s: float = BEAT_S
    ) -> None:
        self.folder = folder
        self._say = say
        self._work = work
        self._beat_s = beat_s
        self._record = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self._done = threading.Event()
        self.lost = threading.Event()

    def __enter__(self) -> DriverLock:
        there = _recorded(self.folder)
        if there is not None and not self._gone(there):
            self._watch(there)
        self._write(0)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._mine():
            self.folder.delete(NAME)

    def check(self) -> None:
        """Raises UserError when another driver has taken over, or the record was deleted."""
        if not self._mine():
            raise UserError(
                f"Another driver has taken over the {self._work} at {str(self.folder)!r}, or {NAME} was deleted there. "
                "This one stops; nothing that it has written before is lost, and the other goes on from there."
            )

    def _mine(self) -> bool:
        there = _recorded(self.folder)
        return there is not None and there.get("id") == self._record["id"]

    def _write(self, beat: int) -> None:
        self.folder.write_json(NAME, {**self._record, "beat": beat})

    def _renew(self) -> None:
        beat = 0
        while not self._done.wait(self._beat_s):
            # A storage that does not answer now may do so at the next beat.
            with contextlib.suppress(OSError, ValueError, UserError):
                if not self._mine():
                    self.lost.set()
                    return
                beat += 1
                self._write(beat)

    def _gone(self, there: dict[str, Any]) -> bool:
        """Whether the driver was on this machine and is no longer; False where that cannot be told."""
        if there.get("host") != socket.gethostname():
            return False
        try:
            os.kill(int(there["pid"]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, KeyError, ValueError):
            return False
        return False

    def _watch(self, there: dict[str, Any]) -> None:
        """Returns when the record has not changed for some beats."""
        who = f"process {there.get('pid')} on {there.get('host')}"
        patience_s = _MISSED * self._beat_s
        self._say(
            f"Another driver, {who}, has worked on this {self._work}. Watching for {patience_s:.0f} s if it still does."
        )
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(self._beat_s / 4)
            now = _recorded(self.folder)
            if now is None:
                return
            if now != there:
                raise UserError(
                    f"Another driver, {who}, works on the {self._work} at {str(self.folder)!r}, and two would undo "
                    "each other's work. Wait for it or stop it, and give the same command again; or give another "
                    "folder."
                )
