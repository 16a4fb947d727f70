"""Ray is needed where it was asked for, or where one process would leave much of the machine unused."""

from __future__ import annotations

from typing import Any

import pytest

from raysl.ray_cluster import autoscaler, local_ray, this_machine


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop on its own: no GPU, few CPUs, and no Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(this_machine, "cpus", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(autoscaler, "launched_here", lambda: False)


@pytest.mark.usefixtures("_small")
def test_a_small_machine_on_its_own_needs_no_ray() -> None:
    assert not this_machine.needs_ray()


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((this_machine, "cpus"), 9),
        (("torch.cuda", "is_available"), True),
        (("ray", "is_initialized"), True),
        ((autoscaler, "launched_here"), True),
    ],
)
def test_a_large_machine_or_a_cluster_does(
    where: tuple[Any, str], value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name = where
    monkeypatch.setattr(local_ray, "folder", lambda: None)
    if isinstance(place, str):
        monkeypatch.setattr(f"{place}.{name}", lambda: value)
    else:
        monkeypatch.setattr(place, name, lambda: value)
    assert this_machine.needs_ray()


@pytest.mark.usefixtures("_small")
def test_an_address_asks_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert this_machine.needs_ray()


@pytest.mark.usefixtures("_small")
def test_a_ray_that_raysl_started_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(local_ray, "folder", lambda: "somewhere")
    assert not this_machine.needs_ray()
