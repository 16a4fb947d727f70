"""Store, query and print the results of probes.

    probes/rows/WRITER.jsonl    one file for each process that adds rows, so that none overwrites another's

The first line of a writer's file holds the number and the checksum of the lines that follow. A row carries everything
that its value depends on, and rows of different protocols never share a table.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from raysl import extraction, probes
from raysl.errors import UserError, counted, explained
from raysl.extraction import FeatureProtocol
from raysl.run import Run, jsonl
from raysl.storage import Folder

if TYPE_CHECKING:
    from rich.table import Table

    from raysl.dataset import DataSet

ENCODERS = ("trained", "random", "pixels")
# Names of the encoders in tables.
TITLES = {"random": "untrained", "pixels": "raw pixels"}
# The moving average of the backbone, of methods that keep one; it is measured only on request.
MOMENTUM = "momentum"
ROWS = "probes/rows"
_OLD_ROWS = "probes/rows.jsonl"
# In a folder of rows that does not belong to a run: the name and the identity of the model.
MODEL = "model.json"
# A row replaces an earlier row that has the same values of these fields.
KEY = ("probe", "name", "layer", "encoder", "step", "seed", "protocol", "train", "test")
_TABLE_KEY = ("probe", "protocol", "train", "test")
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("probe", "name", "layer", "encoder", "protocol", "train", "test"), str),
    **dict.fromkeys(("step", "seed", "primary"), int),
    "value": int | float,
    "time": float,
}
# Measures that are shares of 1, which people read as percent.
_SHARE = re.compile(
    r"(top\d|balanced|mAP|AP|PCK(_without_image)?|within|peak_in|middle_in|precision|closer|readout|chance|constant)"
    r"(?![a-z])|(readout|chance)_whether|.*_share$"
)


def protocol_hash(name: str, config: Any, protocol: FeatureProtocol, bn_statistics: str = probes.KEPT) -> str:
    """Return a hash of all settings that a probe's value depends on, apart from encoder, layer and data.

    The layers of `protocol` are not part of it. For `bn_statistics` see `raysl.evaluation.options.ProbeConfig`.
    """
    features = {key: value for key, value in vars(protocol).items() if key != "layers"}
    if bn_statistics != probes.KEPT:
        # Until November 2026 the statistics were those of batches in stored order, often of one class.
        features["bn_statistics"] = f"{bn_statistics} in random order"
    value = json.dumps([name, probes.settings(config), features], sort_keys=True)
    return hashlib.blake2b(value.encode(), digest_size=6).hexdigest()


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return the newest row of each `KEY` of a run. Raises UserError if a file is damaged, or of raysl 0.1."""
    if run.folder.exists(_OLD_ROWS):
        raise UserError(
            f"The results of probes in {run.folder / _OLD_ROWS} were written by raysl 0.1, which this version does not "
            "read. Delete that file and run the same `raysl probe` again."
        )
    timed: list[tuple[float, dict[str, Any]]] = []
    folder = run.folder / ROWS
    for name in folder.list():
        if name.endswith(".jsonl"):
            timed += [(row.pop("time"), row) for row in _read(folder, name)]
    timed.sort(key=lambda item: item[0])
    return list({_key(row): row for _, row in timed}.values())


def rows(runs: str | os.PathLike[str] | Run | Iterable[str | os.PathLike[str] | Run]) -> list[dict[str, Any]]:
    """Return the stored scores of runs, and of other models that `raysl probe --out` has measured.

    Args:
        runs: folders or runs, or one of them.

    Returns:
        For each number, the newest of its probe, protocol, data, layer, encoder, step and seed: a row as `raysl.probe`
        returns it, and "run", the folder.

    Raises UserError if a folder is neither a run nor that of a model, or a file of rows is damaged.
    """
    several = [runs] if isinstance(runs, str | os.PathLike | Run) else runs
    found = []
    if not isinstance(several, Iterable):
        raise UserError(f"runs is {runs!r}; it must be folders of runs.")
    for one in several:
        if not isinstance(one, str | os.PathLike | Run):
            raise UserError(f"runs holds {one!r}; it must hold folders of runs.")
        uri = str(one.folder) if isinstance(one, Run) else os.fspath(one)
        run = Run(Folder(uri))
        if not run.folder.exists(ROWS) and not run.folder.exists(MODEL):
            run = Run.open(uri)  # Raises UserError for what is no run.
        found += [{"run": uri, **row} for row in rows_of(run)]
    return found


