"""A Ray that raysl starts can be reached by this user's processes alone."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from raysl.errors import UserError
from raysl.ray_cluster import local_ray

# Trains two workers; meanwhile a thread collects every listening socket of this process and its descendants.
PROGRAM = """
    import os, sys, threading
    from pathlib import Path

    import psutil
    import ray

    from raysl import ray_cluster
    from raysl.config import Pretraining, ViewConfig
    from raysl.ingestion import ingest
    from raysl.training.launch import pretrain

    folder = sys.argv[1]
    ray_cluster.start()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    print("token", oct(token.stat().st_mode & 0o777), oct(token.parent.stat().st_mode & 0o777), token)
    ingest("shapes:64", f"{folder}/data")
    done, found = threading.Event(), set()

    def look():
        while not done.wait(0.5):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    sockets = process.net_connections(kind="inet")
                except psutil.Error:
                    continue
                found.update((s.laddr.ip, s.laddr.port) for s in sockets if s.status == "LISTEN")

    thread = threading.Thread(target=look)
    thread.start()
    parts = {"pirl": {"num_negatives": 16}}
    view = ViewConfig(image_size=16)
    pretrain(Pretraining(f"{folder}/data", f"{folder}/run", epochs=2, batch_size=32, view=view, parts=parts))
    done.set()
    thread.join()
    for ip, port in found:
        print("listens", ip, port)
    print("gcs", ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
    ray.shutdown()
    print("folder", token.parent, flush=True)
"""
# The first request of a client. `ray.init` would repeat it for minutes.
ASK = (
    "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', timeout=10)"
)


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
def test_a_run_listens_on_loopback_and_asks_for_a_token(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    running = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert running.stdout is not None
    try:
        lines: list[list[str]] = []
        while not lines or lines[-1][0] != "gcs":
            line = running.stdout.readline()
            assert line, "the run ended early"
            lines.append(line.split())
        said = {words[0]: words[1:] for words in lines}
        assert said["token"][:2] == ["0o600", "0o700"]
        sockets = [
            (ipaddress.ip_address(words[1]), int(words[2])) for words in lines if words[0] == "listens"
        ]
        assert len(sockets) > 10
        open_to_others = [(str(ip), port) for ip, port in sockets if not _loopback(ip)]
        assert not open_to_others
        # The ports of the dashboard and of the client server.
        assert not {8265, 10001} & {port for _, port in sockets}

        secret = Path(said["token"][2]).read_text()
        gcs = said["gcs"][0]
        clients = [
            {**environment, "RAY_AUTH_MODE": "disabled"},
            {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret},
        ]
        with ThreadPoolExecutor(len(clients)) as pool:
            assert list(pool.map(partial(_answered, gcs), clients)) == [False, False, True]
        logs = Path(said["token"][2]).parent.rglob("*.*")
        assert not [log for log in logs if log.is_file() and secret in log.read_text(errors="replace")]
        out, _ = running.communicate("\n", timeout=60)
        folder = out.split()[-1]
        assert not Path(folder).exists()
    finally:
        running.kill()
        running.wait()


def _answered(address: str, environment: dict[str, str]) -> bool:
    """Return True if Ray answers a client with these settings."""
    command = [sys.executable, "-c", ASK, address]
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 0


def _loopback(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


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
