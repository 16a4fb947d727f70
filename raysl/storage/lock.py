"""Allow one driver at a time for a run, a sweep or a data set: a distributed lock, a file that its driver renews.

    driver.json     {"id", "host", "scope", "pid", "started", "beat"}, present while a driver works

A driver that finds the file asks this machine whether the other one runs, where process ids tell it. Otherwise it
watches whether the file changes, and so never compares the clocks of two machines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from raysl.errors import UserError
from raysl.storage import Folder, failure

_log = logging.getLogger("raysl.storage")

NAME = "driver.json"
BEAT_S = 10.0
# Beats that a driver may miss before another takes over.
_MISSED = 4
_SAY_EVERY_S = 60.0


def is_lock(name: str) -> bool:
    """Return True if a file is a lock, or the beginning of one that a killed process left."""
    return re.fullmatch(rf"{re.escape(NAME)}(\.[0-9a-f]{{32}})?", name) is not None


def held_here(folder: Folder) -> bool:
    """Return True if this process holds the lock of the folder."""
    found = _read_record(folder) or {}
    return (found.get("host"), found.get("scope"), found.get("pid")) == (*_here(), os.getpid())


def _here() -> tuple[str, str]:
    """Return the host name, and the scope in which process ids are unique: this boot and PID namespace.

    Containers that share a host name may or may not see each other's processes.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return socket.gethostname(), f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname(), ""


def _started(pid: int) -> int:
    """Return when a process of this PID namespace began, in clock ticks since the boot; 0 if that cannot be known.

    0 also for a process that is stopped or has ended, and so does not work.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name of the program, in parentheses, may contain anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "TtZXx" else int(fields[18])
    return 0


def _read_record(folder: Folder, name: str = NAME) -> dict[str, Any] | None:
    """Return a record; None if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = folder.read_json(name)
        return found if isinstance(found, dict) else None
    return None


def _describe(found: dict[str, Any]) -> str:
    return f"process {found.get('pid')} on {found.get('host')}"


class _HeldError(UserError):
    """Another driver holds the lock."""


