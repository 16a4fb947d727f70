"""What a cluster has and could have, what a run would take of it and cost there, and whether its machines run the same.

Nothing is started for it but a process of a second on each machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from raysl import ray_cluster
from raysl.errors import UserError
from raysl.ray_cluster import autoscaler
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.autoscaler import Growth, NodeType
from raysl.ray_cluster.placement import Placement
from raysl.ray_cluster.versions import MEND, differing, versions


@dataclass(frozen=True)
class Kind:
    """Machines of a cluster that are alike.

    Args:
        name: their type in the cluster's configuration; "machine" where no autoscaler started them.
        resources: of one.
        there: how many there are.
        most: how many there could be.
        usd_per_hour: price of one; None where nobody has stated it.
    """

    name: str
    resources: Mapping[str, float]
    there: int
    most: int
    usd_per_hour: float | None


@dataclass(frozen=True)
class Fleet:
    """A cluster as one run would find it.

    Args:
        kinds: its machines.
        placement: what each trainer would get; None where the run is refused.
        refused: why.
        started: machines that would be started for it, by type.
        waits: what it would wait for, in a sentence; "" where it could begin.
        news: what the autoscaler is doing, and what the cloud has refused it.
        stale: machines that run other code or packages, and what differs.
    """

    kinds: tuple[Kind, ...]
    placement: Placement | None
    refused: str
    started: Mapping[str, int]
    waits: str
    news: tuple[str, ...]
    stale: Mapping[str, tuple[str, ...]]

    def usd_per_hour(self, counts: Mapping[str, int]) -> float | None:
        """Price of so many machines by type; None where one is not known."""
        prices = {kind.name: kind.usd_per_hour for kind in self.kinds}
        known = [prices.get(name) for name, count in counts.items() if count]
        if None in known:
            return None
        return sum((prices[name] or 0.0) * count for name, count in counts.items())

    @property
    def there(self) -> dict[str, int]:
        """How many machines there are, by type."""
        return {kind.name: kind.there for kind in self.kinds}


def survey(workers: int, prices: Mapping[str, float]) -> Fleet:
    """Looks at the cluster that was joined.

    Args:
        workers: Ray Train workers of the run in question.
        prices: US dollars an hour by type of machine, for those that the cluster's configuration does not state.
    """
    import ray

    grows = autoscaler.growth()
    alive = [node for node in ray.nodes() if node["Alive"]]
    placement, refused, started, waits = None, "", {}, ""
    try:
        found = cluster_placement.machines()
        placement = cluster_placement.place(workers, found)
        more = len(cluster_placement.enough(workers, found, placement.gpus_per_worker)) - len(found.now)
        started = _started(grows, [autoscaler.type_of(node) for node in alive], found.has_gpus, more)
        waits = placement.busy(workers)
    except UserError as error:
        refused = str(error)
    return Fleet(_kinds(grows, alive, prices), placement, refused, started, waits, _news(grows), _stale())


def _started(grows: Growth | None, alive: Sequence[str], gpus: bool, count: int) -> dict[str, int]:
    """The types of the first machines that are started for trainers."""
    later = grows.beyond(alive)[0] if grows else ()
    names = [one.name for one in later if one.resources.get("GPU") or not gpus]
    return dict(Counter(names[:count]))


def _kinds(
    grows: Growth | None, alive: Sequence[Mapping[str, Any]], prices: Mapping[str, float]
) -> tuple[Kind, ...]:
    counts = Counter(autoscaler.type_of(node) or "machine" for node in alive)
    types = {one.name: one for one in (grows.head, *grows.types)} if grows else {}
    for node in alive:
        name = autoscaler.type_of(node) or "machine"
        types.setdefault(name, NodeType(name, node["Resources"], 0))
    return tuple(
        Kind(
            name,
            one.resources,
            counts[name],
            max(one.most, counts[name]),
            prices.get(name, one.usd_per_hour),
        )
        for name, one in types.items()
    )


def _stale() -> dict[str, tuple[str, ...]]:
    here = versions()
    found = {
        address: tuple(differing(here, theirs)) if theirs else ("it has no raysl that starts",)
        for address, theirs in ray_cluster.machine_versions().items()
    }
    return {address: differences for address, differences in found.items() if differences}


def _news(grows: Growth | None) -> tuple[str, ...]:
    """What the autoscaler says of machines that are on their way, or that the cloud does not give."""
    if grows is None:
        return ()
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    asked = [f"{one.count} {one.ray_node_type_name} were asked for" for one in status.pending_launches]
    coming = Counter(node.ray_node_type_name for node in status.pending_nodes)
    booting = [f"{count} {name} are starting" for name, count in coming.items()]
    refused = [
        f"the cloud did not give {one.count} {one.ray_node_type_name}: {one.details}"
        for one in status.failed_launches
    ]
    return tuple(asked + booting + refused)


def table(fleet: Fleet) -> Table:
    """Return a table of the machines of a cluster."""
    shown = Table(title="machines")
    for column in ("type", "there", "at most", "CPUs", "GPUs", "memory", "$/hour"):
        shown.add_column(column, justify="left" if column == "type" else "right")
    for kind in fleet.kinds:
        has = kind.resources
        price = "?" if kind.usd_per_hour is None else f"{kind.usd_per_hour:.2f}"
        memory = f"{has['memory'] / 2**30:.0f} GiB" if has.get("memory") else "?"
        row = (kind.there, kind.most, f"{has.get('CPU', 0):g}", f"{has.get('GPU', 0):g}", memory, price)
        shown.add_row(escape(kind.name), *map(str, row))
    return shown


def sentences(fleet: Fleet, workers: int) -> list[str]:
    """What it comes to for a run."""
    said = [f"The cluster costs {_price(fleet.usd_per_hour(fleet.there))} now."]
    if fleet.placement is None:
        said.append(f"The run would be refused: {fleet.refused}")
    else:
        said.append(_taken(fleet, fleet.placement, workers))
    said += [f"The autoscaler: {line}." for line in fleet.news]
    for address, differences in fleet.stale.items():
        said.append(f"{address} does not run what this machine runs: {', '.join(differences)}.")
    machines = sum(kind.there for kind in fleet.kinds)
    said.append(MEND if fleet.stale else f"All {machines} machines run this code and these packages.")
    return said


def _taken(fleet: Fleet, placement: Placement, workers: int) -> str:
    takes = (
        f"Each of {workers} workers would take {placement.cpus_per_worker:g} CPU and {placement.gpus_per_worker:g} "
        f"GPU, and its data tasks {placement.share.cpus:g} CPU."
    )
    if fleet.started:
        asked = ", ".join(f"{count} {name}" for name, count in fleet.started.items())
        total = Counter(fleet.there) + Counter(fleet.started)
        takes += (
            f" {asked} would be started for it; the cluster would cost {_price(fleet.usd_per_hour(total))}."
        )
    return f"{takes} {fleet.waits}".rstrip()


def _price(usd: float | None) -> str:
    return (
        f"${usd:.2f} an hour"
        if usd is not None
        else "an unknown amount (state it: --prices TYPE=USD_PER_HOUR)"
    )
