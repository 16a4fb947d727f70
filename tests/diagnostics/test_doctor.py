"""The doctor: its prediction follows from the measured costs, and its measurement covers every stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from raysl.config import defaults
from raysl.diagnostics import DoctorConfig, examine, pretraining
from raysl.diagnostics.prediction import Costs, predict
from raysl.errors import UserError
from raysl.ray_cluster.placement import Placement
from raysl.stream.reader import DataShare
from tests.data import make_dataset

COSTS = Costs(
    read_us=10,
    decode_us=400,
    crop_us=300,
    augment_us=200,
    transfer_us=90,
    step_s=0.064,
    all_reduce_s=0.0,
)
# One GPU each and four data tasks in all.
ON_GPUS = Placement(1.0, 1.0, DataShare(1.0, 2.0), 1)
ON_CORES = Placement(0.5, 0.0, DataShare(0.5, 0.5), 1)


def test_data_and_training_capacities() -> None:
    found = predict(COSTS, ON_GPUS, workers=2, batch_size=256, cpus=6)
    assert found.data == pytest.approx(4000)  # four tasks at a millisecond for an image
    assert found.training == pytest.approx(4000)
    assert found.images_per_s == pytest.approx(4000)


def test_data_tasks_limit_fast_gpus() -> None:
    found = predict(dataclasses.replace(COSTS, step_s=0.01), ON_GPUS, 2, 256, 6)
    assert found.limit == "decode"
    assert found.images_per_s == found.data
    assert "CPUs for data tasks" in found.advice


def test_costly_augmentation_belongs_on_the_trainer() -> None:
    found = predict(dataclasses.replace(COSTS, step_s=0.01, augment_us=2000), ON_GPUS, 2, 256, 6)
    assert found.limit == "augment"
    assert "--stream.place trainer" in found.advice


def test_step_limits_slow_gpus() -> None:
    found = predict(dataclasses.replace(COSTS, step_s=1.0), ON_GPUS, 2, 256, 6)
    assert found.limit == "step"
    assert found.images_per_s == pytest.approx(256)


def test_exchange_of_gradients_wants_larger_batches() -> None:
    found = predict(dataclasses.replace(COSTS, all_reduce_s=0.5), ON_GPUS, 2, 256, 6)
    assert found.limit == "all-reduce"
    assert "larger batches" in found.advice


def test_without_gpus_trainers_and_data_tasks_share_the_cores() -> None:
    found = predict(dataclasses.replace(COSTS, step_s=0.128), ON_CORES, 2, 64, 2)
    # An image costs one millisecond of data and four of training, and there are two cores.
    assert found.together == pytest.approx(400)
    assert found.images_per_s == found.together
    assert found.limit == "step"


def test_a_data_task_is_one_thread_even_on_many_cpus() -> None:
    few_tasks = Placement(12.0, 0.0, DataShare(1.0, 1.0), 13)
    found = predict(dataclasses.replace(COSTS, step_s=0.001), few_tasks, 1, 64, 64)
    assert found.images_per_s == found.data == pytest.approx(1000)
    assert found.limit == "decode"


@pytest.mark.ray
def test_measures_every_stage(ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_dataset(tmp_path / "set", 100, side=32)
    caplog.set_level("INFO", "raysl")
    report = examine(DoctorConfig(str(tmp_path / "set"), batch_size=8, workers=2))
    said = [text for text in caplog.messages if text]
    assert all(value > 0 for value in dataclasses.asdict(report.costs).values())
    assert report.prediction.limit in "".join(said)
    assert report.prediction.images_per_s > 0
    assert report.resources["CPU"] == 2
    assert report.versions["code"] in "".join(said)


@pytest.mark.ray
def test_impossible_runs_are_refused(ray_session: None, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 100, side=32)
    with pytest.raises(UserError, match="batch-size"):
        examine(DoctorConfig(str(tmp_path / "set"), batch_size=128))
    with pytest.raises(UserError, match="workers"):
        examine(DoctorConfig(str(tmp_path / "set"), batch_size=64, workers=64))


def test_an_unknown_method_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="Unknown method 'nosuch'"):
        DoctorConfig(method="nosuch")


def test_it_measures_the_workers_and_the_batch_that_pretrain_chooses(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 100, side=32)
    data = str(tmp_path / "set")
    made = pretraining(DoctorConfig(data), dataset, 1, has_gpus=False)
    assert made == defaults.choose_defaults({"data": data, "run": "-", "epochs": 1}, dataset, 1, False)
    assert (made.workers, made.batch_size) == (1, 16)
    given = pretraining(DoctorConfig(data, batch_size=64, workers=2), dataset, 1, has_gpus=False)
    assert (given.workers, given.batch_size) == (2, 64)
