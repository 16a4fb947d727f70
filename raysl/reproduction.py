"""Running a run again from its metadata, and naming what differs: ingredients first, then numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from raysl import checkpoint, ray_cluster
from raysl.checkpoint import Checkpoint
from raysl.errors import UserError
from raysl.ingestion import resolve
from raysl.ray_cluster.versions import versions
from raysl.run import METADATA, Run
from raysl.storage import Folder
from raysl.training.launch import pretrain

# Columns of metrics that depend on the machine and its load.
_TIMES = ("images_per_s", "wait_s", "wait_share", "eta_s")


@dataclass(frozen=True)
class ReproduceConfig:
    """Runs a run again from its metadata and compares.

    Args:
        out: folder of the second run, a path or a URI; `again` inside the first by default.
        steps: how far; 0 is as far as the first run's newest checkpoint.
        data: where the images are now; by default where they were.
    """

    out: str = ""
    steps: int = 0
    data: str = ""


@dataclass(frozen=True)
class Comparison:
    """How a second run compares with the first.

    Args:
        ingredients: what the runs were made of and differs: data, code, packages, workers.
        numbers: what came out and differs.
        steps: how far both were run.
        run: the second.
    """

    ingredients: tuple[str, ...]
    numbers: tuple[str, ...]
    steps: int
    run: Run

    @property
    def same(self) -> bool:
        """Whether all numbers are equal, to the last bit."""
        return not self.numbers


def reproduce(first: Run, config: ReproduceConfig, say: Callable[[str], None] = print) -> Comparison:
    """Runs `first` again and compares losses, learning rates, every other metric, and the weights.

    Raises:
        UserError: the first run has no checkpoint to compare with, or the second cannot be run, or a run lies where
            it would go. Other images are a difference and no error.
    """
    newest = first.newest()
    steps = min(config.steps, newest.step) if config.steps else newest.step
    metadata = first.metadata()
    out = config.out or str(first.folder / "again")
    if not config.out:
        Folder(out).delete()  # of an earlier comparison, perhaps of other code
    elif Folder(out).exists(METADATA):
        raise UserError(f"A run lies at {out!r} already. Give a new folder to --out.")
    again = replace(first.config(), run=out, data=config.data or metadata["data"]["uri"])
    # The checkpoint to compare with must come at the same step, and others would only take time.
    again = replace(again, save=replace(again.save, every_steps=0))
    ray_cluster.start()
    ingredients = list(_ingredients(metadata, resolve(again.data).manifest.fingerprint))
    for line in ingredients:
        say(f"differs: {line}")
    second = pretrain(again, until=steps)
    numbers = list(_numbers(first, second, steps))
    return Comparison(tuple(ingredients), tuple(numbers), steps, second)


def _ingredients(metadata: Mapping[str, Any], fingerprint: str) -> list[str]:
    """What the second run is made of that the first was not. Sessions of the first may differ among themselves."""
    found = []
    if metadata["data"]["fingerprint"] != fingerprint:
        found.append(f"data: fingerprint {metadata['data']['fingerprint'][:12]} then, {fingerprint[:12]} now")
    now = _flat(json.loads(json.dumps(versions())))
    for number, session in enumerate(metadata["sessions"]):
        for name, value in _flat({key: session.get(key) for key in versions()}).items():
            if value != now.get(name):
                found.append(f"{name}: {value} in session {number + 1} then, {now.get(name)} now")
    counts = sorted({session["workers"] for session in metadata["sessions"]}, key=str)
    if len(counts) > 1:
        found.append(f"workers: {', '.join(map(str, counts))} in turn then, {counts[-1]} now")
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key} ") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _numbers(first: Run, second: Run, steps: int) -> list[str]:
    """What came out differently: for each metric the first step and the greatest difference; then the weights."""
    theirs = {row["step"]: row for row in first.metrics() if row["step"] <= steps}
    found: dict[str, str] = {}
    greatest: dict[str, float] = {}
    for row in second.metrics():
        before = theirs.get(row["step"], {})
        if before.get("over_steps") != row["over_steps"]:
            continue  # means over other steps, where one of the runs was interrupted
        for name in sorted(row.keys() & before.keys() - {*_TIMES}):
            ours, old = row[name], before[name]
            if ours != old:
                relative = abs(ours - old) / max(abs(old), 1e-12)
                greatest[name] = max(greatest.get(name, 0.0), relative)
                found.setdefault(name, f"{name}: {old:.6g} then, {ours:.6g} now at step {row['step']} first")
    lines = [f"{line}; at most {greatest[name]:.1e} of it" for name, line in found.items()]
    at = next((c for c in checkpoint.complete(first.checkpoints) if c.step == steps), None)
    return lines if at is None else [*lines, *_weights(at, second.newest())]


def _weights(then: Checkpoint, now: Checkpoint) -> list[str]:
    """How many tensors of the network differ, and the first of them. Files may differ where tensors do not."""
    before, after = then.state()["network"], now.state()["network"]
    # A constant that was never set is NaN in both.
    changed = [
        name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())
    ]
    if not changed:
        return []
    return [
        f"weights: {len(changed)} of {len(before)} tensors differ at step {now.step}, the first {changed[0]!r}"
    ]
