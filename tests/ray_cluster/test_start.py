"""What starting Ray does to the process that starts it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from raysl import ray_cluster
from raysl.errors import UserError, exit_on_errors


@pytest.mark.ray
def test_sigterm_puts_away_and_leaves_a_line() -> None:
    program = """
        import os, signal
        from raysl import ray_cluster
        from raysl.errors import exit_on_errors

        with exit_on_errors("experiment"):
            ray_cluster.start()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.sigtimedwait([], 30)
            finally:
                print("put away")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "put away\n"
    assert done.stderr.split("\n") == [
        "",
        "experiment: Interrupted by SIGTERM. The same command resumes the work.",
        "",
    ]
    assert done.returncode == 143


@pytest.mark.ray
def test_sigterm_while_ray_starts_leaves_a_line_and_no_process() -> None:
    program = """
        import os, signal
        from ray._private.node import Node
        from raysl import ray_cluster
        from raysl.errors import exit_on_errors

        whole = Node.start_ray_processes

        def started(node):
            whole(node)
            print(*[process.process.pid for processes in node.all_processes.values() for process in processes])
            os.kill(os.getpid(), signal.SIGTERM)

        Node.start_ray_processes = started
        with exit_on_errors("experiment"):
            ray_cluster.start()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.strip()) == (
        143,
        "experiment: Interrupted by SIGTERM. The same command resumes the work.",
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) > 3
    left = [process for process in psutil.process_iter() if process.pid in pids]
    psutil.wait_procs(left, timeout=20)
    assert not [process for process in left if process.is_running() and process.status() != "zombie"]


def test_a_lost_process_of_ray_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from ray.exceptions import ActorDiedError

    with pytest.raises(SystemExit) as left, exit_on_errors("raysl"):
        raise ActorDiedError()
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("raysl: A process of Ray was lost. The actor died")
    assert said.endswith("The same command resumes the work.\n")


def test_an_error_that_would_repeat_keeps_its_traceback() -> None:
    from ray.exceptions import ActorDiedError, RaySystemError

    unpickled = RaySystemError(ImportError("no module"))
    begun = ActorDiedError()
    begun.error_msg = "The actor died because of an error raised in its creation task, ValueError: bad"
    for error in (unpickled, begun):
        with pytest.raises(type(error)), exit_on_errors("raysl"):
            raise error


@pytest.mark.parametrize("mode", [None, "token", "tokken"])
def test_a_cluster_is_not_joined_without_a_token(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    with _no_token(monkeypatch, mode), pytest.raises(UserError, match=r"10\.0\.0\.1.*get-auth-token"):
        ray_cluster.start()


def test_a_cluster_without_a_token_is_joined_if_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _no_token(monkeypatch, "disabled"), pytest.raises(UserError, match="no answer"):
        ray_cluster.start()
    assert "without a token" in caplog.text


@contextmanager
def _no_token(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> Iterator[None]:
    """RAY_ADDRESS names a cluster that does not answer, and this user has no token."""

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no answer.")

    class Loader:
        @staticmethod
        def instance() -> Loader:
            return Loader()

        def has_token(self, ignore_auth_mode: bool) -> bool:
            return False

    with monkeypatch.context() as patch:
        patch.setattr("ray.is_initialized", lambda: False)
        patch.setattr(ray_cluster, "_require_reachable", fails)
        patch.setattr("ray._raylet.AuthenticationTokenLoader", Loader)
        patch.setattr(ray_cluster, "_ENVIRONMENT", {})
        patch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        if mode is None:
            patch.delenv("RAY_AUTH_MODE", raising=False)
        else:
            patch.setenv("RAY_AUTH_MODE", mode)
        yield
