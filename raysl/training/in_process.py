"""Train with one worker in this process, without Ray: with `--local`, and by default on a small machine.

The worker, the order of the images, the functions of the stream and the checkpoints are those of a run on Ray with one
worker, so the numbers are the same to the last bit, and a run may continue with or without Ray. A trial of a sweep
trains like this inside its actor.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.fields import Checked
from raysl.ingestion import on_local_disk
from raysl.ray_cluster import gpus, this_machine
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Machines, Placement
from raysl.run import Run
from raysl.run.callbacks import Callbacks
from raysl.storage import Folder
from raysl.storage.lock import DriverLock
from raysl.stream.processes import DataProcesses
from raysl.stream.shared import Subscriber
from raysl.training import progress_actor, signals
from raysl.training.progress_actor import Progress, ProgressActor
from raysl.training.worker import OUT_OF_MEMORY, Job, Worker

_log = logging.getLogger("raysl.training")


@dataclass(frozen=True)
class LocalConfig(Checked):
    """Train a run without Ray.

    Args:
        local: train with one worker in this process and without Ray, which starts sooner (for the scripts in
            experiments/, --local means a small experiment). On a machine without a GPU and with at most 8 CPUs, a run
            of one worker does so in any case; with RAY_ADDRESS=local it uses Ray. Ray still starts if more than two
            shards are ingested first. The results equal those of one worker on Ray, bit for bit, and a run may continue
            with or without Ray.
    """

    local: bool = False


def check(config: Pretraining) -> None:
    """Raise UserError if a run cannot be trained without Ray."""
    if config.worker_counts() != (1,):
        raise UserError(
            f"--workers is {config.workers}, and --local trains with one worker. Give --workers 1, or omit --local."
        )
    run = Run.find(config.run)
    if run is None or not run.is_finished():
        Folder(config.run).check_writable()


def is_chosen(
    config: Pretraining, placement: Placement | None = None, subscriber: Subscriber | None = None
) -> bool:
    """Return True if a run trains without Ray although `--local` is not given, because that starts sooner.

    A run that is given resources, or a stream that others read too, does not, nor one on images in an object store,
    from which the tasks of Ray read more quickly.
    """
    alone = placement is None and subscriber is None and config.worker_counts() == (1,)
    return alone and not this_machine.needs_ray() and on_local_disk(config.data)


def local_placement() -> Placement:
    """Return the resources of one worker on this machine, as a Ray that runs here would divide them."""
    return cluster_placement.make_placement(
        1, Machines(({"CPU": float(this_machine.cpus()), "GPU": torch.cuda.device_count()},))
    )


def train(job: Job, num_steps: int, lock: DriverLock, callbacks: Callbacks, show_every_s: float) -> None:
    """Train in this thread until the last step of the job is saved, the lock is lost or this process is asked to stop.

    Raises:
        UserError: the run cannot go on, as `Worker.train`; or the machine has no more memory.
        Interrupted, SystemExit: as `raysl.training.launch.pretrain`.
    """
    on_gpu = job.placement.gpus_per_worker > 0
    if on_gpu and (found := gpus.problem()):
        raise UserError(found)
    share = job.placement.share
    # Forked processes cannot use the clients of object stores that this process has opened; a thread can.
    processes = max(1, round(share.cpus / share.cpus_per_task)) if job.dataset.folder.is_local else 0
    progress = _Progress(num_steps, job.config["epochs"], lock, callbacks, show_every_s)
    with (
        signals.catch_stop_signals(progress.stop.set) as stop,
        DataProcesses(processes) as data,
        _torch_settings(job.placement.threads_per_worker, on_gpu),
    ):
        try:
            worker = Worker(job, torch.device("cuda" if on_gpu else "cpu"), progress, data.columns)
            worker.restore()
            worker.train()
        except torch.OutOfMemoryError as error:
            raise UserError(f"{OUT_OF_MEMORY} {error}") from error
        progress.show()
        if stop.received.is_set() and worker.step < min(job.until or num_steps, num_steps):
            raise stop.exception(worker.step)


@contextmanager
def _torch_settings(threads: int, on_gpu: bool) -> Iterator[None]:
    """Set the number of torch's threads for the duration of the block; then restore its generators and settings."""
    before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.get_deterministic_debug_mode()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[0] if on_gpu else []):
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.benchmark = benchmark
        if torch.get_deterministic_debug_mode() != deterministic:  # to set it imports torch's compiler
            torch.use_deterministic_algorithms(deterministic > 0, warn_only=deterministic == 1)


class _Progress(Progress):
    """Show the progress of the worker, and stop it by the event `stop`."""

    def __init__(
        self, num_steps: int, epochs: float, lock: DriverLock, callbacks: Callbacks, show_every_s: float
    ) -> None:
        self.stop = threading.Event()
        self._num_steps = num_steps
        self._epochs = epochs
        self._lock = lock
        self._callbacks = callbacks
        self._show_every_s = show_every_s
        self._shown_s = -math.inf  # The first row is shown at once.
        # An object of this process, and not an actor.
        self._state = ProgressActor()

    def begin(self, step: int, workers: int, reached: int, saves: str) -> int:
        lost = self._state.begin(step, workers, reached, saves)
        for line in self._state.take_messages():
            _log.info(line)
        return lost

    def post(self, row: dict[str, Any]) -> None:
        self._state.post(row)
        self._callbacks.log([row])
        if time.monotonic() - self._shown_s > self._show_every_s:
            self.show()

    def say(self, message: str) -> None:
        _log.info(message)

    def show(self) -> None:
        """Log the newest row of metrics that has not been shown."""
        for row in self._state.take_rows()[-1:]:
            _log.info(progress_actor.format_row(row, self._num_steps, self._epochs))
        self._shown_s = time.monotonic()

    def stop_requested(self) -> bool:
        if self._lock.lost.is_set():
            self._lock.check()
        return self.stop.is_set()
