"""Clips in the stream: the same views on any number of workers, from any step, wherever they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.model import Model
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream import shared
from raysl.stream.data_tasks import MakeBatches
from raysl.stream.plan import Plan
from raysl.stream.reader import Batch, DataShare, Stream, StreamConfig
from raysl.training import preflight
from raysl.training.worker import Job, Worker
from tests.data import make_clips, make_dataset

METHODS = ("predict-frame_order", "pirl-near_frame", "triplet-tracking", "audio_visual")
BATCH, STEPS = 8, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_clips(tmp_path_factory.mktemp("clips") / "set", 24)


def configured(method: str, run: str = "-") -> Pretraining:
    known: dict[str, dict[str, Any]] = {
        "pirl-near_frame": {"pirl": {"num_negatives": 8, "dim": 8}},
        "triplet-tracking": {"triplet": {"dim": 8}},
        "audio_visual": {"audio_visual": {"dim": 8, "sound_width": 4, "negatives": "both", "window_s": 0.5}},
    }
    view = ViewConfig(image_size=32)
    return Pretraining(
        "-",
        run,
        method,
        2.0,
        BATCH,
        view=view,
        backbone=BackboneConfig(norm="group"),
        parts=known.get(method, {}),
    )


def stream(
    dataset: DataSet, method: str, rank: int = 0, world: int = 1, place: Literal["data", "trainer"] = "data"
) -> Stream:
    views = Model.of(configured(method), dataset).views()
    plan = Plan.of(dataset, BATCH, 0, 2.0)
    return Stream(dataset, plan, views, StreamConfig(place), rank=rank, world=world)


def batch_of(one: Stream, step: int) -> Batch:
    """The batch of a step, by way of the columns that a data task returns, started at this step."""
    columns = next(MakeBatches(one, step, step + 1)({"id": np.zeros(1, np.int64)}))
    return one.batch(step, {name: values[0] for name, values in columns.items()})


def equal(batch: Batch, other: Batch) -> bool:
    assert batch.views.keys() == other.views.keys()
    assert batch.targets.keys() == other.targets.keys()
    pairs = [(batch.views[name], other.views[name]) for name in batch.views]
    pairs += [(batch.targets[name], other.targets[name]) for name in batch.targets]
    return all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_views_on_any_number_of_workers_and_wherever_they_are_made(
    dataset: DataSet, method: str
) -> None:
    whole = [batch_of(stream(dataset, method), step) for step in range(STEPS)]
    assert not any(equal(whole[0], batch) for batch in whole[1:])
    assert all(
        equal(batch, batch_of(stream(dataset, method, place="trainer"), batch.step)) for batch in whole
    )
    for world in (2, 4):
        for step in (1, 4):
            parts = [batch_of(stream(dataset, method, rank, world), step) for rank in range(world)]
            for name, view in whole[step].views.items():
                assert torch.equal(torch.cat([part.views[name] for part in parts]), view)
            for name, target in whole[step].targets.items():
                assert torch.equal(torch.cat([part.targets[name] for part in parts]), target)


def test_steps_of_one_task_are_those_of_tasks_of_their_own(dataset: DataSet) -> None:
    one = stream(dataset, "predict-frame_order")
    tasks = np.arange(-(-STEPS // one.task_steps))
    made = [
        {name: values[0] for name, values in row.items()} for row in MakeBatches(one, 0, STEPS)({"id": tasks})
    ]
    assert len(made) == STEPS
    for step, columns in enumerate(made):
        assert equal(one.batch(step, columns), batch_of(one, step))


def test_a_shared_stream_carries_views_of_clips(dataset: DataSet) -> None:
    streams = [stream(dataset, method) for method in ("predict-frame_order", "audio_visual")]
    union = shared.merge_streams(streams)
    batch = batch_of(union, 2)
    for one in streams:
        own = batch_of(one, 2)
        for name, key in shared.view_keys(one).items():
            assert torch.equal(batch.views[key], own.views[name])


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    dataset: DataSet, method: str, tmp_path: Path
) -> None:
    def worker(name: str) -> Worker:
        config = configured(method, str(tmp_path / name))
        run = Run(Folder(config.run))
        if not run.folder.exists():
            run = Run.begin(config, dataset, {})
        return Worker(
            Job(config.to_json(), run, dataset, Placement(1, 0, DataShare(), 1)), torch.device("cpu")
        )

    def steps(one: Worker, last: int) -> list[float]:
        losses = []
        for step in range(one.step, last):
            batch = batch_of(one.model.stream(dataset), step)
            losses.append(one.update(one.model, batch, 0.01).loss.item())
            one.step += 1
        return losses

    expected = steps(worker("whole"), 4)
    first = worker("run")
    begun = steps(first, 2)
    first.save()
    first.saver.wait()
    second = worker("run")
    second.restore()
    assert second.step == 2
    assert begun + steps(second, 4) == expected
    assert np.isfinite(expected).all()


def test_a_method_of_clips_is_refused_on_images_and_a_silent_set(
    dataset: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = make_dataset(tmp_path / "images", 20)
    with pytest.raises(UserError, match=r"learns from clips and the data set .* holds images"):
        Model.of(configured("predict-frame_order"), images)
    dataset.manifest.clips["with_sound"] = 0
    try:
        with pytest.raises(UserError, match=r"no clip of .* has any"):
            Model.of(configured("audio_visual"), dataset)
        Model.of(configured("triplet-tracking"), dataset)
        dataset.manifest.clips["with_sound"] = dataset.num_images - 1
        preflight.check_and_plan(configured("audio_visual", str(tmp_path / "run")), dataset)
        assert caplog.text.count("1 of") == caplog.text.count("have no sound") == 1
    finally:
        del dataset.manifest.clips["with_sound"]


def test_methods_of_images_read_the_frame_in_the_middle(dataset: DataSet) -> None:
    view = ViewConfig(image_size=32, min_scale=1.0, recipe="none")
    model = Model.of(Pretraining("-", "-", "predict-rotation", view=view), dataset)
    one = Stream(dataset, Plan.of(dataset, BATCH, 0, 1.0), model.views())
    assert one.read_columns == ("image", "label")
    assert batch_of(one, 0).views["transformed"].shape == (8, 1, 3, 32, 32)
