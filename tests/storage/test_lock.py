"""One driver at a time: a second is refused, a dead one is followed, one that was taken over from stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import UserError
from raysl.storage import Folder
from raysl.storage.lock import NAME, DriverLock, _started, held_here, is_lock
from raysl.tuning.journal import NAME as JOURNAL
from raysl.tuning.journal import Journal


def record(folder: Folder, **changes: Any) -> None:
    """What another driver has left."""
    folder.write_json(NAME, {"id": "other", "host": "elsewhere", "pid": 1, "beat": 7, **changes})


def test_a_second_driver_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with DriverLock(folder, beat_s=0.01) as first:
        with (
            pytest.raises(UserError, match=rf"process {os.getpid()} on .*{socket.gethostname()}.* works on"),
            DriverLock(folder, beat_s=0.1),
        ):
            pass
        first.check()
    assert folder.list() == []


@pytest.mark.parametrize("place", ["{}", "memory://{}"])
def test_of_two_drivers_that_find_no_file_one_is_refused(tmp_path: Path, place: str) -> None:
    folder = Folder(place.format(tmp_path))

    class Raced(Folder):
        def write_json(self, name: str, value: object) -> None:
            if self.is_local:
                record(folder)
            super().write_json(name, value)
            if not self.is_local:
                record(folder)

    lock = DriverLock(Raced(str(folder)), beat_s=0.1)
    with pytest.raises(UserError, match=r"process 1 on elsewhere works on"), lock:
        pass
    assert folder.read_json(NAME)["id"] == "other"
    assert folder.list() == [NAME]


def test_a_driver_that_was_killed_here_is_followed_at_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with DriverLock(folder):
        ours = folder.read_json(NAME)
    record(folder, host=ours["host"], scope=ours["scope"], pid=dead.pid)
    with DriverLock(folder) as lock:  # would watch for 40 s
        lock.check()


def test_a_driver_that_runs_here_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(DriverLock, "_wait_until_stale", lambda *_: waited.append(True))
    folder = Folder(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with DriverLock(folder):
            ours = folder.read_json(NAME)
        there = {"host": ours["host"], "scope": ours["scope"], "pid": other.pid}
        record(folder, **there, started=_started(other.pid))
        with (
            pytest.raises(UserError, match=f"process {other.pid} on .*works on the run"),
            DriverLock(folder, "run"),
        ):
            pass
        assert not waited
        # Another process may have got its id, and a record of an earlier version names no start.
        for changes in ({"started": 1}, {}, {"started": _started(other.pid), "scope": "other boot/1"}):
            record(folder, **{**there, **changes})
            with DriverLock(folder, "run"):
                assert waited.pop()
        # A process that lives on after its work no longer renews the record.
        record(folder, **there, started=_started(other.pid))
        os.utime(tmp_path / NAME, (0, 0))
        with DriverLock(folder, "run"):
            assert waited.pop()
        record(folder, **there, started=_started(other.pid))
        other.send_signal(signal.SIGSTOP)
        os.waitpid(other.pid, os.WUNTRACED)
        assert _started(other.pid) == 0
        with DriverLock(folder, "run"):
            assert waited.pop()
        other.kill()


def test_a_process_knows_what_it_works_on(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert not held_here(folder)
    with DriverLock(folder):
        assert held_here(folder)
        folder.write_json(NAME, {**folder.read_json(NAME), "host": "elsewhere"})
        assert not held_here(folder)


@pytest.mark.parametrize(
    "text", ["{", "5", "null", "[1]", '"x"', '{HERE, "pid": [1]}', f'{{HERE, "pid": {1 << 99}}}']
)
def test_a_damaged_record_holds_nobody_up(tmp_path: Path, text: str) -> None:
    folder = Folder(str(tmp_path))
    with DriverLock(folder):
        here = {name: folder.read_json(NAME)[name] for name in ("host", "scope")}
    folder.write(NAME, text.replace("HERE", json.dumps(here)[1:-1]).encode())
    with DriverLock(folder, "run", beat_s=0.01) as lock:
        lock.check()


@pytest.mark.parametrize("moment", ["before it reads", "before it removes"])
def test_a_slow_driver_does_not_take_over_from_one_that_took_over(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found the record of the same dead driver."""
    folder, rename = Folder(str(tmp_path)), os.rename
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    first, ended = DriverLock(folder), DriverLock._has_ended
    with first:
        here = {name: folder.read_json(NAME)[name] for name in ("host", "scope")}
    record(folder, **here, pid=dead.pid)
    first = DriverLock(folder)

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(DriverLock, "_has_ended", ended)
        first.__enter__()
        return ended(*arguments) if moment == "before it reads" else rename(*arguments)

    target, name = (DriverLock, "_has_ended") if moment == "before it reads" else (os, "rename")
    monkeypatch.setattr(target, name, overtaken)
    with (
        pytest.raises(UserError, match=f"process {os.getpid()} .*works on the run"),
        DriverLock(folder, "run"),
    ):
        pass
    first.check()
    first.__exit__()
    assert folder.list() == []


def test_a_driver_elsewhere_that_no_longer_shows_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(str(tmp_path))
    record(folder)
    with caplog.at_level("INFO"), DriverLock(folder, beat_s=0.01) as lock:
        lock.check()
    assert "process 1 on elsewhere" in caplog.text


def test_a_container_with_the_same_host_name_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Its process ids mean nothing here, so the lock is watched for a while."""
    folder = Folder(str(tmp_path))
    with DriverLock(folder):
        ours = folder.read_json(NAME)
    record(folder, host=ours["host"], scope="other boot/1", pid=2**22 - 1)
    lock = DriverLock(folder, beat_s=0.1)
    beating = threading.Timer(0.2, lambda: record(folder, beat=8))
    beating.start()
    with pytest.raises(UserError, match="works on the sweep"), lock:
        pass
    beating.join()


def test_a_driver_that_was_taken_over_from_hears_of_it(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with DriverLock(folder, beat_s=0.01) as lock:
        assert not lock.lost.is_set()
        record(folder)
        assert lock.lost.wait(30)


def test_a_driver_that_was_taken_over_from_writes_no_more(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with DriverLock(folder) as lock:
        journal = Journal(folder, lock.check)
        journal.add({"event": "sweep"})
        before = folder.read(JOURNAL)
        record(folder)
        with pytest.raises(UserError, match="taken over"):
            journal.add({"event": "trial"})
    assert folder.read(JOURNAL) == before
    assert folder.read_json(NAME)["id"] == "other"


def test_one_that_waits_enters_when_the_other_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, waits, entered = Folder(str(tmp_path)), threading.Event(), threading.Event()

    class Watched(DriverLock):
        def _wait_until_stale(self, found: dict[str, Any]) -> None:
            waits.set()
            super()._wait_until_stale(found)

    def second() -> None:
        with Watched(folder, "data set", 0.02, wait=True):
            entered.set()

    with caplog.at_level("INFO"), DriverLock(folder, "data set", 0.01) as lock:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(30)
        lock.check()
        assert not entered.is_set()
    thread.join(30)
    assert entered.is_set()
    assert "Waiting until it has finished" in caplog.text
    assert folder.list() == []


def test_what_a_killed_process_leaves_is_known_as_a_lock() -> None:
    assert is_lock(NAME)
    assert is_lock(f"{NAME}.{'0' * 32}")
    assert not is_lock(f"{NAME}.bak")
    assert not is_lock("driver.jsonl")
