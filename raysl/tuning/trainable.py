"""The trainable of a sweep: a class that Ray Tune runs, and that takes the runs of a trial from rung to rung.

One call of `step` trains every seed of the trial up to the next rung of its schedule, and probes the checkpoint there.
A run with one worker trains inside of the trial's actor, which takes its CPUs and GPUs; so nothing is started at a
rung, and the actor is used again by the next trial. Runs with several workers train through Ray Train. Either way no
process of a run is left when `step` returns, so none is left when Ray Tune stops, pauses or replaces a trial.
Checkpoints of Ray Tune are small records; the weights are in the runs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import ray
from ray import tune
from ray.tune.result import AUTO_RESULT_KEYS, DEFAULT_METRIC

from raysl import checkpoint
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.run import Run
from raysl.storage import Folder
from raysl.storage.records import as_json
from raysl.training.launch import pretrain
from raysl.tuning import preparation
from raysl.tuning.config import SweepConfig
from raysl.tuning.preparation import TrialContext
from raysl.tuning.space import Values, corners, domain_ends

_RECORD = "raysl-trial.json"
# Ray Tune logs failures in one line each, and its actors stay in the folder of the driver.
SETTINGS = {"TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
# The numbers in each result.
_METRICS = ("score", "loss", "rung", "t", "epoch")


class PretrainTrainable(tune.Trainable):  # type: ignore[misc]
    """A trial: its values, its rung, and the folder of its runs.

    Subclasses set `context`; see `trainable`. Every result has "score" (mean over seeds, higher is better), "rung"
    (from 1), "t" (whole number proportional to the share of the schedule), "epoch", "loss" and "runs" (a row for each
    seed, as JSON).
    """

    context: TrialContext

    def setup(self, config: Values) -> None:
        if self.context.messages is not None:
            logger = logging.getLogger("raysl")
            logger.handlers = [_Forward(self)]
            logger.setLevel(logging.INFO)
        elif self._storage is not None:
            _check_metrics(self._storage)
        self.reset_config(config)

    def reset_config(self, new_config: Values) -> bool:
        self._values = dict(new_config)
        self._rung = 0
        self._home = f"trials/{self.trial_name}"
        # The home of the trial whose checkpoint this one copies first.
        self._source = ""
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a record of where the trial is."""
        record = {"trial": self.trial_name, "values": self._values, "rung": self._rung, "home": self._home}
        (Path(checkpoint_dir) / _RECORD).write_text(json.dumps(record))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Continue from a record; from another trial's, or with other values, in a copy of its runs."""
        record = json.loads((Path(checkpoint_dir) / _RECORD).read_text())
        self._rung = record["rung"]
        if record["trial"] == self.trial_name and record["values"] == as_json(self._values):
            self._home = record["home"]
        else:
            self._home, self._source = f"trials/{self.trial_name}/from-rung-{self._rung}", record["home"]

    def step(self) -> dict[str, Any]:
        context, rung = self.context, self._rung
        rows = context.known.get((self.trial_name, rung))
        if rows is None:
            if reason := context.failures.get(self.trial_name):
                raise UserError(reason)
            with ThreadPoolExecutor(context.seeds_at_once) as pool:
                rows = list(pool.map(self._scored, context.seeds))
        self._rung, self._source = rung + 1, ""
        return {
            "score": mean(row["score"] for row in rows),
            "loss": mean(row["loss"] for row in rows),
            "rung": self._rung,
            "t": context.times[rung],
            "epoch": context.base.epochs * context.shares[rung],
            "runs": json.dumps([dict(row) for row in rows]),
            "done": self._rung == len(context.shares),
        }

    def _scored(self, seed: int) -> dict[str, Any]:
        """Take one run from its newest checkpoint to the next rung, and score it."""
        started = time.monotonic()
        context, rung, home = self.context, self._rung, f"{self._home}/seed-{seed}"
        folder = Folder(context.out) / home
        config = replace(context.config_of(self._values), run=str(folder), seed=seed)
        until = context.until(config, rung)
        if self._source:
            copy_checkpoint(
                Folder(context.out) / self._source / f"seed-{seed}", context.until(config, rung - 1), folder
            )
        if context.keep_rungs:
            rungs = tuple(context.until(config, r) for r in range(max(0, rung - 1), rung + 1))
            config = replace(config, save=replace(config.save, keep_steps=rungs))
        run = self._trained(config, until)
        rows = context.scored(
            run, context.validation, ("trained",), str(until), in_process=context.in_process
        )
        score = float(rows[0]["value"])
        if not math.isfinite(score):
            raise UserError(f"The probe {context.probe!r} gave {score} at step {until}.")
        seconds, loss = round(time.monotonic() - started, 2), float(run.metrics_columns(["loss"])["loss"][-1])
        about = {"seed": seed, "step": until, "run": home, "seconds": seconds, **context.cost()}
        about |= {"metric": rows[0]["name"], "num_images": rows[0].get("num_test", 0)}
        return {**about, "score": score, "loss": loss}

    def _trained(self, config: Pretraining, until: int) -> Run:
        """Train a run up to a step, with its place at a shared stream if there is one."""
        context, subscriber = self.context, None
        if context.broker is not None:
            start, number = checkpoint.newest_step(Run(Folder(config.run)).checkpoints), int(self.trial_name)
            subscriber = ray.get(context.broker.subscriber.remote(number, config, start, until))
        local = context.in_process
        try:
            run = pretrain(
                config, until=until, placement=context.placement, subscriber=subscriber, local=local
            )
        finally:
            if context.broker is not None:
                context.broker.leave.remote(config.run)
        if run.newest().step != until:
            raise UserError(
                f"The run at {config.run!r} is at step {run.newest().step} and was to be scored at step {until}. "
                "Another program has trained it further. Give the sweep a folder of its own."
            )
        return run


