"""Check that torch can use the GPUs that Ray hands out."""

from __future__ import annotations

import logging
import subprocess

from raysl.errors import UserError

_log = logging.getLogger("raysl.ray_cluster")


def check(gpus_per_worker: float, precision: str) -> None:
    """Raise UserError if torch cannot use CUDA on a machine where Ray gives a worker a GPU.

    Ray counts devices without asking torch. Without this check the workers would be restarted again and again, or
    would compute on the CPU.
    """
    import ray

    # Inside a trial of Ray Tune, a task without a strategy would ask the trial's placement group for the GPU.
    look = ray.remote(num_cpus=0, num_gpus=gpus_per_worker, max_retries=0, scheduling_strategy="DEFAULT")(
        lambda: (problem(), without_bf16())
    )
    found, slow = ray.get(look.remote())
    if found:
        raise UserError(found)
    if slow and precision == "bf16":
        _log.warning(
            "%s has no bf16 arithmetic and emulates it slowly; --precision fp16 is faster in a new run.", slow
        )


def problem() -> str:
    """Return why torch cannot use the GPU of this process, in a sentence; "" if it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"Ray gives a worker a GPU, but torch {torch.__version__}, built {built}, cannot use it (NVIDIA driver: "
        f"{driver()}). Install a driver or a torch that match (CUDA 13 needs driver 580 or newer), or start Ray "
        "with --num-gpus 0 to train on CPUs."
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
