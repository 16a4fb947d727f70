"""A Ray that raysl starts can be reached by this user's processes alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raysl.errors import UserError
from raysl.ray_cluster import local_ray


@contextmanager
def other_host() -> Iterator[tuple[str, str]]:
    """A network namespace: its name, and this machine's address as seen from it."""
    name = f"raysl{uuid.uuid4().hex[:6]}"
    ours, theirs = f"{name}a", f"{name}b"
    commands = [
        f"ip netns add {name}",
        f"ip link add {ours} type veth peer name {theirs} netns {name}",
        f"ip addr add 198.51.100.1/30 dev {ours}",
        f"ip link set {ours} up",
        f"ip -n {name} addr add 198.51.100.2/30 dev {theirs}",
        f"ip -n {name} link set {theirs} up",
    ]
    try:
        for command in commands:
            if subprocess.run(command.split(), capture_output=True, check=False).returncode:
                pytest.skip(f"cannot pretend another host here: {command} fails")
        yield name, "198.51.100.1"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", ours], capture_output=True, check=False)


@pytest.mark.ray
def test_another_host_reaches_no_port(ray_session: None) -> None:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the command ip")
    import psutil

    ports = {
        s.laddr.port
        for p in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for s in p.net_connections(kind="inet")
        if s.status == "LISTEN"
    }
    assert ports
    attempt = (
        "import socket, sys\n"
        "for port in sys.argv[2:]:\n"
        "    try: socket.create_connection((sys.argv[1], int(port)), timeout=2).close()\n"
        "    except OSError: continue\n"
        "    print(port)"
    )
    with other_host() as (name, address):
        command = ["ip", "netns", "exec", name, sys.executable, "-c", attempt, address, *map(str, ports)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == ""


def test_a_temporary_folder_with_a_long_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(UserError, match="Set RAY_TMPDIR to a shorter path"):
        local_ray.start()
    assert not list(long.iterdir())


OWNER = """
import sys, time
from raysl.ray_cluster import local_ray
folder = local_ray._folder()
lock = local_ray._lock_folder(folder)
print(folder, flush=True)
time.sleep(100)
"""


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_kept() -> None:
    # The path of pytest's own folder is too long for sockets.
    root = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    environment = {**os.environ, "RAY_TMPDIR": str(root)}
    command = [sys.executable, "-c", OWNER]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        folders = [Path(process.stdout.readline().strip()) for process in processes if process.stdout]
        (root / "raysl-of-something-else").mkdir()
        # A process of Ray that outlived its folder has made it again.
        (root / "raysl-again_12" / "r" / "session_1").mkdir(parents=True)
        # This one is a user's.
        (root / "raysl-my_trial" / "r" / "photos").mkdir(parents=True)
        processes[0].kill()
        processes[0].wait()
        local_ray.remove_left_behind(root)
        assert not folders[0].exists()
        assert not (root / "raysl-again_12").exists()
        assert (root / "raysl-my_trial" / "r" / "photos").exists()
        assert folders[1].exists()
        assert (root / "raysl-of-something-else").exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        shutil.rmtree(root)


@pytest.mark.ray
def test_the_agent_takes_any_free_port_and_does_not_wait_for_that_of_another_ray(ray_session: None) -> None:
    import psutil

    # The agent itself replaces its arguments by a name, so those that Ray's daemon starts it with are looked at.
    words = [word for child in psutil.Process().children(recursive=True) for word in child.cmdline()]
    commands = [word for word in words if word.startswith("--dashboard_agent_command=")]
    assert commands
    assert all(" --listen-port=0 " in command for command in commands)
