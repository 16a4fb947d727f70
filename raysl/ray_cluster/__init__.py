"""Start or join Ray, and compare the code and packages of the machines of a cluster."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from raysl import console, plugins
from raysl.errors import UserError
from raysl.ray_cluster import autoscaler, local_ray, versions

_log = logging.getLogger("raysl.ray_cluster")

# Set before Ray starts, unless the user has set them. Ray's defaults suit other work: the Parquet reader that starts
# 32 actors is not used here, and lines printed by trainers would appear twice.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray Data announces every execution, and prints a traceback of its own before it raises an error.
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # At Ray's default priority, other programs on the machine would starve the workers.
    "RAY_worker_niceness": "0",
}
# On an autoscaling cluster, a worker group waits for machines to boot and to load an image of some gigabytes.
_GROWING = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200"}
# Time for a machine to report its versions.
_ANSWER_S = 60.0
# Time for the address of a cluster to accept a connection.
_JOIN_WITHIN_S = 30.0
T = TypeVar("T")


def start(compare: bool = True) -> None:
    """Join the cluster named by RAY_ADDRESS or launched on this machine by `ray up`; otherwise start Ray here.

    A Ray that is started here belongs to this process alone; see `local_ray.start`. SIGTERM then interrupts this
    process as Ctrl-C does, unless the program has a handler of its own.

    Args:
        compare: require that the machines of the cluster run the same code and packages as this process.

    Raises:
        UserError: Ray cannot be joined or started, the cluster has no token, or its machines run other code or
            packages.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or ("auto" if autoscaler.launched_here() else "")
    if address == "local":
        address = ""
    scaling = _GROWING if address and autoscaler.capacity() is not None else {}
    log_to_driver = os.environ.get("RAYSL_LOG_TO_DRIVER") == "1"
    levels = {"RAY_DATA_LOG_LEVEL": "ERROR"} if log_to_driver else {}
    for name, value in {**_ENVIRONMENT, **scaling, **levels}.items():
        os.environ.setdefault(name, value)
    # Ray Data reads the variable when it is imported, which may have been before.
    logging.getLogger("ray.data").setLevel(os.environ.get("RAY_DATA_LOG_LEVEL", "CRITICAL"))
    if address:
        _require_token(address)
    logs: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log_to_driver}
    try:
        with console.working("Starting Ray ..."), _sigterm_interrupts():
            if address:
                _require_reachable(address)
                ray.init(address=address, runtime_env=_runtime_env(), **logs)
            else:
                local_ray.start(**logs)
    except UserError:
        raise
    except Exception as error:  # Ray raises errors of many kinds
        doing, advice = "start Ray on this machine", "It may be too busy, or lack memory: try again."
        if address:
            doing = f"join the Ray cluster at {address!r}"
            advice = "Correct RAY_ADDRESS, or unset it to stay on this machine."
        raise UserError(f"Cannot {doing}: {' '.join(str(error).split())} {advice}") from error
    if address and compare:
        _require_same_versions()


def start_coordinator() -> None:
    """Start the actor that Ray Train and Ray Data ask for resources; do not wait for it.

    Without this, Ray Train starts it when it needs it, and the first step waits a second for its process.
    """
    with suppress(Exception):  # A private function of Ray, which only saves time.
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

        get_or_create_autoscaling_coordinator()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM interrupt this process as Ctrl-C does, or call the program's own handler, from the start of Ray on.

    Ray would end the process without a message while it starts; once started, it would print a C++ trace and abort. If
    the start fails, the previous handler is restored.
    """
    from unittest.mock import patch

    import ray

    before = signal.getsignal(signal.SIGTERM)
    # Handlers belong to the main thread; None is a handler of a program in C.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    own = signal.default_int_handler if before == signal.SIG_DFL else before
    signal.signal(signal.SIGTERM, own)
    try:
        with patch.object(ray._private.utils, "set_sigterm_handler", lambda handler: None):
            yield
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    signal.signal(signal.SIGTERM, own)


def _require_token(address: str) -> None:
    """Raise UserError if a cluster would be joined without a token, unless RAY_AUTH_MODE=disabled asks for it."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    mode = os.environ.get("RAY_AUTH_MODE")
    if mode and mode.lower() == "disabled":
        _log.warning(
            "Joining the Ray cluster at %r without a token (RAY_AUTH_MODE=disabled). Everybody who can reach it can "
            "run programs on its machines.",
            address,
        )
        return
    # Where no mode is set, Ray itself uses a token that it finds.
    uses = mode is None or mode.lower() == "token"
    if not (uses and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)):
        raise UserError(
            f"Cannot join the Ray cluster at {address!r} with "
            f"{'no token' if uses else f'RAY_AUTH_MODE={mode}'}: everybody who can reach a cluster without a token can "
            "run programs on its machines. Make a token with `ray get-auth-token --generate`, copy ~/.ray/auth_token "
            "to all machines, and set RAY_AUTH_MODE=token on all; or set RAY_AUTH_MODE=disabled, behind a firewall."
        )


