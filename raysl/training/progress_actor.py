"""What the driver and the trainers tell each other: rows and news to show, errors, and the wish that they leave off."""

from __future__ import annotations

import math
from typing import Any

from raysl.errors import UserError

# Errors of one worker at one step before a run gives up.
MAX_CRASHES = 3


class Board:
    """An actor on the driver's machine. Trainers post to it and never wait for it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._news: list[str] = []
        self._failure: str | None = None
        self._crashes: dict[tuple[int, int], int] = {}
        self._reached = 0
        self._leave = False
        self._trainers: list[Any] = []

    def enlist(self, trainer: Any) -> None:
        """A trainer says that it is there, with the handle of its actor."""
        self._trainers.append(trainer)

    def leaving(self) -> None:
        """The trainers have agreed on a step to leave off at; from now on nobody ends them."""
        self._trainers = []

    def dismiss(self) -> None:
        """Ends the trainers that have not agreed to leave off, as if their machines had died."""
        import ray

        for trainer in self._trainers:
            ray.kill(trainer)
        self._trainers = []

    def post(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics."""
        self._rows.append(row)
        self._reached = max(self._reached, row["step"])

    def fail(self, message: str) -> None:
        """Remembers the first error that no retry can mend."""
        self._failure = self._failure or message

    def crash(self, step: int, rank: int, trace: str) -> None:
        """Counts an error that a restart may mend. One that a worker keeps meeting at the same step is none of those.

        Workers that only lost one of the others count for themselves, so that a large group is not given up sooner.
        """
        self._reached = max(self._reached, step)
        times = self._crashes[step, rank] = self._crashes.get((step, rank), 0) + 1
        if times >= MAX_CRASHES:
            self.fail(f"Training failed {times} times after step {step}, each time with:\n\n{trace}")

    def begin(self, step: int, workers: int, reached: int) -> int:
        """A group of workers begins, at a step that is 0 or that of a checkpoint.

        Args:
            reached: the last step in the metrics of earlier sessions.

        Returns:
            The steps, as far as rows of metrics tell, that had been done after it and are lost.
        """
        lost = max(0, max(self._reached, reached) - step)
        self._reached = step
        if step or lost:
            self._news.append(f"Went on from step {step} with {workers} workers; {lost} steps were lost.")
        return lost

    def ask_to_leave(self, leave: bool) -> None:
        """Whether the trainers shall save and leave off, as soon as they have agreed on a step."""
        self._leave = leave

    def asked_to_leave(self) -> bool:
        """That wish."""
        return self._leave

    def news(self) -> list[str]:
        """The sentences since the last call."""
        news, self._news = self._news, []
        return news

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
    # Where the driver is, and nowhere else: machines of trainers go away. A wish alone (`soft`) does not hold on a head
    # without CPUs.
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
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
