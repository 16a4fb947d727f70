"""Schedulers and searchers of Ray Tune decide the same whatever is faster, and after any interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.tune")

from ray import tune

from raysl.tuning import settings
from raysl.tuning.config import SweepConfig
from raysl.tuning.order import InOrder, Numbered
from raysl.tuning.space import Dimension, Space
from tests.tuning.toy import TIMES, Toy

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TRIALS = 8
POINTS = Space((Dimension("x", ("x",), (), 0.0, 1.0, mutable=True),))


class Killed(Exception):
    """The driver of a sweep is killed."""


class Notes:
    """What a journal would keep."""

    def __init__(self, kill_after: int = 0) -> None:
        self.scores: dict[tuple[int, int], float] = {}
        self.values: dict[int, Any] = {}
        self.failures: set[int] = set()
        self.decisions: dict[tuple[int, int], Any] = {}
        self.kill_after = kill_after

    def begun(self, trial: int, values: dict[str, Any]) -> None:
        self.values[trial] = values

    def scored(self, trial: int, result: dict[str, Any]) -> None:
        new = (trial, result["rung"]) not in self.scores
        self.scores[trial, result["rung"]] = result["score"]
        if new and len(self.scores) == self.kill_after:
            raise Killed

    def failed(self, trial: int, record: Any) -> None:
        self.failures.add(trial)

    def decided(
        self, trial: int, rung: int, goes_on: bool, copies: int | None, values: dict[str, Any]
    ) -> None:
        self.decisions[trial, rung] = goes_on, copies, dict(values)

    def outcome(self) -> Any:
        return self.scores, self.values, self.failures, self.decisions


def play(
    folder: Path, config: SweepConfig, at_once: int, slow: str, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> Notes:
    """Run the sweep of toys, with what is known from before."""
    monkeypatch.setenv("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")

    names = {"known": dict(notes.scores), "slow": slow, "log": str(folder / "steps"), "at_once": at_once}
    bound = type("Bound", (Toy,), names)
    order = InOrder(settings.scheduler(config, POINTS, TIMES), TRIALS, at_once, 0, notes)
    points = (lambda n: POINTS.drawn(0, n)) if config.searcher == "random" else settings.searcher(config)
    numbered = Numbered(points, order, 4, 0, dict(notes.values), notes.begun)

    def name(trial: Any) -> str:
        return f"{numbered.numbers[trial.trial_id]:04d}"

    tune.Tuner(
        bound,
        param_space={"x": POINTS.dimensions[0].domain()},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=TRIALS,
            scheduler=order,
            search_alg=numbered,
            reuse_actors=True,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name=f"tune-{len(notes.scores)}",
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        ),
    ).fit()
    return notes


@pytest.mark.parametrize(
    ("scheduler", "searcher"),
    [
        ("asha", "optuna"),
        ("pbt", "random"),
        pytest.param("asha", "random", marks=pytest.mark.slow),
        pytest.param("median", "random", marks=pytest.mark.slow),
        pytest.param("hyperband", "random", marks=pytest.mark.slow),
    ],
)
def test_decisions_depend_on_results_only(
    scheduler: Any, searcher: Any, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if searcher == "optuna":
        pytest.importorskip("optuna")
    config = SweepConfig("out", ("x",), scheduler=scheduler, searcher=searcher, rungs=3)
    folder = tmp_path / "alone"
    folder.mkdir()
    alone = play(folder, config, 1, "none", Notes(), monkeypatch)
    if searcher == "random":
        assert alone.failures == {3}
    assert len(alone.values) == TRIALS
    steps = (folder / "steps").read_text().splitlines()
    if scheduler != "median":
        assert len(steps) < 3 * TRIALS - 2 or scheduler == "pbt"
    if scheduler == "pbt":
        assert any(copies is not None for _, copies, _ in alone.decisions.values())
    folder = tmp_path / "killed"
    folder.mkdir()
    notes = Notes(kill_after=5)
    with pytest.raises(tune.TuneError, match="Killed"):
        play(folder, config, 3, "odd", notes, monkeypatch)
    notes.kill_after = 11
    with pytest.raises(tune.TuneError, match="Killed"):
        play(folder, config, 2, "first", notes, monkeypatch)
    assert play(folder, config, 3, "first", notes, monkeypatch).outcome() == alone.outcome()
    assert set((folder / "steps").read_text().splitlines()) == set(steps)
