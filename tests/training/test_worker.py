"""A training worker: exact resumption, and what it refuses before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.backbone import network
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.data_tasks import MakeBatches
from raysl.stream.reader import Batch, Columns, DataShare, Stream
from raysl.training.worker import Job, Worker
from tests.data import make_dataset


def job(folder: Path, dataset: DataSet, backbone: str = "small", weights: str = "") -> Job:
    config = Pretraining(
        data=str(dataset.folder),
        run=str(folder),
        method="npid",
        batch_size=4,
        backbone=BackboneConfig(backbone, weights=weights),
        channels_last=False,
        parts={"npid": {"num_negatives": 8, "dim": 8}},
    )
    run = Run.begin(config, dataset, {})
    return Job(config.to_json(), run, dataset, Placement(1, 0, DataShare(), 1))


def batch(worker: Worker, step: int) -> Batch:
    """The batch of a step, by way of the columns that a data task returns."""
    stream = worker.model.stream(worker.job.dataset)
    columns = next(MakeBatches(stream, step, step + 1)({"id": np.zeros(1, np.int64)}))
    return stream.batch(step, {name: values[0] for name, values in columns.items()})


def steps(worker: Worker, last: int) -> list[float]:
    losses = []
    for step in range(worker.step, last):
        losses.append(worker.update(worker.model, batch(worker, step), 0.01).loss.item())
        worker.step += 1
    return losses


# Stochastic depth, dropout and neither.
@pytest.mark.parametrize("backbone", ["convnext_tiny", "mobilenet_v3_small", "small"])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path, backbone: str) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    whole = Worker(job(tmp_path / "whole", dataset, backbone), torch.device("cpu"))
    expected = steps(whole, 4)
    first = Worker(job(tmp_path / "run", dataset, backbone), torch.device("cpu"))
    begun = steps(first, 2)
    first.save()
    first.saver.wait()
    torch.manual_seed(99)
    second = Worker(first.job, torch.device("cpu"))
    second.restore()
    assert second.step == 2
    assert begun + steps(second, 4) == expected
    for name, tensor in whole.model.state_dict().items():
        again = second.model.state_dict()[name]
        assert torch.equal(tensor.nan_to_num(), again.nan_to_num()), name


def test_a_run_resumes_without_the_file_that_it_started_from(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    file = tmp_path / "weights.pth"
    torch.save(network.build(BackboneConfig("small")).body.state_dict(), file)
    first = Worker(job(tmp_path / "run", dataset, weights=str(file)), torch.device("cpu"))
    steps(first, 2)
    first.save()
    first.saver.wait()
    expected = steps(first, 3)
    file.unlink()
    second = Worker(first.job, torch.device("cpu"))
    second.restore()
    assert steps(second, 3) == expected


def test_a_manifest_of_a_killed_session_does_not_complete_a_later_checkpoint(tmp_path: Path) -> None:
    first = Worker(job(tmp_path / "run", make_dataset(tmp_path / "set", 40)), torch.device("cpu"))
    steps(first, 1)
    first.save()
    first.saver.wait()
    # Worker 1 of two wrote its part of step 2, and worker 0 was killed before it did.
    killed = Saver(first.job.run.checkpoints, SaveConfig(), 1, 2)
    killed.save(2, None, None)
    killed.wait()
    Worker(first.job, torch.device("cpu")).restore()
    assert first.job.run.checkpoints.list() == ["step-000000001"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    def source(stream: Stream, first: int, end: int) -> Iterator[Columns]:
        for columns in MakeBatches(stream, first, end)({"id": np.zeros(1, np.int64)}):
            yield {name: values[0] for name, values in columns.items()}

    settings = replace(job(tmp_path / "run", make_dataset(tmp_path / "set", 40)), until=1)
    worker = Worker(settings, torch.device("cpu"), reader=source)
    # As when a root of 0 is differentiated: the loss is finite and the gradient is not.
    next(worker.model.parameters()).register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    said = (
        "The weights became infinite or NaN at step 1, so training stopped; no checkpoint had been saved yet"
    )
    with pytest.raises(UserError, match=said):
        worker.train()
    assert worker.job.run.checkpoints.list() == []


def test_a_checkpoint_is_called_valid_where_there_is_one(tmp_path: Path) -> None:
    worker = Worker(job(tmp_path / "run", make_dataset(tmp_path / "set", 40)), torch.device("cpu"))
    worker.step = 3
    worker.save()
    worker.saver.wait()
    with pytest.raises(
        UserError, match=r"loss became nan at step 3, .* the checkpoint of step 3 is still valid"
    ):
        worker._check(math.nan)


def test_an_objective_acts_after_every_epoch(tmp_path: Path) -> None:
    worker = Worker(job(tmp_path / "run", make_dataset(tmp_path / "set", 10), "small"), torch.device("cpu"))
    ended: list[tuple[int, int]] = []
    worker.model.objective.after_epoch = lambda backbone, epoch: ended.append((epoch, worker.step))  # type: ignore[attr-defined]
    steps(worker, 8)  # 32 images
    # Epochs of 10 images end within the steps of the images 8 to 11, 16 to 19 and 28 to 31.
    assert ended == [(0, 2), (1, 4), (2, 7)]


def test_a_run_on_another_machine_is_refused_before_it_is_trained_in_vain(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    config = Pretraining(
        data=str(tmp_path / "set"), run="-", batch_size=8, parts={"pirl": Pirl(num_negatives=8)}
    )
    elsewhere = Run(Folder(str(tmp_path / "of-another-machine")))
    other = Job(config.to_json(), elsewhere, dataset, Placement(1, 0, DataShare(), 1))
    with pytest.raises(UserError, match=r"cannot find the run in '.*of-another-machine'.* s3://"):
        Worker(other, torch.device("cpu")).restore()
