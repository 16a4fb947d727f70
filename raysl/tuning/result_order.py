"""Ray Tune's schedulers and searchers, with results delivered in an order that does not depend on time.

A sweep that was killed continues with a new Tuner, which gets at once the results that the journal holds. It makes the
decisions of an uninterrupted sweep if these depend on the results only, and not on which trial was faster:

- `InOrder` wraps a scheduler. A result of trial n at rung r is delivered when all trials with lower numbers have had
  their result at r delivered, or are over. Schedulers that compare the whole population (population based training,
  HyperBand and all others that are not in `PER_RUNG`) get the results of a rung when all trials have one, in order of
  trial number. A trial that waits for its turn is paused and holds no actor.
- `Numbered` wraps a searcher. It proposes trial n when the outcomes of trials up to n - lag are known, and the searcher
  gets these outcomes in order of trial number.

Python's and NumPy's global generators are seeded around each call, because schedulers and searchers draw from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from raysl.errors import UserError
from raysl.ray_cluster import user_error
from raysl.storage import StorageError

_log = logging.getLogger("raysl.tuning")

# Schedulers that compare a result only with those that earlier trials had at the same rung.
PER_RUNG = (FIFOScheduler, ASHAScheduler, MedianStoppingRule)

# Errors of a trial's actors between two results that it may survive. A lost machine may cause two errors.
MAX_CRASHES = 6

Result = dict[str, Any]
Row = dict[str, Any]


@dataclass
class _Tried:
    """A trial of a sweep.

    Args:
        trial: the trial as Ray Tune knows it.
        results: its results, one for each rung.
        delivered: number of results that the inner scheduler has got. A failure counts as a result.
        failed: whether the trial failed after its last result.
        crashes: errors of its actors since its last result.
        over: "finished", "stopped" or "failed", once the inner scheduler knows that the trial is over; "" before.
    """

    trial: Trial
    results: list[Result] = field(default_factory=list)
    delivered: int = 0
    failed: bool = False
    crashes: int = 0
    over: str = ""

    @property
    def active(self) -> bool:
        return self.trial.status in (Trial.RUNNING, Trial.PENDING)

    @property
    def may_continue(self) -> bool:
        """True for a paused trial that has had all of its results delivered."""
        paused = self.trial.status == Trial.PAUSED and not self.over
        return paused and self.delivered == len(self.results) > 0

    def has(self, rung: int) -> bool:
        """Return whether there is a result or a failure for a rung, counted from 1."""
        return len(self.results) + self.failed >= rung


class InOrder(TrialScheduler):  # type: ignore[misc]
    """A scheduler that delivers results to another one in the order of trial numbers; see the module.

    The names of the trials and of their checkpoint folders must be the trial numbers.

    Args:
        inner: any scheduler of Ray Tune.
        num_trials: trials of the sweep.
        record: gets the values, scores, failures and decisions of all trials, as rows of a journal.
        at_once: trials that may run at the same time.
        seed: seed of the random numbers that the inner scheduler draws.
    """

    _supports_buffered_results = False

    def __init__(
        self,
        inner: TrialScheduler,
        num_trials: int,
        record: Callable[[Row], None],
        at_once: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.num_trials = num_trials
        self.record = record
        self.at_once = at_once
        self.tried: list[_Tried] = []
        # Crashed trials that may continue, but that Ray Tune gives up; each with its controller.
        self.given_up: dict[Trial, Any] = {}
        self._controller: Any = None
        self._seed = seed
        self._together = type(inner) not in PER_RUNG

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its scheduler, but a sweep continues from its journal, so nothing unpickles it.
        return {**self.__dict__, "record": None, "_controller": None}

    def kill_trials(self) -> None:
        """Kill the actors of all trials and give back what they hold; Ray Tune does so only after an error."""
        if self._controller is not None:
            self._controller._actor_manager.cleanup()

    def busy(self) -> int:
        """Return the number of trials that run or that could continue now."""
        return sum(not one.over and (one.active or one.may_continue) for one in self.tried)

    # Methods that Ray Tune calls.

    @property
    def metric(self) -> str | None:
        return self.inner.metric  # type: ignore[no-any-return]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self.inner.set_search_properties(metric, mode, **spec))

    def debug_string(self) -> str:
        return str(self.inner.debug_string())

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._controller = tune_controller
        n = _number(trial)
        if n < len(self.tried):  # Ray Tune adds a trial again after an error, to retry it.
            if self.tried[n].failed:
                tune_controller._set_trial_status(trial, Trial.ERROR)
            return
        self.tried.append(_Tried(trial))
        with seeded(self._seed, "add", n):
            self.inner.on_trial_add(_View(self, tune_controller), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Result) -> str:
        n = _number(trial)
        self._take(n, result)
        if not self._together:
            self._advance(tune_controller, current=n)
            one = self.tried[n]
            if one.delivered == len(one.results):
                return str(TrialScheduler.STOP if one.over else TrialScheduler.CONTINUE)
        return str(TrialScheduler.PAUSE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Result) -> None:
        n = _number(trial)
        if not self.tried[n].over:
            self._take(n, {**result, "done": True})
            if not self._together:
                self._advance(tune_controller, current=n)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        n = _number(trial)
        if trial in self.given_up:  # `choose_trial_to_run` queues it again, and Ray Tune then calls this too.
            return
        reason, error = _failure(trial)
        if isinstance(error, StorageError):  # The trial is not at fault, and the others would fail too.
            raise error
        self.tried[n].crashes += 1
        if self.tried[n].crashes <= MAX_CRASHES and error is None:
            _log.warning("trial %d: it continues from its last checkpoint, because it crashed. %s", n, reason)
            # If Ray Tune queues the trial again, it has set this status by now. Otherwise it gives the trial up: a
            # second error of the lost actor, such as that of its checkpoint, has reached a trial in the queue.
            if trial.status != Trial.ERROR:
                self.given_up[trial] = tune_controller
            return
        self.tried[n].failed = True
        self.record({"event": "failed", "trial": n, "reason": reason})
        if not self._together:
            self._advance(tune_controller, current=n)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        one = self.tried[_number(trial)]
        if not one.over:  # The inner scheduler, or the user, has stopped a paused trial.
            one.over = "stopped"
            self.inner.on_trial_remove(_View(self, tune_controller), trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        for trial, controller in self.given_up.items():
            controller._requeue_trial(trial)
        self.given_up.clear()
        self._advance(tune_controller)
        paused = [one for one in self.tried if one.may_continue]
        if paused and sum(one.active for one in self.tried) < self.at_once:
            # The trial that has come farthest continues first.
            return max(paused, key=lambda one: len(one.results)).trial
        return next((one.trial for one in self.tried if one.trial.status == Trial.PENDING), None)

    # The order.

    def _take(self, n: int, result: Result) -> None:
        results = self.tried[n].results
        if len(results) < result["training_iteration"]:
            results.append(dict(result))
            self.tried[n].crashes = 0
            for run in json.loads(result["runs"]):
                self.record({**run, "event": "score", "trial": n, "rung": result["rung"] - 1})
        elif result.get("done"):
            results[-1]["done"] = True

    def _advance(self, controller: Any, current: int | None = None) -> None:
        """Deliver all results whose turn has come, and record what the inner scheduler decides."""
        delivered = []
        while ready := [n for n in range(len(self.tried)) if self._turn(n, current)]:
            # Failures come first: a scheduler that compares all trials must know them.
            n = min(ready, key=lambda n: (not self.tried[n].failed, n))
            self._deliver(controller, n, current)
            delivered.append(n)
        for n in delivered:
            if self.tried[n].over not in ("finished", "failed") and type(self.inner) is not FIFOScheduler:
                self._record_decision(n)

    def _turn(self, n: int, current: int | None) -> bool:
        one, rung = self.tried[n], self.tried[n].delivered + 1
        # A trial that is to pause runs until it has saved. Its result waits for that, because the result may stop it.
        settled = n == current or one.trial.status != Trial.RUNNING
        if one.over or not one.has(rung) or not settled:
            return False
        if not self._together:
            return all(other.over or other.delivered >= rung for other in self.tried[:n])
        ended = (Trial.PAUSED, Trial.TERMINATED, Trial.ERROR)
        return len(self.tried) == self.num_trials and all(
            other.over or other.delivered >= rung or (other.has(rung) and other.trial.status in ended)
            for other in self.tried
        )

    def _deliver(self, controller: Any, n: int, current: int | None) -> None:
        one, view = self.tried[n], _View(self, controller)
        one.delivered += 1
        with seeded(self._seed, n, one.delivered):
            if one.delivered > len(one.results):
                one.over = "failed"
                self.inner.on_trial_error(view, one.trial)
                return
            result = one.results[one.delivered - 1]
            if result.get("done"):
                one.over = "finished"
                self.inner.on_trial_complete(view, one.trial, result)
                return
            stops = self.inner.on_trial_result(view, one.trial, result) == TrialScheduler.STOP
            if stops:
                one.over = one.over or "stopped"
                self.inner.on_trial_complete(view, one.trial, result)
        if stops and n != current:
            controller.stop_trial(one.trial)

    def _record_decision(self, n: int) -> None:
        one = self.tried[n]
        # Population based training may have given this trial the checkpoint of another one.
        owner = int(Path(one.trial.checkpoint.path).parent.name) if one.trial.checkpoint else n
        copies, about = (owner if owner != n else None), {"trial": n, "rung": one.delivered - 1}
        self.record({"event": "decision", **about, "goes_on": not one.over, "copies": copies})
        if copies is not None and not one.over:
            about["rung"] += 1
            self.record({"event": "trial", **about, "values": dict(one.trial.config)})


class _View:
    """The controller of Ray Tune as the inner scheduler sees it: trials in order of number, live until over."""

    # Population based training refuses to work beside a searcher; `Numbered` is one.
    search_alg = None

    def __init__(self, order: InOrder, controller: Any) -> None:
        self._order = order
        self._controller = controller

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return [one.trial for one in self._order.tried]

    def get_live_trials(self) -> list[Trial]:
        return [one.trial for one in self._order.tried if not one.over]


class Numbered(Searcher):  # type: ignore[misc]
    """A searcher that proposes trials in the order of their numbers; see the module.

    Args:
        points: any searcher of Ray Tune, or a function from the number of a trial to its values.
        order: the scheduler of the same Tuner.
        lag: trial n is proposed from the outcomes of trials up to n - lag.
        seed: seed of the random numbers that the searcher draws.
        known: values of trials that an earlier session began. They stay, whatever the searcher would propose now.

    Attributes:
        numbers: the number of each trial, by the id that Ray Tune gives it.
    """

    def __init__(
        self,
        points: Searcher | Callable[[int], Result],
        order: InOrder,
        lag: int = 4,
        seed: int = 0,
        known: Mapping[int, Result] | None = None,
    ) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}
        self._points = points
        self._order = order
        self._lag = lag
        self._seed = seed
        self._known = known or {}
        self._told = 0
        # Trials whose values are not what the searcher proposed.
        self._replaced: set[int] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        self._metric, self._mode = metric, mode
        if isinstance(self._points, Searcher):
            return bool(self._points.set_search_properties(metric, mode, config, **spec))
        return True

    def suggest(self, trial_id: str) -> Result | str | None:
        n = len(self.numbers)
        if n >= self._order.num_trials:
            # If the search ended now, Ray Tune would start a new actor whenever a paused trial continues.
            ended = all(one.trial.is_finished() for one in self._order.tried) and not self._order.given_up
            return str(Searcher.FINISHED) if ended else None
        values = None if self._order.busy() >= self._order.at_once else self._proposed(n)
        if values is None:
            return None
        if self._known.get(n, values) != values:
            _log.warning("Trial %d keeps %s; the searcher now proposes %s.", n, self._known[n], values)
            values = dict(self._known[n])
            self._replaced.add(n)
        self._order.record({"event": "trial", "trial": n, "rung": 0, "values": values})
        self.numbers[trial_id] = n
        return values

    def on_trial_complete(self, trial_id: str, result: Result | None = None, error: bool = False) -> None:
        """Do nothing: the searcher gets results in the order of trial numbers, before it proposes."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: a sweep continues from its journal."""

    def _proposed(self, n: int) -> Result | None:
        if not isinstance(self._points, Searcher):
            return self._points(n)
        while self._told <= n - self._lag:
            if not self._order.tried[self._told].over:
                return None
            self._tell(self._points, self._told)
            self._told += 1
        with seeded(self._seed, "ask", n):
            values = self._points.suggest(f"{n:05d}")
        if not isinstance(values, dict):  # None for "not now", or a word that says that the search has ended
            return None
        return {k: value.item() if isinstance(value, np.generic) else value for k, value in values.items()}

    def _tell(self, searcher: Searcher, n: int) -> None:
        one = self._order.tried[n]
        # Scores of values that the searcher did not propose would mislead it.
        lost = one.over == "failed" or n in self._replaced
        with seeded(self._seed, "tell", n):
            for result in () if n in self._replaced else one.results:
                searcher.on_trial_result(f"{n:05d}", result)
            last = one.results[-1] if one.results and not lost else None
            searcher.on_trial_complete(f"{n:05d}", result=last, error=lost)
            if n in self._replaced and one.results and one.over != "failed":
                with suppress(NotImplementedError):
                    searcher.add_evaluated_point(dict(self._known[n]), one.results[-1][str(self._metric)])


def _number(trial: Trial) -> int:
    return int(str(trial))


def _failure(trial: Trial) -> tuple[str, UserError | None]:
    """Return a sentence on why a trial failed, and the UserError that a retry would raise again; None for a crash."""
    if not trial.pickled_error_file:  # Ray stores only the errors of tasks and actors.
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        return shorten((text.strip().splitlines() or ["unknown"])[-1], 300), None
    # Ray Tune writes the file on this machine, and copies it to the storage later.
    error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    if found := user_error(error):
        return str(found), found
    cause = error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
    last = (str(cause).strip().splitlines() or [""])[-1]
    return f"{type(cause).__name__}: {shorten(last, 300)}", None


@contextmanager
def seeded(*what: Any) -> Iterator[None]:
    """Seed the global generators of Python and NumPy from `what` inside the block, and restore them after it."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    seed = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "big")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
