"""From a configuration to a finished run: checks, placement, Ray Train, progress. Runs on the driver."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from typing import Any

from raysl import checkpoint, cluster, progress
from raysl.cluster import Placement
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.ingest import resolve
from raysl.run import Run
from raysl.stream.plan import Plan
from raysl.train import Job, Network, work

# Restarts of the worker group before a run gives up. Each goes on from the newest checkpoint.
MAX_FAILURES = 8
# Between two lines of progress. Every row is in metrics.jsonl.
SHOW_EVERY_S = 5.0


def pretrain(
    config: Pretraining,
    say: Callable[[str], None] = print,
    *,
    until: int | None = None,
    placement: Placement | None = None,
) -> Run:
    """Runs pretraining to its end, or goes on with a run that was interrupted.

    Args:
        config: of the run.
        say: takes one line of progress at a time.
        until: stop after this step of the run's schedule, with a checkpoint to go on from; None for the end.
        placement: what the workers get; by default the whole cluster is divided among them.

    Returns:
        The run, finished or as far as `until`.

    Raises:
        UserError: something in the configuration, the data or the machine has to be mended; nothing is half-written.
    """
    cluster.start()
    # Before a raw source is ingested, which takes its time.
    placement = placement or cluster.place(config.workers)
    dataset = resolve(config.data)
    plan = Plan.of(dataset, config.batch_size, config.seed, config.epochs)
    # Built here only to find mistakes before any worker starts, and for its facts.
    network = Network(config, dataset.num_images, len(dataset.manifest.classes), dataset.manifest.fingerprint)
    network.views(config)
    run = Run.begin(config, dataset, network.facts())
    found = checkpoint.newest(run.checkpoints)
    if found is not None and found.step >= min(until or plan.num_steps, plan.num_steps):
        done = "finished" if found.step >= plan.num_steps else "there"
        say(f"The run at {config.run} is already {done} ({found.step} steps).")
        return run
    begun = f"goes on from step {found.step}" if found else "begins"
    say(
        f"{config.method} on {dataset.num_images:,} images {begun}: {plan.num_steps} steps of {config.batch_size}, "
        f"{config.workers} workers with {placement.cpus_per_worker:g} CPU and {placement.gpus_per_worker:g} GPU each, "
        f"data tasks with {placement.share.cpus_per_task:g} CPU."
    )
    if busy := placement.busy(config.workers):
        say(busy)
    job = Job(config.to_json(), run, dataset, placement, progress.open_board(), until)
    _fit(job, config.workers, lambda row: say(progress.line(row, plan.num_steps)))
    return run


def _fit(job: Job, workers: int, show: Callable[[dict[str, Any]], None]) -> None:
    """Runs Ray Train and shows the rows that arrive meanwhile."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        lambda: work(job),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=job.placement.gpus_per_worker > 0,
            resources_per_worker=job.placement.resources(),
        ),
        run_config=RunConfig(
            # Ray's own bookkeeping only: checkpoints are raysl's, in the run's folder.
            name=f"raysl-{uuid.uuid4().hex[:8]}",
            storage_path=f"{tempfile.gettempdir()}/raysl-ray-train-{os.getuid()}",
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    done = threading.Event()

    def follow() -> None:
        while not done.wait(SHOW_EVERY_S):
            for row in ray.get(job.board.take.remote())[-1:]:
                show(row)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        trainer.fit()
    except TrainingFailedError as error:
        progress.raise_failure(job.board)
        raise cluster.user_error(error) or UserError(
            f"Training stopped after {MAX_FAILURES} restarts: {str(error).strip().splitlines()[-1]}. The run keeps its "
            "last checkpoint; the same command goes on from there. RAYSL_LOG_TO_DRIVER=1 shows the workers' output."
        ) from error
    finally:
        done.set()
        thread.join()
    progress.raise_failure(job.board)
    for row in ray.get(job.board.take.remote())[-1:]:
        show(row)
