"""Where a sweep stands: what follows from its scores and failures, and from nothing else.

Every trial climbs the same rungs. At each it is scored, for every seed, and the scheduler decides whether it goes on.
All answers are functions of the scores, worked out anew by whoever asks; so a sweep that was interrupted decides as
one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from raysl import rng
from raysl.tuning import schedulers, searchers
from raysl.tuning.config import SweepConfig
from raysl.tuning.searchers import Outcome
from raysl.tuning.space import Space, Values

State = Literal["finished", "stopped", "failed", "running", "waiting"]


@dataclass(frozen=True, order=True)
class Climb:
    """The piece of work of a sweep: one seed of a trial, from the rung before up to this one."""

    trial: int
    seed: int
    rung: int


class Standing:
    """The state of a sweep.

    Args:
        config: of the sweep.
        space: of its points.
        rows: of its journal.
    """

    def __init__(self, config: SweepConfig, space: Space, rows: Iterable[Mapping[str, Any]]) -> None:
        self.config = config
        self.space = space
        self.num_rungs = len(config.shares())
        self.scores: dict[Climb, float] = {}
        self.failures: dict[int, str] = {}
        self._grid = space.grid() if config.searcher == "grid" else None
        self.num_trials = len(self._grid) if self._grid is not None else config.samples
        self._decisions: dict[tuple[int, int], bool | None] = {}
        self._values: dict[tuple[int, int], Values | None] = {}
        for row in rows:
            if row["event"] == "trial" and config.searcher == "optuna":
                # What was tried stays so, whatever is known of other trials since.
                self._values[row["trial"], row["rung"]] = row["values"]
            elif row["event"] == "score":
                self.scores[Climb(row["trial"], row["seed"], row["rung"])] = row["score"]
            elif row["event"] == "failed":
                self.failures[row["trial"]] = row["reason"]
            elif row["event"] == "retry":
                self.failures.pop(row["trial"], None)

    def score(self, trial: int, rung: int) -> float | None:
        """The mean over seeds; None while one of them is missing."""
        found = [self.scores.get(Climb(trial, seed, rung)) for seed in self.config.seeds]
        return None if None in found else mean(value for value in found if value is not None)

    def settled(self, trial: int, rung: int) -> bool:
        """Whether the trial has a score at a rung, or never will."""
        if self.score(trial, rung) is not None or trial in self.failures:
            return True
        return any(self.decision(trial, before) is False for before in range(rung))

    def decision(self, trial: int, rung: int) -> bool | None:
        """Whether the trial goes on from a rung; None while that cannot be told. At the last rung it is finished."""
        if (trial, rung) not in self._decisions:
            self._decisions[trial, rung] = self._decide(trial, rung)
        return self._decisions[trial, rung]

    def _decide(self, trial: int, rung: int) -> bool | None:
        own = self.score(trial, rung)
        if own is None:
            return None
        if rung == self.num_rungs - 1 or self.config.scheduler == "none":
            return True
        others = range(self.num_trials if self.config.scheduler == "pbt" else trial)
        if not all(self.settled(other, rung) for other in others):
            return None
        there = [other for other in others if self.score(other, rung) is not None]
        if self.config.scheduler == "asha":
            earlier = [score for other in there if (score := self.score(other, rung)) is not None]
            return schedulers.asha(own, earlier, self.config.reduction)
        if self.config.scheduler == "median":
            return schedulers.median(
                self.scores_of(trial, rung), [self.scores_of(other, rung) for other in there]
            )
        return True

    def scores_of(self, trial: int, rung: int | None = None) -> list[float]:
        """The means over seeds at the rungs that the trial has been at, up to one of them."""
        rungs = range(self.num_rungs if rung is None else rung + 1)
        return [score for r in rungs if (score := self.score(trial, r)) is not None]

    def values(self, trial: int, rung: int = 0) -> Values | None:
        """The point of a trial on its way to a rung; None while it cannot be told. Only PBT changes it on the way."""
        if (trial, rung) not in self._values:
            self._values[trial, rung] = self._point(trial) if rung == 0 else self._changed(trial, rung)
        return self._values[trial, rung]

    def _point(self, trial: int) -> Values | None:
        if self._grid is not None:
            return self._grid[trial]
        if self.config.searcher == "random":
            return self.space.drawn(self.config.seed, trial)
        known = []
        for other in range(trial - self.config.lag + 1):
            values, state = self.values(other), self.state(other)
            if values is None or state in ("running", "waiting"):
                return None
            known.append(Outcome(values, tuple(self.scores_of(other)), state))
        return searchers.proposed(self.space, self.config.seed, trial, known)

    def _changed(self, trial: int, rung: int) -> Values | None:
        copied = self.donor(trial, rung)
        if copied is None:
            return self.values(trial, rung - 1)
        values = self.values(copied, rung - 1)
        generator = rng.generator(self.config.seed, "change", trial, rung)
        return values and self.space.near(values, generator)

    def donor(self, trial: int, rung: int) -> int | None:
        """The trial from whose checkpoint at the rung before this one starts out to `rung`; None: from its own."""
        if self.config.scheduler != "pbt" or rung == 0 or self.decision(trial, rung - 1) is None:
            return None
        found = {n: self.score(n, rung - 1) for n in range(self.num_trials)}
        scores = {n: score for n, score in found.items() if score is not None}
        return schedulers.donor(trial, scores, rng.generator(self.config.seed, "donor", trial, rung))

    def folder(self, trial: int, seed: int, rung: int) -> str:
        """Where, inside the sweep, the run lies that takes the trial to a rung. PBT begins a new one for a copy."""
        begun = next((r for r in range(rung, 0, -1) if self.donor(trial, r) is not None), 0)
        return f"trials/{trial:04d}/seed-{seed}" + (f"-from-rung-{begun}" if begun else "")

    def next_rung(self, trial: int) -> int | None:
        """The rung that the trial is on its way to; None when it is over, or waits for others."""
        if trial in self.failures:
            return None
        for rung in range(self.num_rungs):
            if self.score(trial, rung) is None:
                return rung
            if not self.decision(trial, rung):
                return None
        return None

    def ready(self) -> list[Climb]:
        """What can be done now, in the order in which it should: what has come farthest first."""
        found = []
        for trial in range(self.num_trials):
            rung = self.next_rung(trial)
            if rung is not None and self.values(trial, rung) is not None:
                climbs = [Climb(trial, seed, rung) for seed in self.config.seeds]
                found += [climb for climb in climbs if climb not in self.scores]
        return sorted(found, key=lambda climb: (-climb.rung, climb.trial))

    def state(self, trial: int) -> State:
        """How the trial is doing. A trial that waits needs others to come as far, or is not begun."""
        if trial in self.failures:
            return "failed"
        if self.score(trial, self.num_rungs - 1) is not None:
            return "finished"
        if any(self.decision(trial, rung) is False for rung in range(self.num_rungs)):
            return "stopped"
        begun = any(climb.trial == trial for climb in self.scores)
        return "running" if begun and self.next_rung(trial) is not None else "waiting"

    def best(self) -> int | None:
        """The finished trial with the best score."""
        done = {n: self.scores_of(n)[-1] for n in range(self.num_trials) if self.state(n) == "finished"}
        return max(done, key=lambda n: (done[n], -n)) if done else None