class DriverLock:
    """The right to write to a folder, for the duration of a `with` block.

    Args:
        work: "run", "sweep" or "data set", for messages.
        beat_s: seconds between two renewals.
        wait: wait for another driver until it has ended.

    Attributes:
        lost: set when another driver has taken over.

    Raises:
        UserError: on entering, another driver holds the lock, and `wait` is False.
    """

    def __init__(
        self, folder: Folder, work: str = "sweep", beat_s: float = BEAT_S, wait: bool = False
    ) -> None:
        self.folder = folder
        self._work = work
        self._beat_s = beat_s
        self._wait = wait
        self._quiet_until_s = 0.0
        host, scope = _here()
        pid = os.getpid()
        self._record = {
            "id": uuid.uuid4().hex,
            "host": host,
            "scope": scope,
            "pid": pid,
            "started": _started(pid),
        }
        self._done = threading.Event()
        self.lost = threading.Event()

    def __enter__(self) -> DriverLock:
        while not self._entered():
            time.sleep(self._beat_s / 10)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        try:
            self._thread.join()
        finally:
            if self._is_mine():
                self.folder.delete(NAME)

    def _entered(self) -> bool:
        """Take the lock; return False if another driver holds it and this one waits."""
        try:
            found = _read_record(self.folder)
            if found is not None and self._runs_here(found):
                if self._wait:
                    self._say(found, 0)
                raise self._held_error(found)
            if found is not None and not self._has_ended(found):
                self._wait_until_stale(found)
                if _read_record(self.folder) != found:
                    return self._entered()
            self._acquire(found)
        except _HeldError:
            if not self._wait:
                raise
            return False
        return True

    def check(self) -> None:
        """Raise UserError if another driver has taken over, or the file was deleted."""
        if not self._is_mine():
            raise UserError(
                f"Another raysl process has taken over the {self._work} at {str(self.folder)!r}, or {NAME} was "
                "deleted. This one stops, and the other one resumes from what it has written."
            )

    def _is_mine(self) -> bool:
        found = _read_record(self.folder)
        return found is not None and found.get("id") == self._record["id"]

    def _acquire(self, ended: dict[str, Any] | None) -> None:
        """Write the first record, in place of one that has ended. Raises UserError when another driver does so."""
        if self.folder.is_local:
            self._remove(ended)
            path = Path(self.folder.uri, NAME)
            mine = path.with_name(f"{NAME}.{self._record['id']}")
            self._write(0, mine.name)
            try:
                os.link(mine, path)  # Only one of several drivers succeeds.
                return
            except FileExistsError as error:
                raise self._held_error(_read_record(self.folder) or {}) from error
            except OSError:  # This file system has no links.
                pass
            finally:
                mine.unlink(missing_ok=True)
        self._write(0)
        # Another driver that saw no file either, or the record of the same dead driver, may overwrite this record.
        time.sleep(self._beat_s / 40)
        if not self._is_mine():
            raise self._held_error(_read_record(self.folder) or {})

    def _remove(self, ended: dict[str, Any] | None) -> None:
        """Remove a record that has ended or is damaged. Raises UserError if another driver has replaced it."""
        path = Path(self.folder.uri, NAME)
        now, aside = _read_record(self.folder), path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        try:
            if now in (None, ended):
                os.rename(path, aside)  # If several drivers find the same record, one succeeds.
                if (now := _read_record(self.folder, aside.name)) == ended:
                    aside.unlink()
                    return
                with contextlib.suppress(FileExistsError):  # A third driver may have entered.
                    os.link(aside, path)
                aside.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise failure(str(path), "write", error) from error
        raise self._held_error(now or {})

    def _write(self, beat: int, name: str = NAME) -> None:
        self.folder.write_json(name, {**self._record, "beat": beat})

    def _renew(self) -> None:
        beat = 0
        while not self._done.wait(self._beat_s):
            # Storage that does not answer now may answer at the next beat.
            with contextlib.suppress(OSError, ValueError, UserError):
                if not self._is_mine():
                    self.lost.set()
                    return
                beat += 1
                self._write(beat)

    def _has_ended(self, found: dict[str, Any]) -> bool:
        """Return True if the driver ran in this PID namespace and has ended; False if that cannot be known."""
        if not found.get("scope") or (found.get("host"), found.get("scope")) != _here():
            return False
        try:
            os.kill(int(found["pid"]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, KeyError, ValueError, TypeError, OverflowError):
            return False
        return False

    def _runs_here(self, found: dict[str, Any]) -> bool:
        """Return True if the driver is another process of this PID namespace, runs, and has renewed the file lately.

        False if that is not known. A later process may have its id, but not its start. A process that lives on after
        its work may have left the file when storage failed, which must not hold up others for ever.
        """
        if not found.get("scope") or (found.get("host"), found.get("scope")) != _here():
            return False
        pid, started = found.get("pid"), found.get("started")
        if not isinstance(pid, int) or pid == os.getpid() or not started:
            return False
        return bool(_started(pid) == started) and not self._has_ended(found) and self._is_fresh()

    def _is_fresh(self) -> bool:
        """Return True if the file lies on a disk and was written within the time of a few beats."""
        if not self.folder.is_local:
            return False
        with contextlib.suppress(OSError):
            return abs(time.time() - Path(self.folder.uri, NAME).stat().st_mtime) < _MISSED * self._beat_s
        return False

    def _wait_until_stale(self, found: dict[str, Any]) -> None:
        """Return when the file has not changed for some beats. Raises UserError when it changes."""
        patience_s = _MISSED * self._beat_s
        self._say(found, patience_s)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            time.sleep(self._beat_s / 10)
            now = _read_record(self.folder)
            if now is None or self._has_ended(now):
                return
            if now != found:
                raise self._held_error(now)

    def _say(self, found: dict[str, Any], patience_s: float) -> None:
        """Say once a minute that this driver waits, and for what."""
        if time.monotonic() < self._quiet_until_s:
            return
        self._quiet_until_s = time.monotonic() + _SAY_EVERY_S
        until = "Waiting until it has finished."
        if not self._wait:
            until = f"Waiting for {patience_s:.0f} s to see whether it still does."
        _log.info(
            "Another raysl %s works on the %s at %s. %s", _describe(found), self._work, self.folder, until
        )

    def _held_error(self, found: dict[str, Any]) -> _HeldError:
        return _HeldError(
            f"Another raysl {_describe(found)} works on the {self._work} at {str(self.folder)!r}. Wait for it or "
            "stop it, and run the same command again; or choose another folder."
        )
