"""Launch a pretraining run: check it, place the workers, run Ray Train, and follow its progress. Runs on the driver."""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from raysl import checkpoint, console, ray_cluster
from raysl.config import Pretraining, methods, run_folder
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.ingestion import open_or_ingest
from raysl.ray_cluster import gpus, local_ray, shared_paths
from raysl.ray_cluster import placement as cluster_placement
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.run.callbacks import Callbacks
from raysl.storage import Folder
from raysl.storage.lock import DriverLock
from raysl.stream.plan import Plan
from raysl.stream.shared import Subscriber
from raysl.training import chance_loss, elastic, in_process, preflight, progress_actor, signals
from raysl.training.elastic import CapacityRequest, Resizing, WorkerGroup
from raysl.training.worker import EXCHANGE_TIMEOUT_S, Job, work

_log = logging.getLogger("raysl.training")

# Number of restarts of the workers without progress before a run gives up. Each resumes from the newest checkpoint.
MAX_RESTARTS_WITHOUT_PROGRESS = 8
# Interval between two lines of progress. Every row is in metrics.jsonl.
SHOW_EVERY_S = 5.0
# Time for a worker group to stop after a request, counted from the request or its last sign of life. Then it is killed:
# if a machine died unnoticed, two workers may share one machine's CPUs and starve their own data tasks.
STOP_WITHIN_S = 120.0


def pretrain(
    config: Pretraining,
    *,
    until: int | None = None,
    placement: Placement | None = None,
    callbacks: Callbacks | None = None,
    subscriber: Subscriber | None = None,
    local: bool | None = None,
) -> Run:
    """Run pretraining to its end, or resume an interrupted run.

    In the main thread, Ctrl-C, SIGTERM and SIGHUP save the run at its current step; a second signal stops at once.

    Args:
        config: configuration of the run.
        until: stop after this step, with a checkpoint; None for the last step of the schedule.
        placement: resources of the workers; by default they share the whole cluster.
        callbacks: code that follows the run; see `raysl.run.callbacks`.
        subscriber: position in a stream shared with other runs; see `raysl.stream.shared`.
        local: train with one worker in this process, without Ray; None for where `training.in_process` chooses it.

    Returns:
        The run, finished or at step `until`.

    Raises:
        UserError: the configuration, the data or the machine has to be fixed. Nothing is half-written.
        Interrupted, SystemExit: Ctrl-C, or SIGTERM or SIGHUP, arrived; the run is saved.
    """
    run_folder.check_free(config.run)
    counts = config.worker_counts()
    local = in_process.is_chosen(config, placement, subscriber) if local is None else local
    # What can be checked without Ray is checked before Ray starts.
    with console.working("Preparing the run ..."):
        ingested = DataSet.exists_at(config.data)
        checked = preflight.check_and_plan(config, DataSet.open(config.data)) if ingested else None
        group = _first_group(config, placement, local)
    dataset = open_or_ingest(config.data)
    plan, facts = checked or preflight.check_and_plan(config, dataset)
    end, callbacks = min(until or plan.num_steps, plan.num_steps), callbacks or Callbacks(())
    if preflight.is_done(config, end, plan.num_steps):  # The lock needs a folder that can be written.
        return Run(Folder(config.run))
    # Another driver may still train the run, or begin another one in its folder.
    with DriverLock(Folder(config.run), "run") as lock:
        if preflight.is_done(config, end, plan.num_steps):
            return Run(lock.folder)
        saved = checkpoint.newest_step(Run(lock.folder).checkpoints)
        run = Run.begin(config, dataset, facts)
        _announce(config, dataset, plan, group, saved, again=len(run.metadata()["sessions"]) > 1, local=local)
        actor = None if local else progress_actor.start_progress_actor()
        job = Job(
            config.to_json(), run, dataset, group.placement, actor, until, subscriber, EXCHANGE_TIMEOUT_S
        )
        begins = "" if local else group.placement.waiting_message(group.workers)
        with console.working(begins or "Starting the training ..."), callbacks.following(run, saved):
            if local:
                in_process.train(job, plan.num_steps, lock, callbacks, SHOW_EVERY_S)
            else:
                _Attempts(job, counts, end, plan.num_steps, lock, callbacks).run(group)
        chance_loss.warn_if_at_chance(run, facts.get("chance", math.inf), plan.num_steps)
    return run


