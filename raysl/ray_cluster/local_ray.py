"""Start a Ray that only this process and its children can reach.

Everybody who can talk to a Ray can run programs as its user. This Ray listens on loopback only, asks for a token of its
own, and keeps the token, sockets, logs and spilled objects in a folder that only this user can open.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysl.errors import UserError

# Length limit of the path of a Unix socket; macOS allows four bytes less than Linux.
_PATH_BYTES = 103
_PREFIX = "raysl-"
# Locked by the process that the folder belongs to, as long as it lives.
_LOCK = "owner"
# Ray opens its own folder to everybody (mode 777), so it lies inside the private one.
_RAY_FOLDER = "r"
# The longest path that Ray creates; process ids have up to seven digits.
_LONGEST = f"{_RAY_FOLDER}/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
# When the GCS of this machine is lost, nothing brings it back. Ray would wait 60 s for it before its processes end.
_GCS_LOST_AFTER_S = 15
# Ray's processes may still write logs for a moment after shutdown.
_REMOVE_WITHIN_S = 5.0


@dataclass(frozen=True)
class _Home:
    """The folder of a Ray, and the environment to restore afterward."""

    folder: Path
    lock: int
    process: int = field(default_factory=os.getpid)
    before: dict[str, str | None] = field(default_factory=dict)

    def set_variable(self, name: str, value: str | None) -> None:
        """Set or remove an environment variable, which Ray's processes inherit."""
        self.before.setdefault(name, os.environ.get(name))
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    def clean_up(self) -> None:
        """Remove the folder and restore the environment."""
        for name, value in self.before.items():
            self.set_variable(name, value)
        os.close(self.lock)
        until_s = time.monotonic() + _REMOVE_WITHIN_S
        while self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            if time.monotonic() > until_s:
                break
            time.sleep(0.05)


_home: _Home | None = None


def start(**options: Any) -> None:
    """Start Ray on loopback, with a token and a folder of its own.

    While it runs, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH name its token, RAY_AUTH_TOKEN is unset, GLOO_SOCKET_IFNAME and
    NCCL_SOCKET_IFNAME name the loopback interface, Ray Train does not watch for reclaimed machines, and all processes
    end 15 s after the loss of Ray's GCS. `stop`, which also runs when this process exits, restores them and removes the
    folder. The next `start` removes folders that killed processes left behind.

    Raises:
        UserError: the folder for temporary files cannot be used, or its path is too long.
    """
    global _home
    from functools import partial
    from unittest.mock import patch

    import ray
    from ray._private import parameter, ray_constants

    folder = _folder()
    home = _Home(folder, _lock_folder(folder))
    remove_left_behind(folder.parent)
    # A Ray may be left that was shut down without `stop`.
    stop()
    _home = home
    # Registered after Ray's exit handler, and therefore called before it.
    atexit.register(stop)
    token = home.folder / "token"
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    home.set_variable("RAY_AUTH_MODE", "token")
    home.set_variable("RAY_AUTH_TOKEN_PATH", str(token))
    # Ray prefers this variable to the file.
    home.set_variable("RAY_AUTH_TOKEN", None)
    # lo on Linux, lo0 on macOS.
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        home.set_variable(name, loopback)
    # This machine is not reclaimed, and the watcher is one more process that starts before the first step.
    home.set_variable("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if (lost := "RAY_gcs_rpc_server_reconnect_timeout_s") not in os.environ:
        home.set_variable(lost, str(_GCS_LOST_AFTER_S))
    _read_environment()
    if sys.platform == "darwin":
        # Ray counts the GPU of an Apple chip, which raysl does not use.
        options = {"num_gpus": 0, **options}
    try:
        # `_node_ip_address="127.0.0.1"` is not enough: Ray 2.60 replaces it by an address that others can reach, and
        # most of its processes then listen on all interfaces, unless clusters are switched off, as on macOS.
        # Its agent gets any free port: beside another Ray, Ray would try the usual one for 3 s before it starts.
        agent = partial(parameter.RayParams, dashboard_agent_listen_port=0)
        with (
            patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False),
            patch.object(parameter, "RayParams", agent),
        ):
            ray.init(
                address="local", include_dashboard=False, _temp_dir=str(home.folder / _RAY_FOLDER), **options
            )
    except BaseException:
        stop()
        raise


def stop() -> None:
    """Stop the Ray that `start` started and remove its folder. Do nothing without one."""
    global _home
    import ray

    home, _home = _home, None
    # In a forked process, the Ray belongs to the parent.
    if home is None or home.process != os.getpid():
        return
    ray.shutdown()
    home.clean_up()
    _read_environment()
    atexit.unregister(stop)


def folder() -> Path | None:
    """Return the private folder of the Ray that `start` started, which is removed even after a kill; else None."""
    return _home.folder if _home is not None else None


def _folder() -> Path:
    """Return a new folder with an unpredictable name that only this user can open."""
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root)).resolve()
    except OSError as error:
        raise UserError(
            f"Cannot start Ray on this machine: no folder can be made in {root!r} ({error.strerror}). Set {name} to a "
            "folder that you can write to."
        ) from error
    over = len(os.fsencode(folder / _LONGEST)) - _PATH_BYTES
    if over > 0:
        folder.rmdir()
        length = len(os.fsencode(folder.parent))
        raise UserError(
            f"Cannot start Ray on this machine: the path of the folder for temporary files, {str(folder.parent)!r}, "
            f"has {length} bytes, and the sockets in it allow {length - over}. Set {name} to a shorter path, such as "
            "/tmp."
        )
    return folder


def _lock_folder(folder: Path) -> int:
    """Lock the folder for the life of this process, and return the open lock."""
    # Locked before it has its name, so that no other process finds it unlocked.
    new = folder / f"{_LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(folder / _LOCK)
    return lock


def remove_left_behind(root: Path) -> None:
    """Remove this user's folders whose processes were killed."""
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            if _is_recreated(folder):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # Its process lives.
        finally:
            os.close(lock)


def _is_recreated(folder: Path) -> bool:
    """Return True if a process of Ray that outlived its folder made it again: it holds logs of sessions only."""
    named = re.fullmatch(rf"{_PREFIX}[a-z0-9_]{{8}}", folder.name) is not None
    return (
        named
        and [path.name for path in folder.iterdir()] == [_RAY_FOLDER]
        and all(path.name.startswith("session_") for path in (folder / _RAY_FOLDER).iterdir())
    )


def _read_environment() -> None:
    """Make Ray read the authentication mode and token again; it caches them at the first use."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
