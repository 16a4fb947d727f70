"""Say at the end of a run if its loss is that of a guess, which a loss alone does not show."""

from __future__ import annotations

import logging
import math

import numpy as np

from raysl.errors import UserError
from raysl.run import Run

_log = logging.getLogger("raysl.training")
# The last part of the steps, and how far below chance its loss should be, as shares.
_LAST, _BELOW = 0.1, 0.01


def warn_if_at_chance(run: Run, chance: float, num_steps: int) -> None:
    """Log a line if a run has ended and the loss of its last steps is not below `chance`, the loss of a guess.

    A run is not judged if the rows of metrics that hold its last steps alone cover less than half of these.
    """
    if not math.isfinite(chance):
        return
    try:
        rows = run.metrics_columns(("step", "loss", "over_steps"))
    except UserError:
        return  # The weights are saved, and do not depend on the metrics.
    late = rows["step"] - rows["over_steps"] >= (1 - _LAST) * num_steps
    over_n, loss_n = rows["over_steps"][late], rows["loss"][late]
    if num_steps not in rows["step"][late] or over_n.sum() < _LAST * num_steps / 2:
        return
    loss = float(np.average(loss_n, weights=over_n))
    if loss >= (1 - _BELOW) * chance:
        _log.warning(
            "The loss of the last steps is %.3f, and guessing would give %.3f: the run has hardly learned to solve its "
            "task. Train for more epochs, on more images, or with a lower learning rate.",
            *(loss, chance),
        )