def _announce(
    config: Pretraining,
    dataset: DataSet,
    plan: Plan,
    group: WorkerGroup,
    saved: int,
    again: bool,
    local: bool,
) -> None:
    _log.info(
        "%s on %s %s: %s of %d.",
        config.method,
        dataset.size_text,
        f"resumes from step {saved}" if saved else "begins again" if again else "begins",
        counted(plan.num_steps - saved, "more step" if saved else "step"),
        config.batch_size,
    )
    objective = methods.parse(config.method).objective
    if methods.is_experimental(objective):
        _log.warning(
            "%s is experimental: no result shows its use, and it may change or be removed.", objective
        )
    if local:
        _log.info("One worker trains in this process, without Ray.")
        return
    described = _described(group, config.worker_counts())
    _log.info(
        "%s; each task that prepares images takes %g CPU.", described, group.placement.share.cpus_per_task
    )


def _first_group(config: Pretraining, placement: Placement | None, local: bool) -> WorkerGroup:
    """Return the first worker group. Raise UserError if it has no GPU and the run needs one."""
    group = _start_ray_and_choose_group(config, placement, local)
    if config.stream.decode == "gpu" and not group.gpus:
        raise UserError(
            "--stream.decode gpu needs a GPU for each worker, and there is none. Train on GPUs, or begin a new run "
            "without it."
        )
    return group


def _start_ray_and_choose_group(config: Pretraining, placement: Placement | None, local: bool) -> WorkerGroup:
    """Start Ray and return the first worker group; or check that this process can train, and return its worker."""
    if local:
        in_process.check(config)
        return WorkerGroup(1, placement or in_process.local_placement())
    ray_cluster.start()
    shared_paths.refuse_local({"--run": config.run})
    ray_cluster.start_coordinator()
    counts = config.worker_counts()
    if placement is not None:
        return WorkerGroup(counts[0], placement)
    if len(counts) == 1:
        return WorkerGroup(counts[0], cluster_placement.make_placement(counts[0]))
    return elastic.largest_group(counts, elastic.machines())


def _described(group: WorkerGroup, counts: Sequence[int]) -> str:
    placement = group.placement
    gpus_each = f" and {placement.gpus_per_worker:g} GPU" if placement.gpus_per_worker else ""
    share = f"{placement.cpus_per_worker:g} CPU{gpus_each} each"
    among = f" (of {', '.join(map(str, counts))}, which divide the batch)" if len(counts) > 1 else ""
    return f"{counted(group.workers, 'worker')}{among} with {share}"


