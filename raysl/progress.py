"""What the driver hears from the trainers: rows of metrics to show, and the error that the user can mend."""

from __future__ import annotations

import math
from typing import Any

from raysl.errors import UserError

# Errors at one step before a run gives up. Every worker of a group counts.
MAX_CRASHES = 6


class Board:
    """An actor on the driver's machine. Trainers post to it and never wait for it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._failure: str | None = None
        self._crashes: dict[int, int] = {}

    def post(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics."""
        self._rows.append(row)

    def fail(self, message: str) -> None:
        """Remembers the first error that no retry can mend."""
        self._failure = self._failure or message

    def crash(self, step: int, trace: str) -> None:
        """Counts an error that a restart may mend. One that keeps coming at the same step is none of those."""
        self._crashes[step] = self._crashes.get(step, 0) + 1
        if self._crashes[step] >= MAX_CRASHES:
            self.fail(
                f"Training failed {self._crashes[step]} times after step {step}, each time with:\n\n{trace}"
            )

    def failure(self) -> str | None:
        """That error, or None."""
        return self._failure

    def take(self) -> list[dict[str, Any]]:
        """The rows since the last call."""
        rows, self._rows = self._rows, []
        return rows


def open_board() -> Any:
    """A new board."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=near)(Board).remote()


def raise_failure(board: Any) -> None:
    """Raises the UserError that a trainer has posted, if any."""
    import ray

    message = ray.get(board.failure.remote())
    if message:
        raise UserError(message)


def line(row: dict[str, Any], num_steps: int) -> str:
    """A row of metrics as one line for people: progress, speed, share of time waiting for data, loss, LR, ETA."""
    eta = duration(row["eta_s"]) if math.isfinite(row["eta_s"]) else "?"
    return (
        f"step {row['step']:>6}/{num_steps}  epoch {row['epoch']:6.2f}  {row['images_per_s']:8.0f} images/s  "
        f"data wait {row['wait_share']:4.0%}  loss {row['loss']:8.4f}  lr {row['lr']:.2e}  ETA {eta}"
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
