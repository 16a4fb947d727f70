"""The cluster: starting or joining Ray, and comparing what its machines run."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
from typing import Any

from raysl.errors import UserError
from raysl.ray_cluster import autoscaler, local_ray, versions

# Set before Ray starts, where the user has not set them. Ray's own defaults are for other work: the Parquet reader
# that starts 32 actors is not used here, and lines printed by trainers would appear twice.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Workers of one machine share its cores with the trainers; at Ray's default priority other programs starve them.
    "RAY_worker_niceness": "0",
}
# Of a group of trainers, on a cluster that grows: machines are asked for, booted, and load an image of some gigabytes.
_GROWING = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200"}
# For a machine to say what it runs.
_ANSWER_S = 60.0


def start(compare: bool = True) -> None:
    """Joins the cluster that RAY_ADDRESS names, or that `ray up` has launched on this machine; else starts Ray here,
    for this process alone (see `alone.begin`). From then on SIGTERM interrupts this process as Ctrl-C does.

    Args:
        compare: whether the machines of a cluster must run what this process runs.

    Raises:
        UserError: Ray cannot be joined or started, the cluster is joined without a token, or machines of the cluster
            run other code or packages.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or ("auto" if autoscaler.launched_here() else "")
    if address == "local":
        address = ""
    grows = _GROWING if address and autoscaler.growth() is not None else {}
    for name, value in {**_ENVIRONMENT, **grows}.items():
        os.environ.setdefault(name, value)
    if address:
        _require_token(address)
    # Ray Data announces every execution; raysl shows its own progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logs: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": os.environ.get("RAYSL_LOG_TO_DRIVER") == "1",
    }
    try:
        if address:
            ray.init(address=address, runtime_env=_runtime_env(), **logs)
        else:
            local_ray.begin(**logs)
    except UserError:
        raise
    except Exception as error:  # Ray raises plain ones
        doing, mend = "start Ray on this machine", "It may be too busy, or lack memory: try again."
        if address:
            doing, mend = (
                f"join the Ray cluster at {address!r}",
                "Mend RAY_ADDRESS, or unset it to stay on this machine.",
            )
        raise UserError(f"Cannot {doing}: {' '.join(str(error).split())} {mend}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler prints a trace of C++ and aborts, and nothing is put away.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if address and compare:
        _compare()


def _require_token(address: str) -> None:
    """Refuses to join a cluster without a token, since others could do so too, unless the user has said to."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    mode = os.environ.get("RAY_AUTH_MODE")
    if mode and mode.lower() == "disabled":
        print(
            f"raysl: the Ray cluster at {address!r} is joined without a token (RAY_AUTH_MODE=disabled): who can reach it "
            "can run programs on its machines.",
            file=sys.stderr,
        )
        return
    # Where no mode is set, Ray itself uses a token that it finds.
    uses = mode is None or mode.lower() == "token"
    if not (uses and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)):
        raise UserError(
            f"Cannot join the Ray cluster at {address!r} with "
            f"{'no token' if uses else f'RAY_AUTH_MODE={mode}'}: who can reach a cluster without one can run programs "
            "on its machines. Make a token with `ray get-auth-token --generate`, copy ~/.ray/auth_token to all machines, "
            "and set RAY_AUTH_MODE=token on all; or set RAY_AUTH_MODE=disabled, behind a firewall."
        )


def _runtime_env() -> dict[str, Any]:
    """What worker processes on all machines are told, those of machines that are started later too."""
    told = {name: os.environ[name] for name in _ENVIRONMENT if name.startswith(("RAY_DATA_", "RAY_TRAIN_"))}
    return {
        "env_vars": {**told, versions.WANTED: json.dumps(versions.versions())},
        "worker_process_setup_hook": "raysl.ray_cluster.versions.check",
    }


def _compare() -> None:
    """Refuses a cluster of which machines run something else. Those that come later are found by `versions.check`."""
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
            f"Machines of the cluster do not run what this driver runs: {'; '.join(stale)}. {versions.MEND}"
        )


def machine_versions() -> dict[str, dict[str, Any]]:
    """What each machine of the cluster runs, by its address; {} of one that has no raysl, or does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(versions.versions)
    # They say what they have, and are compared here.
    uncompared = {"env_vars": {versions.WANTED: ""}}
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = task.options(
                num_cpus=0, max_retries=0, runtime_env=uncompared, scheduling_strategy=there
            ).remote()
            asked[answer] = node["NodeID"], node["NodeManagerAddress"]
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    found: dict[tuple[str, str], dict[str, Any]] = {machine: {} for machine in asked.values()}
    for answer in done:
        try:
            found[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayError:
            continue
    # One that went meanwhile owes no answer.
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {address: theirs for (machine, address), theirs in found.items() if theirs or machine in alive}


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside an error that came through Ray, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return UserError(str(getattr(error, "cause", error)))
        # Of a process that refused to start, Ray keeps the text alone.
        if refused := re.search(r"^raysl\.errors\.UserError: (.+)$", str(error), re.MULTILINE):
            return UserError(refused[1])
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__ or error.__context__
    return None
