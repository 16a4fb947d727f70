"""Probing a run: features of its trunk and of two baselines, then every probe that was asked for, as rows.

The baselines say what a number is worth: the same trunk before its first step, and the pixels. A row carries all that
its number depends on, and rows that were found under different protocols never share a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raysl import cluster, features, probes
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.features import Encoder, FeatureProtocol
from raysl.ingest import resolve
from raysl.probes import Labelled
from raysl.run import Run, jsonl
from raysl.storage import Folder

if TYPE_CHECKING:
    from rich.table import Table

ENCODERS = ("trained", "random", "pixels")
ROWS = "probes/rows.jsonl"
# What tells rows apart. A row that agrees in all of these replaces the one before.
KEY = ("probe", "name", "layer", "encoder", "step", "seed", "protocol", "train", "test")
_TABLE = ("probe", "layer", "protocol", "train", "test")


def probe(
    run: Run,
    train: str,
    test: str,
    names: Sequence[str] = ("knn", "linear"),
    say: Callable[[str], None] = print,
    *,
    encoders: Sequence[str] = ENCODERS,
    configs: Mapping[str, Any] | None = None,
    cache: Folder | None = None,
) -> list[dict[str, Any]]:
    """Probes the newest checkpoint of a run and adds the rows to the run.

    Args:
        run: with at least one complete checkpoint.
        train: labelled data to learn from, as `raysl.ingest.resolve` takes it.
        test: labelled data to be scored on.
        names: of probes.
        say: takes one line of progress at a time.
        encoders: of "trained", "random" and "pixels".
        configs: the Config of a probe by its name; one that is missing has its defaults.
        cache: where features are kept; the run's own folder by default. A sweep shares its baselines through one.

    Returns:
        The rows of this call: `KEY`, and "value", "headline" (whether the row stands for its probe) and "weights".

    Raises:
        UserError: a probe or an encoder does not exist, there is no checkpoint, or the data do not suit the probes.
    """
    ready = {name: _build(name, (configs or {}).get(name)) for name in dict.fromkeys(names)}
    protocol = FeatureProtocol(run.config().view.image_size)
    sources = [_encoder(run, name) for name in dict.fromkeys(encoders)]
    cluster.start()
    train_set, test_set = resolve(train), resolve(test)
    train_labels_n, test_labels_n = common_labels(train_set, test_set)
    fingerprints = {"train": train_set.manifest.fingerprint, "test": test_set.manifest.fingerprint}
    rows: list[dict[str, Any]] = []
    wanted = [(source, data) for source in sources for data in (train_set, test_set)]
    found = features.extract_all(wanted, protocol, cache or run.folder / "features")
    for i, source in enumerate(sources):
        identity = source.identity()
        about = {
            "encoder": source.name,
            "step": identity.get("step", 0),
            "seed": run.config().seed,
            "weights": identity.get("crc32"),
            **fingerprints,
        }
        for layer in protocol.layers:
            seen = Labelled(found[2 * i].load(layer), train_labels_n, fingerprints["train"])
            unseen = Labelled(found[2 * i + 1].load(layer), test_labels_n, fingerprints["test"])
            for name, (config, measure) in ready.items():
                facts = {"probe": name, "layer": layer, "protocol": protocol_hash(name, config, protocol)}
                rows += _measure(measure, seen, unseen, {**about, **facts}, say)
    _keep(run, rows)
    return rows


def _measure(
    measure: probes.Probe,
    seen: Labelled,
    unseen: Labelled,
    facts: Mapping[str, Any],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one probe on one encoder."""
    rows = []
    for row in measure.run(seen, unseen):
        headline = row.name == measure.headline
        rows.append({**facts, "name": row.name, "value": row.value, "headline": headline})
        if headline:
            say(f"{facts['probe']:<10} {facts['encoder']:<8} {row.name} {row.value:.4f}")
    return rows


def _build(name: str, config: Any) -> tuple[Any, probes.Probe]:
    config_type, probe_type = probes.load(name)
    config = config_type() if config is None else config
    return config, probe_type(config)


def _encoder(run: Run, name: str) -> Encoder:
    if name == "trained":
        return features.Trained(run, run.newest())
    if name == "random":
        return features.Untrained(run)
    if name == "pixels":
        return features.Pixels()
    raise unknown("encoder", name, ENCODERS)


def protocol_hash(name: str, config: Any, protocol: FeatureProtocol) -> str:
    """A hash of all that a probe's number depends on besides encoder and data. Layers are told apart by the rows."""
    seen = {key: value for key, value in asdict(protocol).items() if key != "layers"}
    value = json.dumps([name, asdict(config), seen], sort_keys=True)
    return hashlib.blake2b(value.encode(), digest_size=6).hexdigest()


def common_labels(train: DataSet, test: DataSet) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Labels of both sets, int64 (n,), under the numbers of the train set: classes are matched by their names.

    A class that only the test set has gets a number above those of the train set.

    Raises:
        UserError: a set has no labels, or they have no class in common.
    """
    train_n, test_n = features.labels(train), features.labels(test)
    numbers = {name: number for number, name in enumerate(train.manifest.classes)}
    if not numbers.keys() & set(test.manifest.classes):
        raise UserError(
            f"The train set {str(train.folder)!r} and the test set {str(test.folder)!r} have no class in common: the "
            f"first classes are {', '.join(train.manifest.classes[:3])} and {', '.join(test.manifest.classes[:3])}. "
            "Give two sets with the same classes."
        )
    mapped = [numbers.setdefault(name, len(numbers)) for name in test.manifest.classes]
    return train_n, np.array(mapped, dtype=np.int64)[test_n]


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All rows that probes have found for a run."""
    if not run.folder.exists(ROWS):
        return []
    return [json.loads(line) for line in run.folder.read(ROWS).splitlines()]


def _keep(run: Run, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to the run's, in the place of those with the same key."""
    kept = {tuple(row[key] for key in KEY): row for row in [*rows_of(run), *rows]}
    run.folder.write(ROWS, jsonl(kept.values()))


def tables(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """Tables of rows: one for each probe, layer, protocol and pair of data sets; a column for each encoder."""
    from rich.table import Table

    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _TABLE), []).append(row)
    made = []
    for (name, layer, protocol, train, test), members in groups.items():
        caption = f"protocol {protocol}, train {train[:8]}, test {test[:8]}"
        table = Table(title=f"{name} on {layer} features", caption=caption)
        several_seeds = len({row["seed"] for row in members}) > 1
        cells = {(row["name"], _column(row, several_seeds)): row for row in members}
        columns = sorted({column for _, column in cells})
        table.add_column("")
        for _, _, _, title in columns:
            table.add_column(title, justify="right")
        for measure in dict.fromkeys(row["name"] for row in members):
            found = [cells.get((measure, column)) for column in columns]
            style = "bold" if any(row and row["headline"] for row in found) else None
            table.add_row(measure, *(f"{row['value']:.4g}" if row else "" for row in found), style=style)
        made.append(table)
    return made


def _column(row: Mapping[str, Any], several_seeds: bool) -> tuple[int, int, int, str]:
    """Where the column of a row stands, and its title."""
    title = f"{row['encoder']}, step {row['step']}" if row["encoder"] == "trained" else row["encoder"]
    if several_seeds:
        title += f", seed {row['seed']}"
    return ENCODERS.index(row["encoder"]), row["step"], row["seed"], title
