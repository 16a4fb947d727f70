"""A sweep: Ray Tune runs its trials, its journal makes it continue after any interruption."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysl import ray_cluster
from raysl.config import FREE, Pretraining, differences
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.evaluation.evaluate import probe
from raysl.ray_cluster.lock import DriverLock
from raysl.run import Run
from raysl.storage import Folder, filesystem
from raysl.training.progress_actor import duration
from raysl.tuning import algorithms
from raysl.tuning.config import POPULATION, SweepConfig
from raysl.tuning.journal import FORMAT, Journal
from raysl.tuning.preparation import PreparedSweep, prepare
from raysl.tuning.results import SweepResults
from raysl.tuning.space import Space

if TYPE_CHECKING:
    from raysl.tuning.result_order import InOrder, Numbered

_log = logging.getLogger("raysl.tuning")

# Fields of SweepConfig that may differ when a sweep is continued.
_MAY_DIFFER = (
    *("out", "samples", "retry", "max_concurrent", "gpus_per_worker", "share_stream"),
    *("train", "validation", "test", "vary"),
)
# A name of its own: the folder is deleted whenever a sweep begins or continues.
_TUNE = "_ray_tune"


def sweep(base: Pretraining, config: SweepConfig) -> list[dict[str, Any]]:
    """Run a sweep to its end, or continue one that was interrupted.

    Args:
        base: configuration of every run, except what varies, the seed and the folder.
        config: configuration of the sweep.

    Returns:
        A row for each trial, the best first; see `SweepResults.rows`.

    Raises:
        UserError: the sweep cannot run, and no trial has begun; or the journal can no longer be written, or another
            driver works on the sweep.
    """
    prepared = prepare(base, config)
    with DriverLock(Folder(config.out)) as lock:
        journal = Journal(Folder(config.out), lock.check)
        _begin(journal, prepared)
        for trial in journal.failures() if config.retry else ():
            journal.add({"event": "retry", "trial": trial})
        _log.info(
            "%d trials of %d seeds, %d at a time; scored by %s at epochs %s.",
            *(prepared.num_trials, len(config.seeds), prepared.trials_at_once * prepared.seeds_at_once),
            config.probe,
            ", ".join(f"{base.epochs * share:.3g}" for share in config.shares()),
        )
        _run(prepared, journal)
        _extras(prepared, journal)
        rows = SweepResults(journal).rows()
        journal.folder.write_json("table.json", rows)
    return rows


def _begin(journal: Journal, prepared: PreparedSweep) -> None:
    """Write the first row, or compare it with the one that is there.

    Raises:
        UserError: another sweep is there.
    """
    config, base = prepared.config, prepared.base
    # With a population, decisions depend on how many trials there are.
    kept = {
        name: value
        for name, value in asdict(config).items()
        if name not in _MAY_DIFFER or (name == "samples" and config.scheduler in POPULATION)
    }
    data = {name: getattr(prepared, name) for name in ("images", "train", "validation")}
    header = {
        "event": "sweep",
        "format": FORMAT,
        "config": kept,
        "space": [asdict(dimension) for dimension in prepared.space.dimensions],
        "base": {name: value for name, value in base.to_json().items() if name != "run"},
        "data": {name: dataset.manifest.fingerprint for name, dataset in data.items()},
        "uris": {name: str(dataset.folder) for name, dataset in data.items()},
    }
    header = json.loads(json.dumps(header))
    if not journal.rows:
        journal.add(header)
        return
    if journal.header.get("format") != FORMAT:
        raise UserError(
            f"The sweep at {config.out!r} was begun by raysl 0.1 and cannot be continued by this version; `raysl "
            "report` still reads it. Give another --out."
        )
    free = {*(f"base.{name}" for name in FREE), "uris"}
    changed = [
        name
        for name in differences(journal.header, header)
        if not any(name == one or name.startswith(f"{one}.") for one in free)
    ]
    if changed:
        raise UserError(
            f"The sweep at {config.out!r} was begun differently; these differ: {', '.join(changed)}. Give the same "
            "values to continue it, or another --out for a new sweep."
        )


def _run(prepared: PreparedSweep, journal: Journal) -> None:
    """Run all trials through Ray Tune; those that are known are only handed to its scheduler again."""
    config = prepared.config
    from ray.tune import TuneError

    from raysl.tuning.result_order import InOrder, Numbered
    from raysl.tuning.trainable import trainable

    task = _task(prepared, journal)
    progress = _Progress(prepared, journal)
    inner = algorithms.scheduler(config, prepared.space, task.times)
    order = InOrder(inner, prepared.num_trials, prepared.trials_at_once, config.seed, progress)
    known = {row["trial"]: row["values"] for row in journal.of("trial") if row["rung"] == 0}
    numbered = Numbered(
        prepared.point() or algorithms.searcher(config),
        order,
        config.lag,
        config.seed,
        known,
        progress.begun,
    )

    # Files of Ray Tune are made again from the journal.
    journal.folder.delete(_TUNE)
    ended = threading.Event()
    listener = threading.Thread(target=_log_messages, args=(task.messages, ended), daemon=True)
    listener.start()
    try:
        fit(trainable(task), prepared.space, order, numbered, journal.folder, _TUNE)
    except TuneError as error:  # Ray Tune wraps what its callbacks and schedulers raise.
        raise ray_cluster.user_error(error) or error from error
    finally:
        ended.set()
        listener.join()


def fit(bound: Any, space: Space, order: InOrder, numbered: Numbered, folder: Folder, name: str) -> None:
    """Run all trials by a `tune.Tuner`.

    Args:
        bound: trainable whose results have "score".
        space: values of the trials.
        order: scheduler of the trials.
        numbered: searcher of the trials, whose names are their numbers.
        folder: where Ray Tune keeps its files.
        name: name of the folder inside.

    Raises:
        tune.TuneError: a callback or a scheduler failed.
    """
    from ray import tune

    def number(trial: Any) -> str:
        return f"{numbered.numbers[trial.trial_id]:04d}"

    store, path = filesystem(str(folder))
    settings = {"TUNE_MAX_PENDING_TRIALS_PG": str(order.at_once), "RAY_AIR_NEW_OUTPUT": "0"}
    before = {variable: os.environ.get(variable) for variable in settings}
    os.environ.update(settings)
    try:
        tune.Tuner(
            bound,
            param_space={d.name: d.domain() for d in space.dimensions},
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=order.num_trials,
                scheduler=order,
                search_alg=numbered,
                reuse_actors=True,
                trial_name_creator=number,
                trial_dirname_creator=number,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=store,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            ),
        ).fit()
    finally:
        # A Tuner that the caller runs later must not find them.
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def _log_messages(messages: Any, ended: threading.Event) -> None:
    """Log what the runs of the sweep log, until the sweep ends or the machine with the queue is lost."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    with contextlib.suppress(RayError):
        while not ended.is_set():
            with contextlib.suppress(Empty):
                level, text = messages.get(timeout=0.5)
                _log.log(level, "%s", text)


