"""Who gets which CPUs and GPUs.

Placement is computed once, from what the cluster has and what its autoscaler could still start, so that trainers and
data tasks can always run at the same time. Ray would otherwise wait for ever, in silence, for a CPU that the trainers
hold.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from raysl.errors import UserError
from raysl.ray_cluster import autoscaler
from raysl.ray_cluster.autoscaler import Node
from raysl.stream.reader import DataShare

# A trainer and its data tasks need this many CPUs to keep out of each other's way.
_ROOMY_CPUS = 2.0


@dataclass(frozen=True)
class Machines:
    """The machines of a cluster.

    Args:
        now: {"CPU": n, "GPU": n, "memory": bytes} of each that is there.
        later: of those that its autoscaler could start, in the order in which it prefers them.
        room: how many of those at a time.
    """

    now: tuple[Node, ...]
    later: tuple[Node, ...] = ()
    room: int = 0

    @property
    def has_gpus(self) -> bool:
        """Whether any machine has GPUs, or would have."""
        return any(node.get("GPU") for node in (*self.now, *self.later))

    def for_trainers(self) -> tuple[Node, ...]:
        """Those that could be started for trainers: with GPUs, if there are any."""
        return tuple(node for node in self.later if node.get("GPU") or not self.has_gpus)[: self.room]

    @property
    def for_work(self) -> tuple[Node, ...]:
        """Those that are there; if none of them takes work, and one can be started, that one, without a GPU if it can
        be."""
        if self.later and self.room and not any(node.get("CPU", 0) for node in self.now):
            return (*self.now, min(self.later, key=lambda node: node.get("GPU", 0)))
        return self.now

    def totals(self) -> dict[str, float]:
        """CPUs and GPUs that `for_work` have together; where some have GPUs, only of those."""
        nodes = self.for_work
        nodes = tuple(node for node in nodes if node.get("GPU")) or nodes
        return {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}


def machines() -> Machines:
    """Those of the cluster that was joined or started."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    grows = autoscaler.growth()
    now = tuple(dict(node["Resources"]) for node in alive)
    if grows is None:
        return Machines(now)
    later, room = grows.beyond([autoscaler.type_of(node) for node in alive])
    return Machines(now, tuple(one.resources for one in later), room)


def assigned_cpus() -> int:
    """How many whole CPUs Ray has given this task or actor, at least one; one outside of them."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return 1
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


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

        free, there = ray.available_resources(), ray.cluster_resources()
        # GPUs first: they come with CPUs.
        for kind, amount in sorted(self.resources().items(), reverse=True):
            wanted, has = amount * workers, there.get(kind, 0.0)
            if wanted > has:
                return (
                    f"Waiting for {wanted:g} {kind}s: the cluster has {has:g} now and starts machines for the rest, "
                    "which takes minutes. `ray status` on its head says how far it is."
                )
            if wanted > free.get(kind, 0.0):
                return (
                    f"Waiting for {wanted:g} {kind}s: others use the cluster, and {free.get(kind, 0.0):g} of its "
                    f"{has:g} are free."
                )
        return ""


def place(
    workers: int,
    found: Machines | None = None,
    gpus_per_worker: float = 1,
) -> Placement:
    """Divides the cluster among `workers` trainers and their data tasks.

    Each trainer gets an equal slot of CPUs that lies on one machine, and leaves a part of it to data tasks. With GPUs
    it takes one GPU and one CPU. Without, the arithmetic needs the CPUs most: it takes three quarters of a slot of
    four or more, else half. CPUs outside the slots go to data tasks.

    A cluster that grows is divided as it will be with the fewest more machines that the workers need. If any of its
    machines has GPUs, trainers wait for those.

    Args:
        workers: number of trainers.
        found: the machines; by default those that the cluster has now, and could start.
        gpus_per_worker: below 1, several small trainers share a GPU, where there are GPUs.

    Raises:
        UserError: the cluster can never run so many workers.
    """
    found = found or machines()
    gpus_per_worker = gpus_per_worker if found.has_gpus else 0
    nodes = enough(workers, found, gpus_per_worker)
    cpus_n, most_n = _room(workers, nodes, gpus_per_worker)
    sizes = {cpus / k for cpus in cpus_n for k in range(1, workers + 1)} | {0.25}
    slot = max(size for size in sizes if size > 0 and _slots(cpus_n, most_n, size) >= workers)
    trainer = _floor(slot / 2) if slot < 2 else 1.0
    if not gpus_per_worker and slot >= 4:
        trainer = float(int(0.75 * slot))
    share = DataShare(min(1.0, trainer), (sum(cpus_n) - trainer * workers) / workers)
    threads = 1 if gpus_per_worker else max(1, round(slot))
    return Placement(trainer, gpus_per_worker, share, threads)


def usual_workers(found: Machines | None = None) -> int:
    """Two trainers, or one where there is one GPU."""
    found = found or machines()
    if not found.has_gpus:
        return 2
    gpus = sum(int(node.get("GPU", 0)) for node in (*found.now, *found.for_trainers()))
    return max(1, min(2, gpus))


def enough(workers: int, found: Machines, gpus_per_worker: float) -> tuple[Node, ...]:
    """The machines that are there and the fewest more that give every worker room.

    Raises:
        UserError: there is not enough room even with all of them.
    """
    grown = (*found.now, *found.for_trainers())
    cpus_n, most_n = _room(workers, grown, gpus_per_worker)
    could = "could have" if len(grown) > len(found.now) else "has"
    if gpus_per_worker and sum(most_n) < workers:
        gpus = sum(int(node.get("GPU", 0)) for node in grown)
        raise UserError(
            f"{workers} workers need {workers * gpus_per_worker:g} GPUs and the cluster {could} {gpus}. "
            + (
                f"Use --workers {sum(most_n)}, or a larger cluster."
                if sum(most_n)
                else "Use a larger cluster."
            )
        )
    # Four trainers can share one core, slowly; more would only wait for each other.
    fit = _slots(cpus_n, most_n, 0.25)
    if fit < workers:
        raise UserError(
            f"{workers} workers and their data tasks can never run on the {sum(cpus_n):g} CPUs that this cluster "
            f"{could}: it can take {fit}. Use fewer workers, or a larger cluster."
        )
    slot = _ROOMY_CPUS if _slots(cpus_n, most_n, _ROOMY_CPUS) >= workers else 0.25
    counts = range(len(found.now), len(grown))
    few = bisect.bisect_left(counts, workers, key=lambda n: _slots(cpus_n[:n], most_n[:n], slot))
    return grown[: len(found.now) + few]


def _room(workers: int, nodes: Sequence[Node], gpus_per_worker: float) -> tuple[list[float], list[int]]:
    """The CPUs of each machine, and how many trainers its GPUs can take."""
    cpus_n = [node.get("CPU", 0.0) for node in nodes]
    if not gpus_per_worker:
        return cpus_n, [workers] * len(cpus_n)
    return cpus_n, [int(node.get("GPU", 0) / gpus_per_worker + 1e-6) for node in nodes]


def _slots(cpus_n: Sequence[float], most_n: Sequence[int], slot: float) -> int:
    """How many slots of so many CPUs lie on the machines, at most `most_n` on each."""
    # A machine divided by three has room for three, whatever the last bit of the quotient says.
    return sum(min(most, int(cpus / slot + 1e-6)) for cpus, most in zip(cpus_n, most_n, strict=True))


def _floor(share: float) -> float:
    """Rounds down to a thousandth; Ray counts in ten-thousandths."""
    return int(share * 1000) / 1000
