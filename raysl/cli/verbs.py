"""The verbs of the `raysl` command, each a thin layer of flags over the Python API."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from raysl import ray_cluster as ray_cluster
from raysl import recipes
from raysl.backbone.network import BackboneConfig
from raysl.cli.flags import parse, parse_pretraining, peek_all
from raysl.clustering.options import KMeansConfig
from raysl.errors import UserError
from raysl.evaluation.online import WatchConfig
from raysl.extraction import FeaturesConfig
from raysl.ingestion import IngestConfig, resolve
from raysl.ingestion import ingest as make_dataset
from raysl.model_export import ExportConfig
from raysl.reporting import ReportConfig
from raysl.reproduction import ReproduceConfig
from raysl.tuning.config import SweepConfig


def pretrain(arguments: Sequence[str]) -> None:
    """Learns a representation: `raysl pretrain --data D --run R --method pirl-jigsaw`."""
    config, given = parse(arguments, "raysl pretrain", {"watch": WatchConfig})
    from raysl.evaluation.online import pretrain_and_probe as api

    run = api(config, given["watch"])
    print(f"The run is at {run.folder}. `raysl probe {run.folder} --train DATA --test DATA` measures it.")


@dataclass(frozen=True)
class IngestFlags:
    """Turns any source of images into an indexed data set.

    Args:
        source: an image folder, Parquet files, tar shards, IDX files, CIFAR-10, or shapes:N; any path or URI.
        dest: folder of the data set, a path or a URI.
        config: how it is done.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")]
    config: tyro.conf.OmitArgPrefixes[IngestConfig] = dataclasses.field(default_factory=IngestConfig)


def ingest(arguments: Sequence[str]) -> None:
    """Makes a data set: `raysl ingest SOURCE DEST`."""
    given = tyro.cli(IngestFlags, prog="raysl ingest", args=list(arguments))
    ray_cluster.start()
    dataset = make_dataset(given.source, given.dest, given.config)
    manifest = dataset.manifest
    labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    print(f"{given.dest}: {dataset.num_images:,} images, {labels}, fingerprint {manifest.fingerprint[:12]}.")


@dataclass(frozen=True)
class ProbeFlags:
    """Measures what a run has learned, beside its untrained network and raw pixels; or other people's weights.

    Args:
        checkpoint: folder of a run (its newest checkpoint), RUN/checkpoints/step-NNN, a file of weights (with
            --backbone.name and --out), or "random".
        train: labelled data that the probes learn from.
        test: labelled data that they are judged on.
        probes: which of knn, linear, svm, voc_svm, lowshot, finetune, semisup, detection, retrieval, collapse and
            invariance. The protocol of each has flags of its own, such as --linear.schedule fast.
        layers: whose features are measured; "all" for conv1, res2 to res5 and pooled.
        out: folder of the rows, for what is no run.
        image_size: side in pixels of the view, for what is no run; 0 for 224 of a file of weights and 32 otherwise.
        backbone: of a file of weights, or of "random". "timm/NAME" is one of the package timm.
        seed: of "random", and of what a probe of weights draws.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CKPT")]
    train: str
    test: str
    probes: tuple[str, ...] = ("knn", "linear")
    layers: tuple[str, ...] = ("pooled",)
    out: str = ""
    image_size: int = 0
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    seed: int = 0


def probe(arguments: Sequence[str]) -> None:
    """Probes a run or weights: `raysl probe RUN --train D --test D --probes knn linear --layers all`."""
    from raysl import probes

    kinds = {name: probes.load(name)[0] for name in peek_all(arguments, "--probes", ProbeFlags.probes)}
    fields: list[Any] = [(name, kind, kind()) for name, kind in kinds.items()]
    flags = dataclasses.make_dataclass("Flags", fields, bases=(ProbeFlags,), frozen=True)
    flags.__doc__ = ProbeFlags.__doc__
    given: Any = tyro.cli(flags, prog="raysl probe", args=list(arguments))
    from rich.console import Console

    from raysl.evaluation.evaluate import probe as api
    from raysl.evaluation.evaluate import probe_model
    from raysl.evaluation.results import tables
    from raysl.extraction import Trained, named, view_size

    source = named(given.checkpoint, given.backbone, given.seed)
    configs = {name: getattr(given, name) for name in kinds}
    data: Any = (given.train, given.test, given.probes)
    if isinstance(source, Trained):
        if given.out or given.image_size:
            raise UserError(
                f"--out and --image-size are for what is no run, and {given.checkpoint!r} is one: its rows go to its "
                "own folder, and it is seen at its own size. Leave them out."
            )
        size = source.run.config().view.image_size
        rows = api(source.run, *data, layers=given.layers, configs=configs, checkpoint=source.checkpoint)
    else:
        if not given.out:
            raise UserError(f"{given.checkpoint!r} is no run. Give a folder for its rows with --out.")
        title = f"{given.checkpoint.rpartition('/')[2]} ({given.backbone.name})"
        size = given.image_size or view_size(source)
        rows = probe_model(
            source,
            title,
            given.out,
            *data,
            image_size=size,
            layers=given.layers,
            configs=configs,
            seed=given.seed,
        )
    for table in tables(rows):
        Console().print(table)
    if "retrieval" in given.probes:
        from raysl.reporting import retrieval_grid
        from raysl.storage import Folder

        folder = source.run.folder if isinstance(source, Trained) else Folder(given.out)
        sheet = retrieval_grid.draw(folder, source, resolve(given.train), resolve(given.test), size)
        print(f"The nearest images of some are in {sheet}.")


@dataclass(frozen=True)
class FeaturesFlags:
    """Writes the features of every image, as Parquet by index.

    Args:
        checkpoint: folder of a run (its newest checkpoint), RUN/checkpoints/step-NNN, a file of weights (with
            --backbone.name), "random" or "pixels".
        config: which features, and how they are kept.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CKPT")]
    config: Annotated[FeaturesConfig, tyro.conf.arg(name="")]


