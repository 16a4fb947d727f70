"""What an autoscaling cluster can grow to, as the configuration that it was launched with says.

Ray tells what a cluster has, and not what it could have: a cluster that starts at a head without work looks like one
that can never run anything. `ray up` leaves its configuration on the head, where drivers run; KubeRay's autoscaler
reads the RayCluster from Kubernetes with the head's service account, and so does this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where `ray up` puts the configuration of a cluster, on its head alone.
LAUNCHED = Path("~/ray_bootstrap_config.yaml")
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Ray's label of a machine that an autoscaler has started: the name of its type.
_TYPE_LABEL = "ray.io/node-group"
# The label of a type with what a machine costs in US dollars an hour.
PRICE_LABEL = "usd-per-hour"

Node = dict[str, float]


@dataclass(frozen=True)
class NodeType:
    """Machines of one kind that an autoscaler can start.

    Args:
        name: in the configuration.
        resources: of one machine: CPU, GPU, memory in bytes.
        most: machines of this kind at a time.
        usd_per_hour: price of one, which the configuration states as a label; None where it does not.
    """

    name: str
    resources: Node
    most: int
    usd_per_hour: float | None = None

    @staticmethod
    def of(name: str, kind: Mapping[str, Any], most: int) -> NodeType:
        """From an entry of `available_node_types`."""
        has = {what: float(kind["resources"].get(what, 0)) for what in ("CPU", "GPU", "memory")}
        price = kind.get("labels", {}).get(PRICE_LABEL)
        return NodeType(
            name,
            {what: amount for what, amount in has.items() if amount or what == "CPU"},
            int(kind.get("max_workers", most)),
            float(price) if price else None,
        )


@dataclass(frozen=True)
class Growth:
    """What a cluster can grow to.

    Args:
        types: of its workers, those that the autoscaler prefers first.
        most: workers of all types together.
        head: the type of the machine that the drivers run on.
    """

    types: tuple[NodeType, ...]
    most: int
    head: NodeType

    @staticmethod
    def of(config: Mapping[str, Any]) -> Growth:
        """From an autoscaler's configuration, as Ray resolves it from a cluster.yaml or a RayCluster."""
        kinds = config["available_node_types"]
        # Ray takes types of higher priority first, and of equal ones the smallest that do.
        order = sorted(kinds, key=lambda name: (-kinds[name].get("priority", 0), _size(kinds[name])))
        most = int(config.get("max_workers", 0))
        made = {name: NodeType.of(name, kinds[name], most) for name in order}
        head = made.pop(config["head_node_type"])
        return Growth(tuple(made.values()), most, head)

    def beyond(self, alive: Sequence[str]) -> tuple[tuple[NodeType, ...], int]:
        """The machines that could still be started, in the order of preference, and how many of them at a time.

        Args:
            alive: the types of the workers that are there.
        """
        there = [name for name in alive if name in {one.name for one in self.types}]
        later = (one for one in self.types for _ in range(one.most - there.count(one.name)))
        return tuple(later), max(0, self.most - len(there))


def _size(kind: Mapping[str, Any]) -> tuple[float, float]:
    resources = kind.get("resources", {})
    return float(resources.get("GPU", 0)), float(resources.get("CPU", 0))


def launched_here() -> bool:
    """Whether this machine is the head of a cluster that `ray up` has launched."""
    return LAUNCHED.expanduser().exists()


def growth() -> Growth | None:
    """Of the cluster whose head this process runs on; None where nothing is known of an autoscaler."""
    if launched_here():
        import yaml

        return Growth.of(yaml.safe_load(LAUNCHED.expanduser().read_text()))
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name and _NAMESPACE.exists():
        return _of_kuberay(name, _NAMESPACE.read_text().strip())
    return None


def _of_kuberay(name: str, namespace: str) -> Growth | None:
    """Of a RayCluster on Kubernetes; None where it has no autoscaler, or this pod may not read it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    producer = AutoscalingConfigProducer(name, namespace)
    try:
        cluster = producer.kubernetes_api_client.get(f"rayclusters/{name}")
        return Growth.of(producer()) if cluster["spec"].get("enableInTreeAutoscaling") else None
    except OSError:  # what requests raises, too
        return None


def type_of(node: Mapping[str, Any]) -> str:
    """The type of a machine in Ray's list of them; "" when no autoscaler has started it."""
    return str(node.get("Labels", {}).get(_TYPE_LABEL, ""))
