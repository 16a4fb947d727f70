"""Stop the workers of a group together, at the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from raysl.communication import collective

# Interval between two exchanges. Ray drains a machine that gets SIGTERM for 30 s.
EXCHANGE_EVERY_S = 2.0


class StopSync:
    """Agree among the workers, about every `EXCHANGE_EVERY_S` seconds, whether to stop and when they last saved.

    If a worker stopped alone, the others would wait for its gradients. The workers also agree on how long a step takes,
    and compute from it the step of the next exchange.

    Args:
        step: the step at which the workers begin.
        stop_requested: returns True if this worker was asked to stop.
        device: where the exchanged numbers are.
    """

    def __init__(self, step: int, stop_requested: Callable[[], bool], device: torch.device) -> None:
        self._stop_requested = stop_requested
        self._device = device
        self._steps = 1
        self._next = step + 1
        self._since = time.perf_counter()

    def exchange(self, step: int, since_save_s: float) -> tuple[bool, float]:
        """Exchange the state with the other workers if it is time. Every worker must call this after every step.

        Returns:
            True if any worker was asked to stop, and the mean of their seconds since the last save; False and 0 at
            steps without an exchange.
        """
        if step < self._next:
            return False, 0.0
        now = time.perf_counter()
        requested = float(self._stop_requested())
        mine = torch.tensor([requested, since_save_s, now - self._since], device=self._device)
        requested, since_s, took_s = collective.mean(mine).tolist()
        # At most twice as many steps as before, in case the first ones were fast by chance.
        self._steps = max(1, min(2 * self._steps, round(EXCHANGE_EVERY_S * self._steps / took_s)))
        self._next, self._since = step + self._steps, now
        return requested > 0, since_s
