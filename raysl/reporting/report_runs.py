"""Load the folders of a report and group the runs that differ only in their seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl import checkpoint
from raysl.config import MAY_CHANGE
from raysl.config.command import command
from raysl.errors import UserError, explained
from raysl.evaluation.results import MODEL, MOMENTUM, rows_of
from raysl.plugins import MissingCodeError
from raysl.run import METADATA, Run, flattened
from raysl.storage import Folder
from raysl.storage.records import verified
from raysl.storage.similar import similar_folder

# Only rows that agree in these fields are compared.
PROTOCOL = ("probe", "protocol", "train", "test")
_LAYER_ORDER = ("conv1", "res2", "res3", "res4", "res5", "pooled", "heads")
# Columns of metrics that reports show.
_COLUMNS = ("step", "epoch", "loss", "images_per_s", "over_steps", "workers")
# Settings whose value may be the path of a user's file; a report keeps only the name behind the path.
_FILE_NAMES = {"backbone.name", "view.recipe"}


@dataclass(frozen=True)
class ReportRun:
    """A run, or an external model that was probed."""

    run: Run  # its folder; an external model has only rows there
    name: str  # the method, or the file of the model
    seed: int  # seed of the run; 0 for a model
    # Configuration by dotted name, without the fields in which seeds of one experiment differ.
    identity: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # results of probes
    # Columns of the metrics of training, float64 (n,), with NaN where there is no value.
    metrics: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """True for a run of raysl."""
        return self.run.folder.exists(METADATA)

    def command(self) -> str:
        """Return the command of the run; "" for a model, and where code of the run is missing."""
        try:
            return command(self.run.config()) if self.trained else ""
        except MissingCodeError:
            return ""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seed and folder."""

    label: str  # the method, and the fields that distinguish the group from others of that method
    runs: tuple[ReportRun, ...]  # sorted by seed


@dataclass(frozen=True)
class LabeledRow:
    """A row of a probe with its label in the report."""

    label: str
    row: Mapping[str, Any] = field(hash=False)


def groups(folders: Sequence[str]) -> list[Group]:
    """Return the folders in groups, sorted by label. Raises UserError if one holds no run or model, or is damaged."""
    runs = [_loaded(Folder(folder)) for folder in dict.fromkeys(folder.rstrip("/") for folder in folders)]
    runs.sort(key=lambda member: (member.name, member.seed, str(member.run.folder)))
    gathered: dict[str, list[ReportRun]] = {}
    for member in runs:
        gathered.setdefault(json.dumps([member.name, member.identity], sort_keys=True), []).append(member)
    of_name: dict[str, list[Mapping[str, Any]]] = {}
    for members in gathered.values():
        of_name.setdefault(members[0].name, []).append(members[0].identity)
    made = [Group(_label(each[0], of_name[each[0].name]), tuple(each)) for each in gathered.values()]
    return sorted(made, key=lambda group: group.label)


def _loaded(folder: Folder) -> ReportRun:
    run = Run(folder)
    if folder.exists(METADATA):
        metadata, rows = run.metadata(), rows_of(run)
        try:
            config = run.config().to_json()
        except MissingCodeError:  # Scores and losses can be shown without it.
            config = metadata["config"]
        # Settings that cannot change results are left out, except for the number of workers.
        ignored = {"seed", "method", *MAY_CHANGE} - {"workers"}
        identity = _identity({key: value for key, value in config.items() if key not in ignored})
        identity["images"] = metadata["data"]["fingerprint"][:8]
        identity["step"] = _step(run, rows)
        identity |= _inputs(metadata.get("facts", {}))
        return ReportRun(run, config["method"], config["seed"], identity, rows, run.metrics_columns(_COLUMNS))
    if folder.exists(MODEL):
        what = f"The file {folder}/{MODEL} is damaged"
        remedy = "Delete it and run the same `raysl probe` again."
        with explained(what, remedy, ValueError, KeyError, TypeError, show=repr):
            model = verified(folder.read_json(MODEL))
            name, identity = str(model["name"]), _identity(dict(model["identity"]))
        return ReportRun(run, name, 0, identity, rows_of(run))
    raise UserError(
        f"Neither a sweep nor a run lies at {str(folder)!r}: there is no sweep.jsonl, no {METADATA} and no {MODEL}. "
        f"{similar_folder(str(folder), METADATA)}Give folders that `raysl sweep`, `raysl pretrain` or `raysl probe "
        "--out` has made."
    )


