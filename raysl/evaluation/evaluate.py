"""Probe a run or a model: compute features of its backbone and of two baselines, and run probes on them.

The baselines give the numbers a meaning: the same backbone before its first step, and the pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl import extraction, probes
from raysl.checkpoint import Checkpoint
from raysl.dataset import DataSet
from raysl.errors import UserError, explained, unknown
from raysl.evaluation.options import ProbeConfig
from raysl.evaluation.results import (
    MODEL,
    ROWS,
    TITLES,
    add_rows,
    check_writable,
    format_row_value,
    protocol_hash,
)
from raysl.evaluation.train_test_overlap import refuse_same_images, same_set, warn_of_same, warn_of_shared
from raysl.extraction import Encoder, FeatureProtocol, FeatureStore, NetworkEncoder, Reestimated, view_size
from raysl.ingestion import open_or_ingest
from raysl.probes import EncoderProbe, FeatureProbe, LabeledProbe, Probe, Row, Subject, common_labels
from raysl.probes._task import StoredFeatures, measure_layers
from raysl.run import METADATA, Run
from raysl.storage import Folder
from raysl.storage.records import as_json, verified, write_record

_log = logging.getLogger("raysl.evaluation")
Tables = Mapping[str, FeatureStore]


def probe(
    run: Run | str,
    train: DataSet | str,
    test: DataSet | str,
    config: ProbeConfig | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Probe a checkpoint of a run and add the rows to the run, or to the folder `out`.

    Args:
        run: a run with at least one complete checkpoint, or its folder.
        train: labeled data that the probes learn from; a source that `raysl.ingestion.open_or_ingest` accepts.
        test: labeled data on which the probes are scored. Probes without labels use only these images.
        config: what is probed; fields in `changes` replace its own.

    Returns:
        The rows of this call: `raysl.evaluation.results.KEY`, "value", "primary" (the row stands for its probe),
        "weights" (a checksum) and "num_test" (number of test images).

    Raises UserError if a probe, a layer or an encoder does not exist, there is no checkpoint, the results cannot be
    written, or the data do not suit the probes. Rows of earlier probes are kept.
    """
    config = _with_changes(config, changes)
    run = Run.open(run) if isinstance(run, str) else run
    settings = run.config()
    named = [_encoder(run, name, config.checkpoint) for name in dict.fromkeys(config.encoders)]
    sources = [source for source in named if len(named) == 1 or _has_weights(source)]
    context = _Context(run, settings.view.image_size, settings.seed)
    if config.out:
        checkpoint = config.checkpoint or run.newest()
        title, source = f"{settings.method}, step {checkpoint.step}", extraction.Trained(run, checkpoint)
        context = _context_of(config.out, title, source, context.image_size, context.seed)
    check_writable(context.run.folder / ROWS, "probe")
    return _run_probes(context, sources, train, test, config)


