"""Survey a cluster: its machines, what a run would take and cost there, and machines that run other code.

This only starts a process of a second on each machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.markup import escape
from rich.table import Table

from raysl import ray_cluster
from raysl.errors import UserError
from raysl.ray_cluster import autoscaler, gpus
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.autoscaler import Capacity, NodeType
from raysl.ray_cluster.placement import Placement
from raysl.ray_cluster.versions import REMEDY, differing, versions


@dataclass(frozen=True)
class Kind:
    """A type of machines of a cluster."""

    name: str  # type in the cluster's configuration; "machine" without an autoscaler
    resources: Mapping[str, float]  # resources of one machine
    there: int  # number of running machines
    most: int  # greatest number of machines
    usd_per_hour: float | None  # price of one machine; None if unknown


@dataclass(frozen=True)
class Fleet:
    """A cluster and the placement of a run on it."""

    kinds: tuple[Kind, ...]  # types of machines
    placement: Placement | None  # resources of each trainer; None if the run is refused
    refused: str  # reason of the refusal
    started: Mapping[str, int]  # number of machines by type that the run would start
    waits: str  # a sentence about what the run would wait for; "" if it could begin
    # Machines that the autoscaler has requested, and requests that the cloud has refused.
    news: tuple[str, ...]
    # Differences of machines that run other code or packages, by address.
    stale: Mapping[str, tuple[str, ...]]
    unusable: Mapping[str, str]  # why torch cannot use the GPUs of a machine, by address

    def usd_per_hour(self, counts: Mapping[str, int]) -> float | None:
        """Return the price of a number of machines by type; None if a price is unknown."""
        prices = {kind.name: kind.usd_per_hour for kind in self.kinds}
        known = [prices.get(name) for name, count in counts.items() if count]
        if None in known:
            return None
        return sum((prices[name] or 0.0) * count for name, count in counts.items())

    @property
    def there(self) -> Counter[str]:
        """Number of running machines by type."""
        return Counter({kind.name: kind.there for kind in self.kinds})


def survey(workers: int, prices: Mapping[str, float]) -> Fleet:
    """Survey the cluster that Ray is connected to; `prices` by type of machine override its configuration."""
    capacity = autoscaler.capacity()
    alive = [node for node in ray.nodes() if node["Alive"]]
    placement, refused, started, waits = None, "", {}, ""
    try:
        found = cluster_placement.machines()
        placement = cluster_placement.make_placement(workers, found)
        more = len(cluster_placement.machines_for(workers, found, placement.gpus_per_worker)) - len(found.now)
        # The machines that the autoscaler would start first for trainers.
        later = capacity.remaining([autoscaler.type_of(node) for node in alive])[0] if capacity else ()
        names = [one.name for one in later if one.resources.get("GPU") or not found.has_gpus]
        started = dict(Counter(names[:more]))
        waits = placement.waiting_message(workers)
    except UserError as error:
        refused = str(error)
    unusable = {address: why for address, (why, _) in gpus.check_machines().items() if why}
    here = versions()
    differences = {
        address: tuple(differing(here, theirs)) if theirs else ("raysl does not start there",)
        for address, theirs in ray_cluster.machine_versions().items()
    }
    stale = {address: found for address, found in differences.items() if found}
    kinds, news = _kinds(capacity, alive, prices), _news(capacity)
    return Fleet(kinds, placement, refused, started, waits, news, stale, unusable)


def _kinds(
    capacity: Capacity | None, alive: Sequence[Mapping[str, Any]], prices: Mapping[str, float]
) -> tuple[Kind, ...]:
    counts = Counter(autoscaler.type_of(node) or "machine" for node in alive)
    types = {one.name: one for one in (capacity.head, *capacity.types)} if capacity else {}
    for node in alive:
        name = autoscaler.type_of(node) or "machine"
        types.setdefault(name, NodeType(name, node["Resources"], 0))
    made = []
    for name, one in types.items():
        there, price = counts[name], prices.get(name, one.usd_per_hour)
        made.append(Kind(name, one.resources, there, max(one.most, there), price))
    return tuple(made)


def _news(capacity: Capacity | None) -> tuple[str, ...]:
    """Return the autoscaler's messages about machines that are starting or that the cloud refused."""
    if capacity is None:
        return ()
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
    for column in ("type", "running", "at most", "CPUs", "GPUs", "memory", "$/hour"):
        shown.add_column(column, justify="left" if column == "type" else "right")
    for kind in fleet.kinds:
        has = kind.resources
        price = "?" if kind.usd_per_hour is None else f"{kind.usd_per_hour:.2f}"
        memory = f"{has['memory'] / 2**30:.0f} GiB" if has.get("memory") else "?"
        row = (kind.there, kind.most, f"{has.get('CPU', 0):g}", f"{has.get('GPU', 0):g}", memory, price)
        shown.add_row(escape(kind.name), *map(str, row))
    return shown


def sentences(fleet: Fleet, workers: int) -> list[str]:
    """Return sentences about the cost and placement of a run, and about stale machines."""
    said = [f"The cluster costs {_price(fleet.usd_per_hour(fleet.there))} now."]
    if fleet.placement is None:
        said.append(f"The run would be refused: {fleet.refused}")
    else:
        said.append(_taken(fleet, fleet.placement, workers))
    said += [f"The autoscaler: {line}." for line in fleet.news]
    for address, differences in fleet.stale.items():
        said.append(f"{address} differs from this machine: {', '.join(differences)}.")
    said += [f"{address}: {why}" for address, why in fleet.unusable.items()]
    machines = sum(kind.there for kind in fleet.kinds)
    said.append(REMEDY if fleet.stale else f"All {machines} machines run this code and these packages.")
    return said


def _taken(fleet: Fleet, placement: Placement, workers: int) -> str:
    takes = (
        f"Each of {workers} workers would take {placement.cpus_per_worker:g} CPU and {placement.gpus_per_worker:g} "
        f"GPU, and its data tasks {placement.share.cpus:g} CPU."
    )
    if fleet.started:
        asked = ", ".join(f"{count} {name}" for name, count in fleet.started.items())
        price = _price(fleet.usd_per_hour(fleet.there + Counter(fleet.started)))
        takes += f" {asked} would be started for it; the cluster would cost {price}."
    return f"{takes} {fleet.waits}".rstrip()


def _price(usd: float | None) -> str:
    if usd is None:
        return "an unknown amount (give it with --prices TYPE=USD_PER_HOUR)"
    return f"${usd:.2f} an hour"
