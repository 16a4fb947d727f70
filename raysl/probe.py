"""Probing a run: features of its trunk and of two baselines, then every probe that was asked for, as rows.

The baselines say what a number is worth: the same trunk before its first step, and the pixels. A row carries all that
its number depends on, and rows that were found under different protocols never share a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raysl import cluster, features, probes
from raysl.checkpoint import Checkpoint
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.features import Encoder, FeatureProtocol, FeatureTable
from raysl.ingest import resolve
from raysl.probes import (
    EncoderProbe,
    FeatureProbe,
    LabelledProbe,
    Probe,
    Row,
    Subject,
    common_labels,
)
from raysl.probes._frozen import Frozen, by_layer
from raysl.run import PASSPORT, Run, jsonl
from raysl.storage import Folder

if TYPE_CHECKING:
    from rich.table import Table

Integers = npt.NDArray[np.int64]
Tables = Mapping[str, FeatureTable]

ENCODERS = ("trained", "random", "pixels")
ROWS = "probes/rows.jsonl"
# What a folder of rows says about a model that is no run.
MODEL = "model.json"
# What tells rows apart. A row that agrees in all of these replaces the one before.
KEY = ("probe", "name", "layer", "encoder", "step", "seed", "protocol", "train", "test")
_TABLE = ("probe", "protocol", "train", "test")


def probe(
    run: Run,
    train: str,
    test: str,
    names: Sequence[str] = ("knn", "linear"),
    say: Callable[[str], None] = print,
    *,
    layers: Sequence[str] = ("pooled",),
    encoders: Sequence[str] = ENCODERS,
    configs: Mapping[str, Any] | None = None,
    cache: Folder | None = None,
    checkpoint: Checkpoint | None = None,
    spare: bool = False,
) -> list[dict[str, Any]]:
    """Probes a checkpoint of a run and adds the rows to the run.

    Args:
        run: with at least one complete checkpoint.
        train: labelled data to learn from, as `raysl.ingest.resolve` takes it.
        test: labelled data to be scored on. Probes that need no labels look at these images alone.
        names: of probes.
        say: takes one line of progress at a time.
        layers: whose features are measured, all from one pass over the images; "all" for conv1, res2 to res5 and
            pooled. Pixels have no layers and stand once, as "pooled".
        encoders: of "trained", "random" and "pixels".
        configs: the Config of a probe by its name; one that is missing has its defaults.
        cache: where features are kept; the run's own folder by default. A sweep shares its baselines through one.
        checkpoint: which; the newest by default.
        spare: whether features are computed beside trainers, without taking CPUs from them.

    Returns:
        The rows of this call: `KEY`, and "value", "headline" (whether the row stands for its probe) and "weights".

    Raises:
        UserError: a probe, a layer or an encoder does not exist, there is no checkpoint, or the data do not suit the
            probes. The rows of those that came before are kept.
    """
    config = run.config()
    ready = _ready(names, configs)
    sources = [_encoder(run, name, checkpoint) for name in dict.fromkeys(encoders)]
    place = _Place(run, config.view.image_size, config.seed, cache or run.folder / "features", spare)
    return _measured(place, sources, train, test, ready, layers, say)


def probe_model(
    source: Encoder,
    title: str,
    out: str,
    train: str,
    test: str,
    names: Sequence[str] = ("knn", "linear"),
    say: Callable[[str], None] = print,
    *,
    image_size: int = 0,
    layers: Sequence[str] = ("pooled",),
    configs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Probes an encoder that is no run, such as other people's weights, so that it can stand in the same tables.

    Args:
        source: see `raysl.features.named`.
        title: what it is called in reports.
        out: folder for the rows and `model.json`, which says whose they are.
        image_size: side in pixels of the view, on which the protocol of the rows hangs; 0 for
            `raysl.features.view_size`.
        seed: of what a probe draws. Rows of several seeds stand beside each other, as those of several runs do.

    The other arguments, and what is returned and raised, are those of `probe`; besides, UserError where the rows of
    another model lie in the folder.
    """
    ready = _ready(names, configs)
    folder = Folder(out)
    about = json.loads(json.dumps({"name": title, "identity": source.identity()}))
    others = folder.exists(ROWS) and folder.exists(MODEL) and folder.read_json(MODEL) != about
    if folder.exists(PASSPORT) or others:
        raise UserError(
            f"The folder {out!r} belongs to a run, or holds the rows of another model than {title!r}. Give --out a "
            "folder of its own."
        )
    size = image_size or features.view_size(source)
    place = _Place(Run(folder), size, seed, folder / "features")
    # Before the rows, so that none are there of which nobody knows whose they are.
    folder.write_json(MODEL, about)
    return _measured(place, [source], train, test, ready, layers, say)


