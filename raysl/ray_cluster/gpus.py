"""Check that torch can use the GPUs that Ray hands out."""

from __future__ import annotations

import subprocess

from raysl.errors import UserError


def check(gpus_per_worker: float) -> None:
    """Raise UserError if torch cannot use CUDA on a machine where Ray gives a worker a GPU.

    Ray counts devices without asking torch. Without this check the workers would be restarted again and again, or
    would compute on the CPU.
    """
    import ray

    if found := ray.get(ray.remote(num_cpus=0, num_gpus=gpus_per_worker, max_retries=0)(problem).remote()):
        raise UserError(found)


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


def driver() -> str:
    """Return the version of the NVIDIA driver of this machine, or "none found"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "none found"