@dataclass(frozen=True)
class _Attempts:
    """Run a job as a sequence of attempts: each is a Ray Train run of fixed size from one checkpoint to another.

    An attempt ends at the last step, or when the workers stop with a checkpoint because the number of workers can
    change, because a machine will be reclaimed, or because this process got a signal. Ray restarts a group of fixed
    size that lost a worker; for an elastic run the loss ends the attempt. No attempt begins without the lock.
    """

    job: Job
    counts: Sequence[int]
    end: int
    num_steps: int
    lock: DriverLock
    callbacks: Callbacks

    @property
    def elastic(self) -> bool:
        """True if the number of workers may change."""
        return len(self.counts) > 1

    def run(self, group: WorkerGroup) -> None:
        """Run attempts until the last step is saved. With GPUs, check first that the workers can use them."""
        import ray

        if group.gpus:
            gpus.check(group.placement.gpus_per_worker, self.job.config["precision"])
        actor = self.job.progress_actor
        idle, saved = 0, checkpoint.newest_step(self.job.run.checkpoints)
        with signals.catch_stop_signals(lambda: actor.request_stop.remote(True)) as stop:
            while True:
                self.lock.check()
                error = self._attempt(group, stop.received)
                if self.lock.lost.is_set():
                    self.lock.check()
                before, saved = saved, checkpoint.newest_step(self.job.run.checkpoints)
                if saved >= self.end:
                    return
                idle = 0 if saved > before else idle + 1
                over = idle > MAX_RESTARTS_WITHOUT_PROGRESS or (error is not None and not self.elastic)
                if over and (error is not None or not stop.received.is_set()):
                    raise error or UserError(
                        f"Training stopped {idle} times at step {saved} without progress. "
                        f"{progress_actor.resume_hint(saved)}"
                    )
                ray.get(actor.request_stop.remote(stop.received.is_set()))
                group = self._next(group, stop.received)
                if stop.received.is_set():
                    raise stop.exception(saved)

    def _next(self, group: WorkerGroup, stopped: threading.Event) -> WorkerGroup:
        """Return the worker group of the next attempt; wait for machines until one fits."""
        waiting = False
        while self.elastic and not stopped.is_set():
            try:
                group = elastic.largest_group(self.counts, elastic.machines(), group.gpus)
                break
            except UserError as error:
                if not waiting:
                    _log.info("Waiting for machines. %s", error)
                waiting = True
                stopped.wait(SHOW_EVERY_S)
        if not stopped.is_set():
            _log.info("Continues with %s.", _described(group, self.counts))
        return group

    def _attempt(self, group: WorkerGroup, stopped: threading.Event) -> UserError | None:
        """Run Ray Train once and show its progress. While `stopped` is set, ask the workers to stop.

        Returns:
            The reason for a failure that another attempt may overcome; None if the attempt came to its end.

        Raises:
            UserError: no other attempt would succeed.
        """
        from ray.train import TrainingFailedError

        actor = self.job.progress_actor
        request = CapacityRequest(self.counts[-1], group, elastic.machines()) if self.elastic else None
        try:
            with self._followed(group, stopped):
                self._fit(group)
        except TrainingFailedError as error:
            self._show()
            progress_actor.raise_failure(actor)
            if found := ray_cluster.user_error(error):
                raise found from error
            again = progress_actor.resume_hint(checkpoint.newest_step(self.job.run.checkpoints))
            return UserError(
                f"Training stopped after {MAX_RESTARTS_WITHOUT_PROGRESS} restarts: "
                f"{str(error).strip().splitlines()[-1]}. {again} "
                "RAYSL_LOG_TO_DRIVER=1 shows the output of the workers."
            )
        finally:
            if request is not None:
                request.release()
        self._show()
        progress_actor.raise_failure(actor)
        return None

    @contextmanager
    def _followed(self, group: WorkerGroup, stopped: threading.Event) -> Iterator[None]:
        """Show progress in a thread during the block, and ask the workers to stop for `stopped` or a new size."""
        from ray.exceptions import RayError

        actor = self.job.progress_actor
        resizing = Resizing(self.counts, group)
        done = threading.Event()

        def follow() -> None:
            heard_s = time.monotonic()
            while not done.wait(SHOW_EVERY_S):
                with suppress(RayError):  # If Ray itself is lost, the attempt ends with the error.
                    due = self.elastic and resizing.due(elastic.machines())
                    if self._show() or not due:
                        heard_s = time.monotonic()
                    # The actor forgets the request of the signal if its process dies.
                    if due or stopped.is_set():
                        actor.request_stop.remote(True)
                    if self.lock.lost.is_set() or time.monotonic() - heard_s > STOP_WITHIN_S:
                        actor.kill_workers.remote()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _fit(self, group: WorkerGroup) -> None:
        """Run Ray Train in another thread, because in the main thread it takes over Ctrl-C and aborts the run."""
        failed: list[BaseException] = []

        def fit() -> None:
            try:
                with tempfile.TemporaryDirectory(
                    prefix="raysl-train-", dir=local_ray.folder(), ignore_cleanup_errors=True
                ) as scratch:
                    job = replace(self.job, placement=group.placement)
                    _trainer(job, group.workers, not self.elastic, scratch).fit()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=fit, daemon=True)
        try:
            thread.start()
            # A join without a time-out would hold back the signal handlers of the main thread.
            while thread.is_alive():
                thread.join(0.2)
        except BaseException:  # In a notebook, the workers would train on without the lock.
            self.job.progress_actor.fail.remote(UserError("Training was interrupted."))
            self.job.progress_actor.kill_workers.remote()
            if thread.is_alive():
                thread.join(5.0)
            raise
        if failed:
            raise failed[0]

    def _show(self) -> bool:
        """Log the messages and the newest row of metrics; return True if there were any."""
        import ray

        actor = self.job.progress_actor
        messages, rows = ray.get([actor.take_messages.remote(), actor.take_rows.remote()])
        for line in messages:
            _log.info(line)
        if messages and not rows and not messages[-1].startswith("step "):
            _log.info("Waiting for the first steps ...")
        for row in rows[-1:]:
            _log.info(progress_actor.format_row(row, self.num_steps, self.job.config["epochs"]))
        self.callbacks.log(rows)
        return bool(messages or rows)


def _trainer(job: Job, workers: int, restarts: bool, scratch: str) -> Any:
    """Return a trainer of Ray Train. With `restarts`, Ray Train itself restarts workers that were lost."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raysl.training import rendezvous

    # Callbacks that raysl does not need. Each starts a process before the first step, one after the other. Data sets
    # reach the workers without Ray Train. A Ray that raysl started ends with this process, so no placement group
    # outlives it.
    unneeded = {"DatasetsCallback"}
    if local_ray.folder():
        unneeded.add("PlacementGroupCleanerCallback")

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in unneeded]

    return Trainer(
        lambda: work(job),
        torch_config=rendezvous.config(job.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=job.placement.gpus_per_worker > 0,
            resources_per_worker=job.placement.resources(),
        ),
        run_config=RunConfig(
            # Only for Ray's own bookkeeping: raysl keeps its checkpoints in the folder of the run.
            name=f"raysl-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=FailureConfig(MAX_RESTARTS_WITHOUT_PROGRESS, controller_failure_limit=3)
            if restarts
            else FailureConfig(0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