def _require_reachable(address: str) -> None:
    """Raise UserError if nothing answers at `address`. Ray itself would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    deadline = time.monotonic() + _JOIN_WITHIN_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Cannot join the Ray cluster at {address!r}: nothing answered for {_JOIN_WITHIN_S:.0f} s "
                    f"({error}). Correct RAY_ADDRESS, or unset it to stay on this machine."
                ) from error
            time.sleep(1)


def _runtime_env() -> dict[str, Any]:
    """Return the environment of worker processes, also on machines that start later."""
    variables = {
        name: os.environ[name] for name in _ENVIRONMENT if name.startswith(("RAY_DATA_", "RAY_TRAIN_"))
    }
    if plugins.TRUSTED_VARIABLE in os.environ:
        variables[plugins.TRUSTED_VARIABLE] = os.environ[plugins.TRUSTED_VARIABLE]
    return {
        "env_vars": {**variables, versions.WANTED: json.dumps(versions.versions())},
        "worker_process_setup_hook": "raysl.ray_cluster.versions.check",
    }


def _require_same_versions() -> None:
    """Raise UserError if machines run other code or packages. `versions.check` finds machines that start later."""
    import ray

    here = versions.versions()
    stale = [
        f"{name} has {', '.join(found)}"
        for name, theirs in machine_versions().items()
        if (found := versions.differing(here, theirs) if theirs else ["no raysl that starts"])
    ]
    if stale:
        ray.shutdown()
        raise UserError(
            f"Machines of the cluster run other code or packages than this driver: {'; '.join(stale)}. "
            f"{versions.REMEDY}"
        )


def machine_versions() -> dict[str, dict[str, Any]]:
    """Return the versions on each machine by address; {} for a machine without raysl or without an answer."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    # The tasks only report their versions; this process compares them.
    found = ask(nodes, versions.versions, _ANSWER_S, runtime_env={"env_vars": {versions.WANTED: ""}})
    # A machine that has left in the meantime cannot answer.
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {
        node["NodeManagerAddress"]: found.get(node["NodeID"], {})
        for node in nodes
        if node["NodeID"] in found or node["NodeID"] in alive
    }


def ask(
    nodes: Sequence[Mapping[str, Any]], question: Callable[[], T], within_s: float, **options: Any
) -> dict[str, T]:
    """Run a function on machines, without taking CPUs or GPUs, and return the answers in time by the machine's id.

    Args:
        nodes: entries of `ray.nodes()`.
        options: further options of the tasks.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0, **options)(question)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False)
        ).remote(): machine
        for machine in (node["NodeID"] for node in nodes)
    }
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=within_s) if asked else ([], [])
    found = {}
    for answer in done:
        # The machine has left in the meantime, or the function fails there.
        with suppress(ray.exceptions.RayError):
            found[asked[answer]] = ray.get(answer)
    return found


# Ray Data adds to an error how often it tried, and its own settings for more tries.
_OF_RAY_DATA = "\nFailed to apply UDF transform after "


def user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError inside an error that came through Ray, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            inner = getattr(error, "cause", error)
            text, addition, _ = str(inner).partition(_OF_RAY_DATA)
            return inner if isinstance(inner, UserError) and not addition else UserError(text)
        # Ray keeps only the text of an error from a process that refused to start.
        if refused := re.search(r"^raysl\.errors\.UserError: (.+)$", str(error), re.MULTILINE):
            return UserError(refused[1])
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__ or error.__context__
    return None
