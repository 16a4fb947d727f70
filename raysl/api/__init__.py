"""The functions of `import raysl`, one for each verb of the command line.

Data may be given as a path, a URI, a name such as "shapes:1000", or a `DataSet`; a run as a path, a URI or a `Run`.
Give the fields of a configuration as keyword arguments, as an object of its class, or both; keyword arguments win.
Every function first checks its values, the data and the machine, and raises a `UserError` if they do not fit.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from raysl import console
from raysl.api.arguments import (
    check_checkpoint,
    check_source,
    configure,
    dataset,
    given,
    run_config,
    unseen,
    uri,
)
from raysl.api.names import check_names, protocols_of, sweep_and_run, title_of, varied
from raysl.api.results_folder import check_writable
from raysl.errors import UserError

if TYPE_CHECKING:
    from raysl.api.arguments import AnyRun, Data, PathLike
    from raysl.clustering.cluster_and_fit import ClusterfitConfig
    from raysl.clustering.lloyd import Clustering
    from raysl.clustering.options import KMeansConfig
    from raysl.config import Pretraining
    from raysl.dataset import DataSet
    from raysl.diagnostics import Diagnosis, DoctorConfig
    from raysl.extraction import FeaturesConfig, FeatureStore
    from raysl.ingestion import IngestConfig
    from raysl.model_export import ExportConfig
    from raysl.reporting import ReportConfig
    from raysl.run import Run
    from raysl.run.callbacks import Callback
    from raysl.training.reproduction import Comparison, ReproduceConfig
    from raysl.tuning.config import SweepConfig

_log = logging.getLogger("raysl")


@console.prints_start_line
def ingest(source: Any, dest: PathLike, config: IngestConfig | None = None, **fields: Any) -> DataSet:
    """Make a data set of any source of images. The same call again resumes an interrupted ingest.

    Args:
        source: an image folder, tables, archives, arrays or "shapes:N", as a path or a URI; or images in memory, a list
            of files, or a data set of torch, pandas, Hugging Face or Ray; see `raysl.ingestion.objects.ObjectRows.of`.
        dest: folder of the data set, a path or a URI.
        config, fields: the configuration; see `IngestConfig`. `labels` may be a label for each image in memory.
    """
    from raysl.ingestion import pipeline
    from raysl.ingestion.sources import open_source

    labels = None if isinstance(fields.get("labels"), str) else fields.pop("labels", None)
    settings = configure(pipeline.IngestConfig, config, fields)
    if isinstance(source, str | os.PathLike):
        source = open_source(settings.location(os.fspath(source)))
        if labels is None and (done := pipeline.complete(source, uri(dest), settings)) is not None:
            return done
    check_writable(uri(dest))
    return pipeline.ingest(source, uri(dest), settings, labels=labels)


@console.prints_start_line
def pretrain(
    data: Data | None = None,
    run: PathLike | None = None,
    config: Pretraining | None = None,
    *,
    callbacks: Callback | Sequence[Callback] = (),
    probe_every: int = 0,
    train: Data = "",
    test: Data = "",
    probes: Sequence[str] = ("knn",),
    local: bool = False,
    **fields: Any,
) -> Run:
    """Pretrain a backbone. The same call again resumes an interrupted run at the exact step.

    Args:
        data: images to learn from.
        run: folder of the run, a path or a URI.
        config: the whole configuration.
        callbacks: objects whose methods are called during the run; see `raysl.run.callbacks`.
        probe_every: steps between two evaluations of the run while it trains; 0 for none.
        train, test, probes: data and probes of these evaluations.
        local: train in this process, without Ray, also where that is not the default; see `raysl.training.in_process`.
        fields: fields of `Pretraining`, and by their names the configurations of the method's parts, as in
            `pirl={"temperature": 0.1}`. `image_size` is that of the view. `backbone` may be an importable function
            or class that builds an `nn.Module` from normalized images (b, 3, s, s) to features (b, width).
    """
    from raysl.evaluation import online
    from raysl.run.callbacks import Callbacks

    check_names(pretrain, config, fields)
    followers = Callbacks(callbacks)
    probing = online.OnlineConfig(probe_every, uri(train), uri(test), tuple(probes))
    settings = run_config(data, run, config, fields, local=local or (False if probe_every else None))
    return online.pretrain_and_probe(settings, probing, followers, local=local)


@console.prints_start_line
def probe(
    checkpoint: AnyRun,
    train: Data,
    test: Data,
    probes: Sequence[str] = ("knn", "linear"),
    *,
    layers: Sequence[str] = ("pooled",),
    encoders: Sequence[str] = ("trained", "random", "pixels"),
    out: PathLike = "",
    image_size: int = 0,
    backbone: Any = None,
    seed: int = 0,
    bn_statistics: Literal["reestimated", "kept"] = "reestimated",
    plugin: PathLike | Sequence[PathLike] = (),
    **protocols: Any,
) -> list[dict[str, Any]]:
    """Measure a run beside its untrained backbone and raw pixels, or measure weights from elsewhere.

    Args:
        checkpoint: a run (its newest checkpoint), RUN/checkpoints/step-NNN, an export, a weights file, or "random".
        train, test: labeled data that the probes learn from, and labeled data on which the probes are scored.
        probes: a name, or names, of probes; `raysl methods` lists them.
        layers: "all" is conv1, res2 to res5 and pooled.
        encoders: of a run, any of these and "momentum"; see `raysl.evaluation.options.ProbeConfig`.
        out: folder of the rows and features; by default that of the run. Required for weights.
        image_size: side of the view in pixels, for weights only; 0 for that of an export, 224 for other weights, or 32.
        backbone: a `BackboneConfig`, a mapping of its fields or a name, for weights only.
        seed, bn_statistics: see `raysl.evaluation.options.ProbeConfig`.
        plugin: your own files or modules that define probes, or that the run uses.
        protocols: the configuration of a probe by its name, as in `linear={"schedule": "fast"}`.

    Returns:
        A row for each number: its probe, layer, encoder, name and value.
    """
    from raysl.backbone.network import BackboneConfig as Network

    probes, layers, encoders = ([x] if isinstance(x, str) else x for x in (probes, layers, encoders))
    configs = protocols_of(probes, protocols, plugin)
    network = configure(Network, {"name": backbone} if isinstance(backbone, str) else backbone, {})
    check_source(train, test)
    check_checkpoint(checkpoint)
    from raysl.evaluation import evaluate, options
    from raysl.extraction import encoder_by_name

    source = encoder_by_name(name := uri(checkpoint), network, seed)
    title = f"{title_of(name)} ({getattr(source, 'config', network).name})"
    choices = probes, layers, encoders, configs, bn_statistics
    config = options.ProbeConfig(*choices, uri(out), image_size=image_size, seed=seed)
    evaluate.check_before_data(source, title, config)
    data_sets = dataset(train), dataset(test)
    evaluate.check_data(config.ready(), *data_sets)
    rows = evaluate.probe_encoder(source, title, *data_sets, config)
    if "retrieval" in probes:
        from raysl.reporting import retrieval_grid

        _log.info("Nearest images of some test images: %s", retrieval_grid.draw(source, *data_sets, config))
    return rows


@console.prints_start_line
def features(
    checkpoint: AnyRun,
    data: Data | None = None,
    out: PathLike | None = None,
    config: FeaturesConfig | None = None,
    **fields: Any,
) -> FeatureStore:
    """Write the features of every image as Parquet. The same call again completes what was interrupted.

    Args:
        checkpoint: a run, RUN/checkpoints/step-NNN, a file of weights, "random" or "pixels".
        data: the images.
        out: folder of the features, a path or a URI.
        config, fields: the configuration; see `FeaturesConfig`.
    """
    from raysl.extraction.features import FeaturesConfig as Config

    settings = configure(Config, config, {**given(data=data, out=out), **fields})
    check_source(settings.data, settings.bn_images)
    check_checkpoint(checkpoint)
    from raysl.extraction import encoders
    from raysl.extraction.features import check_out, compute_features

    check_out(settings.out)
    source = encoders.encoder_by_name(uri(checkpoint), settings.backbone, settings.seed)
    encoders.check_encoder(source, (settings.layer,))
    dataset(settings.data)
    check_writable(settings.out)
    return compute_features(uri(checkpoint), settings)


@console.prints_start_line
def cluster(
    features: PathLike | FeatureStore,
    k: int | None = None,
    out: PathLike = "",
    config: KMeansConfig | None = None,
    *,
    assign: Sequence[PathLike | FeatureStore] = (),
    **fields: Any,
) -> Clustering:
    """Cluster features by k-means. The same call again resumes an interrupted clustering.

    Args:
        features: a folder that `features` made.
        k: number of clusters.
        out: folder of the result; by default one inside the features, named by the configuration.
        config, fields: the configuration; see `KMeansConfig`.
        assign: more features, such as those of validation images, that get the nearest of the same centroids.
    """
    from raysl.clustering import options

    options.check_faiss()
    from raysl.clustering import lloyd

    settings = configure(options.KMeansConfig, config, {**given(k=k), **fields})
    done = lloyd.fit(uri(features), settings, uri(out))
    for more in map(uri, assign):
        # Named after the whole path, because many folders of features are called "features".
        name = re.sub(r"\W+", "-", more).strip("-")
        table = lloyd.assign(done, more, str(done.folder / f"assignments-{name}.parquet"), settings)
        _log.info("The clusters of %s are in %s.", more, table)
    return done


@console.prints_start_line
def clusterfit(
    teacher: AnyRun,
    data: Data | None = None,
    run: PathLike | None = None,
    config: ClusterfitConfig | None = None,
    *,
    student: Pretraining | Mapping[str, Any] | None = None,
    **fields: Any,
) -> Run:
    """Train a new network to predict the clusters of another network's features (Yan et al. 2020, ClusterFit).

    Args:
        teacher: a run, RUN/checkpoints/step-NNN, a file of weights, or "random".
        data: the images, for teacher and student.
        run: folder of all results.
        config, fields: the configuration of teacher and clusters, such as `k`; see `ClusterfitConfig`.
        student: configuration of the student, or fields of `Pretraining`.

    Returns:
        The run of the last student.
    """
    check_checkpoint(teacher)
    from raysl.clustering import cluster_and_fit

    settings = configure(cluster_and_fit.ClusterfitConfig, config, {"teacher": uri(teacher), **fields})
    cluster_and_fit.check_before_data(settings)
    return cluster_and_fit.clusterfit(settings, run_config(data, run, student, {"method": "clusterfit"}))


@console.prints_start_line
def sweep(
    data: Data | None = None,
    test: Data | None = None,
    out: PathLike | None = None,
    vary: str | Sequence[str] | Mapping[str, Any] | None = None,
    config: SweepConfig | None = None,
    *,
    base: Pretraining | Mapping[str, Any] | None = None,
    **fields: Any,
) -> list[dict[str, Any]]:
    """Compare hyperparameters by a probe, with several seeds. The same call again continues an interrupted sweep.

    Args:
        data: images to learn from.
        test: labeled images on which the chosen trial is scored once. Trials are compared on `validation`.
        out: folder of the sweep, a path or a URI.
        vary: hyperparameters to vary, such as "temperature", "temperature=0.05,0.1" or {"temperature": [0.05, 0.1]}.
        config: the configuration of the sweep.
        base: configuration of every run, or fields of `Pretraining`.
        fields: fields of `SweepConfig`; others are fields of every run, as for `pretrain`.

    Returns:
        A row for each trial, the best first.
    """
    from raysl.tuning.config import SweepConfig as Config

    own, of_runs, chosen_from = sweep_and_run(sweep, data, base, fields)
    settings = configure(Config, config, {**own, **given(test=test, out=out, vary=varied(vary))})
    from raysl.tuning import preparation
    from raysl.tuning import sweep as tuning

    def checked(asked: Pretraining) -> list[str]:
        names = preparation.check_and_list_points(asked, settings)[0].names
        check_source(asked.data, settings.train, settings.validation, settings.test)
        return names

    learner = run_config(data, "-", base, of_runs, check=checked, out=settings.out)
    return tuning.sweep(learner, settings, chosen_from)


@console.prints_start_line
def report(folders: AnyRun | Sequence[AnyRun], config: ReportConfig | None = None, **fields: Any) -> str:
    """Write one page about a sweep, or about runs side by side, and return its path or URI.

    Args:
        folders: the folder of one sweep, finished or not; or folders of runs.
        config, fields: the configuration; see `ReportConfig`.
    """
    from raysl import reporting

    several = isinstance(folders, Sequence) and not isinstance(folders, str)
    uris = [uri(folder) for folder in (folders if several else [folders])]  # type: ignore[union-attr]
    if not uris:
        raise UserError("No folder is given. Name a sweep or runs: `raysl report runs/*`.")
    return f"{reporting.report(uris, configure(reporting.ReportConfig, config, fields))}/index.html"


@console.prints_start_line
def export(run: AnyRun, config: ExportConfig | None = None, **fields: Any) -> str:
    """Write the backbone of a run for other programs, with a model card, and return the folder.

    Args:
        run: the run.
        config, fields: the configuration; see `ExportConfig`.
    """
    from raysl import model_export
    from raysl.run import Run

    settings, opened = configure(model_export.ExportConfig, config, fields), Run.open(uri(run))
    check_source(settings.bn_images)
    return str(model_export.export(opened, settings))


@console.prints_start_line
def views(
    data: Data | None = None,
    out: PathLike = "views.png",
    images: int = 8,
    config: Pretraining | None = None,
    **fields: Any,
) -> str:
    """Draw the views that a method makes of some images, and return the path or URI of the picture.

    Args:
        data: the images.
        out: a PNG file, as a path or a URI.
        images: how many images, at least 1.
        config, fields: the configuration; see `Pretraining`.
    """
    if not uri(out).lower().endswith(".png"):
        raise UserError(f"The picture {str(out)!r} is not a PNG file. Give --out a name that ends in .png.")
    if not hasattr(images, "__index__") or images < 1:
        raise UserError(f"images is {images!r}; it must be a whole number of at least 1.")
    fields.pop("run", None)  # Nothing is trained, so a run that the caller names is not used.
    settings = run_config(data, "-", config, fields, workers=False, check=unseen)
    opened = dataset(settings.data)
    from raysl.reporting import pictures

    grid = pictures.views_grid(opened, pictures.views_of(settings, opened), settings.seed, images)
    pictures.save(grid, uri(out))
    return uri(out)


@console.prints_start_line
def reproduce(run: AnyRun, config: ReproduceConfig | None = None, **fields: Any) -> Comparison:
    """Train a run again from its metadata and compare losses and weights to the last bit.

    Args:
        run: the first run.
        config, fields: the configuration; see `ReproduceConfig`.
    """
    from raysl.run import Run
    from raysl.training import reproduction

    settings, first = configure(reproduction.ReproduceConfig, config, fields), Run.open(uri(run))
    return reproduction.reproduce(first, settings)


@console.prints_start_line
def doctor(config: DoctorConfig | None = None, **fields: Any) -> Diagnosis:
    """Measure what limits the speed of a run on this machine; with `cluster=True`, look at a cluster; with `gpu=True`,
    check the GPUs of this machine.

    Args:
        config, fields: the configuration; see `DoctorConfig`.
    """
    from raysl import diagnostics

    settings = configure(diagnostics.DoctorConfig, config, {**fields, **given(data=fields.get("data"))})
    if not settings.cluster:
        dataset(settings.data)
    return diagnostics.diagnose(settings)
