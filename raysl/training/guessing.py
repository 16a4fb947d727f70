"""Say at the end of a run if its loss is that of a guess, which a loss alone does not show."""

from __future__ import annotations

import logging

import numpy as np

from raysl.config import Pretraining
from raysl.run import Run

_log = logging.getLogger("raysl.training")
# The last part of the steps, and how far below chance its loss should be, as shares.
_LAST, _BELOW = 0.1, 0.01


def warn(run: Run, config: Pretraining, chance: float, num_steps: int) -> None:
    """Log a line if a run has ended and the loss of its last steps is not below `chance`, the loss of equal scores."""
    rows = run.metrics_columns(("step", "loss"))
    late = rows["step"] > (1 - _LAST) * num_steps
    if num_steps not in rows["step"]:
        return
    loss = float(np.nanmean(rows["loss"][late]))
    if loss < (1 - _BELOW) * chance:
        return
    uses_bank = config.method.partition("-")[0] in ("pirl", "npid")
    slower = "--bank.momentum 0.5, " if uses_bank and config.bank.momentum < 0.5 else ""
    _log.warning(
        "The loss of the last steps is %.3f, and guessing would give %.3f: the run has hardly learned to solve its "
        "task. Try %smore --epochs, more images or another --optim.lr.",
        *(loss, chance, slower),
    )
