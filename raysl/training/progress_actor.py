"""Exchange progress between the driver and the workers: metrics and messages to show, errors, and stop requests."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from raysl.errors import UserError, counted

# Errors of one worker at one step before a run gives up.
MAX_SAME_STEP_ERRORS = 3
# What a worker is doing, for the sentence about workers that time out waiting for each other.
WAITING_FOR_IMAGES = "waits for images"
SAVING = "writes a checkpoint"
WAITING_FOR_WORKERS = "waits for the other workers"


class ProgressActor:
    """An actor on the driver's machine. Workers post to it and never wait for it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._messages: list[str] = []
        self._failure: UserError | None = None
        self._crashes: dict[tuple[int, int], int] = {}
        self._reached = 0
        self._stop_requested = False
        self._workers: list[Any] = []
        self._num_workers = 0
        # What the workers do that have not ended a step for long.
        self._stalled: dict[int, str] = {}
        self._stall = ""

    def register(self, worker: Any) -> None:
        """Add a worker, by the handle of its actor, to those that `kill_workers` kills."""
        self._workers.append(worker)

    def stop_agreed(self) -> None:
        """Record that the workers have agreed on a step to stop at; from now on `kill_workers` does nothing."""
        self._workers = []

    def kill_workers(self) -> None:
        """Kill the workers that have not agreed to stop, as if their machines had died."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def post(self, row: dict[str, Any]) -> None:
        """Add a row of metrics."""
        self._rows.append(row)
        self._reached = max(self._reached, row["step"])

    def say(self, message: str) -> None:
        """Add a message."""
        self._messages.append(message)

    def fail(self, error: UserError) -> None:
        """Keep the first error that no retry can solve."""
        self._failure = self._failure or error

    def crash(self, step: int, rank: int, trace: str) -> None:
        """Count an error that a restart may solve. An error that one worker repeats at the same step becomes final.

        Each worker counts separately, so that the loss of one worker does not end a large group sooner. After a stall,
        the errors of all workers follow from it.
        """
        self._reached = max(self._reached, step)
        times = self._crashes[step, rank] = self._crashes.get((step, rank), 0) + 1
        stall = stall_sentence(step, self._stalled, self._num_workers) if self._stalled else ""
        if stall and stall != self._stall:
            self._messages.append(stall)
            self._stall = stall
        if times >= MAX_SAME_STEP_ERRORS:
            often = f"Training failed {times} times after step {step}, each time with:\n\n{trace}"
            self.fail(UserError(stall or often))

    def stalled(self, rank: int, doing: str) -> None:
        """Record what a stalled worker is doing; "" once it has ended its step."""
        self._stalled[rank] = doing
        if not doing:
            self._stalled.pop(rank)

    def begin(self, step: int, workers: int, reached: int, saves: str) -> int:
        """Record that a worker group begins at a step: 0, or the step of a checkpoint.

        Args:
            reached: last step in the metrics of earlier sessions.
            saves: when checkpoints are saved, from `SaveConfig.describe`.

        Returns:
            The number of steps after `step` that were done and lost, as far as metrics show.
        """
        lost = max(0, max(self._reached, reached) - step)
        self._reached, self._num_workers, self._stalled, self._stall = step, workers, {}, ""
        # Metrics have a row every few steps, so those after the last row are not counted.
        were = f"; {counted(lost, 'step')} or more were lost" if lost else ""
        if step:
            self._messages.append(f"Resumed from step {step} with {counted(workers, 'worker')}{were}.")
        elif lost:
            self._messages.append(
                f"No checkpoint had been saved yet ({saves}), so the run starts again{were}."
            )
        return lost

    def request_stop(self, stop: bool) -> None:
        """Set or withdraw the request that the workers save and stop, as soon as they have agreed on a step."""
        self._stop_requested = stop

    def stop_requested(self) -> bool:
        """Return True if the workers were asked to stop."""
        return self._stop_requested

    def take_messages(self) -> list[str]:
        """Return the messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def failure(self) -> UserError | None:
        """Return the first final error, or None."""
        return self._failure

    def take_rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics since the last call."""
        rows, self._rows = self._rows, []
        return rows


class Progress:
    """The worker's side of the exchange with its driver. This base class has no driver and does nothing."""

    def begin(self, step: int, workers: int, reached: int, saves: str) -> int:
        """Report the first step of a worker group; see `ProgressActor.begin`."""
        return 0

    def post(self, row: dict[str, Any]) -> None:
        """Report a row of metrics."""

    def say(self, message: str) -> None:
        """Report a line for the user."""

    def stop_agreed(self) -> None:
        """Report that the workers have agreed on a step to stop at."""

    def stop_requested(self) -> bool:
        """Return True if the worker should save and stop. Every worker must call it at the same step."""
        return False

    def set_activity(self, step: int, activity: str) -> None:
        """Report what the worker begins to do after `step` steps: one of the three constants of this module."""


