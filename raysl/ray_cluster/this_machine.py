"""Read what this machine has, and decide whether a command needs Ray or can work in the calling process."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from raysl.ray_cluster import autoscaler, local_ray

# Largest number of CPUs of a machine on which one process works alone by default. Measured on two CPUs, where one
# process trains as fast as two workers on Ray; with many more, several workers share the CPUs better.
MOST_CPUS_ALONE = 8
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def needs_ray() -> bool:
    """Return True if commands should run on Ray even if one process of this machine could do their work.

    This holds if RAY_ADDRESS is set (RAY_ADDRESS=local starts a Ray here), if `ray up` launched this machine, inside of
    Ray's own workers, if the program itself has started Ray, and on a machine with a GPU or more than 8 CPUs. A Ray
    that raysl has started on this machine, for example to ingest images, is no reason.
    """
    ray = sys.modules.get("ray")
    theirs = ray is not None and ray.is_initialized() and local_ray.folder() is None
    if theirs or os.environ.get("RAY_ADDRESS") or autoscaler.launched_here() or cpus() > MOST_CPUS_ALONE:
        return True
    import torch

    return torch.cuda.is_available()


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    found = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # No limit, or "max".
        quota, period = map(int, _CPU_LIMIT.read_text().split())
        found = min(found, max(1, quota // period))
    return found
