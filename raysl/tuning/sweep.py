"""Run the trials of a sweep by Ray Tune, and continue from a journal after any interruption."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import mean
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from raysl import ray_cluster
from raysl.config import Pretraining, differences, may_change
from raysl.config.defaults import is_given
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.run import Run
from raysl.storage import Folder, filesystem
from raysl.storage.lock import DriverLock
from raysl.storage.records import as_json
from raysl.training.progress_actor import format_duration
from raysl.tuning import algorithms
from raysl.tuning.config import SweepConfig
from raysl.tuning.journal import FORMAT, Journal
from raysl.tuning.preparation import PreparedSweep, TrialContext, prepare
from raysl.tuning.results import SweepResults
from raysl.tuning.space import Space

if TYPE_CHECKING:
    from raysl.tuning.ordered_scheduler import OrderedScheduler
    from raysl.tuning.ordered_searcher import OrderedSearcher

_log = logging.getLogger("raysl.tuning")

# Folder inside the sweep's for the files of Ray Tune. It is deleted whenever a sweep begins or continues.
_TUNE = "_ray_tune"


def sweep(
    base: Pretraining, config: SweepConfig, given: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Run a sweep to its end, or continue one that was interrupted. Return the rows of `SweepResults.rows`.

    Args:
        given: the fields of `base` that the user gives. If the method varies, each method gets what suits the images
            for the others; None: the values of its class. A sweep that exists keeps what it was begun with.

    Raises:
        UserError: the sweep cannot run, and no trial has begun; or the journal can no longer be written, or another
            driver works on the sweep.
    """
    begun = Journal(Folder(config.out))
    _refuse_other_values(begun, given or {})
    prepared = prepare(base, config, given, begun.method_values if begun.rows else None)
    with DriverLock(Folder(config.out)) as lock:
        journal = Journal(Folder(config.out), lock.check)
        _begin(journal, prepared)
        for trial in journal.failures() if config.retry else ():
            journal.add({"event": "retry", "trial": trial})
        epochs = [f"{base.epochs * share:.3g}" for share in config.shares()]
        _log.info(
            "%s, each with seed %s, %s at a time; scored by %s after %s %s.",
            counted(prepared.num_trials, "trial"),
            " and ".join(map(str, config.seeds)),
            counted(prepared.context.trials_at_once * prepared.context.seeds_at_once, "run"),
            config.probe,
            "epoch" if epochs == ["1"] else "epochs",
            ", ".join(epochs),
        )
        _log.info("Tried: %s.", "; ".join(map(str, prepared.space.dimensions)))
        _run(prepared, journal)
        _score_baselines_and_test(prepared, journal)
        rows = SweepResults(journal).rows()
        journal.folder.write_json("table.json", rows)
    return rows


def _refuse_other_values(begun: Journal, given: Mapping[str, Any]) -> None:
    """Raise UserError if a field is given now that was chosen for each method when the sweep began."""
    chosen = {name for values in begun.method_values.values() for name in values}
    if changed := sorted(name for name in chosen if is_given(given, name)):
        raise _begun_differently(str(begun.folder), changed)


def _begin(journal: Journal, prepared: PreparedSweep) -> None:
    """Write the first row of the journal. Raise UserError if it is there and describes another sweep."""
    config, context = prepared.config, prepared.context
    data = {"images": context.images, "train": context.train, "validation": context.validation}
    header = {
        "event": "sweep",
        "format": FORMAT,
        "config": {name: value for name, value in asdict(config).items() if name not in config.may_change()},
        "space": [asdict(dimension) for dimension in prepared.space.dimensions],
        "base": {name: value for name, value in context.base.to_json().items() if name != "run"},
        "data": {name: dataset.manifest.fingerprint for name, dataset in data.items()},
        "uris": {name: str(dataset.folder) for name, dataset in data.items()},
        "sources": {name: dataset.manifest.source for name, dataset in data.items()},
    }
    if context.method_values:
        header["method_values"] = context.method_values
    header = as_json(header)
    if not journal.rows:
        journal.add(header)
        return
    if journal.header.get("format") != FORMAT:
        raise UserError(
            f"The sweep at {config.out!r} was begun by raysl 0.1 and cannot be continued by this version; `raysl "
            "report` still reads it. Give another --out."
        )
    # An earlier version wrote one more field for each dimension.
    fields = header["space"][0]
    dimensions = [{name: row[name] for name in row if name in fields} for row in journal.header["space"]]
    # A field that is newer than the sweep had its default.
    defaults = as_json(Pretraining("", "", method=context.base.method).to_json())
    begun = _with_defaults(journal.header["base"], {name: defaults[name] for name in header["base"]})
    names = differences({**journal.header, "space": dimensions, "base": begun}, header)
    base = {name for name in names if name.startswith("base.") and may_change(name.removeprefix("base."))}
    changed = [name for name in names if name not in base and not name.startswith(("uris.", "sources."))]
    if changed:
        raise _begun_differently(config.out, changed)