def features(arguments: Sequence[str]) -> None:
    """Features of a checkpoint: `raysl features CKPT --data D --layer res5 --out F`."""
    from raysl.extraction import make

    given = tyro.cli(FeaturesFlags, prog="raysl features", args=list(arguments))
    table = make(given.checkpoint, given.config)
    print(f"{table.folder}: {table.parts[-1][1]:,} rows. `raysl cluster {table.folder} --k K` clusters them.")


@dataclass(frozen=True)
class ClusterFlags:
    """Clusters features by k-means.

    Args:
        features: a folder that `raysl features` made.
        config: what is computed.
        out: folder of the result; by default one inside the features that is named by what is computed.
        assign: more features, such as those of validation images, that get the nearest of the same centroids.
    """

    features: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FEATURES")]
    config: tyro.conf.OmitArgPrefixes[KMeansConfig]
    out: str = ""
    assign: tuple[str, ...] = ()


def cluster(arguments: Sequence[str]) -> None:
    """k-means: `raysl cluster F --k K`."""
    given = tyro.cli(ClusterFlags, prog="raysl cluster", args=list(arguments))
    from raysl.clustering import lloyd as kmeans

    done = kmeans.fit(given.features, given.config, given.out)
    card = done.card()
    named = "".join(f", {name} {value:.4f}" for name, value in card.get("labels", {}).items())
    print(f"Objective {card['objective_value']:.6g}, {card['sizes']['empty']} clusters empty{named}.")
    print(f"The clusters are in {done.assignments}.")
    for uri in given.assign:
        # Named after the whole place: many folders of features are called "features".
        name = re.sub(r"\W+", "-", uri).strip("-")
        place = str(done.folder / f"assignments-{name}.parquet")
        print(f"Those of {uri} are in {kmeans.assign(done, uri, place, given.config)}.")


def clusterfit(arguments: Sequence[str]) -> None:
    """ClusterFit: `raysl clusterfit --teacher CKPT --data D --k K --run R`."""
    from raysl.clustering.cluster_and_fit import ClusterfitConfig
    from raysl.clustering.cluster_and_fit import clusterfit as api

    given, rest = tyro.cli(
        ClusterfitConfig, prog="raysl clusterfit", args=list(arguments), return_unknown_args=True
    )
    student = parse_pretraining([*rest, "--method", "clusterfit"], "raysl clusterfit")
    run = api(given, student)
    print(f"The student is at {run.folder}. `raysl probe {run.folder} --train DATA --test DATA` measures it.")


@dataclass(frozen=True)
class ViewsFlags:
    """Draws the views that a method makes of some images. Takes the flags of `raysl pretrain` too, all but --run:
    --data, --method, --view.image-size and so on.

    Args:
        out: the picture, a PNG file.
        images: how many images.
    """

    out: Path = Path("views.png")
    images: int = 8

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".png":
            raise UserError(
                f"The picture {str(self.out)!r} is no PNG file. Give --out a name that ends in .png."
            )
        if self.images < 1:
            raise UserError(f"images is {self.images}; there must be at least 1 in the picture.")


def views(arguments: Sequence[str]) -> None:
    """A picture of what a method sees: `raysl views --data D --method pirl-jigsaw --out sheet.png`."""
    given, rest = tyro.cli(ViewsFlags, prog="raysl views", args=list(arguments), return_unknown_args=True)
    config = parse_pretraining([*rest, "--run", "-"], "raysl views")
    from raysl.documentation import pictures

    ray_cluster.start()
    dataset = resolve(config.data)
    sheet = pictures.views_sheet(dataset, pictures.views_of(config, dataset), config.seed, given.images)
    pictures.save(sheet, given.out)
    print(f"{given.out}: {given.images} images as {config.method} sees them.")


