"""How the workers of a group leave off together: who asks for it, and when they hear of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from raysl import collective

# Between two times at which the workers ask each other. Ray drains a machine that gets SIGTERM for 30 s.
PULSE_S = 2.0


class StopSync:
    """What the workers settle together about every `PULSE_S` seconds: whether to leave off, and when they saved.

    A worker that left off alone would leave the others waiting for its gradients, so all must hear it at one step.
    Which steps those are follows from how long steps take, on which the workers agree too.

    Args:
        step: that the session begins at.
        told: whether this worker has been told to leave off.
        device: of the numbers that are exchanged.
    """

    def __init__(self, step: int, told: Callable[[], bool], device: torch.device) -> None:
        self._told = told
        self._device = device
        self._steps = 1
        self._next = step + 1
        self._since = time.perf_counter()

    def settle(self, step: int, since_save_s: float) -> tuple[bool, float]:
        """Every worker must call it after every step.

        Returns:
            Whether any worker was told to leave off, and the mean of their seconds since the last save; False and 0
            at steps in between.
        """
        if step < self._next:
            return False, 0.0
        now = time.perf_counter()
        mine = torch.tensor([float(self._told()), since_save_s, now - self._since], device=self._device)
        told, since_s, took_s = collective.mean(mine).tolist()
        # At most twice as many as before, should the first ones have been quick by chance.
        self._steps = max(1, min(2 * self._steps, round(PULSE_S * self._steps / took_s)))
        self._next, self._since = step + self._steps, now
        return told > 0, since_s


class StopSignal:
    """Whether a worker shall leave off: the driver asks for it, or Ray is about to take one of the machines away.

    Args:
        board: where the driver's wish is found; None where nobody gives orders.
        rank: the first worker looks at the board.
    """

    def __init__(self, board: Any, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._asked: Any = None

    def __call__(self) -> bool:
        """Every worker must call it at the same step."""
        if self._board is None:
            return False
        import ray
        import ray.train

        # A machine that gets SIGTERM is drained by Ray first, as one is for which a notice came.
        if ray.train.get_preemption_info() is not None:
            return True
        if self._rank > 0:
            return False
        # What was asked the last time: training does not wait for the driver's machine.
        if self._asked is None:
            self._asked = self._board.asked_to_leave.remote()
        if not ray.wait([self._asked], timeout=0)[0]:
            return False
        asked, self._asked = ray.get(self._asked), self._board.asked_to_leave.remote()
        return bool(asked)