def _task(prepared: PreparedSweep, journal: Journal) -> Any:
    from ray.util.queue import Queue

    from raysl.tuning.trainable import Task

    config = prepared.config
    by_rung: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in journal.of("score"):
        by_rung.setdefault((f"{row['trial']:04d}", row["rung"]), []).append(row)
    return Task(
        replace(prepared.base, data=str(prepared.images.folder)),
        prepared.images,
        str(journal.folder),
        str(prepared.train.folder),
        str(prepared.validation.folder),
        config.probe,
        config.seeds,
        config.shares(),
        prepared.placement,
        prepared.trials_at_once,
        prepared.seeds_at_once,
        keep_rungs=config.scheduler == "pbt",
        known={key: rows for key, rows in by_rung.items() if len(rows) == len(config.seeds)},
        failures={f"{trial:04d}": reason for trial, reason in journal.failures().items()},
        points=[point(n) for n in range(prepared.num_trials)] if (point := prepared.point()) else (),
        broker=_broker(prepared),
        messages=Queue(actor_options={"num_cpus": 0}),
    )


def _broker(prepared: PreparedSweep) -> Any:
    """Return the actor that shares streams; None where no runs can share one."""
    from raysl.tuning.shared_streams import open_broker, why_not_shared

    why = why_not_shared(prepared)
    if prepared.trials_at_once > 1:
        _log.info(
            "Each run reads a stream of its own: %s." if why else "Concurrent runs share one stream.",
            *([why] if why else []),
        )
    workers = prepared.base.worker_counts()[0]
    return None if why else open_broker(prepared.images, workers, prepared.placement)


