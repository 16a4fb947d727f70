"""Whether a trial goes on from a rung. Pure functions of scores that were measured at the same point of the schedule.

A trial is compared with the trials that have lower numbers, all of them, and waits until these have been as far. So a
decision does not depend on which was faster, on how many run at a time, or on interruptions. The first trial of all
never waits, so there is always one that can go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEAST = 3


def asha(own: float, earlier: Sequence[float], reduction: int) -> bool:
    """Asynchronous successive halving: goes on when it is in the best 1 / reduction of what was there before it.

    Li et al., "A System for Massively Parallel Hyperparameter Tuning", arXiv 1810.05934, in the form that stops a
    trial rather than to pause it, as Ray Tune's ASHAScheduler.

    Args:
        own: score of the trial at the rung.
        earlier: scores at the same rung of the trials before it.
    """
    return not earlier or own >= float(np.quantile(earlier, 1 - 1 / reduction))


def median(own: Sequence[float], earlier: Sequence[Sequence[float]]) -> bool:
    """Median stopping: goes on when its best score so far is at least the median of the others' means so far.

    Golovin et al., "Google Vizier", KDD 2017, section 3.2.2.

    Args:
        own: scores of the trial up to the rung.
        earlier: scores up to the same rung of each trial before it that came so far.
    """
    means = [sum(scores) / len(scores) for scores in earlier]
    return len(means) < _LEAST or max(own) >= float(np.median(means))


def donor(trial: int, scores: dict[int, float], generator: np.random.Generator) -> int | None:
    """Population based training: a trial of the last quarter goes on from one of the first quarter.

    Jaderberg et al., "Population Based Training of Neural Networks", arXiv 1711.09846 (truncation selection, with a
    quarter where the paper has a fifth).

    Args:
        trial: whose turn it is.
        scores: of all trials at the rung.
        generator: for the choice among the first quarter.

    Returns:
        The trial to copy; None when it goes on with its own.
    """
    ranked = sorted(scores, key=lambda number: (-scores[number], number))
    quarter = max(1, len(ranked) // 4)
    if len(ranked) < 2 or trial not in ranked[-quarter:]:
        return None
    return ranked[int(generator.integers(quarter))]
