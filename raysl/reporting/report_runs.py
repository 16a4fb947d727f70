"""What stands side by side in a report: runs, and other people's models that were probed; seeds gathered in a group."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysl.config import FREE
from raysl.errors import UserError
from raysl.evaluation.results import MODEL, rows_of
from raysl.run import METADATA, Run
from raysl.storage import Folder

# What tells one measurement from another besides the encoder: only rows that agree in these are compared.
PROTOCOL = ("probe", "protocol", "train", "test")
_ORDER = ("conv1", "res2", "res3", "res4", "res5", "pooled", "heads")


@dataclass(frozen=True)
class Entry:
    """One folder.

    Args:
        run: it; the folder of a model that is no run has rows alone.
        name: the method, or the file of the model.
        seed: of the run; 0 of a model.
        identity: what it shares with runs that differ only in seed and folder, by dotted name.
        rows: that probes have found.
        metrics: of training.
    """

    run: Run
    name: str
    seed: int
    identity: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]] = ()

    @property
    def trained(self) -> bool:
        """Whether it is a run of raysl."""
        return self.run.folder.exists(METADATA)


@dataclass(frozen=True)
class Group:
    """Entries that differ in seed and folder alone.

    Args:
        label: the method, and those fields that tell it from other groups of that method.
        entries: by seed.
    """

    label: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Found:
    """A row of a probe under the name that it has in the report."""

    label: str
    row: Mapping[str, Any] = field(hash=False)


def groups(places: Sequence[str]) -> list[Group]:
    """The folders in groups, by label.

    Raises:
        UserError: a folder holds neither a run nor a probed model, or is damaged.
    """
    entries = [_entry(Folder(place)) for place in dict.fromkeys(place.rstrip("/") for place in places)]
    entries.sort(key=lambda entry: (entry.name, entry.seed, str(entry.run.folder)))
    gathered: dict[str, list[Entry]] = {}
    for entry in entries:
        gathered.setdefault(json.dumps([entry.name, entry.identity], sort_keys=True), []).append(entry)
    of_name: dict[str, list[Mapping[str, Any]]] = {}
    for members in gathered.values():
        of_name.setdefault(members[0].name, []).append(members[0].identity)
    made = [
        Group(_label(members[0], of_name[members[0].name]), tuple(members)) for members in gathered.values()
    ]
    return sorted(made, key=lambda group: group.label)


def _entry(folder: Folder) -> Entry:
    run = Run(folder)
    if folder.exists(METADATA):
        metadata, config = run.metadata(), run.config().to_json()
        rows = rows_of(run)
        step = max((row["step"] for row in rows if row["encoder"] == "trained"), default=0)
        # Where a run lies and what only keeps it does not make it another; the number of workers may.
        ignored = {"seed", "method", *FREE} - {"workers"}
        identity = dict(_flat({key: value for key, value in config.items() if key not in ignored}))
        facts = {"images": metadata["data"]["fingerprint"][:8], "step": step, **_taught(metadata)}
        return Entry(run, config["method"], config["seed"], {**identity, **facts}, rows, run.metrics())
    if folder.exists(MODEL):
        model = folder.read_json(MODEL)
        return Entry(run, model["name"], 0, dict(_flat(model["identity"])), rows_of(run))
    raise UserError(
        f"Neither a sweep nor a run lies at {str(folder)!r}: there is no sweep.jsonl, no {METADATA} and no {MODEL}. "
        "Give folders that `raysl sweep`, `raysl pretrain` or `raysl probe --out` has made."
    )


def _taught(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a student learned from, wherever that lies: the number of clusters, and how far which teacher had come."""
    facts = metadata.get("facts", {})
    teacher, labels = facts.get("teacher", {}), facts.get("labels", {})
    told = {
        "K": facts.get("num_clusters"),
        "teacher": teacher.get("method") or labels.get("objective"),
        "teacher_step": teacher.get("step"),
    }
    return {name: value for name, value in told.items() if value is not None}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values. Places are left out: the teacher of another seed lies in another folder."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif not (isinstance(item, str) and "/" in item):
            yield f"{prefix}{key}", item


def _label(entry: Entry, others: Sequence[Mapping[str, Any]]) -> str:
    """The name, and the fields in which groups of that name differ."""
    names = sorted({name for other in others for name in other})
    told = [name for name in names if len({json.dumps(other.get(name)) for other in others}) > 1]
    short = ", ".join(f"{name.removeprefix('parts.')}={entry.identity.get(name)}" for name in told)
    return f"{entry.name} ({short})" if told else entry.name


def found(gathered: Sequence[Group]) -> list[Found]:
    """All rows, those of a checkpoint from the newest step that the probe has seen. The untrained backbone and the pixels
    stand once, however many runs have them. Where runs of a group were probed at other steps than each other, the step
    is in the name: they are no seeds of one measurement."""
    label_of = labels(gathered)
    made: list[Found] = []
    for group in gathered:
        newest = [(entry, row) for entry in group.entries for row in _newest(entry.rows)]
        steps: dict[tuple[Any, ...], set[int]] = {}
        for _, row in newest:
            steps.setdefault(_measurement(row), set()).add(row["step"])
        for entry, row in newest:
            label = label_of(row["encoder"], group, entry)
            apart = row["encoder"] == "trained" and len(steps[_measurement(row)]) > 1
            made.append(Found(f"{label}, step {row['step']}" if apart else label, row))
    return made


def _measurement(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["encoder"], *(row[name] for name in PROTOCOL))


def _newest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each measurement the rows of its newest step."""
    newest: dict[tuple[Any, ...], int] = {}
    for row in rows:
        newest[_measurement(row)] = max(newest.get(_measurement(row), 0), row["step"])
    return [row for row in rows if row["step"] == newest[_measurement(row)]]


def labels(gathered: Sequence[Group]) -> Callable[[str, Group, Entry], str]:
    """How what an encoder has given for an entry is called; untrained backbones by their kind, where there are several."""
    backbones = {
        _backbone(entry)
        for group in gathered
        for entry in group.entries
        if any(row["encoder"] == "random" for row in entry.rows)
    }

    def label_of(encoder: str, group: Group, entry: Entry) -> str:
        if encoder == "pixels":
            return "raw pixels"
        if encoder == "random":
            return f"untrained {_backbone(entry)}" if len(backbones) > 1 else "untrained"
        return group.label

    return label_of


def _backbone(entry: Entry) -> str:
    """Name of the backbone, with what is not usual about it."""
    parts = [entry.identity.get(f"backbone.{name}", "") for name in ("name", "stem", "norm")]
    return " ".join(str(part) for part in parts if part not in ("", "standard", "batch"))


def layers(rows: Sequence[Found]) -> list[str]:
    """The layers of rows, from the image on."""
    seen = dict.fromkeys(item.row["layer"] for item in rows)
    return [layer for layer in _ORDER if layer in seen] + [layer for layer in seen if layer not in _ORDER]
