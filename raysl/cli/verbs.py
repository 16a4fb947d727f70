"""The verbs of the `raysl` command: flags made from dataclasses, over the functions of `raysl.api`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from raysl import api
from raysl.arguments import dataset
from raysl.backbone.network import BackboneConfig
from raysl.cli.flags import parse, peek_all
from raysl.clustering.options import KMeansConfig
from raysl.evaluation.online import OnlineConfig
from raysl.extraction.features import FeaturesConfig
from raysl.ingestion.pipeline import IngestConfig
from raysl.model_export import ExportConfig
from raysl.reporting.page import ReportConfig
from raysl.reproduction import ReproduceConfig
from raysl.tuning.config import SweepConfig


def pretrain(arguments: Sequence[str]) -> None:
    """Learn a representation: `raysl pretrain --data D --run R --method pirl-jigsaw`."""
    flags = parse(arguments, "raysl pretrain", {"online": OnlineConfig})
    run = api.pretrain(**flags.given, **dataclasses.asdict(flags.beside["online"]))
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
    """Make a data set: `raysl ingest SOURCE DEST`."""
    given = tyro.cli(IngestFlags, prog="raysl ingest", args=list(arguments))
    made = api.ingest(given.source, given.dest, given.config)
    manifest = made.manifest
    labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    print(f"{given.dest}: {made.num_images:,} images, {labels}, fingerprint {manifest.fingerprint[:12]}.")


@dataclass(frozen=True)
class ProbeFlags:
    """Measures what a run has learned, beside its untrained network and raw pixels; or other people's weights.

    Args:
        checkpoint: folder of a run (its newest checkpoint), RUN/checkpoints/step-NNN, a file of weights (with
            --backbone.name and --out), or "random".
        train: labelled data that the probes learn from.
        test: labelled data that they are judged on.
        probes: names of probes, such as knn, linear, svm or collapse; docs/methods/probes.md describes all of them. The
            protocol of each has flags of its own, such as --linear.schedule fast.
        layers: whose features are measured; "all" for conv1, res2 to res5 and pooled.
        out: folder of the rows and the features; by default that of the run. Required for a model that is not a run.
        image_size: side in pixels of the view, for what is no run; 0 for 224 of a file of weights and 32 otherwise.
        backbone: of a file of weights, or of "random". "timm/NAME" is one of the package timm.
        seed: of "random", and of what a probe of weights draws.
        bn_statistics: statistics of BatchNorm: "reestimated" on unlabelled train images, or "kept" from training.
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
    bn_statistics: Literal["reestimated", "kept"] = "reestimated"


def probe(arguments: Sequence[str]) -> None:
    """Probe a run or weights: `raysl probe RUN --train D --test D --probes knn linear --layers all`."""
    from raysl import probes

    kinds = {name: probes.config_type(name) for name in peek_all(arguments, "--probes", ProbeFlags.probes)}
    fields: list[Any] = [(name, kind, kind()) for name, kind in kinds.items()]
    flags = dataclasses.make_dataclass("Flags", fields, bases=(ProbeFlags,), frozen=True)
    flags.__doc__ = ProbeFlags.__doc__
    given: Any = tyro.cli(flags, prog="raysl probe", args=list(arguments))
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    rows = api.probe(**values)
    from rich.console import Console

    from raysl.evaluation.results import tables, verdicts

    for table in tables(rows):
        Console().print(table)
    print("\n".join(verdicts(rows)))


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
    """Write features of a checkpoint: `raysl features CKPT --data D --layer res5 --out F`."""
    given = tyro.cli(FeaturesFlags, prog="raysl features", args=list(arguments))
    store = api.features(given.checkpoint, config=given.config)
    print(f"{store.folder}: {store.num_rows:,} rows. `raysl cluster {store.folder} --k K` clusters them.")


@dataclass(frozen=True)
class ClusterFlags:
    """Clusters features by k-means.

    Args:
        features: a folder that `raysl features` made.
        config: of the clustering.
        out: folder of the result; by default a folder inside the features.
        assign: more features to assign to the same centroids, such as those of validation images.
    """

    features: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FEATURES")]
    config: tyro.conf.OmitArgPrefixes[KMeansConfig]
    out: str = ""
    assign: tuple[str, ...] = ()