class RemoteProgress(Progress):
    """Progress through a progress actor, which only rank 0 asks. Also stops when Ray will drain one of the machines."""

    def __init__(self, actor: Any, rank: int) -> None:
        self._actor = actor
        self._rank = rank
        self._answer: Any = None
        self._activity = (time.monotonic(), 0, WAITING_FOR_WORKERS)
        self._stall_reported = False

    def begin(self, step: int, workers: int, reached: int, saves: str) -> int:
        import ray

        return int(ray.get(self._actor.begin.remote(step, workers, reached, saves)))

    def post(self, row: dict[str, Any]) -> None:
        self._actor.post.remote(row)

    def say(self, message: str) -> None:
        self._actor.say.remote(message)

    def stop_agreed(self) -> None:
        self._actor.stop_agreed.remote()

    def stop_requested(self) -> bool:
        import ray
        import ray.train

        # Ray first drains a machine that gets SIGTERM or a preemption notice.
        if ray.train.get_preemption_info() is not None:
            return True
        if self._rank > 0:
            return False
        # Look at the answer to the previous request, so that training never waits for the driver's machine.
        if self._answer is None:
            self._answer = self._actor.stop_requested.remote()
        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        requested, self._answer = ray.get(self._answer), self._actor.stop_requested.remote()
        return bool(requested)

    def set_activity(self, step: int, activity: str) -> None:
        self._activity = (time.monotonic(), step, activity)

    def watch(self, timeout_s: float) -> None:
        """End this process if it waits for the other workers for nearly as long as torch allows, and tell the driver.

        torch itself would end the process when NCCL's time is over, by a signal and without an error in Python.
        """

        def look() -> None:
            while not self.is_late(timeout_s, time.monotonic()):
                time.sleep(timeout_s / 100)
            os._exit(1)

        threading.Thread(target=look, daemon=True).start()

    def is_late(self, timeout_s: float, now_s: float) -> bool:
        """Return True if this worker has waited for the others for 95 % of the time. Report its work from 90 % on."""
        import ray

        since_s, step, doing = self._activity
        stalls = now_s - since_s > 0.9 * timeout_s
        if stalls != self._stall_reported:
            self._actor.stalled.remote(self._rank, doing if stalls else "")
            self._stall_reported = stalls
        late = doing == WAITING_FOR_WORKERS and now_s - since_s > 0.95 * timeout_s
        if late:
            ray.get(self._actor.crash.remote(step, self._rank, ""))
        return late

    def close(self) -> None:
        """End the watch."""
        self._activity = (math.inf, 0, "")


def stall_sentence(step: int, stalled: Mapping[int, str], workers: int) -> str:
    """Return what is known of workers that time out waiting for each other, with the likely causes.

    Args:
        stalled: what a worker does, by its rank; workers that hang are missing.
    """
    does = {rank: stalled.get(rank, "does not answer") for rank in range(max(workers, 1 + max(stalled)))}
    others = [f"worker {rank} {doing}" for rank, doing in does.items() if doing != WAITING_FOR_WORKERS]
    found = f"After step {step}, the workers timed out waiting for each other: "
    if WAITING_FOR_IMAGES in does.values():
        return f"{found}{', '.join(others)}. Its data tasks get no CPU (`ray status`), or the storage does not answer."
    if others:
        return f"{found}{', '.join(others)}. Look at its machine: at its GPU (`nvidia-smi`), memory and disk."
    return (
        f"{found}none is behind the others. The network between the machines is the likely cause: a firewall, or "
        "NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs) that names no interface which all machines share. "
        "NCCL_DEBUG=INFO and RAYSL_LOG_TO_DRIVER=1 show more. Otherwise a GPU has failed (`nvidia-smi`), or an "
        "objective of yours exchanges tensors on some workers only."
    )


def start_progress_actor() -> Any:
    """Start a progress actor."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    # The actor stays on the driver's machine, because machines of workers may be reclaimed. A soft affinity would not
    # hold on a head without CPUs.
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    # If its process dies, a new one takes over. Requests to stop are repeated; its counts are lost, and so are the
    # handles of the workers: it cannot kill them until they start again.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": near}
    return ray.remote(**options)(ProgressActor).remote()


def raise_failure(actor: Any) -> None:
    """Raise the UserError that a worker has posted, if any."""
    import ray

    failure = ray.get(actor.failure.remote())
    if failure is not None:
        raise failure


def format_row(row: dict[str, Any], num_steps: int, epochs: float) -> str:
    """Return a row of metrics as a line of text: progress, speed, share of time waiting for data, loss, ETA.

    Args:
        epochs: epochs of the run. The last batch may go a little beyond them, which is not shown.
    """
    epoch = min(row["epoch"], epochs)
    eta = format_duration(row["eta_s"]) if math.isfinite(row["eta_s"]) else "?"
    return (
        f"step {row['step']:>5}/{num_steps}  epoch {epoch:5.1f}  {row['images_per_s']:6.0f} images/s  "
        f"waits {row['wait_share']:3.0%}  loss {row['loss']:7.4f}  ETA {eta}"
    )


def format_step(step: int, num_steps: int, with_loss: int) -> str:
    """Return a line of text for a step without a row of metrics: the first of a worker group, and later slow ones.

    Args:
        with_loss: the step of the next row.
    """
    return f"step {step:>5}/{num_steps}  the next loss at step {with_loss}"


def resume_hint(saved: int) -> str:
    """Return what the same command does when the newest checkpoint is of step `saved`; 0 for none."""
    if saved:
        return f"The same command resumes from the checkpoint of step {saved}."
    return "No checkpoint has been saved yet, so the same command begins again."


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
