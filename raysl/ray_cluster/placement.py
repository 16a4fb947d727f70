"""Divide the CPUs and GPUs of a cluster among trainers and data tasks.

Placement is computed once, from the machines of the cluster and those that its autoscaler can start, so that trainers
and data tasks fit at the same time. Otherwise Ray would wait forever for CPUs that the trainers hold.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from raysl.errors import UserError
from raysl.ray_cluster import autoscaler, this_machine
from raysl.ray_cluster.autoscaler import Node
from raysl.stream.reader import DataShare

# A trainer and its data tasks disturb each other on fewer CPUs.
_ROOMY_CPUS = 2.0


@dataclass(frozen=True)
class Machines:
    """The machines of a cluster."""

    now: tuple[Node, ...]  # {"CPU": n, "GPU": n, "memory": bytes} of each running machine
    later: tuple[Node, ...] = ()  # machines that the autoscaler can start, in the order of its preference
    max_new_machines: int = 0  # largest number of them at a time

    @property
    def has_gpus(self) -> bool:
        """True if any running or possible machine has GPUs."""
        return any(node.get("GPU") for node in (*self.now, *self.later))

    def for_trainers(self) -> tuple[Node, ...]:
        """Return the machines that can be started for trainers: with GPUs, if there are any."""
        return tuple(node for node in self.later if node.get("GPU") or not self.has_gpus)[
            : self.max_new_machines
        ]

    @property
    def for_work(self) -> tuple[Node, ...]:
        """The running machines; if none of them takes work, also one that can be started, without a GPU if possible."""
        if self.later and self.max_new_machines and not any(node.get("CPU", 0) for node in self.now):
            return (*self.now, min(self.later, key=lambda node: node.get("GPU", 0)))
        return self.now

    def totals(self) -> dict[str, float]:
        """Return the total CPUs and GPUs of `for_work`; if some machines have GPUs, of these alone."""
        nodes = self.for_work
        nodes = tuple(node for node in nodes if node.get("GPU")) or nodes
        return {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}


def machines() -> Machines:
    """Return the machines of the cluster that Ray is connected to."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    capacity = autoscaler.capacity()
    now = tuple(dict(node["Resources"]) for node in alive)
    if capacity is None:
        return Machines(now)
    later, room = capacity.remaining([autoscaler.type_of(node) for node in alive])
    return Machines(now, tuple(one.resources for one in later), room)


