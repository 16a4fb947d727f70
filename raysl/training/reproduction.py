"""Repeat a run from its metadata and list the differences: first of data, code and packages, then of numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from raysl import checkpoint
from raysl.checkpoint import Checkpoint
from raysl.config import Pretraining, run_folder
from raysl.errors import UserError
from raysl.fields import Bounds, CheckedTop
from raysl.ingestion import open_or_ingest
from raysl.ray_cluster.versions import versions
from raysl.run import METADATA, Run, flattened
from raysl.storage import Folder
from raysl.storage.records import as_json
from raysl.training.launch import pretrain

_log = logging.getLogger("raysl.training.reproduction")
# Columns of metrics that depend on the machine and its load.
_TIMES = ("images_per_s", "wait_s", "wait_share", "eta_s")


@dataclass(frozen=True)
class ReproduceConfig(CheckedTop):
    """Repeat a run from its metadata and compare the two.

    Args:
        out: folder of the second run, a path or a URI; default: `again` in the first.
        steps: number of steps; 0 for the steps of the first run's newest checkpoint.
        data: data set; default: the data set of the first run.
        local: repeat with one worker in this process and without Ray; the numbers are the same.
    """

    out: str = ""
    steps: Annotated[int, Bounds(0, 2**63 - 1)] = 0
    data: str = ""
    local: bool = False


@dataclass(frozen=True)
class Comparison:
    """What differs between a repeated run and the first: inputs (data, code, packages, workers) and results.

    `compared` names what was compared: "numbers" (rows of metrics), "weights" (a checkpoint of the last step), or both.
    """

    input_differences: tuple[str, ...]
    result_differences: tuple[str, ...]
    steps: int
    run: Run
    compared: tuple[str, ...]

    @property
    def same(self) -> bool:
        """True if all numbers are equal to the last bit."""
        return not self.result_differences


def reproduce(first: Run, config: ReproduceConfig) -> Comparison:
    """Repeat `first` and compare all metrics, and the weights if the first has a checkpoint of the last step.

    A repetition that was interrupted is resumed if the code and the packages are still the same.

    Raises:
        UserError: the first run has no checkpoint, or nothing to compare within the steps; the second cannot run, or
            its folder holds another run. Different images are a difference and not an error.
    """
    if config.local and first.config().worker_counts() != (1,):
        raise UserError(
            f"The run was trained with --workers {first.config().workers}, and --local repeats with one. Omit --local."
        )
    newest = first.newest()
    steps = min(config.steps, newest.step) if config.steps else newest.step
    at = checkpoint.checkpoint_of_step(first.checkpoints, steps)
    if at is None and not any(row["step"] <= steps for row in first.metrics()):
        raise _nothing(steps)
    metadata = first.metadata()
    out = config.out or str(first.folder / "again")
    again = replace(first.config(), run=out, data=config.data or metadata["data"]["uri"])
    # Only the last checkpoint is compared.
    again = replace(again, save=replace(again.save, every_steps=0))
    fingerprint = open_or_ingest(again.data).manifest.fingerprint
    if not _is_interrupted(again, steps, fingerprint):
        if not config.out:
            Folder(out).delete()  # The rest of an earlier comparison.
        elif Folder(out).exists(METADATA):
            raise UserError(f"--out is {out!r}, which already holds a run. Give a new folder.")
    run_folder.check_free(out, "--out")
    input_differences = list(_input_differences(metadata, fingerprint))
    for line in input_differences:
        _log.info("differs: %s", line)
    second = pretrain(again, until=steps, local=config.local or None)
    rows, differences = _metric_differences(first, second, steps)
    if not rows and at is None:
        raise _nothing(steps)
    if at is not None:
        differences += _weights(at, second.newest())
    compared = tuple(name for name, has in (("numbers", bool(rows)), ("weights", at is not None)) if has)
    return Comparison(tuple(input_differences), tuple(differences), steps, second, compared)


def _is_interrupted(again: Pretraining, steps: int, fingerprint: str) -> bool:
    """Return True if the folder holds the beginning of this repetition, by the code, packages and images of today."""
    begun = Run(Folder(again.run))
    if not begun.folder.exists(METADATA) or checkpoint.newest_step(begun.checkpoints) >= steps:
        return False
    now = as_json(versions())
    metadata = begun.metadata()
    is_same = begun.config() == again and metadata["data"]["fingerprint"] == fingerprint
    return is_same and all({**session, **now} == session for session in metadata["sessions"])


def _nothing(steps: int) -> UserError:
    return UserError(
        f"The run holds nothing to compare at --steps {steps}: no checkpoint of this step, and no row of metrics over "
        "the same steps before it. Give more steps, or omit --steps."
    )


def _input_differences(metadata: Mapping[str, Any], fingerprint: str) -> list[str]:
    """Return the differences of data, code and packages. Sessions of the first run may differ from each other."""
    found = []
    if metadata["data"]["fingerprint"] != fingerprint:
        found.append(f"data: fingerprint {metadata['data']['fingerprint'][:12]} then, {fingerprint[:12]} now")
    now = dict(flattened(as_json(versions())))
    for number, session in enumerate(metadata["sessions"]):
        for name, value in flattened({key: session.get(key) for key in versions()}):
            if value != now.get(name):
                found.append(f"{name}: {value} in session {number + 1} then, {now.get(name)} now")
    counts = sorted({session["workers"] for session in metadata["sessions"]}, key=str)
    if len(counts) > 1:
        found.append(f"workers: {', '.join(map(str, counts))} in turn then, {counts[-1]} now")
    return found


def _metric_differences(first: Run, second: Run, steps: int) -> tuple[int, list[str]]:
    """Return how many rows were compared, and for each metric that differs its first step and greatest difference."""
    theirs = {row["step"]: row for row in first.metrics() if row["step"] <= steps}
    found: dict[str, str] = {}
    greatest: dict[str, float] = {}
    rows = 0
    for row in second.metrics():
        before = theirs.get(row["step"], {})
        if before.get("over_steps") != row["over_steps"]:
            continue  # After an interruption, a row is a mean over other steps.
        rows += 1
        for name in sorted(row.keys() & before.keys() - {*_TIMES}):
            ours, old = row[name], before[name]
            if ours != old:
                relative = abs(ours - old) / max(abs(old), 1e-12)
                greatest[name] = max(greatest.get(name, 0.0), relative)
                found.setdefault(name, f"{name}: {old:.6g} then, {ours:.6g} now at step {row['step']} first")
    return rows, [f"{line}; at most {greatest[name]:.1e} of it" for name, line in found.items()]


def _weights(then: Checkpoint, now: Checkpoint) -> list[str]:
    """Return the number of tensors that differ, and the first of them. Equal tensors may be in different files."""
    # The state of an objective may be nested, as MoCo's queue is.
    before, after = (dict(flattened(one.state()["network"])) for one in (then, now))
    # A constant that was never set is NaN in both runs.
    changed = [
        name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())
    ]
    if not changed:
        return []
    return [
        f"weights: {len(changed)} of {len(before)} tensors differ at step {now.step}, the first {changed[0]!r}"
    ]
