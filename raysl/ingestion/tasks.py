"""Do numbered pieces of work in tasks of Ray Data, or in this process if they are few and the machine is small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from raysl import ray_cluster
from raysl.errors import UserError
from raysl.ray_cluster import this_machine
from raysl.storage.lock import DriverLock

# Largest number of shards that one process writes alone. Ray, which would write two of them at once, takes about as
# long to start.
_MOST_HERE = 2
# What a task does with the unit of a number; returns how many images were written and how many are bad.
Work = Callable[[int], tuple[int, int]]


def run(numbers: list[int], work: Work, cpus_per_task: float, lock: DriverLock) -> Iterator[tuple[int, int]]:
    """Return (images, bad) of the work for every number: an iterator that goes on as each task of Ray Data ends.

    On a machine that needs no Ray, this process does the work of a few numbers. Raises UserError if a task failed, or
    another process has taken over.
    """
    if len(numbers) <= _MOST_HERE and not this_machine.needs_ray():
        return _checked((_done(work, number) for number in numbers), lock)
    if numbers:
        ray_cluster.start()  # Here, before the progress is shown.
    return _checked(_on_ray(numbers, work, cpus_per_task), lock)


def _checked(done: Iterable[tuple[int, int, str]], lock: DriverLock) -> Iterator[tuple[int, int]]:
    """Yield (images, bad) of each result of `_done`. Raise UserError for its error, or if the lock is lost."""
    for written, bad, error in done:
        if error:
            raise UserError(error)
        if lock.lost.is_set():
            lock.check()
        yield written, bad


def _on_ray(numbers: list[int], work: Work, cpus_per_task: float) -> Iterator[tuple[int, int, str]]:
    """Yield the results of `_done` for each number, as the tasks of Ray Data end."""
    if not numbers:
        return
    import ray.data

    def do(batch: dict[str, Any]) -> dict[str, Any]:
        written, bad, errors = zip(*(_done(work, numbers[i]) for i in batch["id"]), strict=True)
        return {"images": np.array(written), "bad": np.array(bad), "error": np.array(errors, dtype=object)}

    tasks = ray.data.range(len(numbers), override_num_blocks=len(numbers))
    tasks = tasks.map_batches(do, batch_size=None, num_cpus=cpus_per_task)
    tasks.context.enable_progress_bars = False
    for row in tasks.iter_rows():
        yield row["images"], row["bad"], row["error"]


def _done(work: Work, number: int) -> tuple[int, int, str]:
    """Do the work of a number; return (images, bad, error).

    A UserError is returned as a value: as an exception of a task it would arrive wrapped, or be retried.
    """
    try:
        return (*work(number), "")
    except UserError as error:
        return 0, 0, str(error)
    except OSError as error:
        return 0, 0, f"Cannot read the source: {error}. The same command resumes from here."
