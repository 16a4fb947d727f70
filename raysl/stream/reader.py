"""Stream batches to a training worker: images are read, decoded, cropped and transformed; it gets uint8 views.

The batches of a worker's part of the plan, for all epochs, from any step, come in plan order. `load` makes them: in
tasks of Ray Data (`raysl.stream.data_tasks`), or without Ray in processes of its own (`raysl.stream.processes`). Every
batch carries its indices, which are compared with the plan: a lost or repeated image is an error.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from raysl.communication.device_copy import copy_on_side_stream, to_device
from raysl.dataset import DataSet, Rows
from raysl.errors import UserError
from raysl.fields import Checked
from raysl.rng import ImageRng
from raysl.stream import gpu_decode
from raysl.stream.decode import DecodeError, cut, cut_clips, cut_decoded, rng_name
from raysl.stream.plan import Plan
from raysl.stream.views import View

Columns = dict[str, npt.NDArray[Any]]
ColumnReader = Callable[["Stream", int, int], Iterator[Columns]]

# A data task that reads a remote store covers so many encoded bytes, and reads the next block while it decodes one.
_REMOTE_TASK_BYTES = 32 << 20


@dataclass(frozen=True)
class StreamConfig(Checked):
    """The stream: reading, decoding and augmenting images.

    Args:
        place: where decoded crops become views: "data" in the Ray Data tasks, "trainer" on the training device. Both
            give identical pixels.
        decode: "data": data tasks decode the files, on CPUs; "gpu": they send the files, and the GPU of the trainer
            decodes them and makes the views, whatever `place` says. You cannot change this flag when you resume a run,
            because the pixels differ slightly.
    """

    place: Literal["data", "trainer"] = "data"
    decode: Literal["data", "gpu"] = "data"


@dataclass(frozen=True)
class DataShare:
    """CPUs that one pipeline may use.

    Args:
        cpus_per_task: logical CPUs of one data task.
        cpus: logical CPUs of all tasks of the pipeline together.
    """

    cpus_per_task: float = 1.0
    cpus: float = 1.0


@dataclass
class Batch:
    """The batch of one training worker at one step.

    Args:
        step: step of the run.
        rows: indices and epochs of the images.
        labels_b: int64 (b,), classes from the data set; None without labels.
        views: uint8 (b, p, c, h, w) by name.
        targets: targets of the pretext transforms by view, as `Transformed.target`; views without a target are absent.
        wait_s: seconds that the trainer waited for the batch.
    """

    step: int
    rows: Rows
    labels_b: Tensor | None
    views: dict[str, Tensor]
    targets: dict[str, Tensor]
    wait_s: float = 0.0

    @functools.cached_property
    def indices_b(self) -> Tensor:
        """Indices of the images, int64 (b,), on the device of the views."""
        devices = [view.device for view in self.views.values()]
        return to_device(self.rows.indices_b, devices[0] if devices else torch.device("cpu"))


@dataclass(frozen=True)
class Stream:
    """The stream of one training worker.

    Args:
        dataset: the images.
        plan: the order of the images.
        views: the views of each image, by name. A name may end in "@...": such variants of a view have equal random
            numbers, so that one stream can carry the views of several runs (see `shared`).
        config: configuration of the stream.
        share: CPUs of the data tasks.
        rank: rank of this worker.
        world: number of workers.
        device: device of the tensors of the batches.
        schedule: function from a step to the names of its views; None when every step takes all views. Other views are
            not made. It must be picklable.
        reader: function from the stream, a first step and an end (exclusive) to the columns of these steps, in place
            of Ray Data; see `raysl.stream.processes`.
    """

    dataset: DataSet
    plan: Plan
    views: Mapping[str, View]
    config: StreamConfig = field(default_factory=StreamConfig)
    share: DataShare = field(default_factory=DataShare)
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    schedule: Callable[[int], Collection[str]] | None = None
    reader: ColumnReader | None = None

    def views_of(self, step: int) -> dict[str, View]:
        """Return the views of a step."""
        names = self.views if self.schedule is None else self.schedule(step)
        return {name: self.views[name] for name in names}

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Return the columns of the data set that the views need, and the label."""
        needed = {column: None for view in self.views.values() for column in view.columns}
        return (*needed, "label")

    def batches(self, start_step: int = 0, end_step: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps start_step, start_step + 1, ... below end_step, or to the end of the plan.

        Raises:
            UserError: a shard of the data set is damaged.
        """
        end = self.end(end_step)
        arrivals = self.columns(start_step, end)
        for step in range(start_step, end):
            started = time.perf_counter()
            batch = self.batch(step, next(arrivals))
            batch.wait_s = time.perf_counter() - started
            yield batch

    def end(self, end_step: int | None = None) -> int:
        """Return the end of the stream (exclusive): `end_step`, but at most the end of the plan."""
        return self.plan.num_steps if end_step is None else min(end_step, self.plan.num_steps)

    def columns(self, start_step: int, end_step: int) -> Iterator[Columns]:
        """Yield the batches as the data tasks send them: read-only arrays "index", "label", "view/NAME" and so on.

        `batch` makes a `Batch` of them. Raises as `batches` does.
        """
        if self.reader is not None:
            return self.reader(replace(self, reader=None), start_step, end_step)
        from raysl.stream import data_tasks

        return data_tasks.columns(self, start_step, end_step)

    @functools.cached_property
    def task_steps(self) -> int:
        """Steps of a data task: one block of the plan, or several if they are short and the data is remote."""
        if self.dataset.folder.is_local:
            return self.plan.steps_per_block
        images = self.plan.steps_per_block * self.plan.batch_size // self.world
        task_images = _REMOTE_TASK_BYTES * self.dataset.num_images / max(1, self.dataset.manifest.num_bytes)
        return self.plan.steps_per_block * max(1, round(task_images / images))

    def batch(self, step: int, columns: Columns) -> Batch:
        """Make the batch of a step from its columns, on the device, and compare its images with the plan."""
        expected = self.plan.rows(step, self.rank, self.world)
        if not np.array_equal(columns["index"], expected.indices_b):
            raise RuntimeError(
                f"At step {step}, worker {self.rank} of {self.world} received other images than planned. This is a bug "
                "in raysl; please report it."
            )
        parts: dict[str, dict[str, Tensor]] = {"view": {}, "target": {}, "crop": {}}
        for column, values in columns.items():
            kind, _, name = column.partition("/")
            if name:
                parts[kind][name] = self._to_device(values)
        labels = self._to_device(columns["label"]) if "label" in columns else None
        batch = Batch(step, expected, labels, parts["view"], parts["target"])
        crops = self._decoded(step, columns, expected) if gpu_decode.FILES in columns else parts["crop"]
        return self.finish(batch, crops)

    def _decoded(self, step: int, columns: Columns, rows: Rows) -> dict[str, Tensor]:
        """Decode the files of a batch on the device, and cut the source crops of its views."""
        sources = {name: view.source for name, view in self.views_of(step).items()}
        image_rng = ImageRng(self.plan.seed, rows.epochs_b, rows.indices_b)
        try:
            return cut_decoded(
                gpu_decode.decode_on(gpu_decode.unpack(columns), self.device), sources, image_rng
            )
        except DecodeError as error:
            raise self.damaged(error) from error

    def damaged(self, error: DecodeError) -> UserError:
        """Return the error for an image that could be decoded when it was ingested."""
        return UserError(
            f"An image in the data set {str(self.dataset.folder)!r} cannot be decoded, although it could when "
            f"the data was ingested: {error}. A shard file is damaged; run `raysl ingest` again."
        )

    def _to_device(self, values: npt.NDArray[Any]) -> Tensor:
        # Ray returns read-only views of its object store, of which torch makes no tensors.
        owned = values if values.flags.writeable else values.copy()
        return copy_on_side_stream(torch.from_numpy(owned), self.device)

    def finish(self, batch: Batch, crops: Mapping[str, Tensor]) -> Batch:
        """Make the views of a batch from its source crops, on the device of the crops."""
        image_rng = ImageRng(self.plan.seed, batch.rows.epochs_b, batch.rows.indices_b)
        for name, crops_bchw in crops.items():
            made = self.views[name](crops_bchw, image_rng.named(rng_name(name)).to(crops_bchw.device))
            batch.views[name] = made.crops_bpchw
            if made.target is not None:
                batch.targets[name] = made.target
        return batch


def step_blocks(plan: Plan, start: int, end: int) -> Iterator[range]:
    """Yield the steps start .. end - 1 in blocks that share windows of the data set."""
    edges = itertools.chain(
        [start],
        range(start - start % plan.steps_per_block + plan.steps_per_block, end, plan.steps_per_block),
        [end],
    )
    return (range(first, last) for first, last in itertools.pairwise(edges))


def load(stream: Stream, parts: Iterable[range]) -> Iterator[Columns]:
    """Yield the columns of the steps of some blocks, as `Stream.columns` does, computed in this process.

    While a block is made, the next one is read.

    Raises:
        UserError: a shard of the data set is damaged.
    """
    with ThreadPoolExecutor(1) as reader:
        reading: Future[tuple[range, list[Rows], pa.Table]] | None = None
        for steps in parts:
            before, reading = reading, reader.submit(_read, stream, steps)
            if before is not None:
                yield from _columns_of_steps(stream, *before.result())
        if reading is not None:
            yield from _columns_of_steps(stream, *reading.result())


def _read(stream: Stream, steps: range) -> tuple[range, list[Rows], pa.Table]:
    rows = [stream.plan.rows(step, stream.rank, stream.world) for step in steps]
    indices = np.concatenate([step_rows.indices_b for step_rows in rows])
    return steps, rows, stream.dataset.read(indices, stream.read_columns)


def _columns_of_steps(stream: Stream, steps: range, rows: list[Rows], table: pa.Table) -> Iterator[Columns]:
    offset = 0
    for step, step_rows in zip(steps, rows, strict=True):
        part = table.slice(offset, len(step_rows))
        offset += len(step_rows)
        columns: Columns = {"index": step_rows.indices_b}
        if "label" in part.column_names:
            columns["label"] = part.column("label").to_numpy()
        columns.update(_view_columns(stream, part, step_rows, stream.views_of(step)))
        yield columns


def _view_columns(stream: Stream, table: pa.Table, rows: Rows, views: Mapping[str, View]) -> Columns:
    if stream.config.decode == "gpu":
        return gpu_decode.pack(table.column("image").to_pylist())
    image_rng = ImageRng(stream.plan.seed, rows.epochs_b, rows.indices_b)
    sources = {name: view.source for name, view in views.items() if view.of_clips is None}
    batch = Batch(0, rows, None, {}, {})
    try:
        crops = cut(table.column("image").to_pylist(), sources, image_rng) if sources else {}
        crops |= cut_clips(table, views, image_rng, batch.views, batch.targets)
    except DecodeError as error:
        raise stream.damaged(error) from error
    if stream.config.place == "trainer":
        columns = {f"crop/{name}": crops_bchw.numpy() for name, crops_bchw in crops.items()}
        made = batch
    else:
        columns, made = {}, stream.finish(batch, crops)
    columns.update({f"view/{name}": view.numpy() for name, view in made.views.items()})
    columns.update({f"target/{name}": target.numpy() for name, target in made.targets.items()})
    return columns
