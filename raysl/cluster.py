"""The cluster: starting or joining Ray, and who gets which CPUs and GPUs.

Placement is computed once, from what the cluster has, so that trainers and data tasks can always run at the same
time. Ray would otherwise wait for ever, in silence, for a CPU that the trainers hold.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from raysl.errors import UserError
from raysl.stream.reader import DataShare

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


def start() -> None:
    """Joins the cluster that RAY_ADDRESS names, or the one this process runs on; else starts Ray on this machine."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address=address or "local",
        logging_level=logging.ERROR,
        log_to_driver=os.environ.get("RAYSL_LOG_TO_DRIVER") == "1",
        include_dashboard=None if address else False,
    )


@dataclass(frozen=True)
class Placement:
    """Who gets what.

    Args:
        cpus_per_worker: logical CPUs of a trainer.
        gpus_per_worker: GPUs of a trainer.
        share: the data tasks of one trainer.
        threads_per_worker: CPU threads of a trainer's arithmetic.
    """

    cpus_per_worker: float
    gpus_per_worker: float
    share: DataShare
    threads_per_worker: int

    def resources(self) -> dict[str, float]:
        """What Ray Train is asked for, for each worker."""
        resources = {"CPU": self.cpus_per_worker}
        return {**resources, "GPU": self.gpus_per_worker} if self.gpus_per_worker else resources


def place(workers: int, resources: dict[str, Any] | None = None) -> Placement:
    """Divides the cluster among `workers` trainers and their data tasks.

    With GPUs, a trainer gets one GPU and one CPU, and the data tasks all other CPUs. Without, the arithmetic needs
    the CPUs most: three quarters of them go to the trainers, but never all.

    Args:
        workers: number of trainers.
        resources: {"CPU": n, "GPU": n}; by default what the cluster has now.

    Raises:
        UserError: the cluster can never run so many workers.
    """
    if resources is None:
        import ray

        resources = ray.cluster_resources()
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if gpus and workers > gpus:
        raise UserError(
            f"{workers} workers need {workers} GPUs and the cluster has {gpus}. Use --workers {gpus}, or a larger "
            "cluster."
        )
    # On CPUs four trainers can share one core, slowly; more would only wait for each other.
    if workers > cpus * 4 or (gpus and cpus < workers + 1):
        most = int(min(cpus * 4, cpus - 1)) if gpus else int(cpus * 4)
        raise UserError(
            f"{workers} workers and their data tasks can never run on the {cpus:g} CPUs of this cluster: it can take "
            f"{max(most, 0)}. Use fewer workers, or a larger cluster."
        )
    if gpus:
        per_task = 1.0 if (cpus - workers) / workers >= 1 else _floor((cpus - workers) / workers)
        return Placement(1, 1, DataShare(per_task, (cpus - workers) / workers), 1)
    trainer = 0.75 * cpus / workers if cpus >= 4 * workers else 0.5 * cpus / workers
    trainer = float(int(trainer)) if trainer >= 1 else _floor(trainer)
    left = (cpus - trainer * workers) / workers
    return Placement(trainer, 0, DataShare(min(1.0, _floor(left)), left), max(1, round(cpus / workers)))


def _floor(share: float) -> float:
    """Rounds down to Ray's resolution, a ten-thousandth."""
    return int(share * 1000) / 1000


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside an error that came through Ray, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError):
            return UserError(str(getattr(error, "cause", error)))
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__ or error.__context__
    return None
