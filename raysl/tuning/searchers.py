"""Which point a trial tries: a function of its number and, for TPE, of the outcomes of a fixed set of trials."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysl import rng
from raysl.errors import UserError
from raysl.tuning.space import Dimension, Space, Values

# Trials of TPE that are drawn at random first.
_STARTUP = 8


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        values: its point.
        scores: the means over seeds at the rungs it reached.
        state: "finished", "stopped" or "failed".
    """

    values: Values
    scores: tuple[float, ...]
    state: str


def need_optuna() -> None:
    """Raises UserError when the package is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "The searcher 'optuna' needs the package optuna, which is not installed. Install raysl[search], or use "
            "--searcher random."
        )


def proposed(space: Space, seed: int, trial: int, known: Sequence[Outcome]) -> Values:
    """The proposal of the Tree-structured Parzen Estimator (Bergstra et al. 2011) of Optuna, given some outcomes.

    A new study is made for each trial and told the outcomes in order, so that the answer does not depend on how often
    the sweep was interrupted.
    """
    optuna: Any = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=rng.key(seed, "tpe", trial) % 2**32, n_startup_trials=_STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    wanted = {d.name: _distribution(optuna.distributions, d) for d in space.dimensions}
    states = optuna.trial.TrialState
    for outcome in known:
        state = {"finished": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}[outcome.state]
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=outcome.scores[-1] if state == states.COMPLETE else None,
                params=outcome.values,
                distributions=wanted,
                intermediate_values=dict(enumerate(outcome.scores)),
            )
        )
    return dict(study.ask(wanted).params)


def _distribution(distributions: Any, dimension: Dimension) -> Any:
    if dimension.values:
        return distributions.CategoricalDistribution(dimension.values)
    kind = distributions.IntDistribution if dimension.whole else distributions.FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)
