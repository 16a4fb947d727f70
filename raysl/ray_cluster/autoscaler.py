"""Read the capacity that an autoscaling cluster can grow to from the configuration it was launched with.

Ray reports the machines that exist and not those that could start, so a cluster with only a head looks as if it could
never run anything. `ray up` leaves its configuration on the head, where drivers run. On Kubernetes this module reads
the RayCluster with the service account of the head, as KubeRay's autoscaler does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `ray up` puts the configuration of a cluster here, on the head only.
LAUNCHED = Path("~/ray_bootstrap_config.yaml")
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Ray labels machines that an autoscaler started with the name of their type.
_TYPE_LABEL = "ray.io/node-group"
# Our label for the price of a machine of a type, in US dollars an hour.
PRICE_LABEL = "usd-per-hour"

Node = dict[str, float]


@dataclass(frozen=True)
class NodeType:
    """A type of machine that an autoscaler can start."""

    name: str  # name in the configuration
    resources: Node  # resources of one machine: CPU, GPU, memory in bytes
    most: int  # maximum number of machines of this type
    usd_per_hour: float | None = None  # price of one machine from its label; None without a label

    @staticmethod
    def of(name: str, kind: Mapping[str, Any], most: int) -> NodeType:
        """Return the type for an entry of `available_node_types`."""
        has = {what: float(kind["resources"].get(what, 0)) for what in ("CPU", "GPU", "memory")}
        price = kind.get("labels", {}).get(PRICE_LABEL)
        return NodeType(
            name,
            {what: amount for what, amount in has.items() if amount or what == "CPU"},
            int(kind.get("max_workers", most)),
            float(price) if price else None,
        )


@dataclass(frozen=True)
class Capacity:
    """The capacity that a cluster can grow to."""

    types: tuple[NodeType, ...]  # types of its workers, in the order of the autoscaler's preference
    most: int  # maximum number of workers of all types together
    head: NodeType  # type of the machine that drivers run on

    @staticmethod
    def of(config: Mapping[str, Any]) -> Capacity:
        """Return the capacity for an autoscaler configuration that Ray resolved from a cluster.yaml or a RayCluster."""
        kinds = config["available_node_types"]
        # Ray prefers types of higher priority, and among equal ones the smallest that fits.
        order = sorted(kinds, key=lambda name: (-kinds[name].get("priority", 0), _machine_size(kinds[name])))
        most = int(config.get("max_workers", 0))
        made = {name: NodeType.of(name, kinds[name], most) for name in order}
        head = made.pop(config["head_node_type"])
        return Capacity(tuple(made.values()), most, head)

    def remaining(self, alive: Sequence[str]) -> tuple[tuple[NodeType, ...], int]:
        """Return the machines that could still start, in the order of preference, and their maximum number.

        Args:
            alive: types of the workers that exist.
        """
        there = [name for name in alive if name in {one.name for one in self.types}]
        later = (one for one in self.types for _ in range(one.most - there.count(one.name)))
        return tuple(later), max(0, self.most - len(there))


def _machine_size(kind: Mapping[str, Any]) -> tuple[float, float]:
    resources = kind.get("resources", {})
    return float(resources.get("GPU", 0)), float(resources.get("CPU", 0))


def launched_here() -> bool:
    """Return True if this machine is the head of a cluster that `ray up` launched."""
    return os.path.exists(LAUNCHED.expanduser())  # False as well in a home that may not be read.


def capacity() -> Capacity | None:
    """Return the capacity of the cluster whose head runs this process; None without an autoscaler."""
    if launched_here():
        import yaml

        return Capacity.of(yaml.safe_load(LAUNCHED.expanduser().read_text()))
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name and _NAMESPACE.exists():
        return _of_kuberay(name, _NAMESPACE.read_text().strip())
    return None


def _of_kuberay(name: str, namespace: str) -> Capacity | None:
    """Return the capacity of a RayCluster; None without an autoscaler, or if this pod may not read it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    producer = AutoscalingConfigProducer(name, namespace)
    try:
        cluster = producer.kubernetes_api_client.get(f"rayclusters/{name}")
        return Capacity.of(producer()) if cluster["spec"].get("enableInTreeAutoscaling") else None
    except OSError:  # also the base class of the errors of requests
        return None


def type_of(node: Mapping[str, Any]) -> str:
    """Return the type of a machine in Ray's list; "" if no autoscaler started it."""
    return str(node.get("Labels", {}).get(_TYPE_LABEL, ""))