class _Progress:
    """Write what `InOrder` hears to the journal, and log one line for each result."""

    def __init__(self, prepared: PreparedSweep, journal: Journal) -> None:
        self._prepared = prepared
        self._journal = journal

    def begun(self, trial: int, values: Mapping[str, Any]) -> None:
        self._journal.add_once({"event": "trial", "trial": trial, "rung": 0, "values": dict(values)})

    def scored(self, trial: int, result: Mapping[str, Any]) -> None:
        rung = result["rung"] - 1
        before = len(self._journal.rows)
        for row in json.loads(result["runs"]):
            facts = {**row, **self._prepared.cost()}
            self._journal.add_once({**facts, "event": "score", "trial": trial, "rung": rung})
        if len(self._journal.rows) > before:
            self._log(
                trial, f"{self._prepared.config.probe} {result['score']:.4f} at epoch {result['epoch']:.3g}"
            )

    def failed(self, trial: int, record: Any) -> None:
        if trial in self._journal.failures():
            return
        reason = _reason(record)
        self._journal.add({"event": "failed", "trial": trial, "reason": reason})
        self._log(trial, f"failed: {reason}")

    def decided(
        self, trial: int, rung: int, goes_on: bool, copies: int | None, values: Mapping[str, Any]
    ) -> None:
        if self._prepared.config.scheduler == "none":
            return
        row = {"event": "decision", "trial": trial, "rung": rung, "goes_on": goes_on, "copies": copies}
        self._journal.add_once(row)
        if copies is not None and goes_on:
            self._journal.add_once(
                {"event": "trial", "trial": trial, "rung": rung + 1, "values": dict(values)}
            )

    def _log(self, trial: int, what: str) -> None:
        record = SweepResults(self._journal)
        best = record.best()
        top = f"best {record.means(best)[-1]:.4f} (trial {best})" if best is not None else "none finished"
        over = sum(record.state(n) != "running" for n in record.trials)
        _log.info(
            "trial %d: %s | %s | %d of %d trials over | ETA %s",
            *(trial, what, top, over, self._prepared.num_trials, self._eta(record)),
        )

    def _eta(self, record: SweepResults) -> str:
        """Return the time left if every trial that can continue continues to the end."""
        shares = (0.0, *record.config.shares())
        rows = list(record.scores.values())
        done = sum(shares[row["rung"] + 1] - shares[row["rung"]] for row in rows)
        if not done:
            return "?"
        left = float(self._prepared.num_trials - len(record.trials))
        left += sum(1.0 - shares[len(record.means(n))] for n in record.trials if record.state(n) == "running")
        at_once = self._prepared.trials_at_once * self._prepared.seeds_at_once
        seconds = sum(row["seconds"] for row in rows) / done * left * len(record.config.seeds) / at_once
        return f"at most {duration(seconds)}"


def _reason(record: Any) -> str:
    """Return why a trial of Ray Tune failed. Its files are read on this machine: they reach the storage later."""
    pickled = Path(record.pickled_error_file or "")
    if pickled.is_file():
        error = pickle.loads(pickled.read_bytes())
        if found := ray_cluster.user_error(error):
            return str(found)
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    text = Path(record.error_file).read_text() if record.error_file else ""
    return (text.strip().splitlines() or ["unknown"])[-1]


def _extras(prepared: PreparedSweep, journal: Journal) -> None:
    """Score the baselines on the images that trials were compared on, and the chosen trial once on the test images."""
    results = SweepResults(journal)
    best = results.best()
    if best is None:
        return
    wanted: list[tuple[str, DataSet, tuple[str, ...], int | None]]
    wanted = [("baseline", prepared.validation, ("random", "pixels"), None)]
    if prepared.test is not None:
        wanted.append(("test", prepared.test, ("trained", "random", "pixels"), best))
    for seed in prepared.config.seeds:
        run = Run(journal.folder / results.scores[best, seed, results.num_rungs - 1]["run"])
        for event, judged, encoders, chosen in wanted:
            images = judged.manifest.fingerprint
            there = {
                (row["encoder"], row["seed"], row["chosen"])
                for row in journal.of(event)
                if row.get("images", images) == images
            }
            left = tuple(encoder for encoder in encoders if (encoder, seed, chosen) not in there)
            for row in _scored(run, prepared, judged, left) if left else ():
                score = {
                    "encoder": row["encoder"],
                    "seed": seed,
                    "score": float(row["value"]),
                    "chosen": chosen,
                    "images": images,
                }
                journal.add({"event": event, **score})


def _scored(
    run: Run, prepared: PreparedSweep, judged: DataSet, encoders: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the primary rows of the sweep's probe. The features are used once and are not kept."""
    features = run.folder / "features-baselines"
    data, names = (str(prepared.train.folder), str(judged.folder)), (prepared.config.probe,)
    try:
        rows = probe(run, *data, probes=names, encoders=encoders, cache=features)
    finally:
        features.delete()
    return [row for row in rows if row["primary"]]
