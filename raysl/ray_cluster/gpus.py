"""Check that torch can use the GPUs that Ray hands out, and choose the device of a process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from raysl import ray_cluster
from raysl.errors import UserError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("raysl.ray_cluster")
# Time for the machines to load torch and to answer.
_ANSWER_S = 120.0


def check(gpus_per_worker: float, precision: str) -> None:
    """Raise UserError if torch cannot use CUDA on a machine that has GPUs for Ray.

    Ray counts devices without asking torch. Without this check the workers would be restarted again and again, or
    would compute on the CPU. Machines that start later are not seen, except the first of a cluster without any.
    """
    import ray

    found = check_machines()
    if not found:
        # Inside a trial of Ray Tune, a task without a strategy would ask the trial's placement group for the GPU.
        first = ray.remote(num_cpus=0, num_gpus=gpus_per_worker, max_retries=0, scheduling_strategy="DEFAULT")
        found = {"that started": ray.get(first(_check_this_machine).remote())}
    for machine, (reason, slow_gpu) in found.items():
        if reason:
            raise UserError(f"{reason} This is so on the machine {machine}.")
        if slow_gpu and precision == "bf16":
            _log.warning(
                "%s has no bf16 arithmetic and emulates it slowly; --precision fp16 is faster in a new run.",
                slow_gpu,
            )


def check_machines() -> dict[str, tuple[str, str]]:
    """Return `problem()` and `without_bf16()` of each machine with GPUs, by address; without those that do not answer.

    No GPU is taken, so machines on which others work answer too.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    found = ray_cluster.ask(nodes, _check_this_machine, _ANSWER_S)
    return {node["NodeManagerAddress"]: found[node["NodeID"]] for node in nodes if node["NodeID"] in found}


def _check_this_machine() -> tuple[str, str]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        # With RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1, Ray hides all GPUs from a task that takes none.
        del os.environ["CUDA_VISIBLE_DEVICES"]
    return problem(), without_bf16()


def device() -> torch.device:
    """Return the GPU that Ray has assigned to this task or actor, or one that torch finds outside of Ray; else the CPU.

    Raises:
        UserError: Ray has assigned a GPU that torch cannot use.
    """
    import torch

    ray: Any = sys.modules.get("ray")  # a process that has not imported it runs no task
    in_task = bool(ray) and ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None
    assigned = in_task and bool(ray.get_gpu_ids())
    if assigned and (why := problem()):
        raise UserError(why)
    # Ray does not hide the GPUs of a machine from tasks without one.
    usable = torch.cuda.is_available() and (assigned or not in_task)
    return torch.device("cuda" if usable else "cpu")


def problem() -> str:
    """Return why torch cannot use the GPU of this process, in a sentence; "" if it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"Ray gives a worker a GPU, but torch {torch.__version__}, built {built}, cannot use it (NVIDIA driver: "
        f"{driver()}). Install a driver or a torch that match (CUDA 13 needs driver 580 or newer). To compute on "
        "CPUs, set CUDA_VISIBLE_DEVICES to an empty value, on a cluster before Ray is started there."
    )


def without_bf16() -> str:
    """Return the name of this process's GPU if it is older than bf16 arithmetic (compute capability 8); else ""."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
        return ""
    return torch.cuda.get_device_name()


def driver() -> str:
    """Return the version of the NVIDIA driver of this machine, or "none found"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "none found"
