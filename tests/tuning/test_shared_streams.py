"""Test which runs of a sweep share a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysl.backbone.network import BackboneConfig
from raysl.stream.reader import DataShare
from raysl.tuning import shared_streams
from raysl.tuning.preparation import TrialContext
from tests.data import make_dataset
from tests.tuning.small import base


def test_runs_that_take_the_same_steps_share_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second trial takes the place that was kept for it; another seed or schedule has a stream of its own."""
    images = make_dataset(tmp_path / "set", 96)
    one = base(str(images.folder), backbone=BackboneConfig("small"))
    placement: Any = SimpleNamespace(share=DataShare())
    context = TrialContext(one, images, str(tmp_path), images, images, "knn", (0,), (1.0,), 2, 1, placement)
    opened: list[int] = []

    def start_actors(streams: Any, start: int, until: int) -> tuple[str, ...]:
        opened.append(len(streams))
        return (f"actor {len(opened)}",)

    monkeypatch.setattr(shared_streams, "start_actors", start_actors)
    monkeypatch.setattr(shared_streams, "_register", lambda *_: True)
    broker = shared_streams.StreamBroker(context, [{"pirl.temperature": 0.1}, {"pirl.temperature": 0.2}])
    first = broker.subscriber(0, replace(one, run="a"), 0, 12)
    second = broker.subscriber(1, replace(one, run="b"), 0, 12)
    assert opened == [2]
    assert first is not None
    assert second is not None
    assert first.actors == second.actors
    assert broker.subscriber(1, replace(one, run="c", seed=1), 0, 12) is None
    assert broker.subscriber(1, replace(one, run="d", epochs=3), 0, 12) is None