def add_rows(run: Run, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a run. Any number of processes may do so at once.

    Raises UserError if the folder cannot be written, or the file of this process is damaged.
    """
    folder, name = run.folder / ROWS, _file_of(os.getpid())
    before = _read(folder, name) if folder.exists(name) else []
    now = [{**row, "time": time.time()} for row in rows]
    lines = jsonl({_key(row): row for row in [*before, *now]}.values())
    header = {"rows": lines.count(b"\n"), "crc32": zlib.crc32(lines)}
    folder.write(name, jsonl([header]) + lines)


def check_writable(folder: Folder, verb: str) -> None:
    """Raise UserError if the results of a verb cannot be written into a folder."""
    try:
        folder.check_writable()
    except UserError as error:
        raise UserError(
            f"{error} `raysl {verb}` can write its results elsewhere: give --out FOLDER."
        ) from error


@lru_cache
def _file_of(process: int) -> str:
    """Return the name of the file of a process. Process numbers repeat on other machines, so the name is random."""
    return f"{uuid.uuid4().hex}.jsonl"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _read(folder: Folder, name: str) -> list[dict[str, Any]]:
    data = folder.read(name)
    first, _, lines = data.partition(b"\n")
    remedy = "Delete that file and run the same `raysl probe` again; the results in other files are intact."
    what = f"The results of probes in {folder / name} are damaged"
    with explained(what, remedy, ValueError, KeyError, TypeError):
        header = json.loads(first)
        if (header["rows"], header["crc32"]) != (lines.count(b"\n"), zlib.crc32(lines)):
            raise ValueError("its checksum does not match")
        return [_checked(json.loads(line)) for line in lines.splitlines()]


def _checked(row: Any) -> dict[str, Any]:
    """Return a row if its fields have the right types, so that no report fails on it. Raises ValueError or KeyError."""
    for name, kind in _TYPES.items():
        if not isinstance(row[name], kind):
            raise ValueError(f"the {name} of a row is {row[name]!r}")
    if not math.isfinite(row["value"]):
        raise ValueError("a value is not a finite number")
    num_test = row.get("num_test", 0)
    if not isinstance(num_test, int) or isinstance(num_test, bool) or num_test < 0:
        raise ValueError("the number of test images of a row is not a whole number")
    if not isinstance(row.get("weights"), str | int | float | None):
        raise ValueError("the weights of a row are neither a name nor a number")
    # A report takes the names of its files from these.
    for name in _TABLE_KEY:
        if not re.fullmatch(r"[\w-]*", row[name]):
            raise ValueError(f"the {name} of a row, {row[name]!r}, is not a word")
    return dict(row)


def rows_of_probe(
    run: Run,
    name: str,
    train: str,
    test: str,
    config: Any = None,
    step: int | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of one probe under one protocol on given data, of all layers and encoders.

    Args:
        train, test: fingerprints of the data sets.
        config: Config of the probe; None for its defaults.
        step: only rows of this checkpoint and of untrained encoders; None for all.
        rows: the rows of the run, if the caller has read them already.
    """
    config = probes.load(name)[0]() if config is None else config
    protocol = FeatureProtocol(run.config().view.image_size)
    wanted = name, protocol_hash(name, config, protocol, probes.REESTIMATED)
    return [
        dict(row)
        for row in (rows_of(run) if rows is None else rows)
        if (row["probe"], row["protocol"]) == wanted
        and row["train"] in ("", train)
        and row["test"] in ("", test)
        and (step is None or row["step"] in (0, step))
    ]


def format_row_value(row: Mapping[str, Any]) -> str:
    """Return the value of a row as text: a share in percent with one decimal, other values with four digits."""
    return f"{100 * row['value']:.1f} %" if _SHARE.match(row["name"]) else f"{row['value']:.4g}"


def tables(rows: Iterable[Mapping[str, Any]], sets: Iterable[DataSet] = ()) -> list[Table]:
    """Return tables of rows: one for each probe, protocol and pair of data sets, with a column for each encoder.

    A table of several layers shows the primary metric, or all measures where some layer has no primary metric. Captions
    tell how large the data sets in `sets` are.
    """
    sizes = {one.manifest.fingerprint: _size(one) for one in sets}
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _TABLE_KEY), []).append(row)
    return [_table(members, sizes) for members in groups.values()]


def _size(dataset: DataSet) -> str:
    classes = f", {counted(len(dataset.manifest.classes), 'class')}" if dataset.has_labels else ""
    return f" ({dataset.size_text}{classes})"