def cluster(arguments: Sequence[str]) -> None:
    """Cluster features by k-means: `raysl cluster F --k K`."""
    given = tyro.cli(ClusterFlags, prog="raysl cluster", args=list(arguments))
    done = api.cluster(given.features, None, given.out, given.config, assign=given.assign)
    summary = done.summary()
    labels = "".join(f", {name} {value:.4f}" for name, value in summary.get("labels", {}).items())
    print(f"Objective {summary['objective_value']:.6g}, {summary['sizes']['empty']} clusters empty{labels}.")
    print(f"Assignments: {done.assignments}")


def clusterfit(arguments: Sequence[str]) -> None:
    """Run ClusterFit: `raysl clusterfit --teacher CKPT --data D --k K --run R`."""
    from raysl.clustering.cluster_and_fit import ClusterfitConfig

    given, rest = tyro.cli(
        ClusterfitConfig, prog="raysl clusterfit", args=list(arguments), return_unknown_args=True
    )
    student = parse([*rest, "--method", "clusterfit"], "raysl clusterfit").given
    run = api.clusterfit(given.teacher, config=given, student=student)
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


def views(arguments: Sequence[str]) -> None:
    """Draw what a method sees: `raysl views --data D --method pirl-jigsaw --out sheet.png`."""
    given, rest = tyro.cli(ViewsFlags, prog="raysl views", args=list(arguments), return_unknown_args=True)
    flags = parse([*rest, "--run", "-"], "raysl views")
    picture = api.views(out=given.out, images=given.images, **flags.given)
    print(f"{picture}: {given.images} images as {flags.config.method} sees them.")


@dataclass(frozen=True)
class MethodsFlags:
    """Lists objectives, pretext transforms, what combines with what, and recipes.

    Args:
        pages: write a page of documentation for each of them to this folder instead.
    """

    pages: Path | None = None


def methods(arguments: Sequence[str]) -> None:
    """List what there is: `raysl methods`."""
    given = tyro.cli(MethodsFlags, prog="raysl methods", args=list(arguments))
    if given.pages is not None:
        from raysl.documentation import pages

        pages.write(given.pages, dataset(pages.DATA))
        print(f"{given.pages}: {len(pages.names())} pages, with the pictures of what the methods see.")
        return
    from rich.console import Console
    from rich.table import Table

    from raysl import recipes
    from raysl.documentation.combinations import describe

    listed = Table("recipe", "what it reproduces", title="Recipes: raysl pretrain --recipe RECIPE")
    for name in recipes.names():
        listed.add_row(name, recipes.summary(name))
    console = Console()
    for part in (*describe(), listed):
        console.print(part)


def sweep(arguments: Sequence[str]) -> None:
    """Try values: `raysl sweep --data D --method pirl-jigsaw --vary temperature lambda --out S`."""
    given, rest = tyro.cli(SweepConfig, prog="raysl sweep", args=list(arguments), return_unknown_args=True)
    flags = parse([*rest, "--run", "-"], "raysl sweep")
    rows = api.sweep(config=given, base=flags.given)
    from rich.console import Console

    from raysl.tuning.results import SweepResults, render

    Console().print(render(SweepResults.open(given.out)))
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
    """Write a page of figures and tables: `raysl report SWEEP`, `raysl report RUNS...`."""
    given = tyro.cli(ReportFlags, prog="raysl report", args=list(arguments))
    print(api.report(given.folders, given.config))


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
    """Write weights for other programs: `raysl export RUN --format torchvision`."""
    given = tyro.cli(ExportFlags, prog="raysl export", args=list(arguments))
    print(api.export(given.run, given.config))


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
    """Train a run once more: `raysl reproduce RUN`."""
    given = tyro.cli(ReproduceFlags, prog="raysl reproduce", args=list(arguments))
    found = api.reproduce(given.run, given.config)
    for line in found.numbers:
        print(f"differs: {line}")
    if not found.same:
        raise SystemExit(1)
    print(f"The first {found.steps} steps gave the same numbers and weights, to the last bit.")


def doctor(arguments: Sequence[str]) -> None:
    """Measure where time goes: `raysl doctor --data D --method pirl-jigsaw`; `raysl doctor --cluster`.

    Exits with 1 when machines of the cluster run something else, or the run would be refused.
    """
    from raysl.diagnostics import DoctorConfig

    found: Any = api.doctor(tyro.cli(DoctorConfig, prog="raysl doctor", args=list(arguments)))
    if getattr(found, "stale", ()) or getattr(found, "refused", ""):
        raise SystemExit(1)


def demo(arguments: Sequence[str]) -> None:
    """Show the whole story: `raysl demo`."""
    from raysl import demo as story

    story.demo(tyro.cli(story.DemoConfig, prog="raysl demo", args=list(arguments)))