def _step(run: Run, rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the newest step that was probed; that of the newest checkpoint if none was, and 0 before the first."""
    probed = [int(row["step"]) for row in rows if row["encoder"] == "trained"]
    return max(probed) if probed else checkpoint.newest_step(run.checkpoints)


def _inputs(facts: Mapping[str, Any]) -> dict[str, Any]:
    teacher, labels = facts.get("teacher", {}), facts.get("labels", {})
    values = {
        "K": facts.get("num_clusters"),
        "teacher": teacher.get("method") or labels.get("objective"),
        "teacher_step": teacher.get("step"),
        "starting_weights": facts.get("starting_weights"),
    }
    return {name: value for name, value in values.items() if value is not None}


def _identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values under dotted names, without paths: the teacher of another seed is in another folder.

    Of networks and augmentations that a file or timm defines, the name is kept without the folder.
    """
    named = dict(flattened(values))
    for name in named.keys() & _FILE_NAMES:
        named[name] = str(named[name]).rpartition("/")[2]
    return {name: item for name, item in named.items() if not (isinstance(item, str) and "/" in item)}


def _label(member: ReportRun, others: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({name for other in others for name in other})
    differing = [name for name in names if len({json.dumps(other.get(name)) for other in others}) > 1]
    short = ", ".join(f"{name.removeprefix('parts.')}={member.identity.get(name)}" for name in differing)
    return f"{member.name} ({short})" if differing else member.name


def labeled_rows(gathered: Sequence[Group]) -> list[LabeledRow]:
    """Return all rows with their labels; of each measurement only the rows of its newest step.

    Rows of untrained backbones and of pixels share a label across runs. If runs of a group were probed at different
    steps, the label names the step, because they are not seeds of one measurement.
    """
    label_of = labels(gathered)
    made: list[LabeledRow] = []
    for group in gathered:
        newest = [(member, row) for member in group.runs for row in newest_rows(member.rows)]
        steps: dict[tuple[Any, ...], set[int]] = {}
        for _, row in newest:
            steps.setdefault(_measurement(row), set()).add(row["step"])
        for member, row in newest:
            label = label_of(row["encoder"], group, member)
            if row["encoder"] in ("trained", MOMENTUM) and len(steps[_measurement(row)]) > 1:
                label = f"{label}, step {row['step']}"
            made.append(LabeledRow(label, row))
    return made


def _measurement(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["encoder"], *(row[name] for name in PROTOCOL))


def newest_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the newest step of each measurement."""
    newest: dict[tuple[Any, ...], int] = {}
    for row in rows:
        newest[_measurement(row)] = max(newest.get(_measurement(row), 0), row["step"])
    return [row for row in rows if row["step"] == newest[_measurement(row)]]


def labels(gathered: Sequence[Group]) -> Callable[[str, Group, ReportRun], str]:
    """Return a function that labels the results of an encoder.

    An untrained backbone is named by its kind if the report has several.
    """
    members = [member for group in gathered for member in group.runs]
    backbones = {_backbone(one) for one in members if any(row["encoder"] == "random" for row in one.rows)}

    def label_of(encoder: str, group: Group, member: ReportRun) -> str:
        if encoder == "pixels":
            return "raw pixels"
        if encoder == "random":
            return f"untrained {_backbone(member)}" if len(backbones) > 1 else "untrained"
        return f"{group.label}, moving average" if encoder == MOMENTUM else group.label

    return label_of


def _backbone(member: ReportRun) -> str:
    parts = [member.identity.get(f"backbone.{name}", "") for name in ("name", "stem", "norm")]
    return " ".join(str(part) for part in parts if part not in ("", "standard", "batch"))


def layers(rows: Sequence[LabeledRow]) -> list[str]:
    """Return the layers of rows, from the image upward."""
    seen = dict.fromkeys(item.row["layer"] for item in rows)
    known = [layer for layer in _LAYER_ORDER if layer in seen]
    return known + [layer for layer in seen if layer not in known]


def by_protocol(rows: Sequence[LabeledRow]) -> list[tuple[tuple[str, ...], list[LabeledRow]]]:
    """Return rows in groups that may be compared: the values of `PROTOCOL`, and their rows, sorted."""
    together: dict[tuple[str, ...], list[LabeledRow]] = {}
    for item in rows:
        together.setdefault(tuple(item.row[name] for name in PROTOCOL), []).append(item)
    return sorted(together.items())
