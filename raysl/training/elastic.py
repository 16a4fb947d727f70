"""Choose the number of workers of an elastic run: the largest that fits the cluster and divides the batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raysl.errors import UserError
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Machines, Placement

# Another number must fit for this long before a run changes: machines start one after the other, and each change
# restarts the workers. Ray also notices the death of a machine late, and until then too many workers seem to fit.
RESIZE_AFTER_S = 30.0


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one attempt of a run."""

    workers: int
    placement: Placement

    @property
    def gpus(self) -> bool:
        """True if the workers use GPUs. A run that began on GPUs does not continue without them."""
        return self.placement.gpus_per_worker > 0


def machines() -> Machines:
    """Return the machines of the cluster, without those that are being drained."""
    import ray

    # Ray Train's own watcher uses this call; there is no public one without a dashboard.
    draining = ray._private.state.state.get_draining_nodes()
    staying = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining]
    return replace(cluster_placement.machines(), now=tuple(staying))


def largest_count(counts: Sequence[int], found: Machines, gpus: bool) -> int:
    """Return the largest of the ascending `counts` of workers that fits now; 0 if not even the smallest fits.

    Args:
        gpus: whether a worker needs a GPU; otherwise it and its data tasks need a whole CPU.
    """
    room = sum(int(node.get("GPU" if gpus else "CPU", 0)) for node in found.now)
    return max((count for count in counts if count <= room), default=0)


def largest_group(counts: Sequence[int], found: Machines, gpus: bool = False) -> WorkerGroup:
    """Return the largest worker group that fits now.

    If not even the smallest fits, its workers share CPUs, or wait for machines that the cluster can start. With `gpus`
    they need GPUs, even if there are none now.

    Raises:
        UserError: the cluster can never run the smallest number of workers.
    """
    if gpus and not found.has_gpus:
        raise UserError("The run began on GPUs, and the cluster has none now.")
    workers = largest_count(counts, found, found.has_gpus)
    return WorkerGroup(workers or counts[0], cluster_placement.make_placement(workers or counts[0], found))


class CapacityRequest:
    """Ask the autoscaler for the machines of a larger worker group, and reserve them until `release`.

    Only GPUs are requested: a request for CPUs could take CPUs that are reserved for data loading.
    """

    def __init__(self, most: int, group: WorkerGroup, found: Machines) -> None:
        import ray

        missing = most - group.workers if group.gpus and found.later else 0
        self._groups = [ray.util.placement_group([group.placement.resources()]) for _ in range(missing)]

    def release(self) -> None:
        """Release the requested resources."""
        import ray

        for group in self._groups:
            ray.util.remove_placement_group(group)


@dataclass
class Resizing:
    """Decide when a worker group should stop in favor of one of another size. `clock` is an argument for tests."""

    counts: Sequence[int]
    group: WorkerGroup
    clock: Callable[[], float] = time.monotonic
    _since: float | None = None

    def due(self, found: Machines) -> bool:
        """Return True if another number of workers has fitted for `RESIZE_AFTER_S`. Call it regularly."""
        if (largest_count(self.counts, found, self.group.gpus) or self.counts[0]) == self.group.workers:
            self._since = None
            return False
        self._since = self.clock() if self._since is None else self._since
        return self.clock() - self._since >= RESIZE_AFTER_S
