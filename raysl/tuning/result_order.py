"""Ray Tune's schedulers and searchers, with results delivered in an order that does not depend on time.

A sweep that is killed starts again with a new Tuner, and gets the results that are known from its journal at once. It
decides as an uninterrupted sweep if decisions depend on results and not on which trial was faster:

- `InOrder` wraps a scheduler. A result of trial n at rung r is delivered when all trials with lower numbers have had
  their result at r delivered, or are over. Schedulers that compare the whole population (population based training,
  HyperBand and all others that are not in `PER_RUNG`) get the results of a rung when all trials have one, by number.
  A trial that waits is paused; it then holds no actor.
- `Numbered` wraps a searcher. Trial n is proposed when the outcomes of trials up to n - lag are known, and the searcher
  hears of them by number.

Python's and NumPy's global generators are seeded around each call, because schedulers and searchers draw from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from raysl.ray_cluster import user_error

_log = logging.getLogger("raysl.tuning")

# Schedulers that compare a result with results at the same time only, from trials that came before.
PER_RUNG = (FIFOScheduler, ASHAScheduler, MedianStoppingRule)

Result = dict[str, Any]


class Listener(Protocol):
    """What `InOrder` tells of results, failures and decisions, by trial numbers. A sweep writes it to its journal."""

    def scored(self, trial: int, result: Result) -> None:
        """A trial got its score at a rung."""

    def retried(self, trial: int, reason: str) -> None:
        """A trial crashed, and continues from its last checkpoint."""

    def failed(self, trial: int, reason: str) -> None:
        """A trial failed and is not tried again."""

    def decided(self, trial: int, rung: int, goes_on: bool, copies: int | None, values: Result) -> None:
        """The scheduler decided on a trial after a rung, counted from 0; `values` are those that it continues with."""


class InOrder(TrialScheduler):  # type: ignore[misc]
    """A scheduler that delivers results to another one by trial number; see the module.

    Args:
        inner: any scheduler of Ray Tune.
        num_trials: trials of the sweep.
        listener: hears of results and decisions.
        at_once: trials that may run at the same time.
        seed: of what the inner scheduler draws.
    """

    _supports_buffered_results = False

    def __init__(
        self, inner: TrialScheduler, num_trials: int, listener: Listener, at_once: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        self.inner = inner
        self.num_trials = num_trials
        self.at_once = at_once
        self.over: dict[int, str] = {}
        self.results: dict[int, list[Result]] = {}
        self._seed = seed
        self._listener = listener
        self._together = type(self.inner) not in PER_RUNG
        self._trials: list[Trial] = []
        self._numbers: dict[str, int] = {}
        self._failed: set[int] = set()
        self._delivered: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its scheduler, and never needs it back: a sweep continues from its journal.
        return {**self.__dict__, "_listener": None}

    def number(self, trial: Trial) -> int:
        """Return the number of a trial: trials are numbered in the order in which they were added."""
        return self._numbers[trial.trial_id]

    def busy(self) -> int:
        """Return how many trials run, or could continue at once."""
        return sum(
            self._trials[n].status in (Trial.RUNNING, Trial.PENDING) or self._may_continue(n)
            for n in range(len(self._trials))
            if n not in self.over
        )

    # What Ray Tune calls.

    @property
    def metric(self) -> str | None:
        return self.inner.metric  # type: ignore[no-any-return]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self.inner.set_search_properties(metric, mode, **spec))

    def debug_string(self) -> str:
        return str(self.inner.debug_string())

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.trial_id in self._numbers:  # Ray Tune adds it again after an error, to retry it.
            if self.number(trial) in self._failed:
                tune_controller._set_trial_status(trial, Trial.ERROR)
            return
        n = self._numbers[trial.trial_id] = len(self._trials)
        self._trials.append(trial)
        self.results[n], self._delivered[n] = [], 0
        with seeded(self._seed, "add", n):
            self.inner.on_trial_add(_View(self, tune_controller), trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Result) -> str:
        n = self.number(trial)
        self._take(n, result)
        if self._together:
            return str(TrialScheduler.PAUSE)
        self._advance(tune_controller, current=n)
        if self._delivered[n] < len(self.results[n]):
            return str(TrialScheduler.PAUSE)
        return str(TrialScheduler.STOP if n in self.over else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Result) -> None:
        n = self.number(trial)
        if n in self.over:
            return
        self._take(n, {**result, "done": True})
        if not self._together:
            self._advance(tune_controller, current=n)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        n = self.number(trial)
        reason, repeats = _failure(trial)
        if trial.should_recover() and not repeats:
            self._listener.retried(n, reason)
            return
        self._failed.add(n)
        self._listener.failed(n, reason)
        if not self._together:
            self._advance(tune_controller, current=n)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        n = self.number(trial)
        if n not in self.over:  # The inner scheduler, or the user, stops a trial that is paused.
            self.over[n] = "stopped"
            self.inner.on_trial_remove(_View(self, tune_controller), trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._advance(tune_controller)
        active = sum(trial.status in (Trial.RUNNING, Trial.PENDING) for trial in self._trials)
        paused = [n for n in range(len(self._trials)) if n not in self.over and self._may_continue(n)]
        if paused and active < self.at_once:
            # Those that have come farthest first.
            return self._trials[min(paused, key=lambda n: (-len(self.results[n]), n))]
        return next((trial for trial in self._trials if trial.status == Trial.PENDING), None)

    # The order.

    def _take(self, n: int, result: Result) -> None:
        if len(self.results[n]) < result["training_iteration"]:
            self.results[n].append(dict(result))
            self._listener.scored(n, result)
        elif result.get("done"):
            self.results[n][-1]["done"] = True

    def _may_continue(self, n: int) -> bool:
        """Return whether a paused trial has had all of its results delivered."""
        return self._trials[n].status == Trial.PAUSED and self._delivered[n] == len(self.results[n]) > 0

    def _has(self, n: int, rung: int) -> bool:
        """Return whether a trial has a result or a failure to deliver for a rung, counted from 1."""
        return len(self.results[n]) + (n in self._failed) >= rung

    def _advance(self, controller: Any, current: int | None = None) -> None:
        """Deliver all results whose turn has come."""
        if self._together:
            while self._deliver_rung(controller):
                pass
            return
        moved = True
        while moved:
            moved = False
            for n in range(len(self._trials)):
                while self._turn(n, current):
                    self._deliver(controller, n, current)
                    moved = True

    def _turn(self, n: int, current: int | None) -> bool:
        rung = self._delivered[n] + 1
        # A trial that is still saving what it pauses with is stopped when it has paused.
        settled = n == current or self._trials[n].status != Trial.RUNNING
        if n in self.over or not self._has(n, rung) or not settled:
            return False
        return all(m in self.over or self._delivered[m] >= rung for m in range(n))

    def _deliver_rung(self, controller: Any) -> bool:
        """Deliver the results of the next rung to a scheduler that compares all trials, if all have one."""
        left = [n for n in range(len(self._trials)) if n not in self.over]
        if not left or len(self._trials) < self.num_trials:
            return False
        rung = min(self._delivered[n] for n in left) + 1
        settled = (Trial.PAUSED, Trial.TERMINATED, Trial.ERROR)
        if not all(self._has(n, rung) and self._trials[n].status in settled for n in left):
            return False
        owners = {self._trials[n].checkpoint.path: n for n in left if self._trials[n].checkpoint}
        # Failures first: the scheduler must know them when it compares the others.
        for n in sorted(left, key=lambda n: (n not in self._failed, n)):
            if n not in self.over:
                self._deliver(controller, n, None)
        for n in left:
            if self.over.get(n) in ("finished", "failed"):
                continue
            found = self._trials[n].checkpoint
            donor = owners.get(found.path) if found else None
            copies = donor if donor != n else None
            self._listener.decided(n, rung - 1, n not in self.over, copies, self._trials[n].config)
        return True

    def _deliver(self, controller: Any, n: int, current: int | None) -> None:
        rung, trial, view = self._delivered[n] + 1, self._trials[n], _View(self, controller)
        self._delivered[n] = rung
        with seeded(self._seed, n, rung):
            if rung > len(self.results[n]):
                self.over[n] = "failed"
                self.inner.on_trial_error(view, trial)
                return
            result = self.results[n][rung - 1]
            if result.get("done"):
                self.over[n] = "finished"
                self.inner.on_trial_complete(view, trial, result)
                return
            decision = self.inner.on_trial_result(view, trial, result)
            if decision == TrialScheduler.STOP:
                self.over.setdefault(n, "stopped")
                self.inner.on_trial_complete(view, trial, result)
        if not self._together:
            self._listener.decided(n, rung - 1, n not in self.over, None, trial.config)
        if decision == TrialScheduler.STOP and n != current:
            controller.stop_trial(trial)


class _View:
    """The controller of Ray Tune as the inner scheduler sees it: trials by number, and live until they are over."""

    # Population based training refuses to work beside a searcher; `Numbered` is one.
    search_alg = None

    def __init__(self, order: InOrder, controller: Any) -> None:
        self._order = order
        self._controller = controller

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return list(self._order._trials)

    def get_live_trials(self) -> list[Trial]:
        return [trial for n, trial in enumerate(self._order._trials) if n not in self._order.over]


class Numbered(Searcher):  # type: ignore[misc]
    """A searcher that proposes trials by number; see the module.

    Args:
        points: any searcher of Ray Tune, or a function from the number of a trial to its values.
        order: the scheduler of the same Tuner.
        lag: trial n is proposed from the outcomes of trials up to n - lag.
        seed: of what the searcher draws.
        known: values of trials that were begun before. They stay, whatever the searcher would propose now.
        begun: called with the number and the values of every trial before it begins.
    """

    def __init__(
        self,
        points: Searcher | Callable[[int], Result],
        order: InOrder,
        lag: int = 4,
        seed: int = 0,
        known: Mapping[int, Result] | None = None,
        begun: Callable[[int, Result], None] | None = None,
    ) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}
        self._points = points
        self._order = order
        self._lag = lag
        self._seed = seed
        self._known = known or {}
        self._begun = begun
        self._told = 0
        self._replaced: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": None}

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        self._metric, self._mode = metric, mode
        if isinstance(self._points, Searcher):
            return bool(self._points.set_search_properties(metric, mode, config, **spec))
        return True

    def suggest(self, trial_id: str) -> Result | str | None:
        n = len(self.numbers)
        if n >= self._order.num_trials:
            return str(Searcher.FINISHED)
        if self._order.busy() >= self._order.at_once:
            return None
        values = self._proposed(n)
        if values is None:
            return None
        if n in self._known and self._known[n] != values:
            _log.warning("Trial %d keeps %s; the searcher now proposes %s.", n, self._known[n], values)
            values = dict(self._known[n])
            self._replaced.add(n)
        if self._begun is not None:
            self._begun(n, values)
        self.numbers[trial_id] = n
        return values

    def on_trial_complete(self, trial_id: str, result: Result | None = None, error: bool = False) -> None:
        """Nothing: the searcher is told by number, before it proposes."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a sweep continues from its journal."""

    def _proposed(self, n: int) -> Result | None:
        if not isinstance(self._points, Searcher):
            return self._points(n)
        while self._told <= n - self._lag:
            if self._told not in self._order.over:
                return None
            self._tell(self._points, self._told)
            self._told += 1
        with seeded(self._seed, "ask", n):
            values = self._points.suggest(f"{n:05d}")
        return {name: _plain(value) for name, value in values.items()} if isinstance(values, dict) else None

    def _tell(self, searcher: Searcher, n: int) -> None:
        results, failed = self._order.results[n], self._order.over[n] == "failed"
        with seeded(self._seed, "tell", n):
            if n in self._replaced:
                # The score belongs to other values than the searcher's own proposal.
                searcher.on_trial_complete(f"{n:05d}", error=True)
                if results and not failed:
                    with contextlib.suppress(NotImplementedError):
                        searcher.add_evaluated_point(dict(self._known[n]), results[-1][str(self._metric)])
                return
            for result in results:
                searcher.on_trial_result(f"{n:05d}", result)
            last = results[-1] if results and not failed else None
            searcher.on_trial_complete(f"{n:05d}", result=last, error=failed)


def _failure(trial: Trial) -> tuple[str, bool]:
    """Return why a trial failed in a sentence, and True if it would fail again. A crash may not repeat."""
    if not trial.pickled_error_file:  # Ray stores only the errors of tasks and actors.
        text = Path(trial.error_file).read_text() if trial.error_file else ""
        return (text.strip().splitlines() or ["unknown"])[-1][:300], False
    # The file is read on this machine; it reaches the storage later.
    error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    if found := user_error(error):
        return str(found), True
    cause = error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
    last = (str(cause).strip().splitlines() or [""])[-1]
    return f"{type(cause).__name__}: {last[:300]}", False


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def seeded(*what: Any) -> Iterator[None]:
    """Make the global generators of Python and NumPy functions of `what` inside the block, and restore them after."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    digest = hashlib.blake2b(repr(what).encode(), digest_size=4).digest()
    random.seed(int.from_bytes(digest, "big"))
    np.random.seed(int.from_bytes(digest, "big"))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
