"""Probes during training: what a run is worth at its checkpoints, found with what the trainers leave over.

The probes run beside the trainers and never hold what these need: by one process of the lowest priority, and on a
cluster with GPUs only while the trainers have theirs and another one is free. What was not done by the last step is
done after it.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysl import checkpoint, probes, ray_cluster
from raysl.checkpoint import Checkpoint
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import Unset, UserError
from raysl.evaluation.evaluate import check_apart, probe
from raysl.evaluation.results import rows_under
from raysl.ingestion import resolve
from raysl.ray_cluster import lock, placement
from raysl.run import Run, TensorBoard
from raysl.storage import Folder
from raysl.training.launch import pretrain

ERROR = "probes/error.txt"
BOARD = "tensorboard/probes"
_LOOK_EVERY_S = 5.0


@dataclass(frozen=True)
class WatchConfig:
    """Probes during training.

    Args:
        probe_every: steps between two probes of the run while it trains; 0 for none. At each of them a checkpoint is
            saved, and kept.
        probe_train: labelled data that these probes learn from.
        probe_test: labelled data that they are scored on.
        probes: which ones, with their default protocols; so none that needs more, as detection needs boxes.
    """

    probe_every: int = 0
    probe_train: str = ""
    probe_test: str = ""
    probes: tuple[str, ...] = ("knn",)

    def __post_init__(self) -> None:
        if self.probe_every < 0:
            raise UserError(f"probe_every is {self.probe_every}; it must be 0 or a number of steps.")
        if self.probe_every and not (self.probe_train and self.probe_test and self.probes):
            raise UserError(
                f"probe_every is {self.probe_every}, and what to probe with is missing. Give labelled data with "
                "--probe-train and --probe-test, and at least one name to --probes."
            )
        if not self.probe_every and (self.probe_train or self.probe_test):
            raise UserError(
                "Data to probe with are given, and probe_every is 0: nothing would be probed. Give a number of steps "
                "with --probe-every."
            )


def pretrain_and_probe(config: Pretraining, watch: WatchConfig, say: Callable[[str], None] = print) -> Run:
    """`raysl.training.launch.pretrain`, with probes at every `watch.probe_every` steps and after the last.

    Rows go to the run's with the step that they belong to, and to TensorBoard, as they are found; into metrics.jsonl
    when the trainers, who write that file, have gone. A probe that fails does not stop anything, other probes neither:
    it says so, the error is in probes/error.txt, and it is tried again after the last step.

    Raises:
        UserError: as `pretrain`; or a probe does not exist or needs settings of its own, or the data for it cannot be
            read or do not suit it.
    """
    if not watch.probe_every:
        return pretrain(config)
    config = saving(config, watch)
    _check_defaults(watch.probes)
    ray_cluster.start()
    train, test = resolve(watch.probe_train), resolve(watch.probe_test)
    check_apart(watch.probes, train, test)
    watcher = Watcher(Run(Folder(config.run)), watch, train, test, say, config.worker_counts()[0])
    thread = threading.Thread(target=watcher.follow, daemon=True)
    thread.start()
    try:
        run = pretrain(config)
    finally:
        watcher.over.set()
    thread.join()
    watcher.finish()
    return run


def _check_defaults(names: Sequence[str]) -> None:
    """Raises UserError when a probe does not exist, or its defaults are not enough."""
    for name in names:
        flags = " and ".join(probes.required(name))
        if flags:
            raise Unset(
                f"The probe {name} needs {flags}, for which there is no default, and probes during training have only "
                f"their defaults. Leave {name} out of --probes, and after training run: raysl probe RUN --probes "
                f"{name} {flags} ..."
            )


def saving(config: Pretraining, watch: WatchConfig) -> Pretraining:
    """The run with checkpoints at the steps of the probes.

    Raises:
        UserError: it is to save, or to keep, at other steps only.
    """
    values = {}
    for name in ("every_steps", "keep_every"):
        steps = getattr(config.save, name) or watch.probe_every
        if watch.probe_every % steps:
            raise UserError(
                f"save.{name} is {steps} and probe_every is {watch.probe_every}: there would be no checkpoint to "
                f"probe. Make probe_every a multiple of save.{name}, or leave the latter out."
            )
        values[name] = steps
    return replace(config, save=replace(config.save, **values))


class Watcher:
    """Probes the checkpoints of a run.

    Args:
        run: it need not have begun.
        watch: when, and which probes.
        train: labelled data that they learn from.
        test: labelled data that they are scored on.
        say: takes one line at a time.
        trainers: the fewest that train, each on a GPU where there are any.

    Attributes:
        over: to be set when the trainers have gone.
    """

    def __init__(
        self,
        run: Run,
        watch: WatchConfig,
        train: DataSet,
        test: DataSet,
        say: Callable[[str], None],
        trainers: int = 1,
    ) -> None:
        self.run = run
        self.watch = watch
        self.train = train
        self.test = test
        self.say = say
        self.trainers = trainers
        self.over = threading.Event()
        self._failed: set[int] = set()
        self._told = -1

    def follow(self) -> None:
        """Probes the newest checkpoint that is due, again and again until the trainers have gone."""
        # This thread alone, and those that it starts.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        # Those that train or transform for themselves would take the trainers' CPUs, or GPUs that these come to want.
        names = [name for name in self.watch.probes if not hasattr(probes.load(name)[1], "examine")]
        while names and not self.over.wait(_LOOK_EVERY_S):
            if not lock.held_here(self.run.folder):
                continue  # this run has not begun, and what lies there may be another's
            due = [found for found in self.due(names) if found.step not in self._failed]
            if due and self._room(due[-1].step):
                self._probe(due[-1], names, spare=True)

    def finish(self) -> list[int]:
        """Probes what is left, the last step too, and writes all scores into metrics.jsonl.

        Returns:
            The steps that were left.
        """
        names = self.watch.probes
        left = {found.step: found for found in self.due(names)}
        last = self.run.newest()
        if self._lacking(last.step, names):
            left[last.step] = last
        for step in sorted(left):
            self._probe(left[step], names, spare=False)
        self._into_metrics()
        return sorted(left)

    def due(self, names: Sequence[str]) -> list[Checkpoint]:
        """The checkpoints at steps of the probes that lack a row of one of these, oldest first."""
        every = self.watch.probe_every
        there = [found for found in checkpoint.complete(self.run.checkpoints) if found.step % every == 0]
        return [found for found in there if self._lacking(found.step, names)]

    def _lacking(self, step: int, names: Sequence[str]) -> list[str]:
        """Those of the probes that have no rows at this step."""
        done = {row["probe"] for row in self._rows() if row["step"] == step}
        return [name for name in names if name not in done]

    def _rows(self) -> list[dict[str, Any]]:
        """What these probes have found, whoever asked: by their default protocols, with the data sets of the watch."""
        data = self.train.manifest.fingerprint, self.test.manifest.fingerprint
        found = [row for name in self.watch.probes for row in rows_under(self.run, name, *data)]
        return [row for row in found if (row["encoder"], row["layer"]) == ("trained", "pooled")]

    def _room(self, step: int) -> bool:
        """Whether a probe can start without taking anything from the trainers."""
        import ray

        found = placement.machines()
        if not found.has_gpus:
            return True
        free = float(ray.available_resources().get("GPU", 0))
        # Trainers that have not begun, or are between two legs, hold none, and would have to wait for the probe.
        room = free >= 1 and found.totals()["GPU"] - free >= self.trainers
        if not room and self._told != step:
            self._told = step
            self.say(
                f"The probe of step {step} waits until a GPU is free, at the latest for the end of training."
            )
        return room

    def _probe(self, found: Checkpoint, names: Sequence[str], spare: bool) -> None:
        """Those of the probes that are not done at this checkpoint. One that fails keeps no other from its turn."""
        before = left = self._lacking(found.step, names)
        cache = self.run.folder / f"features-{found.step}"
        try:
            while left and not self._succeeds(found, left, cache, spare):
                # They take their turns in this order: the first without rows is the one that failed.
                left = self._lacking(found.step, left)[1:]
        finally:
            # They are used once, and are larger than the checkpoint.
            cache.delete()
        self._tell(found.step, before)

    def _succeeds(self, found: Checkpoint, names: Sequence[str], cache: Folder, spare: bool) -> bool:
        """Probes a checkpoint, and says so when that fails."""
        try:
            probe(
                self.run,
                str(self.train.folder),
                str(self.test.folder),
                names,
                _quiet,
                encoders=("trained",),
                cache=cache,
                checkpoint=found,
                spare=spare,
            )
        except Exception as error:  # whatever it is, training goes on
            self._failed.add(found.step)
            self.say(f"The probe of step {found.step} failed: {error} The run itself goes on. See {ERROR}.")
            self.run.folder.write(ERROR, "".join(traceback.format_exception(error)).encode())
            return False
        return True

    def _tell(self, step: int, names: Sequence[str]) -> None:
        """Says the scores of some probes at a step, and writes them for TensorBoard."""
        scored = [row for row in self._rows() if row["headline"] and row["step"] >= step]
        told = [row for row in scored if row["step"] == step and row["probe"] in names]
        if not told:
            return
        line = ", ".join(f"{_name(row).removeprefix('probe/')} {row['value']:.4f}" for row in told)
        self.say(f"probe of step {step}: {line}")
        if self.run.folder.is_local:
            # A session hides what earlier ones wrote from its step on, and the newest checkpoint may come first.
            board = TensorBoard(self.run.folder / BOARD, step)
            for row in sorted(scored, key=lambda row: int(row["step"])):
                board.add({"step": row["step"], _name(row): row["value"]})
            board.flush()

    def _into_metrics(self) -> None:
        """Writes the scores into the rows of metrics.jsonl of their steps."""
        metrics = {row["step"]: row for row in self.run.metrics()}
        for row in self._rows():
            if row["headline"]:
                metrics.setdefault(row["step"], {"step": row["step"]})[_name(row)] = row["value"]
        self.run.write_metrics(metrics[step] for step in sorted(metrics))


def _name(row: Mapping[str, Any]) -> str:
    return f"probe/{row['probe']}/{row['name']}"


def _quiet(_: str) -> None:
    pass
