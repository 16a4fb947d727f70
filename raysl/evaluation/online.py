"""Online evaluation: probe the checkpoints of a run while it trains, with resources that the trainers do not need.

One process of the lowest priority computes the probes. On a cluster with GPUs it waits until the trainers have theirs
and another GPU is free. Checkpoints that were not probed by the last step are probed after it.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from raysl import checkpoint, probes, ray_cluster
from raysl.checkpoint import Checkpoint
from raysl.config import Pretraining, run_folder
from raysl.dataset import DataSet
from raysl.errors import MissingValueError, UserError
from raysl.evaluation.evaluate import check_data, probe
from raysl.evaluation.options import ProbeConfig
from raysl.evaluation.results import format_row_value, rows_of, rows_of_probe
from raysl.fields import Bounds, check
from raysl.ingestion import open_or_ingest
from raysl.ray_cluster import placement
from raysl.run import Run, TensorBoard
from raysl.run.callbacks import Callbacks
from raysl.storage import Folder, lock
from raysl.training.launch import pretrain

ERROR = "probes/error.txt"
TENSORBOARD = "tensorboard/probes"
_log = logging.getLogger("raysl.evaluation")
_LOOK_EVERY_S = 5.0
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class OnlineConfig:
    """Probe a run while it trains.

    Args:
        probe_every: steps between two evaluations of the run while it trains; 0 for none. Each evaluation saves a
            checkpoint, which is kept.
        train: labeled data that the probes learn from.
        test: labeled data that the probes are scored on.
        probes: names of probes, run with their default protocols. A probe with a required setting, such as detection,
            cannot be used.
    """

    probe_every: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    train: str = ""
    test: str = ""
    probes: tuple[str, ...] = ("knn",)

    def __post_init__(self) -> None:
        check(self)
        if self.probe_every and not (self.train and self.test and self.probes):
            raise UserError(
                f"--probe-every is {self.probe_every}, and the data or the probes are missing. Give labeled data with "
                "--train and --test, and at least one name with --probes."
            )
        if not self.probe_every and (self.train or self.test):
            raise UserError(
                "--train or --test is given and --probe-every is 0, so nothing would be probed. Give a "
                "number of steps with --probe-every."
            )


def pretrain_and_probe(
    config: Pretraining, online: OnlineConfig, callbacks: Callbacks | None = None, local: bool = False
) -> Run:
    """Pretrain as `raysl.training.launch.pretrain`, and probe every `online.probe_every` steps and after the last.

    Rows are added to the run with their step, and written to TensorBoard, as soon as they exist; the values are added
    to metrics.jsonl when the trainers, which write that file, have ended. A probe that fails stops neither training nor
    other probes: it is logged, its error is in probes/error.txt, and it is repeated after the last step. Raises
    UserError as `pretrain`, or if a probe does not exist or has a required setting, or its data cannot be read or do
    not suit it.
    """
    if not online.probe_every:
        return pretrain(config, callbacks=callbacks, local=local or None)
    if local:
        raise UserError(
            f"--probe-every is {online.probe_every}, and these probes run on Ray, which --local does not start. Omit "
            "one of the two; `raysl probe RUN` measures the run afterward."
        )
    run_folder.check_free(config.run)
    config = with_checkpoints(config, online)
    _check_defaults(online.probes)
    ray_cluster.start()
    train, test = open_or_ingest(online.train), open_or_ingest(online.test)
    check_data(ProbeConfig(online.probes).ready(), train, test)
    evaluator = OnlineEvaluator(
        Run(Folder(config.run)), online, train, test, config.worker_counts()[0], callbacks
    )
    thread = threading.Thread(target=evaluator.follow, daemon=True)
    thread.start()
    try:
        run = pretrain(config, callbacks=callbacks, local=False)
    finally:
        evaluator.training_ended.set()
    thread.join()
    evaluator.finish()
    return run


def _check_defaults(names: Sequence[str]) -> None:
    for name in names:
        flags = " and ".join(probes.required(name))
        if flags:
            raise MissingValueError(
                f"The probe {name} needs {flags}, which has no default, and online evaluation uses default protocols. "
                f"Remove {name} from --probes, and after training run: raysl probe RUN --probes {name} {flags} ..."
            )


def with_checkpoints(config: Pretraining, online: OnlineConfig) -> Pretraining:
    """Return the configuration with checkpoints at the steps of the probes. Raises UserError if it excludes them."""
    values: dict[str, Any] = {}
    for name in ("every_steps", "keep_every"):
        steps = getattr(config.save, name) or online.probe_every
        if online.probe_every % steps:
            flag = f"--save.{name}".replace("_", "-")
            raise UserError(
                f"{flag} is {steps} and --probe-every is {online.probe_every}, so some steps to probe have no "
                f"checkpoint. Make --probe-every a multiple of {flag}, or omit {flag}."
            )
        values[name] = steps
    return replace(config, save=replace(config.save, **values))


@dataclass
class OnlineEvaluator:
    """Probe the checkpoints of a run."""

    run: Run  # it need not have begun
    online: OnlineConfig  # when and what is probed
    train: DataSet
    test: DataSet
    trainers: int = 1  # smallest number of workers that train, each on a GPU if there are any
    callbacks: Callbacks | None = None  # code that is told the results
    # Set when the trainers have ended.
    training_ended: threading.Event = field(default_factory=threading.Event, init=False)
    _failed: set[int] = field(default_factory=set, init=False)
    _waiting_at: int = field(default=-1, init=False)

    def follow(self) -> None:
        """Probe the newest checkpoint that is due, repeatedly, until the trainers have ended."""
        # The priority of this thread only, and of those that it starts.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        # A probe of an encoder starts tasks of its own, which would take CPUs or GPUs from the trainers.
        names = [name for name in self.online.probes if not hasattr(probes.load(name)[1], "examine")]
        while names and not self.training_ended.wait(_LOOK_EVERY_S):
            if not lock.held_here(self.run.folder):
                continue  # The run has not begun, and the folder may hold another run.
            due = [found for found in self.due(names, self._rows()) if found.step not in self._failed]
            if due and self._has_free_gpu(due[-1].step):
                self._probe(due[-1], names, low_priority=True)

    def finish(self) -> list[int]:
        """Probe the remaining checkpoints and the last step, write metrics.jsonl, and return these steps."""
        names, rows = self.online.probes, self._rows()
        remaining = {found.step: found for found in self.due(names, rows)}
        last = self.run.newest()
        if _missing(last.step, names, rows):
            remaining[last.step] = last
        for step in sorted(remaining):
            self._probe(remaining[step], names, low_priority=False)
        self._add_to_metrics()
        return sorted(remaining)

    def due(self, names: Sequence[str], rows: Rows) -> list[Checkpoint]:
        """Return the checkpoints at steps to probe that lack a row of one of these probes, oldest first."""
        every = self.online.probe_every
        saved = [found for found in checkpoint.complete(self.run.checkpoints) if found.step % every == 0]
        return [found for found in saved if _missing(found.step, names, rows)]

    def _rows(self) -> list[dict[str, Any]]:
        """Return all rows of the trained backbone by these probes, with default protocols on these data sets."""
        data = self.train.manifest.fingerprint, self.test.manifest.fingerprint
        stored = rows_of(self.run)
        found = [
            row for name in self.online.probes for row in rows_of_probe(self.run, name, *data, rows=stored)
        ]
        return [row for row in found if (row["encoder"], row["layer"]) == ("trained", "pooled")]

    def _has_free_gpu(self, step: int) -> bool:
        """Return True if a probe can start without taking resources from the trainers."""
        import ray

        machines = placement.machines()
        if not machines.has_gpus:
            return True
        free = float(ray.available_resources().get("GPU", 0))
        # Trainers that have not begun, or are between two attempts, hold no GPU and would wait for the probe.
        room = free >= 1 and machines.totals()["GPU"] - free >= self.trainers
        if not room and self._waiting_at != step:
            self._waiting_at = step
            _log.info("The probe of step %d waits for a free GPU, at most until the end of training.", step)
        return room

    def _probe(self, found: Checkpoint, names: Sequence[str], low_priority: bool) -> None:
        """Run the probes that have no row at this checkpoint. A probe that fails does not stop the next."""
        wanted = missing = _missing(found.step, names, self._rows())
        cache = self.run.folder / f"features-{found.step}"
        try:
            while missing and not self._try_probes(found, missing, cache, low_priority):
                # Probes run in this order, so the first without rows is the one that failed.
                missing = _missing(found.step, missing, self._rows())[1:]
        finally:
            # The features are used once, and are larger than the checkpoint.
            cache.delete()
        self._report(found.step, wanted)

    def _try_probes(self, found: Checkpoint, names: Sequence[str], cache: Folder, low_priority: bool) -> bool:
        """Probe a checkpoint. Log an error and return False if it fails."""
        try:
            probe(
                self.run,
                self.train,
                self.test,
                probes=names,
                encoders=("trained",),
                cache=cache,
                checkpoint=found,
                low_priority=low_priority,
            )
        except Exception as error:  # No error of a probe may stop training.
            self._failed.add(found.step)
            _log.warning(
                "The probe of step %d failed: %s The run itself continues. See %s.", found.step, error, ERROR
            )
            self.run.folder.write(ERROR, "".join(traceback.format_exception(error)).encode())
            return False
        return True

    def _report(self, step: int, names: Sequence[str]) -> None:
        """Log the primary metrics of some probes at a step, and write them for TensorBoard."""
        rows = [row for row in self._rows() if row["primary"] and row["step"] >= step]
        new = [row for row in rows if row["step"] == step and row["probe"] in names]
        if not new:
            return
        line = ", ".join(f"{_metric_name(row).removeprefix('probe/')} {format_row_value(row)}" for row in new)
        _log.info("Probes of step %d: %s", step, line)
        if self.callbacks is not None:
            self.callbacks.report_probe_rows(new)
        if self.run.folder.is_local:
            # A session of TensorBoard hides earlier events from its step on, and the newest checkpoint may come first.
            tensorboard = TensorBoard(self.run.folder / TENSORBOARD, step)
            for row in sorted(rows, key=lambda row: int(row["step"])):
                tensorboard.add({"step": row["step"], _metric_name(row): row["value"]})
            tensorboard.flush()

    def _add_to_metrics(self) -> None:
        """Write the primary metrics into the rows of metrics.jsonl of their steps."""
        metrics = {row["step"]: row for row in self.run.metrics()}
        for row in self._rows():
            if row["primary"]:
                metrics.setdefault(row["step"], {"step": row["step"]})[_metric_name(row)] = row["value"]
        self.run.write_metrics(metrics[step] for step in sorted(metrics))


def _missing(step: int, names: Sequence[str], rows: Rows) -> list[str]:
    done = {row["probe"] for row in rows if row["step"] == step}
    return [name for name in names if name not in done]


def _metric_name(row: Mapping[str, Any]) -> str:
    return f"probe/{row['probe']}/{row['name']}"
