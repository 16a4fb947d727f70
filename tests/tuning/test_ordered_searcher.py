"""The searcher of a sweep proposes trials from the outcomes that it may know, in order of their numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("ray.tune")

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raysl.tuning.ordered_scheduler import OrderedScheduler
from raysl.tuning.ordered_searcher import OrderedSearcher


class Source(Searcher):  # type: ignore[misc]
    """A searcher that counts its proposals and keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self.calls.append(("suggest", trial_id))
        return {"x": int(trial_id) / 10}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.calls.append(("result", trial_id, result["score"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.calls.append(("complete", trial_id, result and result["score"], error))

    def add_evaluated_point(self, parameters: dict[str, Any], value: float, *_: Any, **__: Any) -> None:
        self.calls.append(("point", parameters, value))


class Sweep:
    """A searcher and a scheduler of three trials, without Ray Tune."""

    def __init__(self, **arguments: Any) -> None:
        self.source, self.rows = Source(), list[dict[str, Any]]()
        self.scheduler = OrderedScheduler(FIFOScheduler(), 3, self.rows.append, at_once=3)
        self.searcher = OrderedSearcher(self.source, self.scheduler, lag=2, **arguments)
        self.searcher.set_search_properties("score", "max", {})

    def suggest(self) -> Any:
        """Ask for the next trial, and add it to the scheduler if there is one."""
        n = len(self.scheduler.trials)
        values = self.searcher.suggest(f"id-{n}")
        if isinstance(values, dict):
            trial = Mock(status=Trial.RUNNING, checkpoint=None, __str__=lambda _: f"{n:04d}")
            trial.is_finished = lambda: trial.status == Trial.TERMINATED
            self.scheduler.on_trial_add(SimpleNamespace(), trial)
        return values

    def finish(self, n: int, score: float) -> None:
        trial = self.scheduler.trials[n].trial
        result = {"training_iteration": 1, "rung": 1, "score": score, "runs": "[]"}
        self.scheduler.on_trial_complete(SimpleNamespace(), trial, result)
        trial.status = Trial.TERMINATED


def test_a_trial_is_proposed_from_the_outcomes_of_earlier_trials_in_order() -> None:
    sweep = Sweep()
    assert [sweep.suggest(), sweep.suggest(), sweep.suggest()] == [{"x": 0.0}, {"x": 0.1}, None]
    sweep.finish(1, 0.5)
    assert sweep.suggest() is None, "trial 2 needs the outcome of trial 0"
    sweep.finish(0, 0.25)
    assert sweep.suggest() == {"x": 0.2}
    assert sweep.source.calls[2:] == [
        ("result", "00000", 0.25),
        ("complete", "00000", 0.25, False),
        ("suggest", "00002"),
    ]
    assert sweep.searcher.numbers == {"id-0": 0, "id-1": 1, "id-2": 2}
    assert sweep.suggest() is None, "the search ends only after the last trial"
    sweep.finish(2, 0.125)
    assert sweep.suggest() == Searcher.FINISHED


def test_a_trial_of_an_earlier_session_keeps_its_values(caplog: pytest.LogCaptureFixture) -> None:
    """The searcher then gets the score as that of a point, and not of its own proposal."""
    sweep = Sweep(known={0: {"x": 0.9}})
    assert [sweep.suggest(), sweep.suggest()] == [{"x": 0.9}, {"x": 0.1}]
    assert "Trial 0 keeps {'x': 0.9}" in caplog.text
    sweep.finish(0, 0.25)
    sweep.suggest()
    assert sweep.source.calls[2:4] == [("complete", "00000", None, True), ("point", {"x": 0.9}, 0.25)]
    assert [row["values"] for row in sweep.rows if row["event"] == "trial"] == [
        {"x": 0.9},
        {"x": 0.1},
        {"x": 0.2},
    ]
