"""What a cluster can grow to: read from the configuration that `ray up` leaves, and from a RayCluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raysl.ray_cluster import autoscaler
from raysl.ray_cluster.autoscaler import Capacity

CONFIG: dict[str, Any] = {
    "max_workers": 4,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0, "labels": {"usd-per-hour": "0.2"}},
        "cpu": {"resources": {"CPU": 16, "memory": 10**10}, "max_workers": 2},
        "gpu_ondemand": {"resources": {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, "max_workers": 3},
        "gpu_spot": {
            "resources": {"CPU": 8, "GPU": 1},
            "max_workers": 3,
            "priority": 10,
            "labels": {"usd-per-hour": "0.5"},
        },
    },
}


def test_preferred_types_come_first_and_the_head_never() -> None:
    found = Capacity.of(CONFIG)
    assert [one.name for one in found.types] == ["gpu_spot", "cpu", "gpu_ondemand"]
    assert found.types[2].resources == {"CPU": 8, "GPU": 1}
    assert (found.head.name, found.head.resources) == ("head", {"CPU": 0})


def test_prices_are_labels() -> None:
    found = Capacity.of(CONFIG)
    assert [one.usd_per_hour for one in (found.head, *found.types)] == [0.2, 0.5, None, None]


def test_what_is_there_counts_against_its_type_and_against_all() -> None:
    found = Capacity.of(CONFIG)

    def remaining(*alive: str) -> tuple[list[str], int]:
        later, room = found.remaining(alive)
        return [one.name for one in later], room

    spot, cpu, ondemand = "gpu_spot", "cpu", "gpu_ondemand"
    assert remaining() == ([spot] * 3 + [cpu] * 2 + [ondemand] * 3, 4)
    assert remaining(spot, cpu, "by hand", "head") == ([spot] * 2 + [cpu] + [ondemand] * 3, 2)
    assert remaining(*[spot] * 4)[1] == 0


def test_the_head_of_a_launched_cluster_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(autoscaler, "LAUNCHED", tmp_path / "bootstrap.yaml")
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    assert autoscaler.capacity() is None
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(CONFIG))
    assert autoscaler.launched_here()
    assert autoscaler.capacity() == Capacity.of(CONFIG)


def test_the_type_of_a_machine_is_its_label() -> None:
    assert autoscaler.type_of({"Labels": {"ray.io/node-group": "gpu_spot"}}) == "gpu_spot"
    assert autoscaler.type_of({}) == ""
