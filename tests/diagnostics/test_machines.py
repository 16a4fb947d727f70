"""Test the survey of a cluster: machines, cost of a run, and machines that run other code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raysl import ray_cluster
from raysl.diagnostics import DoctorConfig, look, machines
from raysl.diagnostics.machines import Fleet
from raysl.errors import UserError
from raysl.ray_cluster import autoscaler, gpus
from raysl.ray_cluster.versions import versions
from tests.ray_cluster.test_autoscaler import CONFIG


def node(kind: str, **resources: float) -> dict[str, Any]:
    return {"Alive": True, "Labels": {"ray.io/node-group": kind}, "Resources": resources, "NodeID": kind}


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that surveys a simulated cluster, by default of machines with the same code."""
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr(autoscaler, "LAUNCHED", tmp_path / "bootstrap.yaml")
    monkeypatch.setattr(machines, "_news", lambda _: ("2 gpu_spot are starting",))

    def made(
        *nodes: dict[str, Any], workers: int, runs: dict[str, Any] | None = None, unusable: Any = None
    ) -> Fleet:
        total = {kind: sum(n["Resources"].get(kind, 0) for n in nodes) for kind in ("CPU", "GPU")}
        monkeypatch.setattr("ray.nodes", lambda: list(nodes))
        monkeypatch.setattr("ray.cluster_resources", lambda: total)
        monkeypatch.setattr("ray.available_resources", lambda: total)
        monkeypatch.setattr(gpus, "check_machines", lambda: unusable or {})
        monkeypatch.setattr(ray_cluster, "machine_versions", lambda: runs or {"10.0.0.1": versions()})
        return machines.survey(workers, {"cpu": 0.8})

    return made


def test_an_empty_cluster_names_the_machines_to_start_and_their_cost(fleet: Any) -> None:
    found = fleet(node("head", CPU=0), workers=2)
    assert [(k.name, k.there, k.most, k.usd_per_hour) for k in found.kinds] == [
        ("head", 1, 1, 0.2),
        ("gpu_spot", 0, 3, 0.5),
        ("cpu", 0, 2, 0.8),
        ("gpu_ondemand", 0, 3, None),
    ]
    assert found.started == {"gpu_spot": 2}
    said = machines.sentences(found, 2)
    assert said[0] == "The cluster costs $0.20 an hour now."
    assert "2 gpu_spot would be started for it; the cluster would cost $1.20 an hour." in said[1]
    assert "Waiting for 2 GPUs: the cluster has 0 now" in said[1]
    assert said[2:] == [
        "The autoscaler: 2 gpu_spot are starting.",
        "All 1 machines run this code and these packages.",
    ]


def test_running_machines_are_used_first(fleet: Any) -> None:
    found = fleet(node("head", CPU=0), node("gpu_spot", CPU=8, GPU=1), workers=2)
    assert found.started == {"gpu_spot": 1}
    assert fleet(node("head", CPU=0), node("gpu_spot", CPU=8, GPU=1), workers=1).started == {}


def test_a_run_that_can_never_fit_is_refused_with_the_reason(fleet: Any) -> None:
    found = fleet(node("head", CPU=0), workers=5)
    assert "5 workers need 5 GPUs and the cluster could have 4" in machines.sentences(found, 5)[1]


def test_an_unknown_price_is_not_guessed(fleet: Any) -> None:
    found = fleet(node("head", CPU=0), node("gpu_ondemand", CPU=8, GPU=1), workers=1)
    assert "an unknown amount" in machines.sentences(found, 1)[0]


def test_stale_machines_are_named_with_what_differs(fleet: Any) -> None:
    old = {**versions(), "code": "0" * 16}
    found = fleet(
        node("head", CPU=0), workers=1, runs={"10.0.0.1": versions(), "10.0.0.2": old, "10.0.0.3": {}}
    )
    said = " ".join(machines.sentences(found, 1))
    assert found.stale.keys() == {"10.0.0.2", "10.0.0.3"}
    assert "10.0.0.2 differs from this machine: code 0000000000000000 instead of" in said
    assert "`ray up cluster.yaml`" in said


def test_machines_with_gpus_that_torch_cannot_use_are_named(fleet: Any) -> None:
    answers = {"10.0.0.1": ("", ""), "10.0.0.2": ("Ray gives a worker a GPU, but ...", "")}
    found = fleet(node("gpu_spot", CPU=8, GPU=1), workers=1, unusable=answers)
    assert "10.0.0.2: Ray gives a worker a GPU, but ..." in machines.sentences(found, 1)
    assert not any(said.startswith("10.0.0.1") for said in machines.sentences(found, 1))


def test_prices_are_parsed() -> None:
    assert DoctorConfig(prices=("gpu_spot=0.49",)).price_list() == {"gpu_spot": 0.49}
    with pytest.raises(UserError, match="gpu_spot"):
        DoctorConfig(prices=("gpu_spot",)).price_list()


@pytest.mark.ray
def test_one_machine_without_an_autoscaler(ray_session: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "raysl")
    found = look(DoctorConfig(workers=2, prices=("machine=0",)))
    assert [(kind.name, kind.there, kind.resources["CPU"]) for kind in found.kinds] == [("machine", 1, 2)]
    assert found.stale == {}
    assert "The cluster costs $0.00 an hour now." in caplog.messages