@dataclass(frozen=True)
class _Place:
    """Where rows and features go, and what the evaluation takes from the run.

    Args:
        run: whose folder gets the rows; that of a model is no more than a folder.
        image_size: side of the view.
        seed: of the run.
        cache: of features.
        spare: see `raysl.features.extract_all`.
    """

    run: Run
    image_size: int
    seed: int
    cache: Folder
    spare: bool = False


def _ready(names: Sequence[str], configs: Mapping[str, Any] | None) -> dict[str, tuple[Any, Probe]]:
    ready = {}
    for name in dict.fromkeys(names):
        config_type, probe_type = probes.load(name)
        config = (configs or {}).get(name) or config_type()
        ready[name] = config, probe_type(config)
    return ready


def _measured(
    place: _Place,
    sources: Sequence[Encoder],
    train: str,
    test: str,
    ready: Mapping[str, tuple[Any, Probe]],
    layers: Sequence[str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of every encoder and probe. Those of one probe of one encoder are added to the folder together, as soon
    as they are there: what comes after may fail."""
    cluster.start()
    data = _Data.open(resolve(train), resolve(test), any(needs_labels(probe) for _, probe in ready.values()))
    check_apart(list(ready), data.train, data.test)
    found = _extract(sources, layers, ready, data, place)
    rows: list[dict[str, Any]] = []
    for source, tables in zip(sources, found, strict=True):
        for name, (config, measure) in ready.items():
            # Of weights that are given, features depend on no seed, and so no probe of features does.
            drawn = isinstance(measure, EncoderProbe) or not isinstance(source, features.Weights)
            facts = _facts(source, place.seed if drawn else 0)
            protocol = protocol_hash(name, config, FeatureProtocol(place.image_size))
            about = {"probe": name, **facts, "protocol": protocol, **data.fingerprints(measure)}
            these = _layers(source, layers)
            measured: Iterable[Row]
            if isinstance(measure, EncoderProbe):
                own = f"{source.name}-{facts['step']}-{about['test'][:8]}-{protocol}"
                folder = place.run.folder / f"probes/{name}/{own}"
                subject = Subject(source, these, place.image_size, data.train, data.test, place.seed, folder)
                measured = measure.examine(subject)
            else:
                measured = by_layer(measure, these, *data.frozen(*tables), place.spare)
            new = _rows(measured, measure, about, say)
            _keep(place.run, new)
            rows += new
    return rows


def check_apart(names: Sequence[str], train: DataSet, test: DataSet) -> None:
    """Raises UserError when a probe that learns would be scored on the images that it has learned from."""
    found = [name for name in names if probes.learns(name)]
    if found and train.manifest.fingerprint == test.manifest.fingerprint:
        raise UserError(
            f"The probe {found[0]} would learn from and be scored on the same images, those of {str(test.folder)!r}, "
            "which would measure how well it remembers. Give another test set, or data with the splits train and "
            "test; the probe knn can use one set for both."
        )


def needs_labels(probe: Probe) -> bool:
    """Whether a probe compares with labels. One of an encoder sees for itself what its images have."""
    return isinstance(probe, LabelledProbe)


@dataclass(frozen=True)
class _Data:
    """The images, and their labels under common numbers; None where no probe needs them."""

    train: DataSet
    test: DataSet
    train_labels_n: Integers | None
    test_labels_n: Integers | None

    @staticmethod
    def open(train: DataSet, test: DataSet, labels: bool) -> _Data:
        return _Data(train, test, *(common_labels(train, test) if labels else (None, None)))

    def fingerprints(self, probe: Probe) -> dict[str, str]:
        """What the rows of a probe hang on. One that needs no labels has seen nothing of the train set."""
        train = "" if isinstance(probe, FeatureProbe) else self.train.manifest.fingerprint
        return {"train": train, "test": self.test.manifest.fingerprint}

    def frozen(self, seen: Tables, unseen: Tables) -> tuple[Frozen, Frozen]:
        """The features of both sets, with their labels."""
        return (
            Frozen(seen, self.train_labels_n, self.train.manifest.fingerprint),
            Frozen(unseen, self.test_labels_n, self.test.manifest.fingerprint),
        )


def _extract(
    sources: Sequence[Encoder],
    layers: Sequence[str],
    ready: Mapping[str, tuple[Any, Probe]],
    data: _Data,
    place: _Place,
) -> list[tuple[Tables, Tables]]:
    """The features of the train and the test set that probes ask for, for each encoder; every image is seen once."""
    measures = [measure for _, measure in ready.values() if not isinstance(measure, EncoderProbe)]
    sets = [data.train, data.test] if any(needs_labels(measure) for measure in measures) else [data.test]
    wanted = []
    for source in sources:
        taps = [features.tap(layer, m.dims) for layer in _layers(source, layers) for m in measures]
        protocol = FeatureProtocol(place.image_size, tuple(dict.fromkeys(taps)))
        wanted += [(source, dataset, protocol) for dataset in sets]
    found = features.extract_all(wanted, place.cache, place.spare)
    return [(found[i], found[i + len(sets) - 1]) for i in range(0, len(found), len(sets))]


def _layers(source: Encoder, layers: Sequence[str]) -> tuple[str, ...]:
    """Those that were asked for; "pooled" of pixels, which have nothing else. Raises UserError for one that the
    encoder does not have."""
    known = source.layers
    if isinstance(source, features.Pixels):
        return known
    expanded = [
        stage for layer in layers for stage in (features.stages(source) if layer == "all" else [layer])
    ]
    for layer in expanded:
        if layer not in known:
            raise unknown(f"layer of the {source.name} encoder", layer, ["all", *known])
    return tuple(dict.fromkeys(expanded))


def _facts(source: Encoder, seed: int) -> dict[str, Any]:
    """What tells the rows of one encoder from those of another."""
    identity = source.identity()
    step, weights = identity.get("step", 0), identity.get("crc32", identity.get("weights"))
    return {"encoder": source.name, "step": step, "seed": seed, "weights": weights}


def _rows(
    found: Iterable[Row], probe: Probe, facts: Mapping[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of one probe on one encoder, with what they hang on."""
    rows = []
    for row in found:
        headline = row.name == probe.headline
        rows.append({**facts, "layer": row.layer, "name": row.name, "value": row.value, "headline": headline})
        if headline:
            say(f"{facts['probe']:<10} {facts['encoder']:<8} {row.layer:<8} {row.name} {row.value:.4f}")
    return rows


def _encoder(run: Run, name: str, checkpoint: Checkpoint | None) -> Encoder:
    if name == "trained":
        return features.Trained(run, checkpoint or run.newest())
    if name == "random":
        return features.untrained(run)
    if name == "pixels":
        return features.Pixels()
    raise unknown("encoder", name, ENCODERS)


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
    """The rows of a run by one probe under one protocol, of all layers and encoders.

    Args:
        name: of the probe.
        train: fingerprint of the train set. A probe that needs no labels has seen nothing of it.
        test: fingerprint of the test set.
        config: of the probe; its defaults, if it is None.
        step: only of this checkpoint, and of what was not trained; None for all.
    """
    config = probes.load(name)[0]() if config is None else config
    wanted = name, protocol_hash(name, config, FeatureProtocol(run.config().view.image_size)), test
    found = [
        row
        for row in rows_of(run)
        if (row["probe"], row["protocol"], row["test"]) == wanted and row["train"] in ("", train)
    ]
    return [row for row in found if step is None or row["step"] in (0, step)]


def _keep(run: Run, rows: Iterable[Mapping[str, Any]]) -> None:
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
        data = f"train {train[:8]}, test {test[:8]}" if train else f"images {test[:8]}"
        title = f"{name} on {layers[0]} features" if len(layers) == 1 else f"{name} by layer"
        table = Table(title=title, caption=f"protocol {protocol}, {data}")
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


def _column(row: Mapping[str, Any], several_seeds: bool) -> tuple[int, int, int, str]:
    """Where the column of a row stands, and its title."""
    title = f"{row['encoder']}, step {row['step']}" if row["encoder"] == "trained" else row["encoder"]
    if several_seeds:
        title += f", seed {row['seed']}"
    order = (*ENCODERS, features.Weights.name)
    return order.index(row["encoder"]), row["step"], row["seed"], title
