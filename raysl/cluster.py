"""The cluster: starting or joining Ray, and who gets which CPUs and GPUs.

Placement is computed once, from what the cluster has, so that trainers and data tasks can always run at the same
time. Ray would otherwise wait for ever, in silence, for a CPU that the trainers hold.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """Joins the cluster that RAY_ADDRESS names; else starts Ray on this machine, for this process alone.

    Raises:
        UserError: Ray cannot be joined or started.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray Data announces every execution; raysl shows its own progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=os.environ.get("RAYSL_LOG_TO_DRIVER") == "1",
            include_dashboard=None if address else False,
        )
    except Exception as error:  # Ray raises plain ones
        doing, mend = "start Ray on this machine", "It may be too busy, or lack memory: try again."
        if address:
            doing, mend = (
                f"join the Ray cluster at {address!r}",
                "Mend RAY_ADDRESS, or unset it to stay on this machine.",
            )
        raise UserError(f"Cannot {doing}: {' '.join(str(error).split())} {mend}") from error


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

    def busy(self, workers: int) -> str:
        """What `workers` trainers would wait for now, in a sentence; "" when they can start."""
        import ray

        free = ray.available_resources()
        for kind, amount in self.resources().items():
            if amount * workers > free.get(kind, 0.0):
                return (
                    f"Waiting for {amount * workers:g} {kind}s: others use the cluster, and {free.get(kind, 0.0):g} of "
                    f"its {ray.cluster_resources()[kind]:g} are free."
                )
        return ""


def place(
    workers: int, nodes: Sequence[Mapping[str, float]] | None = None, gpus_per_worker: float = 1
) -> Placement:
    """Divides the cluster among `workers` trainers and their data tasks.

    Each trainer gets an equal slot of CPUs that lies on one machine, and leaves a part of it to data tasks. With GPUs
    it takes one GPU and one CPU. Without, the arithmetic needs the CPUs most: it takes three quarters of a slot of
    four or more, else half. CPUs outside the slots go to data tasks.

    Args:
        workers: number of trainers.
        nodes: {"CPU": n, "GPU": n} of each machine; by default those that the cluster has now.
        gpus_per_worker: below 1, several small trainers share a GPU, where there are GPUs.

    Raises:
        UserError: the cluster can never run so many workers.
    """
    if nodes is None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus_n = [node.get("CPU", 0.0) for node in nodes]
    # Trainers that the GPUs of each machine can take.
    gpus_n = [int(node.get("GPU", 0) / gpus_per_worker + 1e-6) for node in nodes]
    if 0 < sum(gpus_n) < workers:
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        raise UserError(
            f"{workers} workers need {workers * gpus_per_worker:g} GPUs and the cluster has {gpus}. Use --workers "
            f"{sum(gpus_n)}, or a larger cluster."
        )
    most_n = gpus_n if any(gpus_n) else [workers] * len(cpus_n)
    # Four trainers can share one core, slowly; more would only wait for each other.
    fit = _slots(cpus_n, most_n, 0.25)
    if fit < workers:
        raise UserError(
            f"{workers} workers and their data tasks can never run on the {sum(cpus_n):g} CPUs of this cluster: it "
            f"can take {fit}. Use fewer workers, or a larger cluster."
        )
    sizes = {cpus / k for cpus in cpus_n for k in range(1, workers + 1)} | {0.25}
    slot = max(size for size in sizes if size > 0 and _slots(cpus_n, most_n, size) >= workers)
    trainer = _floor(slot / 2) if slot < 2 else 1.0
    if not any(gpus_n) and slot >= 4:
        trainer = float(int(0.75 * slot))
    share = DataShare(min(1.0, trainer), (sum(cpus_n) - trainer * workers) / workers)
    threads = 1 if any(gpus_n) else max(1, round(slot))
    return Placement(trainer, gpus_per_worker if any(gpus_n) else 0, share, threads)


def _slots(cpus_n: Sequence[float], most_n: Sequence[int], slot: float) -> int:
    """How many slots of so many CPUs lie on the machines, at most `most_n` on each."""
    # A machine divided by three has room for three, whatever the last bit of the quotient says.
    return sum(min(most, int(cpus / slot + 1e-6)) for cpus, most in zip(cpus_n, most_n, strict=True))


def _floor(share: float) -> float:
    """Rounds down to a thousandth; Ray counts in ten-thousandths."""
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
