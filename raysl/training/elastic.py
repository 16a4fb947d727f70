"""How many workers a run has now: as many as the cluster has room for, of the numbers that divide its batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raysl.errors import UserError
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Machines, Placement

# How long there must have been room for another number: machines come one after the other, and to resize is to
# restart. Ray also takes its time to see that a machine has died, until when there seems to be room for too many.
RESIZE_AFTER_S = 30.0


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of a run for a while.

    Args:
        workers: their number.
        placement: what they get.
    """

    workers: int
    placement: Placement

    @property
    def gpus(self) -> bool:
        """Whether they work on GPUs. A run that began on GPUs does not go on without."""
        return self.placement.gpus_per_worker > 0


def machines() -> Machines:
    """Those of the cluster, without those that are about to be taken away."""
    import ray

    # What Ray Train's own watcher asks; there is no public way without a dashboard.
    leaving = ray._private.state.state.get_draining_nodes()
    staying = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    return replace(cluster_placement.machines(), now=tuple(staying))


def size(counts: Sequence[int], found: Machines, gpus: bool) -> int:
    """The largest number of workers that there is room for now; 0 when there is not room for the fewest.

    Args:
        counts: numbers that are allowed, in order.
        found: the machines.
        gpus: a worker takes a GPU; else a whole CPU, with its data tasks.
    """
    room = sum(int(node.get("GPU" if gpus else "CPU", 0)) for node in found.now)
    return max((count for count in counts if count <= room), default=0)


def gather(counts: Sequence[int], found: Machines, gpus: bool = False) -> WorkerGroup:
    """The largest team that there is room for now.

    Where there is not even room for the fewest workers, these may share CPUs, or wait for machines that the cluster
    can start.

    Args:
        counts: numbers of workers that are allowed, in order.
        found: the machines.
        gpus: whether the workers need GPUs, even where there are none now.

    Raises:
        UserError: the cluster can never run the fewest.
    """
    if gpus and not found.has_gpus:
        raise UserError("The run began on GPUs, and the cluster has none now.")
    workers = size(counts, found, found.has_gpus)
    return WorkerGroup(workers or counts[0], cluster_placement.place(workers or counts[0], found))


class CapacityRequest:
    """Asks the autoscaler of a cluster for the machines of a larger team, and holds what comes until it is taken back.

    Only for GPUs: a wish for CPUs would be granted with those of the data tasks.

    Args:
        most: the largest team that is allowed.
        team: that works now.
        found: the machines.
    """

    def __init__(self, most: int, group: WorkerGroup, found: Machines) -> None:
        import ray

        missing = most - group.workers if group.gpus and found.later else 0
        self._groups = [ray.util.placement_group([group.placement.resources()]) for _ in range(missing)]

    def take_back(self) -> None:
        """Lets go of what was asked for."""
        import ray

        for group in self._groups:
            ray.util.remove_placement_group(group)


class Resizing:
    """Whether a team should leave off for one of another size.

    Args:
        counts: numbers of workers that are allowed, in order.
        team: that works now.
        clock: seconds; an argument so that a test can turn it.
    """

    def __init__(
        self, counts: Sequence[int], group: WorkerGroup, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counts = counts
        self._team = group
        self._clock = clock
        self._since: float | None = None

    def due(self, found: Machines) -> bool:
        """Whether there has been room for another number of workers for `RESIZE_AFTER_S`. To be asked now and then."""
        if (size(self._counts, found, self._team.gpus) or self._counts[0]) == self._team.workers:
            self._since = None
            return False
        self._since = self._clock() if self._since is None else self._since
        return self._clock() - self._since >= RESIZE_AFTER_S
