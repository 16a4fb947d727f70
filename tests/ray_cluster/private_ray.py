"""Assertions about a Ray that raysl starts: this user's processes reach it, and nobody else does."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil

# The first request of a client. `ray.init` would repeat it for minutes.
ASK = (
    "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', timeout=10)"
)


def without_token() -> dict[str, str]:
    """Return this environment without what raysl sets for a Ray of its own: a token, and loopback for workers."""
    ours = ("RAY_AUTH", "GLOO_SOCKET", "NCCL_SOCKET")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def private_folder(driver: psutil.Process) -> Path:
    """Return the folder of a driver's Ray, after checks that it is private.

    It listens on loopback only, and answers only clients that have a token, which others cannot read.
    """
    processes = [driver, *driver.children(recursive=True)]
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            found += process.net_connections(kind="inet")
    sockets = [
        (ipaddress.ip_address(socket.laddr.ip), socket.laddr.port)
        for socket in found
        if socket.status == "LISTEN"
    ]
    assert len(sockets) > 10
    open_to_others = [(str(ip), port) for ip, port in sockets if not _loopback(ip)]
    assert not open_to_others
    # The ports of the dashboard and of the client server.
    assert not {8265, 10001} & {port for _, port in sockets}

    (raylet,) = (process for process in processes if _name(process) == "raylet")
    token = Path(raylet.environ()["RAY_AUTH_TOKEN_PATH"])
    assert [oct(path.stat().st_mode & 0o777) for path in (token, token.parent)] == ["0o600", "0o700"]
    secret, flag = token.read_text(), "--gcs-address="
    address = next(word.removeprefix(flag) for word in raylet.cmdline() if word.startswith(flag))
    clients = [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret},
    ]
    with ThreadPoolExecutor(len(clients)) as pool:
        assert list(pool.map(partial(_answered, address), clients)) == [False, False, True]
    for log in [one for one in token.parent.rglob("*.*") if one.is_file()]:
        with contextlib.suppress(FileNotFoundError):
            assert secret not in log.read_text(errors="replace")
    return token.parent


def _name(process: psutil.Process) -> str:
    """Return the name of a process; nothing if it has ended."""
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""


def _answered(address: str, settings: dict[str, str]) -> bool:
    """Return True if Ray answers a client with these settings."""
    command, environment = [sys.executable, "-c", ASK, address], {**without_token(), **settings}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 0


def _loopback(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)
