"""How many workers a run has now: as many as the cluster has room for, of the numbers that divide its batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from raysl import cluster
from raysl.cluster import Placement
from raysl.errors import UserError

Nodes = Sequence[Mapping[str, float]]

# A run grows once there has been room for so long: machines come one after the other, and to grow is to restart.
GROW_AFTER_S = 30.0


@dataclass(frozen=True)
class Team:
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


def machines(leaving: Collection[str] = ()) -> Nodes:
    """{"CPU": n, "GPU": n} of each machine of the cluster, without those (by id) that are about to leave."""
    import ray

    return [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]


def size(counts: Sequence[int], nodes: Nodes, gpus: bool) -> int:
    """The largest number of workers that there is room for; 0 when there is not room for the fewest.

    Args:
        counts: numbers that are allowed, in order.
        nodes: {"CPU": n, "GPU": n} of each machine.
        gpus: a worker takes a GPU; else a whole CPU, with its data tasks.
    """
    room = sum(int(node.get("GPU" if gpus else "CPU", 0)) for node in nodes)
    return max((count for count in counts if count <= room), default=0)


def gather(counts: Sequence[int], nodes: Nodes, gpus: bool | None = None) -> Team:
    """The largest team that there is room for. Without GPUs, the fewest workers may also share CPUs.

    Args:
        counts: numbers of workers that are allowed, in order.
        nodes: {"CPU": n, "GPU": n} of each machine.
        gpus: whether the workers need GPUs; None for wherever there are some.

    Raises:
        UserError: there is not even room for the fewest.
    """
    if gpus is None:
        gpus = any(node.get("GPU") for node in nodes)
    workers = size(counts, nodes, gpus) or counts[0]
    if gpus and not size(counts, nodes, gpus):
        raise UserError(f"{workers} workers need as many GPUs, and the cluster has fewer.")
    return Team(workers, cluster.place(workers, nodes))


class Growth:
    """Whether a team should leave off for a larger one.

    Args:
        counts: numbers of workers that are allowed, in order.
        team: that works now.
        clock: seconds; an argument so that a test can turn it.
    """

    def __init__(
        self, counts: Sequence[int], team: Team, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counts = counts
        self._team = team
        self._clock = clock
        self._since: float | None = None

    def due(self, nodes: Nodes) -> bool:
        """Whether there has been room for more workers for `GROW_AFTER_S`. To be asked now and then."""
        if size(self._counts, nodes, self._team.gpus) <= self._team.workers:
            self._since = None
            return False
        self._since = self._clock() if self._since is None else self._since
        return self._clock() - self._since >= GROW_AFTER_S
