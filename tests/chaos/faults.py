"""Faults that the chaos program causes, and what a command leaves behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

# Every process of a command inherits this variable.
MARK = "RAYSL_CHAOS"
_STOPPED_S, _AWAY_S, _FULL_S = 4.0, 5.0, 5.0
# Parts of the command lines of Ray's processes.
_KINDS = {
    "gcs": "gcs_server",
    "raylet": "raylet/raylet",
    "worker": "RayTrainWorker",
    "controller": "TrainController",
    "data task": "ray::Map",
    "k-means worker": "ray::KMeans",
    "trial": "ray::Trial",
    "idle process": "ray::IDLE",
    "other task or actor": "ray::",
    # Forked by the driver of a run with --local.
    "data process": "-m raysl",
}
_SHARED, _ALONE = "/dev/shm", "RAYSL_CHAOS_ALONE"
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


def processes(mark: str) -> list[psutil.Process]:
    """Return the living processes of a command, wherever they have moved."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def kind(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return next((name for name, part in _KINDS.items() if part in line), line[-60:].strip() or line[:60])
    return "gone"


class Target(NamedTuple):
    """A running command.

    Args:
        driver: its first process.
        mark: value of `MARK` in its processes.
        disk: a mounted file system of its own, or None.
    """

    driver: subprocess.Popen[bytes]
    mark: str
    disk: Path | None


def _kill(target: Target, rng: random.Random) -> str | None:
    """Kill the driver, or a process of Ray of a random kind."""
    by_kind: dict[str, list[psutil.Process]] = {}
    for process in processes(target.mark):
        if process.pid != target.driver.pid:
            by_kind.setdefault(kind(process), []).append(process)
    named = sorted(set(by_kind) & set(_KINDS))
    chosen = rng.choice(["driver", *named])
    pid = target.driver.pid if chosen == "driver" else rng.choice(by_kind[chosen]).pid
    os.kill(pid, signal.SIGKILL)
    return f"kill {chosen}"


def _stop(target: Target, rng: random.Random) -> str | None:
    """Stop a random process and continue it after some seconds."""
    by_kind: dict[str, list[psutil.Process]] = {}
    for process in processes(target.mark):
        by_kind.setdefault("driver" if process.pid == target.driver.pid else kind(process), []).append(
            process
        )
    name = rng.choice(sorted(by_kind))
    process = rng.choice(by_kind[name])
    process.suspend()
    time.sleep(_STOPPED_S)
    process.resume()
    return f"stop {name if name in (*_KINDS, 'driver') else 'another process'}"


def _signal(target: Target, rng: random.Random) -> str | None:
    name = rng.choice(_SIGNALS)
    target.driver.send_signal(signal.Signals[name])
    return name


def _fill(target: Target, rng: random.Random) -> str | None:
    """Fill the disk of the result for some seconds."""
    if target.disk is None:
        return None
    filler = target.disk / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(_FULL_S)
    finally:
        filler.unlink()
    return "disk full"


def _take_away(target: Target, rng: random.Random) -> str | None:
    """Cover the folder of the result by an empty read-only one for some seconds."""
    if target.disk is None:
        return None
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", target.disk], check=True)
    try:
        time.sleep(_AWAY_S)
    finally:
        subprocess.run(["umount", "-l", target.disk], check=True)
    return "storage away"


_FAULTS: tuple[Callable[[Target, random.Random], str | None], ...] = (
    _kill,
    _stop,
    _signal,
    _fill,
    _take_away,
)
_WEIGHTS = (7, 1, 1, 1, 1)


def strike(target: Target, rng: random.Random) -> str | None:
    """Cause a random fault and return its name; None if it was not possible, because the command has ended."""
    (fault,) = rng.choices(_FAULTS, _WEIGHTS)
    with contextlib.suppress(psutil.Error, ProcessLookupError, IndexError):
        if target.driver.poll() is None:
            return fault(target, rng)
    return None


def shared_memory() -> set[str]:
    return set(os.listdir(_SHARED))


def alone() -> None:
    """Start this program again with mounts and shared memory that no other process sees, where that is possible."""
    command = ["unshare", "--mount", "--", "sh", "-c", f'mount -t tmpfs none {_SHARED} && exec "$@"', "sh"]
    if (
        _ALONE in os.environ
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        return
    os.environ[_ALONE] = "1"
    os.execvp("unshare", [*command, *sys.orig_argv])


def leftovers(mark: str, within_s: float) -> tuple[list[str], float]:
    """Return the kinds of processes that are left after some seconds, and the seconds waited. Kill those left."""
    begun = time.monotonic()
    while (left := processes(mark)) and time.monotonic() < begun + within_s:
        time.sleep(0.5)
    waited_s = time.monotonic() - begun
    names = [kind(process) for process in left]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return names, waited_s


def mount(folder: Path, megabytes: int) -> bool:
    """Mount a small file system at a folder; return False where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    return (
        os.path.ismount(folder) or subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def unmount(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)