def probe_encoder(
    source: Encoder,
    title: str,
    train: DataSet | str,
    test: DataSet | str,
    config: ProbeConfig | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Probe an encoder: a run as `probe` does, any other one with its rows in the folder `out`.

    Args:
        title: name of the model in reports.
        config: what is probed; of a model that is not a run, its `out` is required and its `encoders` are not used.

    Raises UserError as `probe`, or if `image_size` is given for a run, or `out` is empty or of another model.
    """
    config = _with_changes(config, changes)
    config.check_encoder(source, title)
    if isinstance(source, extraction.Trained):
        return probe(source.run, train, test, config, checkpoint=source.checkpoint)
    context = _context_of(config.out, title, source, config.image_size or view_size(source), config.seed)
    check_writable(context.run.folder / ROWS, "probe")
    return _run_probes(context, [source], train, test, config)


def folder_of(source: Encoder, config: ProbeConfig) -> Folder:
    """Return the folder of the results of an encoder."""
    if config.out or not isinstance(source, extraction.Trained):
        return Folder(config.out)
    return source.run.folder


def frozen_encoder(source: Encoder, train: DataSet, image_size: int, bn_statistics: str) -> Encoder:
    """Return the encoder of frozen features, by default with BatchNorm statistics of the train set."""
    if bn_statistics == probes.KEPT or not isinstance(source, NetworkEncoder):
        return source
    return Reestimated(source, train, image_size)


def _with_changes(config: ProbeConfig | None, changes: Mapping[str, Any]) -> ProbeConfig:
    known = [field.name for field in fields(ProbeConfig)]
    for name in changes:
        if name not in known:
            raise unknown("option of probe", name, known)
    return replace(config or ProbeConfig(), **changes)


@dataclass(frozen=True)
class _Context:
    """Where the rows go (a run, or a folder for results), and the image size and the seed that come from a run."""

    run: Run
    image_size: int
    seed: int
    model: Mapping[str, Any] | None = None  # content of `model.json`, for a folder that is not a run

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Store rows. The model is written before the first, so that rows always have an owner."""
        if self.model is not None:
            write_record(self.run.folder, MODEL, dict(self.model))
        add_rows(self.run, rows)


def _context_of(out: str, title: str, source: Encoder, image_size: int, seed: int) -> _Context:
    """Return the context of the folder `out`. Raise UserError if it is a run, or has results of another model."""
    folder = Folder(out)
    model = as_json({"name": title, "identity": source.identity()})
    with explained(f"The file {folder / MODEL} is damaged", "Give --out another folder.", ValueError):
        is_other = folder.exists(ROWS) and folder.exists(MODEL) and verified(folder.read_json(MODEL)) != model
    if folder.exists(METADATA) or is_other:
        raise UserError(
            f"The folder {out!r} is a run, or holds results of another model than {title!r}, or of other code of it. "
            "Give --out a folder that is empty or does not exist."
        )
    return _Context(Run(folder), image_size, seed, model)


def _run_probes(
    context: _Context,
    sources: Sequence[Encoder],
    train: DataSet | str,
    test: DataSet | str,
    config: ProbeConfig,
) -> list[dict[str, Any]]:
    """Return the rows of every encoder and probe. Each is stored as soon as it exists: a later probe may fail."""
    ready = config.ready()
    layers = [layers_of(source, config.layers) for source in sources]
    train, test = (one if isinstance(one, DataSet) else open_or_ingest(one) for one in (train, test))
    labeled = [name for name, (_, probe) in ready.items() if isinstance(probe, LabeledProbe)]
    common = common_labels(train, test) if labeled else (None, None)
    data = _Data(train, test, config.bn_statistics, *common)
    check_data(ready, data.train, data.test)
    # Online evaluation would say it at every checkpoint.
    if labeled and not config.low_priority and same_set(train, test):
        warn_of_same(labeled)
    if unseen := data.unseen():
        _log.warning(
            "%s of %s test images show classes that the train set does not have%s. No probe that learns from labels "
            "can predict them.",
            f"{unseen:,}",
            f"{data.test.num_images:,}",
            _names_besides(data.test, data.train),
        )
    found = _extract(sources, layers, ready, data, context, config)
    rows: list[dict[str, Any]] = []
    for source, tables in zip(sources, found, strict=True):
        if isinstance(source, extraction.Pixels) and labeled and not same_set(train, test):
            warn_of_shared(*(next(iter(one.values())) for one in tables))
    for source, own_layers, tables in zip(sources, layers, found, strict=True):
        for name, (protocol, measure) in ready.items():
            identity = _row_identity(name, protocol, measure, source, data, context)
            if isinstance(measure, EncoderProbe):
                results: Iterable[Row] = measure.examine(
                    _subject(identity, source, own_layers, data, context)
                )
            else:
                frozen = data.frozen(*tables)
                results = measure_layers(measure, own_layers, *frozen, config.low_priority, config.in_process)
            new = _stored_rows(results, measure, identity)
            context.add(new)
            rows += new
    return rows


def check_data(ready: Mapping[str, tuple[Any, Probe]], train: DataSet, test: DataSet) -> None:
    """Raise UserError if data do not suit one of the probes, or one that learns would be scored on the same images."""
    refuse_same_images(list(ready), train, test)
    for _, probe in ready.values():
        if hasattr(probe, "check_data"):
            probe.check_data(train, test)


def _names_besides(test: DataSet, train: DataSet) -> str:
    """Return some classes that images of the test set show and none of the train set, with counts, for a message."""
    tested, learned = (
        {
            one.manifest.classes[i]: count
            for i, count in zip(*np.unique(one.labels(), return_counts=True), strict=True)
            if i >= 0
        }
        for one in (test, train)
    )
    names = [f"{name} {tested[name]:,}" for name in sorted(tested.keys() - learned.keys())]
    return f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


@dataclass(frozen=True)
class _Data:
    """The images, and their labels under common numbers; None if no probe needs labels."""

    train: DataSet
    test: DataSet
    bn_statistics: str
    train_labels_n: NDArray[np.int64] | None
    test_labels_n: NDArray[np.int64] | None

    def unseen(self) -> int:
        """Return the number of test images of classes that the train set does not show."""
        if self.train_labels_n is None or self.test_labels_n is None:
            return 0
        return int((~np.isin(self.test_labels_n, self.train_labels_n)).sum())

    def fingerprints(self, probe: Probe) -> dict[str, str]:
        """Return the data sets that the rows of a probe depend on; a probe with own images depends on neither.

        A probe without labels depends on the train set only through BatchNorm statistics.
        """
        if getattr(probe, "own_images", False):
            return {"train": "", "test": ""}
        train_unused = isinstance(probe, FeatureProbe) and self.bn_statistics == probes.KEPT
        train = "" if train_unused else self.train.manifest.fingerprint
        return {"train": train, "test": self.test.manifest.fingerprint}

    def frozen(self, train: Tables, test: Tables) -> tuple[StoredFeatures, StoredFeatures]:
        """Return the features of both sets with their labels."""
        return (
            StoredFeatures(train, self.train_labels_n, self.train.manifest.fingerprint),
            StoredFeatures(test, self.test_labels_n, self.test.manifest.fingerprint),
        )


def _row_identity(
    name: str, protocol: Any, measure: Probe, source: Encoder, data: _Data, context: _Context
) -> dict[str, Any]:
    """Return everything that the rows of a probe and encoder depend on, but for the code of a user's network."""
    identity = source.identity()
    # Probes of features of given weights do not depend on the seed.
    seeded = isinstance(measure, EncoderProbe) or not isinstance(source, extraction.Weights)
    return {
        "probe": name,
        "encoder": source.name,
        "step": identity.get("step", 0),
        "seed": context.seed if seeded else 0,
        "weights": identity.get("crc32", identity.get("weights")),
        "protocol": protocol_hash(name, protocol, FeatureProtocol(context.image_size), data.bn_statistics),
        **data.fingerprints(measure),
        "num_test": min(data.test.num_images, getattr(protocol, "max_test", data.test.num_images)),
    }


def _subject(
    about: Mapping[str, Any], source: Encoder, layers: tuple[str, ...], data: _Data, context: _Context
) -> Subject:
    own = f"{source.name}-{about['step']}-{about['test'][:8]}-{about['protocol']}"
    folder = context.run.folder / f"probes/{about['probe']}/{own}"
    return Subject(
        source, layers, context.image_size, data.train, data.test, context.seed, folder, data.bn_statistics
    )


def _extract(
    sources: Sequence[Encoder],
    layers: Sequence[tuple[str, ...]],
    ready: Mapping[str, tuple[Any, Probe]],
    data: _Data,
    context: _Context,
    config: ProbeConfig,
) -> list[tuple[Tables, Tables]]:
    """Return the features of the train and the test set for each encoder, in one pass over the images."""
    measures = [measure for _, measure in ready.values() if not isinstance(measure, EncoderProbe)]
    labeled = any(isinstance(measure, LabeledProbe) for measure in measures)
    sets = [data.train, data.test] if labeled else [data.test]
    wanted = []
    for source, own in zip(sources, layers, strict=True):
        specs = [extraction.feature_spec(layer, measure.dims) for layer in own for measure in measures]
        protocol = FeatureProtocol(context.image_size, tuple(dict.fromkeys(specs)))
        encoder = frozen_encoder(source, data.train, context.image_size, data.bn_statistics)
        wanted += [(encoder, dataset, protocol) for dataset in sets]
    # Not "test images": a sweep scores trials on images that it has held out of the train images.
    sizes = [one.size_text for one in (data.train, data.test)]
    named = (f"{sizes[0]} to learn from", f"{sizes[1]} to score")
    _log.info("Computing the features of %s ...", " and ".join(named[-len(sets) :]))
    cache = config.cache or context.run.folder / "features"
    found = extraction.extract_all(wanted, cache, config.low_priority, config.in_process)
    return [(found[i], found[i + len(sets) - 1]) for i in range(0, len(found), len(sets))]


def check_before_data(source: Encoder, title: str, config: ProbeConfig) -> None:
    """Raise UserError if an encoder cannot be loaded, lacks a layer, or has no folder for results."""
    config.check_encoder(source, title)
    layers_of(source, config.layers)
    extraction.check_encoder(source, ())


def layers_of(source: Encoder, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the requested layers of an encoder; pixels have only "pooled". Raises UserError for an unknown layer."""
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


def _stored_rows(found: Iterable[Row], probe: Probe, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one probe on one encoder, with everything that they depend on."""
    rows = []
    for row in found:
        primary = row.name == probe.primary_metric
        stored = {**identity, "layer": row.layer, "name": row.name, "value": row.value, "primary": primary}
        rows.append(stored)
        if primary:
            encoder = TITLES.get(identity["encoder"], identity["encoder"])
            text = format_row_value(stored)
            _log.info("%-10s %-10s %-8s %s %s", identity["probe"], encoder, row.layer, row.name, text)
    return rows


def _encoder(run: Run, name: str, checkpoint: Checkpoint | None) -> Encoder:
    if name not in ("random", "pixels"):
        return extraction.Trained(run, checkpoint or run.newest(), name)
    return extraction.untrained(run) if name == "random" else extraction.Pixels()


def _has_weights(source: Encoder) -> bool:
    """Return False, and say so, for an untrained network whose starting weights are gone or have changed."""
    lost = source.lost_weights() if isinstance(source, extraction.RandomBackbone) else ""
    if lost:
        _log.warning("The row of the untrained network, which starts from a file, is left out. %s", lost)
    return not lost
