"""The rows that probes have found: kept with a run, found again by what they hang on, and as tables.

A row carries all that its number depends on, and rows that were found under different protocols never share a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raysl import extraction, probes
from raysl.extraction import FeatureProtocol
from raysl.run import Run, jsonl

if TYPE_CHECKING:
    from rich.table import Table

ENCODERS = ("trained", "random", "pixels")
ROWS = "probes/rows.jsonl"
# What a folder of rows says about a model that is no run.
MODEL = "model.json"
# What tells rows apart. A row that agrees in all of these replaces the one before.
KEY = ("probe", "name", "layer", "encoder", "step", "seed", "protocol", "train", "test")
_TABLE = ("probe", "protocol", "train", "test")


def protocol_hash(name: str, config: Any, protocol: FeatureProtocol) -> str:
    """A hash of all that a probe's number depends on besides encoder and data. Layers are told apart by the rows.

    A Config that has `facts()` says by it what counts, such as the contents of a folder instead of its name.
    """
    seen = {key: value for key, value in asdict(protocol).items() if key != "layers"}
    facts = config.facts() if hasattr(config, "facts") else asdict(config)
    value = json.dumps([name, facts, seen], sort_keys=True)
    return hashlib.blake2b(value.encode(), digest_size=6).hexdigest()


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All rows that probes have found for a run."""
    if not run.folder.exists(ROWS):
        return []
    return [json.loads(line) for line in run.folder.read(ROWS).splitlines()]


def rows_under(
    run: Run, name: str, train: str, test: str, config: Any = None, step: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a run by one probe under one protocol, of all layers and encoders, on these data; see
    `_Data.fingerprints` for probes that have seen nothing of some of them.

    Args:
        name: of the probe.
        train: fingerprint of the train set.
        test: fingerprint of the test set.
        config: of the probe; its defaults, if it is None.
        step: only of this checkpoint, and of what was not trained; None for all.
    """
    config = probes.load(name)[0]() if config is None else config
    wanted = name, protocol_hash(name, config, FeatureProtocol(run.config().view.image_size))
    found = [
        row
        for row in rows_of(run)
        if (row["probe"], row["protocol"]) == wanted
        and row["train"] in ("", train)
        and row["test"] in ("", test)
    ]
    return [row for row in found if step is None or row["step"] in (0, step)]


def keep(run: Run, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to the run's, in the place of those with the same key."""
    kept = {tuple(row[key] for key in KEY): row for row in [*rows_of(run), *rows]}
    run.folder.write(ROWS, jsonl(kept.values()))


def tables(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """Tables of rows: one for each probe, protocol and pair of data sets; a column for each encoder. Of several layers
    the headline is shown, or all that there is where a probe has none for some of them."""
    from rich.table import Table

    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _TABLE), []).append(row)
    made = []
    for (name, protocol, train, test), members in groups.items():
        layers = list(dict.fromkeys(row["layer"] for row in members))
        headlined = {row["layer"] for row in members if row["headline"]}
        if len(layers) > 1 and headlined == set(layers):
            members = [row for row in members if row["headline"]]
        title = f"{name} on {layers[0]} features" if len(layers) == 1 else f"{name} by layer"
        table = Table(title=title, caption=f"protocol {protocol}, {of_images(train, test)}")
        several_seeds = len({row["seed"] for row in members}) > 1
        cells = {(row["layer"], row["name"], _column(row, several_seeds)): row for row in members}
        columns = sorted({column for _, _, column in cells})
        table.add_column("")
        for _, _, _, heading in columns:
            table.add_column(heading, justify="right")
        for layer, measure in dict.fromkeys((row["layer"], row["name"]) for row in members):
            found = [cells.get((layer, measure, column)) for column in columns]
            style = "bold" if any(row and row["headline"] for row in found) else None
            label = measure if len(layers) == 1 else f"{layer} {measure}"
            table.add_row(label, *(f"{row['value']:.4g}" if row else "" for row in found), style=style)
        made.append(table)
    return made


def of_images(train: str, test: str) -> str:
    """The images that a number hangs on, for people.

    Args:
        train: fingerprint of the train set; empty where the probe has seen nothing of it.
        test: of the test set; empty where the protocol names the images.
    """
    if train:
        return f"train {train[:8]}, test {test[:8]}"
    return f"images {test[:8]}" if test else "images of its own"


def _column(row: Mapping[str, Any], several_seeds: bool) -> tuple[int, int, int, str]:
    """Where the column of a row stands, and its title."""
    title = f"{row['encoder']}, step {row['step']}" if row["encoder"] == "trained" else row["encoder"]
    if several_seeds:
        title += f", seed {row['seed']}"
    order = (*ENCODERS, extraction.Weights.name)
    return order.index(row["encoder"]), row["step"], row["seed"], title