def _begun_differently(out: str, names: Sequence[str]) -> UserError:
    return UserError(
        f"The sweep at {out!r} was begun differently; these differ: {', '.join(names)}. Give the same values to "
        "continue it, or another --out for a new sweep."
    )


def _with_defaults(value: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON value with the fields that it lacks, also of the values inside."""
    made = {**defaults, **value}
    for key, inner in defaults.items():
        if isinstance(inner, Mapping) and isinstance(value.get(key), Mapping):
            made[key] = _with_defaults(value[key], inner)
    return made


def _run(prepared: PreparedSweep, journal: Journal) -> None:
    """Run all trials with Ray Tune. Its scheduler gets the results in the journal again without training."""
    from ray.tune import TuneError

    from raysl.tuning.ordered_scheduler import OrderedScheduler
    from raysl.tuning.ordered_searcher import OrderedSearcher
    from raysl.tuning.trainable import trainable

    config, context = prepared.config, _context_with_journal(prepared, journal)
    inner = algorithms.scheduler(config, prepared.space, context.times)
    record = _Recorder(prepared, journal)
    scheduler = OrderedScheduler(inner, prepared.num_trials, record, context.trials_at_once, config.seed)
    known = {row["trial"]: row["values"] for row in journal.of("trial") if row["rung"] == 0}
    source = prepared.point() or algorithms.searcher(config)
    searcher = OrderedSearcher(source, scheduler, config.lag, config.seed, known)
    # Ray Tune starts from nothing; the journal holds all that a sweep needs to continue.
    journal.folder.delete(_TUNE)
    try:
        with _messages_logged(context.messages):
            fit(trainable(context), prepared.space, scheduler, searcher, journal.folder, _TUNE)
    except TuneError as error:  # Ray Tune wraps what its callbacks and schedulers raise.
        raise ray_cluster.user_error(error) or error from error


def fit(
    trainable: Any,
    space: Space,
    scheduler: OrderedScheduler,
    searcher: OrderedSearcher,
    folder: Folder,
    name: str,
) -> None:
    """Run all trials with a `tune.Tuner` that keeps its files in the folder `name` inside `folder`.

    Raises:
        tune.TuneError: a callback or a scheduler failed.
    """
    from ray import tune

    from raysl.tuning.trainable import SETTINGS

    def number(trial: Any) -> str:
        return f"{searcher.numbers[trial.trial_id]:04d}"

    store, path = filesystem(str(folder), retry_s=90)
    settings = {
        "TUNE_MAX_PENDING_TRIALS_PG": str(scheduler.at_once),
        "RAY_AIR_NEW_OUTPUT": "0",
        # Ray Tune's own handler would end the sweep as if it had finished.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        **SETTINGS,
    }
    tune_config = tune.TuneConfig(
        metric="score",
        mode="max",
        # One more than there are, because the searcher ends the search.
        num_samples=scheduler.num_trials + 1,
        scheduler=scheduler,
        search_alg=searcher,
        reuse_actors=True,
        trial_name_creator=number,
        trial_dirname_creator=number,
    )
    run_config = tune.RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=store,
        verbose=0,
        failure_config=tune.FailureConfig(-1),  # No limit: `OrderedScheduler` counts the failures.
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
    )
    param_space = {d.name: d.domain() for d in space.dimensions}
    # A Tuner that the caller runs later must not find the settings.
    with patch.dict(os.environ, settings):
        tuner = tune.Tuner(trainable, param_space=param_space, tune_config=tune_config, run_config=run_config)
        try:
            tuner.fit()
        except (KeyboardInterrupt, SystemExit):  # A notebook lives on, and the trials would keep its CPUs.
            with contextlib.suppress(Exception):  # A Ray that is lost has no trials to kill.
                scheduler.kill_trials()
            raise


@contextmanager
def _messages_logged(messages: Any) -> Iterator[None]:
    """Log here what the runs of the sweep log. Stop doing so if the machine with the queue is lost."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    ended = threading.Event()

    def listen() -> None:
        with contextlib.suppress(RayError):
            while True:
                last = ended.is_set()
                try:
                    level, text = messages.get(timeout=0.5)
                    _log.log(level, "%s", text)
                except Empty:
                    if last:
                        return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _context_with_journal(prepared: PreparedSweep, journal: Journal) -> TrialContext:
    """Return what the trials share, with the results of earlier sessions and the actors of this session."""
    from ray.util.queue import Queue

    from raysl.tuning.shared_streams import open_broker, why_not_shared

    context, point, why = prepared.context, prepared.point(), why_not_shared(prepared)
    if context.trials_at_once > 1:
        shared = f"Each run reads a stream of its own: {why}." if why else "Concurrent runs share one stream."
        _log.info("%s", shared)
    points = [point(n) for n in range(prepared.num_trials)] if point else []
    rows = sorted(journal.of("score"), key=lambda row: (row["trial"], row["rung"]))
    known = {
        (f"{trial:04d}", rung): list(found)
        for (trial, rung), found in itertools.groupby(rows, lambda row: (row["trial"], row["rung"]))
    }
    return replace(
        context,
        known={key: found for key, found in known.items() if len(found) == len(context.seeds)},
        failures={f"{trial:04d}": reason for trial, reason in journal.failures().items()},
        broker=None if why else open_broker(context, points),
        messages=Queue(actor_options={"num_cpus": 0}),
    )


class _Recorder:
    """Write the rows of `OrderedScheduler` to the journal, and log one line for each result."""

    def __init__(self, prepared: PreparedSweep, journal: Journal) -> None:
        self._prepared = prepared
        self._journal = journal

    def __call__(self, row: dict[str, Any]) -> None:
        journal, trial = self._journal, row["trial"]
        # A retried trial may fail again, and that failure is a new row.
        new = trial not in journal.failures() if row["event"] == "failed" else journal.is_new(row)
        if not new:
            return
        journal.add(row)
        if row["event"] == "failed":
            self._log(trial, f"failed: {row['reason']}")
        elif row["event"] == "score" and (scores := SweepResults(journal).by_seed(trial, row["rung"])):
            config = self._prepared.config
            epoch = self._prepared.context.base.epochs * config.shares()[row["rung"]]
            self._log(trial, f"{config.probe} {mean(scores):.4f} at epoch {epoch:.3g}")

    def _log(self, trial: int, what: str) -> None:
        results = SweepResults(self._journal)
        best = results.best()
        top = f"best {results.means(best)[-1]:.4f} (trial {best})" if best is not None else "none finished"
        over = sum(results.state(n) != "running" for n in results.trials)
        _log.info(
            "trial %d: %s | %s | %d of %d trials over | ETA %s",
            *(trial, what, top, over, self._prepared.num_trials, self._eta(results)),
        )

    def _eta(self, results: SweepResults) -> str:
        """Return the time left if every trial that can continue continues to the end."""
        context, rows = self._prepared.context, results.scores.values()
        shares = (0.0, *results.config.shares())
        done = sum(shares[row["rung"] + 1] - shares[row["rung"]] for row in rows)
        if not done:
            return "?"
        running = [n for n in results.trials if results.state(n) == "running"]
        left = float(self._prepared.num_trials - len(results.trials))
        left += sum(1.0 - shares[len(results.means(n))] for n in running)
        seconds = sum(row["seconds"] for row in rows) / done * left * len(context.seeds)
        return f"at most {format_duration(seconds / (context.trials_at_once * context.seeds_at_once))}"


def _score_baselines_and_test(prepared: PreparedSweep, journal: Journal) -> None:
    """Score the baselines on the images that trials were compared on, and the chosen trial once on the test images."""
    results, context = SweepResults(journal), prepared.context
    best = results.best()
    if best is None:
        return
    wanted: list[tuple[str, DataSet, tuple[str, ...], int | None]]
    wanted = [("baseline", context.validation, ("random", "pixels"), None)]
    if prepared.test is not None:
        wanted.append(("test", prepared.test, ("trained", "random", "pixels"), best))
    for seed, (event, eval_set, encoders, chosen) in itertools.product(context.seeds, wanted):
        about = {"seed": seed, "chosen": chosen, "images": eval_set.manifest.fingerprint}
        there = [row["encoder"] for row in journal.of(event) if about.items() <= row.items()]
        if not (left := [encoder for encoder in encoders if encoder not in there]):
            continue
        run = Run(journal.folder / results.scores[best, seed, results.num_rungs - 1]["run"])
        for row in context.scored(run, eval_set, left, "baselines"):
            journal.add({"event": event, **about, "encoder": row["encoder"], "score": float(row["value"])})
