"""The source of a stream on Ray: tasks of Ray Data make the batches of one training worker, in plan order.

A task receives step numbers, reads the images itself and may run ahead of the trainer. A long stream is made by
several pipelines, one after the other; each starts shortly before the previous one ends.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysl.stream.reader import Columns, Stream, load, step_blocks

# Each block costs the task and the trainer some milliseconds, whatever its size.
_BLOCK_BYTES = 8 << 20
# Tasks of one Ray Data execution. Listing them takes half a second; they cover hundreds of thousands of photos, or
# millions of small images.
TASKS_PER_EXECUTION = 512
# Batches whose columns or lengths change from step to step are pickled into one column: Arrow needs fixed columns.
_PACKED = "packed"
# Shortest time between two steps of the loop of Ray Data's executor.
_LOOP_PERIOD_S = 0.01


def columns(stream: Stream, start_step: int, end_step: int) -> Iterator[Columns]:
    """Yield the columns of steps start_step .. end_step - 1, as `Stream.columns` does, from tasks of Ray Data.

    Raises:
        UserError: a shard of the data set is damaged.
    """
    opener = ThreadPoolExecutor(1)
    # Steps before the end of a pipeline at which the next one starts.
    ahead = stream.task_steps * (1 + max(1, int(stream.share.cpus / stream.share.cpus_per_task)))
    try:
        opened = opener.submit(_open, stream, start_step, end_step) if start_step < end_step else None
        while opened is not None:
            step, end, rows = opened.result()
            opened = None
            for row in rows:
                step += 1
                # The last tasks of this pipeline have their CPUs now; tasks of the next pipeline use the others.
                if opened is None and end < end_step and end - step <= ahead:
                    opened = opener.submit(_open, stream, end, end_step)
                sent = {name: values[0] for name, values in row.items()}
                yield pickle.loads(bytes(sent[_PACKED])) if _PACKED in sent else sent
    finally:
        opener.shutdown(wait=False, cancel_futures=True)


def _open(stream: Stream, step: int, end_step: int) -> tuple[int, int, Iterator[Any]]:
    """Start a pipeline and wait for its first batch; return its first step, its end and its rows."""
    end = min(end_step, (step // stream.task_steps + TASKS_PER_EXECUTION) * stream.task_steps)
    rows = iter(pipeline(stream, step, end).iter_batches(batch_size=1, prefetch_batches=2))
    return step, end, itertools.chain([next(rows)], rows)


def pipeline(stream: Stream, start: int, end: int) -> Any:
    """Return a Ray Data set whose rows are the batches of this worker for steps start .. end - 1."""
    import ray.data
    from ray.data import ExecutionResources

    num_tasks = -(-end // stream.task_steps) - start // stream.task_steps
    # Not `ray.data.range`: its read tasks need a whole CPU each.
    tasks = ray.data.from_items(
        [{"id": number} for number in range(num_tasks)], override_num_blocks=num_tasks
    )
    # The context of this data set alone: that of the process belongs to the program.
    context = tasks.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=stream.share.cpus)
    context.target_max_block_size = _BLOCK_BYTES
    # Let tasks buffer all of their output; otherwise only the first could run.
    context._max_num_blocks_in_streaming_gen_buffer = 64
    context.custom_execution_callback_classes = [_SlowLoop]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Batches that another machine makes cross the network, which is still better than waiting for CPUs of this one.
    this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return tasks.map_batches(
        MakeBatches(stream, start, end),
        batch_size=None,
        num_cpus=stream.share.cpus_per_task,
        label_selector=this_node,
        fallback_strategy=[{"label_selector": {}}],
    )


class _SlowLoop:
    """Limit the loop of Ray Data's executor to a hundred steps a second.

    The loop waits for tasks with new output. A task ahead of the trainer always has some, so the wait returns at once,
    and the loop, a thread of the trainer, would use half a core.
    """

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: object) -> None:
        time.sleep(max(0.0, self.last + _LOOP_PERIOD_S - time.perf_counter()))
        self.last = time.perf_counter()

    def before_execution_starts(self, executor: object) -> None: ...

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...


@functools.lru_cache(maxsize=2)
def _unpickled(pickled: bytes) -> Any:
    import ray.cloudpickle

    return ray.cloudpickle.loads(pickled)


@dataclass(frozen=True)
class MakeBatches:
    """The function of a data task of Ray Data: make the batches of one block of the plan."""

    stream: Stream
    start: int
    end: int

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that runs many tasks unpickles the stream once: the manifest of 100 M images takes 2.6 s.
        import ray.cloudpickle

        return type(self)._from_pickle, (ray.cloudpickle.dumps((self.stream, self.start, self.end)),)

    @classmethod
    def _from_pickle(cls, pickled: bytes) -> Any:
        return cls(*_unpickled(pickled))

    def __call__(self, task: Columns) -> Iterator[Columns]:
        length = self.stream.task_steps
        parts: list[range] = []
        for number in task["id"]:
            first = max(self.start, (self.start // length + int(number)) * length)
            parts += step_blocks(self.stream.plan, first, min(self.end, first - first % length + length))
        for columns in load(self.stream, parts):
            if self.stream.schedule is not None or self.stream.config.decode == "gpu":
                columns = {_PACKED: np.array(pickle.dumps(columns, protocol=5), dtype=object)}
            # A batch is one row of Ray Data, which is never split. With images as rows, the trainer would have to
            # put batches together.
            yield {name: values[None] for name, values in columns.items()}
