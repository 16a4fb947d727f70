"""A searcher of Ray Tune that proposes trials in an order that does not depend on time.

`OrderedSearcher` wraps a searcher. It proposes trial n when the outcomes of trials up to n - lag are known, and the
searcher gets these outcomes in order of trial number. A sweep therefore has the same trials, whatever was faster and
whenever it was killed; see `ordered_scheduler`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from raysl.tuning.ordered_scheduler import OrderedScheduler, Result, seeded

_log = logging.getLogger("raysl.tuning")


class OrderedSearcher(Searcher):  # type: ignore[misc]
    """A searcher that proposes trials in the order of their numbers; see the module.

    Args:
        source: any searcher of Ray Tune, or a function from the number of a trial to its values.
        scheduler: the scheduler of the same Tuner.
        lag: trial n is proposed from the outcomes of trials up to n - lag.
        seed: seed of the random numbers that the searcher draws.
        known: values of trials that an earlier session began. They stay, whatever the searcher would propose now.

    Attributes:
        numbers: the number of each trial, by the id that Ray Tune gives it.
    """

    def __init__(
        self,
        source: Searcher | Callable[[int], Result],
        scheduler: OrderedScheduler,
        lag: int = 4,
        seed: int = 0,
        known: Mapping[int, Result] | None = None,
    ) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}
        self._source = source
        self._scheduler = scheduler
        self._lag = lag
        self._seed = seed
        self._known = known or {}
        # The number of trials whose outcomes the searcher has got.
        self._reported = 0
        # Trials whose values are not what the searcher proposed.
        self._replaced: set[int] = set()

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        self._metric, self._mode = metric, mode
        if isinstance(self._source, Searcher):
            return bool(self._source.set_search_properties(metric, mode, config, **spec))
        return True

    def suggest(self, trial_id: str) -> Result | str | None:
        n, scheduler = len(self.numbers), self._scheduler
        if n >= scheduler.num_trials:
            # If the search ended now, Ray Tune would start a new actor whenever a paused trial continues.
            ended = all(state.trial.is_finished() for state in scheduler.trials) and not scheduler.to_requeue
            return str(Searcher.FINISHED) if ended else None
        values = None if scheduler.num_runnable() >= scheduler.at_once else self._propose(n)
        if values is None:
            return None
        if self._known.get(n, values) != values:
            _log.warning("Trial %d keeps %s; the searcher now proposes %s.", n, self._known[n], values)
            values = dict(self._known[n])
            self._replaced.add(n)
        scheduler.record({"event": "trial", "trial": n, "rung": 0, "values": values})
        self.numbers[trial_id] = n
        return values

    def on_trial_complete(self, trial_id: str, result: Result | None = None, error: bool = False) -> None:
        """Do nothing: the searcher gets results in the order of trial numbers, before it proposes."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: a sweep continues from its journal."""

    def _propose(self, n: int) -> Result | None:
        if not isinstance(self._source, Searcher):
            return self._source(n)
        while self._reported <= n - self._lag:
            if not self._scheduler.trials[self._reported].outcome:
                return None
            self._report(self._source, self._reported)
            self._reported += 1
        with seeded(self._seed, "ask", n):
            values = self._source.suggest(f"{n:05d}")
        if not isinstance(values, dict):  # None for "not now", or a word that says that the search has ended
            return None
        return {k: value.item() if isinstance(value, np.generic) else value for k, value in values.items()}

    def _report(self, searcher: Searcher, n: int) -> None:
        """Give the searcher the results and the outcome of a trial."""
        state = self._scheduler.trials[n]
        # Scores of values that the searcher did not propose would mislead it.
        lost = state.outcome == "failed" or n in self._replaced
        with seeded(self._seed, "tell", n):
            for result in () if n in self._replaced else state.results:
                searcher.on_trial_result(f"{n:05d}", result)
            last = state.results[-1] if state.results and not lost else None
            searcher.on_trial_complete(f"{n:05d}", result=last, error=lost)
            if n in self._replaced and state.results and state.outcome != "failed":
                with suppress(NotImplementedError):
                    searcher.add_evaluated_point(dict(self._known[n]), state.results[-1][str(self._metric)])
