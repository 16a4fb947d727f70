"""The scheduler of a sweep decides which errors end a trial, and which end the sweep."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("ray.tune")

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from raysl.storage import StorageError
from raysl.tuning.ordered_scheduler import MAX_TRIAL_CRASHES, OrderedScheduler


def test_a_full_disk_ends_the_sweep_and_not_the_trial(tmp_path: Path) -> None:
    """The same command then continues; a trial that failed would need --retry."""
    rows: list[dict[str, Any]] = []
    scheduler = OrderedScheduler(FIFOScheduler(), 1, rows.append)
    (tmp_path / "error.pkl").write_bytes(pickle.dumps(StorageError("No space left.")))
    trial = Mock(pickled_error_file=str(tmp_path / "error.pkl"), __str__=lambda _: "0000")
    scheduler.on_trial_add(SimpleNamespace(), trial)
    with pytest.raises(StorageError, match="No space left"):
        scheduler.on_trial_error(SimpleNamespace(), trial)
    assert not rows


def test_a_second_error_of_a_lost_actor_does_not_end_a_trial() -> None:
    """Ray Tune queues the trial at the first error, of a step, and gives it up at the second, of a checkpoint."""
    queued: list[Any] = []
    controller = SimpleNamespace(_requeue_trial=queued.append)
    rows: list[dict[str, Any]] = []
    scheduler = OrderedScheduler(FIFOScheduler(), 1, rows.append)
    trial = Mock(status=Trial.PENDING, pickled_error_file="", error_file="", __str__=lambda _: "0000")
    scheduler.on_trial_add(controller, trial)
    scheduler.on_trial_error(controller, trial)
    trial.status = Trial.ERROR
    scheduler.choose_trial_to_run(controller)
    assert queued == [trial]
    assert not rows
    for _ in range(MAX_TRIAL_CRASHES):
        scheduler.on_trial_error(controller, trial)
    assert [row["event"] for row in rows] == ["failed"]
