"""Probing a run: features of its backbone and of two baselines, then every probe that was asked for, as rows.

The baselines say what a number is worth: the same backbone before its first step, and the pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raysl import extraction, probes, ray_cluster
from raysl.checkpoint import Checkpoint
from raysl.dataset import DataSet
from raysl.errors import UserError, unknown
from raysl.evaluation.results import ENCODERS, MODEL, ROWS, keep, protocol_hash
from raysl.extraction import Encoder, FeatureProtocol, FeatureStore
from raysl.ingestion import resolve
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
from raysl.run import METADATA, Run
from raysl.storage import Folder

Integers = npt.NDArray[np.int64]
Tables = Mapping[str, FeatureStore]


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
        train: labelled data to learn from, as `raysl.ingestion.resolve` takes it.
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
        source: see `raysl.extraction.named`.
        title: what it is called in reports.
        out: folder for the rows and `model.json`, which says whose they are.
        image_size: side in pixels of the view, on which the protocol of the rows hangs; 0 for
            `raysl.extraction.view_size`.
        seed: of what a probe draws. Rows of several seeds stand beside each other, as those of several runs do.

    The other arguments, and what is returned and raised, are those of `probe`; besides, UserError where the rows of
    another model lie in the folder.
    """
    ready = _ready(names, configs)
    folder = Folder(out)
    about = json.loads(json.dumps({"name": title, "identity": source.identity()}))
    others = folder.exists(ROWS) and folder.exists(MODEL) and folder.read_json(MODEL) != about
    if folder.exists(METADATA) or others:
        raise UserError(
            f"The folder {out!r} belongs to a run, or holds the rows of another model than {title!r}. Give --out a "
            "folder of its own."
        )
    size = image_size or extraction.view_size(source)
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
        spare: see `raysl.extraction.extract_all`.
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
    ray_cluster.start()
    data = _Data.open(resolve(train), resolve(test), any(needs_labels(probe) for _, probe in ready.values()))
    check_apart(list(ready), data.train, data.test)
    if unseen := data.unseen():
        say(
            f"{unseen:,} of {data.test.num_images:,} test images show classes that the train set lacks: no probe that "
            "learns from labels can be right about them."
        )
    found = _extract(sources, layers, ready, data, place)
    rows: list[dict[str, Any]] = []
    for source, tables in zip(sources, found, strict=True):
        for name, (config, measure) in ready.items():
            # Of weights that are given, features depend on no seed, and so no probe of features does.
            drawn = isinstance(measure, EncoderProbe) or not isinstance(source, extraction.Weights)
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
            keep(place.run, new)
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

    def unseen(self) -> int:
        """How many test images are of classes that the train set does not show."""
        if self.train_labels_n is None or self.test_labels_n is None:
            return 0
        return int((~np.isin(self.test_labels_n, self.train_labels_n)).sum())

    def fingerprints(self, probe: Probe) -> dict[str, str]:
        """What the rows of a probe hang on: one that needs no labels has seen nothing of the train set, and one that
        has images of its own nothing of either."""
        if getattr(probe, "own_images", False):
            return {"train": "", "test": ""}
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
        taps = [extraction.feature_spec(layer, m.dims) for layer in _layers(source, layers) for m in measures]
        protocol = FeatureProtocol(place.image_size, tuple(dict.fromkeys(taps)))
        wanted += [(source, dataset, protocol) for dataset in sets]
    found = extraction.extract_all(wanted, place.cache, place.spare)
    return [(found[i], found[i + len(sets) - 1]) for i in range(0, len(found), len(sets))]


def _layers(source: Encoder, layers: Sequence[str]) -> tuple[str, ...]:
    """Those that were asked for; "pooled" of pixels, which have nothing else. Raises UserError for one that the
    encoder does not have."""
    known = source.layers
    if isinstance(source, extraction.Pixels):
        return known
    expanded = [
        stage for layer in layers for stage in (extraction.stages(source) if layer == "all" else [layer])
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
        return extraction.Trained(run, checkpoint or run.newest())
    if name == "random":
        return extraction.untrained(run)
    if name == "pixels":
        return extraction.Pixels()
    raise unknown("encoder", name, ENCODERS)
