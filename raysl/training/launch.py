"""From a configuration to a finished run: checks, placement, Ray Train, progress. Runs on the driver."""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from raysl import checkpoint, ray_cluster
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.ingestion import resolve
from raysl.model import Model
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.lock import DriverLock
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.stream.shared import Subscriber
from raysl.training import elastic, progress_actor
from raysl.training.elastic import CapacityRequest, Resizing, WorkerGroup
from raysl.training.worker import Job, work

_log = logging.getLogger("raysl.training")

# Restarts of the workers without progress before a run gives up. Each goes on from the newest checkpoint.
MAX_FAILURES = 8
# Between two lines of progress. Every row is in metrics.jsonl.
SHOW_EVERY_S = 5.0
# For a team of another size to leave off, from when it was asked or last heard of. It is ended then: of a machine that
# died unseen, workers take the place on those that are left, and starve their own data tasks.
LEAVE_WITHIN_S = 120.0


def pretrain(
    config: Pretraining,
    say: Callable[[str], None] = print,
    *,
    until: int | None = None,
    placement: Placement | None = None,
    subscriber: Subscriber | None = None,
) -> Run:
    """Runs pretraining to its end, or goes on with a run that was interrupted.

    Args:
        config: of the run.
        say: takes one line of progress at a time.
        until: stop after this step of the run's schedule, with a checkpoint to go on from; None for the end.
        placement: what the workers get; by default the whole cluster is divided among them.
        seat: at a stream that is shared with other runs; see `raysl.stream.shared`.

    Returns:
        The run, finished or as far as `until`.

    Raises:
        UserError: something in the configuration, the data or the machine has to be mended; nothing is half-written.
        SystemExit: the process got SIGTERM; the run was saved at the step where it was.
    """
    ray_cluster.start()
    counts = config.worker_counts()
    # Before a raw source is ingested, which takes its time.
    group = _first_team(counts, placement)
    dataset = resolve(config.data)
    plan = config.plan(dataset)
    # Built here only to find mistakes before any worker starts, and for its facts.
    model = Model.of(config, dataset)
    model.views()
    run = Run.begin(config, dataset, model.describe())
    end = min(until or plan.num_steps, plan.num_steps)
    saved = _saved(run)
    if saved >= end:
        done = "finished" if saved >= plan.num_steps else "there"
        say(f"The run at {config.run} is already {done} ({saved} steps).")
        return run
    begun = f"goes on from step {saved}" if saved else "begins"
    say(
        f"{config.method} on {dataset.num_images:,} images {begun}: {plan.num_steps} steps of {config.batch_size}, "
        f"{_described(group, counts)}, data tasks with {group.placement.share.cpus_per_task:g} CPU."
    )
    if busy := group.placement.busy(group.workers):
        say(busy)
    _log.info("Starting the workers ...")
    job = Job(config.to_json(), run, dataset, group.placement, progress_actor.open_board(), until)
    with DriverLock(run.folder, say, "run") as lock:
        _Legs(job, counts, end, plan.num_steps, say, lock).run(group)
    return run


def _first_team(counts: Sequence[int], placement: Placement | None) -> WorkerGroup:
    if placement is not None:
        return WorkerGroup(counts[0], placement)
    if len(counts) == 1:
        return WorkerGroup(counts[0], cluster_placement.place(counts[0]))
    return elastic.gather(counts, elastic.machines())


def _described(group: WorkerGroup, counts: Sequence[int]) -> str:
    placement = group.placement
    share = f"{placement.cpus_per_worker:g} CPU and {placement.gpus_per_worker:g} GPU each"
    among = f" (of {', '.join(map(str, counts))}, which divide the batch)" if len(counts) > 1 else ""
    return f"{group.workers} workers{among} with {share}"


def _saved(run: Run) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    found = checkpoint.newest(run.checkpoints)
    return found.step if found else 0