def _check_metrics(storage: Any) -> None:
    """Raise UserError if the Tuner, its scheduler or its searcher needs a metric that no result has.

    Ray Tune itself compares the names at the first result, after the training, and never those of a scheduler's time.
    """
    try:
        with storage.storage_filesystem.open_input_file(f"{storage.experiment_fs_path}/tuner.pkl") as file:
            config = pickle.loads(file.read())["_tune_config"]
    except Exception:  # The folder or a package of the scheduler is on another machine, or no Tuner was used.
        return
    asked = [(config, "metric"), (config.scheduler, "metric"), (config.search_alg, "metric")]
    for one, name in (*asked, (config.scheduler, "_time_attr")):
        metric = getattr(one, name, None)
        for wanted in metric if isinstance(metric, list) else [metric]:
            if wanted not in (None, DEFAULT_METRIC, *_METRICS, *AUTO_RESULT_KEYS):
                raise UserError(
                    f"{type(one).__name__} needs the metric {wanted!r}, which the trials do not give. Use one of "
                    f"{', '.join(_METRICS)}; score is the primary metric of the probe."
                )


class _Forward(logging.Handler):
    """Send what is logged in the actor of a trial to the driver of the sweep."""

    def __init__(self, trial: PretrainTrainable) -> None:
        super().__init__()
        self._trial = trial

    def emit(self, record: logging.LogRecord) -> None:
        text = f"trial {int(self._trial.trial_name)}: {record.getMessage()}"
        self._trial.context.messages.actor.put.remote((record.levelno, text))


def tune_trainable(
    base: Pretraining,
    out: str,
    *,
    param_space: Mapping[str, Any] | None = None,
    train: str = "",
    validation: str = "",
    probe: str = "knn",
    seeds: tuple[int, ...] = (0,),
    rungs: tuple[float, ...] = (1 / 9, 1 / 3, 1.0),
    max_concurrent: int = 0,
    gpus_per_worker: float = 1,
) -> type[PretrainTrainable]:
    """Return a trainable for `ray.tune.Tuner` that pretrains and probes, for any scheduler, searcher and callback.

    The keys of `param_space` are dotted fields: `{"pirl.temperature": tune.loguniform(0.03, 0.5)}`. Each result has
    "score" (mean over seeds of the probe's primary metric, higher is better), "rung" (1, 2, ...), "t" (a whole number
    proportional to the steps done), "epoch" and "loss".

    The Tuner needs two environment variables, which are set for this process: TUNE_PRINT_ALL_TRIAL_ERRORS=0 and
    RAY_CHDIR_TO_TRIAL_DIR=0.

    Args:
        base: configuration of every run, except what varies, the seed and the folder.
        out: folder of the runs, a path or a URI.
        param_space: that of the Tuner; if it is given here too, both ends of every domain are checked at once.
        train: labeled data that the probe learns from; by default the pretraining images.
        validation: labeled data that trials are compared on; by default a tenth of `train`, which is held out.
        probe: name of the probe.
        seeds: every trial runs with each of them.
        rungs: shares of the schedule at which a trial is scored, in (0, 1], increasing; the last is 1.
        max_concurrent: runs at the same time; 0 for as many as leave a whole CPU to each trainer.
        gpus_per_worker: below 1, several small trainers share a GPU.

    Raises:
        UserError: an argument or the space is not allowed, or the cluster can never run such a trial.
    """
    names = tuple(param_space or ()) or ("-",)
    how: dict[str, Any] = {"max_concurrent": max_concurrent, "gpus_per_worker": gpus_per_worker}
    config = SweepConfig(out, names, train, validation, probe=probe, seeds=tuple(seeds), **how)
    preparation.check_workers(base)
    if not rungs or rungs[-1] != 1 or any(b <= a for a, b in zip((0.0, *rungs), rungs, strict=False)):
        raise UserError(f"rungs is {rungs}; give increasing shares of the schedule, of which the last is 1.")
    points = list(corners(domain_ends(param_space or {})))
    preparation.check_points(base, points)
    # Ray Tune decides how many trials there are.
    context, _ = preparation.make_trial_context(base, config, points, 10**6, rungs)
    os.environ.update(SETTINGS)
    return trainable(context)


def trainable(context: TrialContext) -> type[PretrainTrainable]:
    """Return the class of the trials of a sweep, for `tune.Tuner`."""

    class Pretrain(PretrainTrainable):
        @classmethod
        def default_resource_request(cls, config: Values) -> Any:
            # Ray Tune calls this on the driver when it makes a trial.
            context.config_of(config)
            return tune.PlacementGroupFactory([context.resources()])

    Pretrain.context = context
    return Pretrain


def copy_checkpoint(source: Folder, step: int, target: Folder) -> None:
    """Copy a checkpoint to a run that has none. Manifests are copied last, so that half a copy is no checkpoint.

    Raises:
        UserError: the checkpoint is no longer there.
    """
    there = Run(target).checkpoints
    if checkpoint.newest_checkpoint(there) is not None:
        return
    found = checkpoint.checkpoint_of_step(Run(source).checkpoints, step)
    if found is None:
        raise UserError(
            f"The checkpoint of step {step} is no longer in {str(source)!r}, and another trial copies it. Run the "
            "sweep again in another folder."
        )
    for name in sorted(found.folder.list(), key=lambda name: name.startswith("manifest-")):
        (there / found.folder.uri.rpartition("/")[2]).write(name, found.folder.read(name))