def _table(members: list[Mapping[str, Any]], sizes: Mapping[str, str]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    name, protocol, train, test = (members[0][key] for key in _TABLE_KEY)
    layers = list(dict.fromkeys(row["layer"] for row in members))
    if len(layers) > 1 and {row["layer"] for row in members if row["primary"]} == set(layers):
        members = [row for row in members if row["primary"]]
    title = f"{name} on {layers[0]} features" if len(layers) == 1 else f"{name} by layer"
    table = Table(
        title=escape(title), caption=escape(f"protocol {protocol}, {describe_images(train, test, sizes)}")
    )
    several_seeds = len({row["seed"] for row in members}) > 1
    cells = {(row["layer"], row["name"], _column(row, several_seeds)): row for row in members}
    columns = sorted({column for _, _, column in cells})
    table.add_column("")
    for *_, heading in columns:
        table.add_column(escape(heading), justify="right")
    for layer, measure in dict.fromkeys((row["layer"], row["name"]) for row in members):
        found = [cells.get((layer, measure, column)) for column in columns]
        style = "bold" if any(row and row["primary"] for row in found) else None
        label = measure if len(layers) == 1 else f"{layer} {measure}"
        table.add_row(escape(label), *(format_row_value(row) if row else "" for row in found), style=style)
    return table


def describe_images(train: str, test: str, sizes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the images that a value depends on, as text.

    Both fingerprints are empty if the protocol names the images, and that of the train set if the probe did not see it.
    `sizes` are texts to add to a fingerprint.
    """
    named = {one: f"{one[:8]}{sizes.get(one, '')}" for one in (train, test)}
    if train and train == test:
        return f"same images for train and test: {named[test]}"
    if train:
        return f"train {named[train]}, test {named[test]}"
    return f"images {named[test]}" if test else "images named by the protocol"


def _column(row: Mapping[str, Any], several_seeds: bool) -> tuple[int, int, int, str]:
    of_run = row["encoder"] in ("trained", MOMENTUM)
    title = f"{row['encoder']}, step {row['step']}" if of_run else TITLES.get(row["encoder"], row["encoder"])
    if several_seeds:
        title += f", seed {row['seed']}"
    order = (*ENCODERS, MOMENTUM, extraction.Weights.name, row["encoder"])
    return order.index(row["encoder"]), row["step"], row["seed"], title


def verdicts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return sentences for each probe that say if the trained encoder is better than the baselines.

    Each encoder counts with the primary metric of its best layer. A probe that gives no score says what it has found
    in each layer, or that it is none. Accuracies that differ by less than two standard errors, of independent images,
    are called equal.
    """
    sentences = []
    members: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        members.setdefault(tuple(row[key] for key in _TABLE_KEY), []).append(row)
    for (name, *_), together in members.items():
        found = [row for row in together if row["primary"]]
        if not probes.is_score(name):
            sentences += _findings(name, together)
            continue
        best = {row["encoder"]: row for row in sorted(found, key=lambda row: float(row["value"]))}
        others = [best[encoder] for encoder in ENCODERS[1:] if encoder in best]
        if "trained" in best and others:
            sentences.append(_verdict(name, best["trained"], others))
    return sentences


def _findings(name: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what a probe that gives no score has found in the trained encoder, in a sentence for each layer."""
    by_layer: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["encoder"] == "trained":
            by_layer.setdefault(row["layer"], {})[row["name"]] = row["value"]
    found = [probes.finding(name, layer, values) for layer, values in by_layer.items()]
    if not found:
        return []
    if not any(found):
        found = [f"The probe {name} gives no score: more is not always better."]
    return [" ".join([*found, "Only a probe with labels tells if the features are useful."])]


def _verdict(name: str, trained: Mapping[str, Any], others: list[Mapping[str, Any]]) -> str:
    num_test = trained.get("num_test", 0)
    called = {"random": "the untrained network", "pixels": "raw pixels"}
    margins = [margin(row["name"], (trained["value"], row["value"]), num_test) for row in others]
    found: dict[str, list[str]] = {"better": [], "not clearly better": [], "worse": []}
    for row, chance in zip(others, margins, strict=True):
        ahead = trained["value"] - row["value"]
        how = "better" if ahead > chance else "worse" if ahead < -chance else "not clearly better"
        found[how].append(f"{called[row['encoder']]} ({format_row_value(row)})")
    listed = " and ".join(f"{how} than {' and '.join(texts)}" for how, texts in found.items() if texts)
    if len(found["better"]) == len(others):
        listed += ": the run has learned something useful"
    elif len(found["worse"]) == len(others):
        listed += ": the run has not learned anything that this probe can use yet"
    elif not found["better"] and max(margins):
        points = f"{100 * max(margins):.1f} percentage points"
        listed += f": with {counted(num_test, 'test image')}, a difference of {points} may be chance"
    return f"By {name}, the trained network ({format_row_value(trained)}) is {listed}."


def margin(measure: str, values: tuple[float, float], num_images: int) -> float:
    """Return two standard errors of the difference of two accuracies on independent images; 0 for other measures."""
    if not num_images or not measure.startswith("top"):
        return 0.0
    return 2 * math.sqrt(sum(value * (1 - value) for value in values) / num_images)
