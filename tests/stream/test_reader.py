"""The stream through Ray Data: the same pixels for any number of workers, from any step, whatever is killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from raysl.augment import recipe
from raysl.dataset import SHARDS, DataSet
from raysl.errors import UserError
from raysl.pretext import Geometry, build
from raysl.stream.plan import Plan
from raysl.stream.reader import Batch, DataShare, Stream, StreamConfig
from raysl.stream.views import View
from tests.data import make_dataset

pytestmark = pytest.mark.ray

BATCH = 16
SHARE = DataShare(cpus_per_task=0.5, cpus=1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", 150)


def views() -> dict[str, View]:
    geometry = Geometry(image_size=32)
    # A label, nothing, and a target of many numbers for each image.
    names = {"transformed": "jigsaw", "image": "identity", "colors": "colorization"}
    return {name: View(build(spec, {}, geometry), recipe("pirl")) for name, spec in names.items()}


def stream(dataset: DataSet, rank: int = 0, world: int = 1, place: str = "data", epochs: float = 2) -> Stream:
    # Small pieces, so that the run takes ten data tasks.
    plan = replace(Plan.of(dataset, BATCH, seed=3, epochs=epochs), groups_per_window=2, steps_per_block=2)
    configs = {
        "data": StreamConfig(),
        "trainer": StreamConfig(place="trainer"),
        "gpu": StreamConfig(decode="gpu"),
    }
    config = configs[place]
    return Stream(dataset, plan, views(), config, SHARE, rank, world)


def fingerprints(batch: Batch) -> list[tuple[int, int, str]]:
    """(epoch, index, hash of all pixels and targets) of every image of a batch."""
    found = []
    for i in range(len(batch.rows)):
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(batch.views):
            digest.update(batch.views[name][i].numpy().tobytes())
            if name in batch.targets:
                digest.update(batch.targets[name][i].numpy().tobytes())
        found.append((int(batch.rows.epochs_b[i]), int(batch.rows.indices_b[i]), digest.hexdigest()))
    return found


def whole(
    dataset: DataSet, world: int, start: int = 0, place: str = "data"
) -> list[list[tuple[int, int, str]]]:
    """The global batches of a run of `world` workers, from step `start` on."""
    ranks = [stream(dataset, rank, world, place).batches(start) for rank in range(world)]
    return [[one for part in parts for one in fingerprints(part)] for parts in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def alone(ray_session: None, dataset: DataSet) -> list[list[tuple[int, int, str]]]:
    return whole(dataset, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_same_images_and_pixels_on_any_number_of_workers(
    dataset: DataSet, alone: list[list[tuple[int, int, str]]], world: int
) -> None:
    assert whole(dataset, world) == alone


def test_every_index_exactly_once_an_epoch(dataset: DataSet, alone: list[list[tuple[int, int, str]]]) -> None:
    counts = Counter((epoch, index) for batch in alone for epoch, index, _ in batch)
    for epoch in (0, 1):
        assert [counts[epoch, index] for index in range(dataset.num_images)] == [1] * dataset.num_images


def test_augmentation_differs_between_epochs(alone: list[list[tuple[int, int, str]]]) -> None:
    first = {(epoch, index): pixels for batch in alone for epoch, index, pixels in batch}
    assert all(first[0, index] != first[1, index] for index in range(150))


def test_starts_at_any_step(dataset: DataSet, alone: list[list[tuple[int, int, str]]]) -> None:
    assert whole(dataset, 2, start=7) == alone[7:]


@pytest.mark.parametrize("place", ["trainer", "gpu"])
def test_views_made_on_the_trainer_are_the_same(
    dataset: DataSet, alone: list[list[tuple[int, int, str]]], place: str
) -> None:
    """Also with files that the trainer decodes: PNG is decoded by its CPU."""
    assert whole(dataset, 1, start=15, place=place) == alone[15:]


def test_the_settings_of_ray_data_stay_as_the_program_has_them(alone: object) -> None:
    from ray.data import DataContext

    now, fresh = DataContext.get_current(), DataContext()
    assert now.execution_options == fresh.execution_options
    assert now.target_max_block_size == fresh.target_max_block_size
    assert now.custom_execution_callback_classes == fresh.custom_execution_callback_classes


def kill_data_workers() -> int:
    """Kills the processes of this session's Ray that run, or have just run, a task; returns how many."""
    killed = 0
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and ("MapBatches" in title or "IDLE" in title):
                process.send_signal(signal.SIGKILL)
                killed += 1
    return killed


# The same happens to a whole run in tests/training/test_launch.py.
@pytest.mark.slow
def test_survives_the_death_of_data_tasks(dataset: DataSet, alone: list[list[tuple[int, int, str]]]) -> None:
    seen, killed = [], 0
    for batch in stream(dataset).batches():
        seen.append(fingerprints(batch))
        if batch.step in (1, 9):
            killed += kill_data_workers()
    assert killed > 0
    assert seen == alone


@dataclass(frozen=True)
class InTurn:
    """The two views in turn."""

    def __call__(self, step: int) -> tuple[str]:
        return (("transformed", "image")[step % 2],)


@pytest.mark.parametrize("place", ["data", "trainer"])
def test_a_step_may_take_some_of_the_views(dataset: DataSet, ray_session: None, place: str) -> None:
    every = {batch.step: batch for batch in stream(dataset, epochs=0.6).batches()}
    some = list(replace(stream(dataset, place=place, epochs=0.6), schedule=InTurn()).batches())
    assert [batch.step for batch in some] == list(every)
    for batch in some:
        (name,) = batch.views
        assert name == InTurn()(batch.step)[0]
        assert torch.equal(batch.views[name], every[batch.step].views[name])
        assert batch.targets.keys() == ({name} & every[batch.step].targets.keys())
        assert torch.equal(batch.labels_b, every[batch.step].labels_b)  # type: ignore[arg-type]


def test_labels_come_with_their_images(dataset: DataSet, ray_session: None) -> None:
    batch = next(stream(dataset).batches())
    table = dataset.read(batch.rows.indices_b, ["label"])
    assert batch.labels_b is not None
    assert batch.labels_b.tolist() == table.column("label").to_pylist()


def test_damaged_shard_is_an_error_of_the_user(tmp_path: Path, ray_session: None) -> None:
    damaged = make_dataset(tmp_path / "set", 64)
    shard = tmp_path / "set" / SHARDS / "00001.parquet"
    data = bytearray(shard.read_bytes())
    data[100:900] = bytes(np.random.default_rng(0).integers(0, 256, 800, dtype=np.uint8))
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        list(stream(damaged).batches())