@dataclass(frozen=True)
class MethodsFlags:
    """Lists objectives, pretext transforms, what combines with what, and recipes.

    Args:
        pages: write a page of documentation for each of them to this folder instead.
    """

    pages: Path | None = None


def methods(arguments: Sequence[str]) -> None:
    """What there is: `raysl methods`."""
    given = tyro.cli(MethodsFlags, prog="raysl methods", args=list(arguments))
    if given.pages is not None:
        from raysl.documentation import pages

        ray_cluster.start()
        pages.write(given.pages, resolve(pages.DATA))
        print(f"{given.pages}: {len(pages.names())} pages, with the pictures of what the methods see.")
        return
    from rich.console import Console
    from rich.table import Table

    from raysl.documentation.combinations import describe

    listed = Table("recipe", "what it reproduces", title="Recipes: raysl pretrain --recipe RECIPE")
    for name in recipes.names():
        listed.add_row(name, recipes.summary(name))
    console = Console()
    for part in (*describe(), listed):
        console.print(part)


def sweep(arguments: Sequence[str]) -> None:
    """Tries values: `raysl sweep --data D --test T --method pirl-jigsaw --vary temperature lambda --out S`."""
    given, rest = tyro.cli(SweepConfig, prog="raysl sweep", args=list(arguments), return_unknown_args=True)
    base = parse_pretraining([*rest, "--run", "-"], "raysl sweep")
    from rich.console import Console

    from raysl.tuning import driver, table

    rows = driver.sweep(base, given)
    Console().print(table.render(rows, given.probe, base.epochs))
    failed = [str(row["trial"]) for row in rows if row["state"] == "failed"]
    if failed:
        print(f"Trials {', '.join(failed)} failed; the same command with --retry tries them again.")
        raise SystemExit(1)


@dataclass(frozen=True)
class ReportFlags:
    """Writes one page that holds all it needs, and its figures: of a sweep, or of runs side by side.

    Args:
        folders: of a sweep, finished or not; or of runs, which are compared.
        config: where it goes, and prices.
    """

    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SWEEP|RUNS")]
    config: tyro.conf.OmitArgPrefixes[ReportConfig] = dataclasses.field(default_factory=ReportConfig)


def report(arguments: Sequence[str]) -> None:
    """A page of figures and tables: `raysl report SWEEP`, `raysl report RUNS...`."""
    from raysl.reporting import report as api

    given = tyro.cli(ReportFlags, prog="raysl report", args=list(arguments))
    if not given.folders:
        raise UserError("No folder is given. Name a sweep or runs: `raysl report runs/*`.")
    print(f"{api(given.folders, given.config)}/index.html")


@dataclass(frozen=True)
class ExportFlags:
    """Writes the backbone of a run for other programs, with a model card.

    Args:
        run: folder of the run.
        config: for whom, and where.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    config: tyro.conf.OmitArgPrefixes[ExportConfig] = dataclasses.field(default_factory=ExportConfig)


def export(arguments: Sequence[str]) -> None:
    """Weights for other programs: `raysl export RUN --format torchvision`."""
    from raysl.model_export import export as api
    from raysl.run import Run

    given = tyro.cli(ExportFlags, prog="raysl export", args=list(arguments))
    print(f"{api(Run.open(given.run), given.config)}")


@dataclass(frozen=True)
class ReproduceFlags:
    """Runs a run again from its metadata and compares, to the last bit. Exits with 1 when a number differs.

    Args:
        run: folder of the run.
        config: how far, and where.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    config: tyro.conf.OmitArgPrefixes[ReproduceConfig] = dataclasses.field(default_factory=ReproduceConfig)


def reproduce(arguments: Sequence[str]) -> None:
    """A run once more: `raysl reproduce RUN`."""
    from raysl.reproduction import reproduce as api
    from raysl.run import Run

    given = tyro.cli(ReproduceFlags, prog="raysl reproduce", args=list(arguments))
    found = api(Run.open(given.run), given.config)
    for line in found.numbers:
        print(f"differs: {line}")
    if not found.same:
        raise SystemExit(1)
    print(f"The first {found.steps} steps gave the same numbers and weights, to the last bit.")


def doctor(arguments: Sequence[str]) -> None:
    """Where time goes: `raysl doctor --data D --method pirl-jigsaw`; `raysl doctor --cluster`.

    Exits with 1 when machines of the cluster run something else, or the run would be refused.
    """
    from raysl.diagnostics import DoctorConfig, examine, look

    given = tyro.cli(DoctorConfig, prog="raysl doctor", args=list(arguments))
    if not given.cluster:
        examine(given)
        return
    fleet = look(given)
    if fleet.stale or fleet.refused:
        raise SystemExit(1)


def demo(arguments: Sequence[str]) -> None:
    """The whole story: `raysl demo`."""
    from raysl.demo import DemoConfig
    from raysl.demo import demo as api

    api(tyro.cli(DemoConfig, prog="raysl demo", args=list(arguments)))