def assigned_cpus() -> int:
    """Return the number of whole CPUs of this Ray task or actor, at least one; outside of tasks, of this process."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return this_machine.cpus()
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


@dataclass(frozen=True)
class Placement:
    """Resources of the trainers and their data tasks."""

    cpus_per_worker: float  # logical CPUs of a trainer
    gpus_per_worker: float  # GPUs of a trainer
    share: DataShare  # CPUs of the data tasks of one trainer
    threads_per_worker: int  # CPU threads of a trainer
    slot: float = 1.0  # CPUs of one machine that are left to a trainer and its data tasks together

    def resources(self) -> dict[str, float]:
        """Return the resources of a worker for Ray Train."""
        resources = {"CPU": self.cpus_per_worker}
        return {**resources, "GPU": self.gpus_per_worker} if self.gpus_per_worker else resources

    def waiting_message(self, workers: int) -> str:
        """Return a sentence about the resources that `workers` trainers must wait for; "" if they can start now."""
        import ray

        free, there = ray.available_resources(), ray.cluster_resources()
        # GPUs first: they come with CPUs.
        for kind, amount in sorted(self.resources().items(), reverse=True):
            wanted, has = amount * workers, there.get(kind, 0.0)
            if wanted > has:
                return (
                    f"Waiting for {wanted:g} {kind}s: the cluster has {has:g} now and starts machines for the rest, "
                    "which takes minutes. `ray status` on its head shows the progress."
                )
            if wanted > free.get(kind, 0.0):
                return (
                    f"Waiting for {wanted:g} {kind}s: other work uses the cluster, and {free.get(kind, 0.0):g} of its "
                    f"{has:g} are free."
                )
        return ""


def make_placement(workers: int, found: Machines | None = None, gpus_per_worker: float = 1) -> Placement:
    """Divide the cluster among `workers` trainers and their data tasks.

    Each trainer gets a slot of CPUs on one machine and leaves a part of it to data tasks. With GPUs it takes one GPU
    and one CPU; without, three quarters of a slot of four or more CPUs, else half. CPUs outside of the slots go to data
    tasks. On an autoscaling cluster, plan for the smallest scale-up that fits. If any machine type has GPUs, trainers
    wait for them.

    Args:
        found: the machines; by default `machines()`.
        gpus_per_worker: GPUs of a trainer if there are GPUs; below 1, several trainers share one.

    Raises:
        UserError: the cluster can never run so many workers.
    """
    found = found or machines()
    gpus_per_worker = gpus_per_worker if found.has_gpus else 0
    nodes = machines_for(workers, found, gpus_per_worker)
    cpus_n, most_n = _capacity_of(workers, nodes, gpus_per_worker)
    sizes = {cpus / k for cpus in cpus_n for k in range(1, workers + 1)} | {0.25}
    slot = max(size for size in sizes if size > 0 and _num_slots(cpus_n, most_n, size) >= workers)
    trainer = _floor(slot / 2) if slot < 2 else 1.0
    if not gpus_per_worker and slot >= 4:
        trainer = float(int(0.75 * slot))
    share = DataShare(min(1.0, trainer), (sum(cpus_n) - trainer * workers) / workers)
    threads = 1 if gpus_per_worker else max(1, round(slot))
    return Placement(trainer, gpus_per_worker, share, threads, _floor(slot))


def default_workers(found: Machines | None = None) -> int:
    """Return the default number of trainers: two, or one if there is one GPU, or only one machine with few CPUs."""
    found = found or machines()
    if not found.has_gpus:
        alone = len(found.now) == 1 and not found.later
        return 1 if alone and found.now[0].get("CPU", 0.0) <= this_machine.MOST_CPUS_ALONE else 2
    gpus = sum(int(node.get("GPU", 0)) for node in (*found.now, *found.for_trainers()))
    return max(1, min(2, gpus))


def machines_for(workers: int, found: Machines, gpus_per_worker: float) -> tuple[Node, ...]:
    """Return the running machines and the fewest more that have room for every worker.

    Raises:
        UserError: there is not enough room even with all of them.
    """
    grown = (*found.now, *found.for_trainers())
    cpus_n, most_n = _capacity_of(workers, grown, gpus_per_worker)
    verb = "could have" if len(grown) > len(found.now) else "has"
    if gpus_per_worker and sum(most_n) < workers:
        gpus = sum(int(node.get("GPU", 0)) for node in grown)
        raise UserError(
            f"{workers} workers need {workers * gpus_per_worker:g} GPUs and the cluster {verb} {gpus}. "
            + (
                f"Use --workers {sum(most_n)}, or a larger cluster."
                if any(most_n)
                else "Use a larger cluster."
            )
        )
    # At most four trainers share a core; more would only wait for each other.
    fit = _num_slots(cpus_n, most_n, 0.25)
    if fit < workers:
        raise UserError(
            f"{workers} workers and their data tasks can never run on the {sum(cpus_n):g} CPUs that this cluster "
            f"{verb}: it has room for {fit}. Give fewer --workers, or use a larger cluster."
        )
    slot = _ROOMY_CPUS if _num_slots(cpus_n, most_n, _ROOMY_CPUS) >= workers else 0.25
    counts = range(len(found.now), len(grown))
    num_new = bisect.bisect_left(counts, workers, key=lambda n: _num_slots(cpus_n[:n], most_n[:n], slot))
    return grown[: len(found.now) + num_new]


def _capacity_of(
    workers: int, nodes: Sequence[Node], gpus_per_worker: float
) -> tuple[list[float], list[int]]:
    """Return the CPUs of each machine, and the number of trainers that fit on its GPUs."""
    cpus_n = [node.get("CPU", 0.0) for node in nodes]
    if not gpus_per_worker:
        return cpus_n, [workers] * len(cpus_n)
    # Ray gives a trainer a share of one GPU, and never of two.
    each = max(1, int(1 / gpus_per_worker + 1e-6))
    return cpus_n, [int(node.get("GPU", 0) / max(1.0, gpus_per_worker)) * each for node in nodes]


def _num_slots(cpus_n: Sequence[float], most_n: Sequence[int], slot: float) -> int:
    """Return the number of slots of `slot` CPUs on the machines, at most `most_n` on each."""
    # The margin is for rounding: a third of a machine fits three times.
    return sum(min(most, int(cpus / slot + 1e-6)) for cpus, most in zip(cpus_n, most_n, strict=True))


def _floor(share: float) -> float:
    """Round down to a thousandth; Ray counts in ten-thousandths."""
    return int(share * 1000) / 1000
