"""A scheduler of Ray Tune that gets results in an order that does not depend on time.

A sweep that was killed continues with a new Tuner, which gets at once the results that the journal holds. It makes the
decisions of an uninterrupted sweep if these depend on the results only, and not on which trial was faster.
`OrderedScheduler` wraps a scheduler. A result of trial n at rung r is delivered when all trials with lower numbers have
had their result at r delivered, or have ended. Schedulers that compare the whole population (population based training,
HyperBand and all others that are not in `COMPARE_WITH_EARLIER`) get the results of a rung when all trials have one, in
order of trial number. A trial that waits for its turn is paused and holds no actor. `ordered_searcher` does the same
for a searcher.

Python's and NumPy's global generators are seeded around each call, because schedulers and searchers draw from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raysl.errors import UserError
from raysl.ray_cluster import user_error
from raysl.storage import StorageError

_log = logging.getLogger("raysl.tuning")

# Schedulers that compare a result only with those that earlier trials had at the same rung.
COMPARE_WITH_EARLIER = (FIFOScheduler, ASHAScheduler, MedianStoppingRule)

# Errors of a trial's actors between two results that it may survive. A lost machine may cause two errors.
MAX_TRIAL_CRASHES = 6

Result = dict[str, Any]
Row = dict[str, Any]


@dataclass
class _TrialState:
    """The state of a trial."""

    trial: Trial  # the trial as Ray Tune knows it
    results: list[Result] = field(default_factory=list)  # its results, one for each rung
    delivered: int = 0  # number of results that the inner scheduler has got. A failure counts as a result.
    failed: bool = False  # whether the trial failed after its last result
    crashes: int = 0  # errors of its actors since its last result
    # "finished", "stopped" or "failed", once the inner scheduler knows that the trial has ended; "" before.
    outcome: str = ""

    @property
    def active(self) -> bool:
        return self.trial.status in (Trial.RUNNING, Trial.PENDING)

    @property
    def may_continue(self) -> bool:
        """True for a paused trial whose results have all been delivered."""
        paused = self.trial.status == Trial.PAUSED and not self.outcome
        return paused and self.delivered == len(self.results) > 0

    def has(self, rung: int) -> bool:
        """Return whether there is a result or a failure for a rung, counted from 1."""
        return len(self.results) + self.failed >= rung


class OrderedScheduler(TrialScheduler):  # type: ignore[misc]
    """A scheduler that delivers results to another one in the order of trial numbers; see the module.

    The names of the trials and of their checkpoint folders must be the trial numbers.

    Args:
        inner: any scheduler of Ray Tune.
        num_trials: trials of the sweep.
        record: gets the values, scores, failures and decisions of all trials, as rows of a journal.
        at_once: trials that may run at the same time.
        seed: seed of the random numbers that the inner scheduler draws.

    Attributes:
        trials: the states of the trials, by number.
        to_requeue: crashed trials that may continue, but that Ray Tune gives up; each with its controller.
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
        self.trials: list[_TrialState] = []
        self.to_requeue: dict[Trial, Any] = {}
        self._controller: Any = None
        self._seed = seed
        self._compares_all = type(inner) not in COMPARE_WITH_EARLIER

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its scheduler, but a sweep continues from its journal, so nothing unpickles it.
        return {**self.__dict__, "record": None, "_controller": None}

    def kill_trials(self) -> None:
        """Kill the actors of all trials and give back what they hold; Ray Tune does so only after an error."""
        if self._controller is not None:
            self._controller._actor_manager.cleanup()

    def num_runnable(self) -> int:
        """Return the number of trials that run or that could continue now."""
        return sum(not state.outcome and (state.active or state.may_continue) for state in self.trials)

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
        if n < len(self.trials):  # Ray Tune adds a trial again after an error, to retry it.
            if self.trials[n].failed:
                tune_controller._set_trial_status(trial, Trial.ERROR)
            return
        self.trials.append(_TrialState(trial))
        with seeded(self._seed, "add", n):
            self.inner.on_trial_add(_ControllerView(self, tune_controller), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Result) -> str:
        n = _number(trial)
        self._add_result(n, result)
        if not self._compares_all:
            self._deliver_due(tune_controller, current=n)
            state = self.trials[n]
            if state.delivered == len(state.results):
                return str(TrialScheduler.STOP if state.outcome else TrialScheduler.CONTINUE)
        return str(TrialScheduler.PAUSE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Result) -> None:
        n = _number(trial)
        if not self.trials[n].outcome:
            self._add_result(n, {**result, "done": True})
            if not self._compares_all:
                self._deliver_due(tune_controller, current=n)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        n = _number(trial)
        # `choose_trial_to_run` queues it again, and Ray Tune then calls this too.
        if trial in self.to_requeue:
            return
        reason, error = _failure(trial)
        if isinstance(error, StorageError):  # The trial is not at fault, and the others would fail too.
            raise error
        self.trials[n].crashes += 1
        if self.trials[n].crashes <= MAX_TRIAL_CRASHES and error is None:
            _log.warning("trial %d: it continues from its last checkpoint, because it crashed. %s", n, reason)
            # If Ray Tune queues the trial again, it has set this status by now. Otherwise it gives the trial up: a
            # second error of the lost actor, such as that of its checkpoint, has reached a trial in the queue.
            if trial.status != Trial.ERROR:
                self.to_requeue[trial] = tune_controller
            return
        self.trials[n].failed = True
        self.record({"event": "failed", "trial": n, "reason": reason})
        if not self._compares_all:
            self._deliver_due(tune_controller, current=n)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        state = self.trials[_number(trial)]
        if not state.outcome:  # The inner scheduler, or the user, has stopped a paused trial.
            state.outcome = "stopped"
            self.inner.on_trial_remove(_ControllerView(self, tune_controller), trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        for trial, controller in self.to_requeue.items():
            controller._requeue_trial(trial)
        self.to_requeue.clear()
        self._deliver_due(tune_controller)
        paused = [state for state in self.trials if state.may_continue]
        if paused and sum(state.active for state in self.trials) < self.at_once:
            # The trial that has come farthest continues first.
            return max(paused, key=lambda state: len(state.results)).trial
        return next((state.trial for state in self.trials if state.trial.status == Trial.PENDING), None)

    # The order.

    def _add_result(self, n: int, result: Result) -> None:
        results = self.trials[n].results
        if len(results) < result["training_iteration"]:
            results.append(dict(result))
            self.trials[n].crashes = 0
            for run in json.loads(result["runs"]):
                self.record({**run, "event": "score", "trial": n, "rung": result["rung"] - 1})
        elif result.get("done"):
            results[-1]["done"] = True

    def _deliver_due(self, controller: Any, current: int | None = None) -> None:
        """Deliver all results whose turn has come, and record what the inner scheduler decides."""
        delivered = []
        while due := [n for n in range(len(self.trials)) if self._is_due(n, current)]:
            # Failures come first: a scheduler that compares all trials must know them.
            n = min(due, key=lambda n: (not self.trials[n].failed, n))
            self._deliver(controller, n, current)
            delivered.append(n)
        for n in delivered:
            if self.trials[n].outcome not in ("finished", "failed") and type(self.inner) is not FIFOScheduler:
                self._record_decision(n)

    def _is_due(self, n: int, current: int | None) -> bool:
        state, rung = self.trials[n], self.trials[n].delivered + 1
        # A trial that is to pause runs until it has saved. Its result waits for that, because the result may stop it.
        saved = n == current or state.trial.status != Trial.RUNNING
        if state.outcome or not state.has(rung) or not saved:
            return False
        if not self._compares_all:
            return all(other.outcome or other.delivered >= rung for other in self.trials[:n])
        inactive = (Trial.PAUSED, Trial.TERMINATED, Trial.ERROR)
        return len(self.trials) == self.num_trials and all(
            other.outcome or other.delivered >= rung or (other.has(rung) and other.trial.status in inactive)
            for other in self.trials
        )

    def _deliver(self, controller: Any, n: int, current: int | None) -> None:
        state, view = self.trials[n], _ControllerView(self, controller)
        state.delivered += 1
        with seeded(self._seed, n, state.delivered):
            if state.delivered > len(state.results):
                state.outcome = "failed"
                self.inner.on_trial_error(view, state.trial)
                return
            result = state.results[state.delivered - 1]
            if result.get("done"):
                state.outcome = "finished"
                self.inner.on_trial_complete(view, state.trial, result)
                return
            stops = self.inner.on_trial_result(view, state.trial, result) == TrialScheduler.STOP
            if stops:
                state.outcome = state.outcome or "stopped"
                self.inner.on_trial_complete(view, state.trial, result)
        if stops and n != current:
            controller.stop_trial(state.trial)

    def _record_decision(self, n: int) -> None:
        state = self.trials[n]
        # Population based training may have given this trial the checkpoint of another one.
        owner = int(Path(state.trial.checkpoint.path).parent.name) if state.trial.checkpoint else n
        copies, about = (owner if owner != n else None), {"trial": n, "rung": state.delivered - 1}
        self.record({"event": "decision", **about, "goes_on": not state.outcome, "copies": copies})
        if copies is not None and not state.outcome:
            about["rung"] += 1
            self.record({"event": "trial", **about, "values": dict(state.trial.config)})


class _ControllerView:
    """Ray Tune's controller as the inner scheduler sees it: trials by number; those without an outcome are live."""

    # Population based training refuses to work beside a searcher, and a sweep always has an `OrderedSearcher`.
    search_alg = None

    def __init__(self, scheduler: OrderedScheduler, controller: Any) -> None:
        self._scheduler = scheduler
        self._controller = controller

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return [state.trial for state in self._scheduler.trials]

    def get_live_trials(self) -> list[Trial]:
        return [state.trial for state in self._scheduler.trials if not state.outcome]


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