@dataclass(frozen=True)
class _Legs:
    """A run in legs: each is a run of Ray Train with a fixed number of workers, from one checkpoint to another.

    A leg ends at the last step, or where the workers left off with a checkpoint: because there is room for another
    number of them, because one of their machines is about to be taken away, or because this process got SIGTERM. Ray
    restarts a team of fixed size that lost a worker; for one that may change its size, that is the end of a leg too.

    Args:
        job: without the placement of a leg.
        counts: numbers of workers that are allowed, in order.
        end: the step to stop after.
        num_steps: of the whole run.
        say: takes one line of progress at a time.
        lease: of the run, without which no leg begins.
    """

    job: Job
    counts: Sequence[int]
    end: int
    num_steps: int
    say: Callable[[str], None]
    lock: DriverLock

    @property
    def elastic(self) -> bool:
        """Whether the team may change its size."""
        return len(self.counts) > 1

    def run(self, group: WorkerGroup) -> None:
        """Runs legs until the last step is saved."""
        import ray

        board = self.job.board
        idle, saved = 0, _saved(self.job.run)
        with _sigterm(lambda: board.ask_to_leave.remote(True)) as terminated:
            while True:
                self.lock.check()
                error = self._leg(group)
                if self.lock.lost.is_set():
                    self.lock.check()
                before, saved = saved, _saved(self.job.run)
                if saved >= self.end:
                    return
                idle = 0 if saved > before else idle + 1
                over = idle > MAX_FAILURES or (error is not None and not self.elastic)
                if over and not terminated.is_set():
                    raise error or UserError(
                        f"Training left off {idle} times after step {saved} without a step between. The same command "
                        "goes on from there."
                    )
                ray.get(board.ask_to_leave.remote(terminated.is_set()))
                group = self._next(group, terminated)
                if terminated.is_set():
                    self.say(
                        f"Stopped by SIGTERM after step {saved}, which is saved. The same command goes on."
                    )
                    raise SystemExit(128 + signal.SIGTERM)

    def _next(self, group: WorkerGroup, terminated: threading.Event) -> WorkerGroup:
        """The team of the next leg; waits for machines until there is room for one."""
        waiting = False
        while self.elastic and not terminated.is_set():
            try:
                group = elastic.gather(self.counts, elastic.machines(), group.gpus)
                break
            except UserError as error:
                if not waiting:
                    self.say(f"Waiting for machines. {error}")
                waiting = True
                terminated.wait(SHOW_EVERY_S)
        if not terminated.is_set():
            self.say(f"Goes on with {_described(group, self.counts)}.")
        return group

    def _leg(self, group: WorkerGroup) -> UserError | None:
        """Runs Ray Train and shows what is heard from it.

        Returns:
            Why it failed, if another leg may do better; None if it came to its end.

        Raises:
            UserError: no other leg would.
        """
        from ray.train import TrainingFailedError

        board = self.job.board
        resizing = Resizing(self.counts, group)
        request = CapacityRequest(self.counts[-1], group, elastic.machines()) if self.elastic else None
        done = threading.Event()

        def follow() -> None:
            heard_s = time.monotonic()
            while not done.wait(SHOW_EVERY_S):
                due = self.elastic and resizing.due(elastic.machines())
                if self._show() or not due:
                    heard_s = time.monotonic()
                if due:
                    board.ask_to_leave.remote(True)
                if self.lock.lost.is_set() or time.monotonic() - heard_s > LEAVE_WITHIN_S:
                    board.dismiss.remote()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            with tempfile.TemporaryDirectory(prefix="raysl-train-", ignore_cleanup_errors=True) as scratch:
                job = replace(self.job, placement=group.placement)
                _trainer(job, group.workers, self.elastic, scratch).fit()
        except TrainingFailedError as error:
            progress_actor.raise_failure(board)
            if found := ray_cluster.user_error(error):
                raise found from error
            return UserError(
                f"Training stopped after {MAX_FAILURES} restarts: {str(error).strip().splitlines()[-1]}. The run keeps "
                "its last checkpoint; the same command goes on from there. RAYSL_LOG_TO_DRIVER=1 shows the workers' "
                "output."
            )
        finally:
            done.set()
            thread.join()
            if request is not None:
                request.take_back()
        progress_actor.raise_failure(board)
        self._show()
        return None

    def _show(self) -> bool:
        """Shows what there is; whether there was anything."""
        import ray

        news, rows = ray.get([self.job.board.news.remote(), self.job.board.take.remote()])
        for line in news:
            self.say(line)
        for row in rows[-1:]:
            self.say(progress_actor.line(row, self.num_steps))
        return bool(news or rows)


def _trainer(job: Job, workers: int, once: bool, scratch: str) -> Any:
    """A run of Ray Train. With `once`, it does not restart the workers by itself."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raysl.training import rendezvous

    return TorchTrainer(
        lambda: work(job),
        torch_config=rendezvous.config(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=job.placement.gpus_per_worker > 0,
            resources_per_worker=job.placement.resources(),
        ),
        run_config=RunConfig(
            # Ray's own bookkeeping only: checkpoints are raysl's, in the run's folder.
            name=f"raysl-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=FailureConfig(0, controller_failure_limit=0, max_preemption_failures=0)
            if once
            else FailureConfig(MAX_FAILURES, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


@contextmanager
def _sigterm(act: Callable[[], object]) -> Iterator[threading.Event]:
    """While it lasts, the first SIGTERM to this process sets the event and calls `act`; the next one ends it at once.

    Signals reach the main thread only; in another one, as in sweeps, nothing changes.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        told.set()
        act()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
