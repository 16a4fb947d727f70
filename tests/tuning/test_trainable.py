"""The trials of a sweep, run by hand in this process: rungs, copies of other trials, and mistakes. Without Ray."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune.execution.experiment_state import StorageContext
from ray.util.queue import Empty

from raysl.checkpoint import SaveConfig
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.stream.reader import DataShare
from raysl.training.launch import pretrain
from raysl.tuning.preparation import TrialContext
from raysl.tuning.sweep import _messages_logged
from raysl.tuning.trainable import SETTINGS, PretrainTrainable, trainable
from tests.data import make_dataset
from tests.tuning.small import base


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    folder = tmp_path_factory.mktemp("sweep")
    images, validation = make_dataset(folder / "train", 32), make_dataset(folder / "test", 16, seed=1)
    small = base(
        str(images.folder), save=SaveConfig(every_steps=3), parts={"pirl": Pirl(num_negatives=16, dim=16)}
    )
    placement = Placement(1.0, 0.0, DataShare(1.0, 1.0), 1, 2.0)
    out = str(folder / "out")
    return TrialContext(small, images, out, images, validation, "knn", (1,), (0.5, 1.0), 1, 1, placement)


def trial(context: TrialContext, name: str, **values: Any) -> PretrainTrainable:
    named: type[PretrainTrainable] = type("Named", (trainable(context),), {"trial_name": name})
    return named({key.replace("__", "."): value for key, value in values.items()})


def files(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / f"step-{step:09d}").iterdir()}


def test_a_trial_climbs_rungs_and_another_continues_from_its_weights(
    context: TrialContext, tmp_path: Path
) -> None:
    better = trial(context, "0000", optim__lr=0.03)
    first = better.train()
    assert (first["rung"], first["t"], first["done"]) == (1, 1, False)
    better.save_checkpoint(str(tmp_path))
    other = trial(context, "0001", optim__lr=0.01)
    other.load_checkpoint(str(tmp_path))
    assert other.train()["done"]
    out = Path(context.out)
    copied, there = (files(out / "trials" / home / "seed-1", 2) for home in ("0001/from-rung-1", "0000"))
    assert copied
    assert copied == there
    # A trial that goes on in another process has the numbers of a run that nothing has interrupted.
    again = trial(context, "0000", optim__lr=0.03)
    again.load_checkpoint(str(tmp_path))
    last = again.train()
    assert (last["rung"], last["t"], last["done"]) == (2, 2, True)
    config = replace(
        context.base, run=str(tmp_path / "alone"), optim=replace(context.base.optim, lr=0.03), seed=1
    )
    alone = pretrain(config, local=True, placement=context.placement).newest()
    assert Run.open(str(out / "trials" / "0000" / "seed-1")).newest().crc32() == alone.crc32()


def test_what_is_known_is_not_measured_again(context: TrialContext) -> None:
    rows = [{"seed": 1, "score": 0.5, "loss": 1.0}]
    known = replace(context, known={("0002", 0): rows}, failures={"0002": "The loss became nan."})
    climber = trial(known, "0002", optim__lr=0.03)
    assert climber.train()["score"] == 0.5
    with pytest.raises(UserError, match="became nan"):
        climber.train()
    assert not (Path(context.out) / "trials" / "0002").exists()


def test_the_actor_of_a_trial_asks_for_what_its_run_takes(context: TrialContext) -> None:
    assert context.resources() == {"CPU": 2.0, "GPU": 0.0}
    # The trainers of Ray Train ask for theirs, and so do the tasks of a shared stream.
    several = replace(context, base=replace(context.base, workers=2))
    assert several.resources().keys() == {"node:__internal_head__"}
    assert replace(context, broker=object()).resources()["CPU"] == 1.0


def test_the_environment_stays_as_it_was(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    trainable(context)
    assert not SETTINGS.keys() & os.environ.keys()


def test_all_messages_of_the_runs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    lines, over = [(logging.INFO, f"line {n}") for n in range(3)], threading.Event()

    def get(timeout: float) -> tuple[int, str]:
        over.wait(30)
        if not lines:
            raise Empty
        return lines.pop(0)

    with caplog.at_level("INFO"), _messages_logged(SimpleNamespace(get=get)):
        over.set()
    assert caplog.messages == ["line 0", "line 1", "line 2"]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"metric": "accuracy"}, "TuneConfig needs the metric 'accuracy'.*score is the primary metric"),
        (
            {"scheduler": tune.schedulers.ASHAScheduler(metric="top1", mode="max")},
            "AsyncHyperBandScheduler needs the metric 'top1'",
        ),
        ({"metric": "score", "scheduler": tune.schedulers.ASHAScheduler("steps")}, "metric 'steps'"),
    ],
)
def test_a_metric_that_no_result_has_is_refused_before_the_training(
    context: TrialContext, tmp_path: Path, settings: dict[str, Any], answer: str
) -> None:
    bound = trainable(context)
    tune.Tuner(
        bound,
        tune_config=tune.TuneConfig(mode="max" if "metric" in settings else None, **settings),
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path)),
    )
    # A trial outside of an actor, which Ray Tune itself cannot make.
    made = object.__new__(bound)
    made._storage = StorageContext(str(tmp_path), "tune", trial_dir_name="0000")
    with pytest.raises(UserError, match=answer):
        made.setup({})
