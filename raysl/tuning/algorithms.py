"""The schedulers and searchers of Ray Tune that `raysl sweep` offers."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from raysl.errors import UserError, install_hint
from raysl.tuning.config import SweepConfig
from raysl.tuning.space import Space


def check_installed(name: str) -> None:
    """Raise UserError for a searcher whose package is not installed."""
    if name == "optuna" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"--searcher optuna needs the package optuna, which is not installed. {install_hint('search')} --searcher "
            "random does not need it."
        )


def scheduler(config: SweepConfig, points: Space, times: tuple[int, ...]) -> Any:
    """Return the scheduler that a sweep asks for. `times` are those of the rungs, as trials report them under "t"."""
    from ray.tune import schedulers as made

    if config.scheduler == "asha":
        return made.ASHAScheduler("t", max_t=times[-1], grace_period=1, reduction_factor=config.reduction)
    if config.scheduler == "median":
        return made.MedianStoppingRule("rung", grace_period=1, min_samples_required=3)
    if config.scheduler == "hyperband":
        return made.HyperBandScheduler("t", max_t=times[-1], reduction_factor=config.reduction)
    if config.scheduler == "pbt":
        how = {"hyperparam_mutations": points.mutations(), "custom_explore_fn": points.clipped}
        return made.PopulationBasedTraining(
            "rung", perturbation_interval=1, log_config=False, synch=True, **how
        )
    return made.FIFOScheduler()


def searcher(config: SweepConfig) -> Any:
    """Return the searcher of a sweep whose values depend on scores."""
    from ray.tune.search.optuna import OptunaSearch

    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(seed=config.seed)
