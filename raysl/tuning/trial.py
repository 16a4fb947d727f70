"""One piece of work of a sweep: a run goes on to a rung of its schedule, and is then scored by a probe.

The trainers have gone when the probe begins, and saved what they go on from, so a trial that waits for its fate holds
nothing of the cluster.
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raysl import checkpoint
from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.evaluation.evaluate import probe
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.shared import Subscriber
from raysl.training.launch import pretrain

ERROR = "error.txt"
_ATTEMPTS = 2


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Args:
        config: of the run.
        until: the step of the rung.
        placement: what the trainers get.
        train: labelled data that the probe learns from.
        test: labelled data that it is scored on.
        probe: its name.
        begun: the step of the rung before, 0 at first.
        donor: another run, from whose checkpoint of that step this one starts if it has none yet.
        receivers: runs that start from the checkpoint of this one at that step. They get it before this one goes on,
            and may then delete it.
        seat: at a stream that the run shares with others.
    """

    config: Pretraining
    until: int
    placement: Placement
    train: str
    test: str
    probe: str
    begun: int = 0
    donor: Folder | None = None
    receivers: tuple[Folder, ...] = ()
    subscriber: Subscriber | None = None


def perform(work: Work, say: Callable[[str], None]) -> dict[str, Any]:
    """Does it, from the newest checkpoint. What is done already is not done again.

    Returns:
        A row for the journal: "event" is "score", with the score, the last training loss and the seconds; or "failed",
        with the reason.
    """
    started = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            score, loss = _score(work, say)
        except UserError as error:
            return {"event": "failed", "reason": str(error)}
        except Exception as error:  # a node that was lost, or a defect, which the next attempt tells apart
            if attempt == _ATTEMPTS - 1:
                return {"event": "failed", "reason": _reason(error, Folder(work.config.run))}
        else:
            seconds = round(time.monotonic() - started, 2)
            return {"event": "score", "step": work.until, "score": score, "loss": loss, "seconds": seconds}
    raise AssertionError("an attempt returns")


def _reason(error: BaseException, run: Folder) -> str:
    """What is at the bottom of an error that came through Ray, in a line; all of it goes to the folder of the run."""
    with contextlib.suppress(UserError):
        run.write(ERROR, "".join(traceback.format_exception(error)).encode())
    seen: list[BaseException] = []
    below: BaseException | None = error
    while below is not None and below not in seen:
        seen.append(below)
        cause = getattr(below, "cause", None)
        below = cause if isinstance(cause, BaseException) else below.__cause__
    said = str(seen[-1]).strip().splitlines() or [""]
    return f"{type(seen[-1]).__name__}: {said[-1][:200]} The whole error is in {ERROR} of the run."


def _score(work: Work, say: Callable[[str], None]) -> tuple[float, float]:
    run_folder = Folder(work.config.run)
    if work.donor is not None:
        _copy(work.donor, work.begun, run_folder)
    for receiver in work.receivers:
        _copy(run_folder, work.begun, receiver)
    run = pretrain(work.config, until=work.until, placement=work.placement, subscriber=work.subscriber)
    if run.newest().step != work.until:
        raise UserError(
            f"The run at {work.config.run!r} is at step {run.newest().step} and was to be scored at step {work.until}. "
            "Something else has trained it further. Give the sweep a folder of its own."
        )
    say("probing")
    # Features of a rung are used once, and are larger than the checkpoint.
    features = run.folder / f"features-{work.until}"
    try:
        rows = probe(run, work.train, work.test, probes=(work.probe,), encoders=("trained",), cache=features)
    finally:
        features.delete()
    score = next(float(row["value"]) for row in rows if row["primary"])
    if not math.isfinite(score):
        raise UserError(f"The probe {work.probe!r} gave {score} at step {work.until}.")
    return score, float(run.metrics()[-1]["loss"])


def _copy(source: Folder, step: int, target: Folder) -> None:
    """Copies a checkpoint to a run that has none. Receipts go last: half a copy is no checkpoint."""
    there = Run(target).checkpoints
    if checkpoint.newest(there) is not None:
        return
    found = next((c for c in checkpoint.complete(Run(source).checkpoints) if c.step == step), None)
    if found is None:
        raise UserError(
            f"The checkpoint of step {step} is no longer in {str(source)!r}, and another trial was to go on from it. "
            "Begin the sweep anew in another folder."
        )
    for name in sorted(found.folder.list(), key=lambda name: name.startswith("manifest-")):
        (there / found.folder.uri.rpartition("/")[2]).write(name, found.folder.read(name))
