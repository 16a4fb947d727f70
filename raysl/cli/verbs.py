"""The verbs of the `raysl` command over the functions of `raysl.api`.

`raysl.__main__` parses the flags of a verb from its parameters; a verb with the parameter `arguments` parses its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from raysl import api, plugins
from raysl.api.arguments import dataset
from raysl.backbone.network import BackboneConfig
from raysl.cli.flags import parse, peek_all, read
from raysl.clustering.options import KMeansConfig
from raysl.errors import counted
from raysl.evaluation.online import OnlineConfig
from raysl.extraction.features import FeaturesConfig
from raysl.ingestion.pipeline import IngestConfig
from raysl.model_export import ExportConfig
from raysl.reporting.page import ReportConfig
from raysl.run import Run
from raysl.training.in_process import LocalConfig
from raysl.training.reproduction import ReproduceConfig
from raysl.tuning.config import POPULATION, SweepConfig

_FLAGS = tyro.conf.arg(name="")  # The fields of a configuration are flags without a prefix.
# The names are the headings in the help.
_BESIDE = {"online_evaluation": OnlineConfig, "local_training": LocalConfig}
_Run = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]


def pretrain(arguments: Sequence[str]) -> None:
    """Learn a representation: `raysl pretrain --data D --run R --method pirl-jigsaw`."""
    flags = parse(arguments, "raysl pretrain", _BESIDE)
    probing, local = (dataclasses.asdict(flags.beside[name]) for name in _BESIDE)
    run = api.pretrain(**flags.given, **probing, **local)
    config = run.config()
    data = str(flags.given.get("data", config.data))
    print(f"The run is at {run.folder}. Next:\n{_next_commands(run, data, config.sources())}")


def _next_commands(run: Run, data: str, own_code: Collection[str] = ()) -> str:
    """Return commands for a run, after one that lets them run the code of the user that it uses."""
    folder = shlex.quote(str(run.folder))
    first = f"  export {_trusting()}    allow these to run your code\n" if own_code else ""
    return (
        f"{first}"
        f"  raysl probe {folder} --train LABELED --test OTHERS    measure it\n"
        f"  raysl features {folder} --data {shlex.quote(data)} --out FEATURES    features of images as Parquet\n"
        f"  raysl export {folder}    weights for other programs"
    )


def _trusting() -> str:
    """Return the assignment by which a shell trusts the code that this process trusts."""
    return f"{plugins.TRUSTED_VARIABLE}={shlex.quote(os.environ.get(plugins.TRUSTED_VARIABLE, ''))}"


def ingest(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")],
    config: Annotated[IngestConfig, _FLAGS, tyro.conf.OmitArgPrefixes],
) -> None:
    """Make a data set from any source of images: `raysl ingest SOURCE DEST`.

    Args:
        source: a folder of images or videos; tables of images, or of names of files: Parquet, Arrow, Feather, CSV, TSV,
            JSON lines, a Hugging Face data set; tar, zip or WebDataset archives; IDX files, CIFAR, .npz arrays; or N
            images or clips that raysl generates, shapes:N or clips:N. Any path or URI; docs/data.md describes each.
        dest: folder of the data set, a path or a URI.
        config: see `IngestConfig`.
    """
    made = api.ingest(source, dest, config)
    fingerprint = made.manifest.fingerprint[:12]
    run = shlex.quote(_free_run(dest))
    print(f"Fingerprint {fingerprint}. Next: raysl pretrain --data {shlex.quote(dest)} --run {run}")


def _free_run(dest: str) -> str:
    """Return a folder that does not exist yet, for a run on the data set at `dest`."""
    name = Path(dest).absolute().name
    others = (f"{name}-{number}" for number in itertools.count(2))
    return next(
        run
        for run in (f"runs/{one}" for one in itertools.chain(["first", name], others))
        if not Path(run).exists()
    )


@dataclass(frozen=True)
class ProbeFlags:
    """Evaluate the features of a run against its untrained backbone and raw pixels, or those of a weights file:
    `raysl probe resnet50.pth --backbone resnet50 --out probes/resnet50 --train D --test D`.

    Args:
        checkpoint: folder of a run (its newest checkpoint), RUN/checkpoints/step-NNN, a folder of `raysl export`,
            or "random"; or a weights file, with --backbone.name and --out: a state dict of PyTorch, a checkpoint
            that holds one, or safetensors.
        train: labeled data that the probes learn from.
        test: labeled data on which the probes are scored.
        probes: names of probes: PROBES. docs/methods/probes.md describes them. Each probe has flags of its own, such as
            --linear.schedule fast; help lists them for the probes that are given.
        layers: layers to measure: "pooled", the output of the backbone; "all" adds the stages of a ResNet, conv1 and
            res2 to res5.
        encoders: encoders of a run to measure: "trained", "random" (the untrained backbone), "pixels", and "momentum"
            (the moving average of the backbone that BYOL, MoCo and DINO keep).
        out: folder for the results and features; default: the folder of the run. Required if the model is not a run.
        image_size: side of the view in pixels, for a model that is not a run; 0 means the size that an export
            states, 224 for other weights, and 32 for "random".
        backbone: backbone of a weights file, or of "random"; "timm/NAME" for a backbone of timm.
        seed: seed of "random", and of the probes of a weights file.
        bn_statistics: statistics of BatchNorm: "reestimated" on whole train images, without labels, or "kept" from
            training, which often mixes whole images and patches.
        plugin: your own files or modules that define probes, or that the run uses.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CKPT")]
    train: str
    test: str
    probes: tuple[str, ...] = ("knn", "linear")
    layers: tuple[str, ...] = ("pooled",)
    encoders: tuple[str, ...] = ("trained", "random", "pixels")
    out: str = ""
    image_size: int = 0
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    seed: int = 0
    bn_statistics: Literal["reestimated", "kept"] = "reestimated"
    plugin: tuple[str, ...] = ()


def probe(arguments: Sequence[str]) -> None:
    """Probe a run or weights: `raysl probe RUN --train D --test D --probes knn linear --layers all`."""
    from raysl import probes

    plugins.add_and_trust(peek_all(arguments, "--plugin", ()))
    kinds = {name: probes.config_type(name) for name in peek_all(arguments, "--probes", ProbeFlags.probes)}
    fields: list[Any] = [(name, kind, kind()) for name, kind in kinds.items()]
    flags = dataclasses.make_dataclass("Flags", fields, bases=(ProbeFlags,), frozen=True)
    flags.__doc__ = (ProbeFlags.__doc__ or "").replace("PROBES", ", ".join(probes.names()))
    given = read(flags, "raysl probe", arguments)
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    rows = api.probe(**values)
    from rich.console import Console

    from raysl.evaluation.results import tables, verdicts

    train, test = dataset(given.train), dataset(given.test)
    for table in tables(rows, (train, test)):
        Console().print(table)
    print("\n".join(verdicts(rows)))


def features(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CKPT")],
    config: Annotated[FeaturesConfig, _FLAGS],
) -> None:
    """Write the features of every image as Parquet: `raysl features CKPT --data D --out F`.

    Args:
        checkpoint: folder of a run (its newest checkpoint), RUN/checkpoints/step-NNN, a weights file (with
            --backbone.name), "random" or "pixels".
        config: see `FeaturesConfig`.
    """
    store = api.features(checkpoint, config=config)
    print(
        f"{store.folder}: {counted(store.num_rows, 'row')}, for pandas.read_parquet({str(store.folder)!r})."
    )
    print(f"`raysl cluster {store.folder} --k K` clusters them.")


def cluster(
    features: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FEATURES")],
    config: Annotated[KMeansConfig, _FLAGS],
    out: str = "",
    assign: tuple[str, ...] = (),
) -> None:
    """Cluster features by k-means: `raysl cluster F --k K`.

    Args:
        features: a folder that `raysl features` made.
        config: see `KMeansConfig`.
        out: folder of the result; default: a folder in FEATURES, which the command prints.
        assign: more features to assign to the same centroids, such as those of validation images.
    """
    done = api.cluster(features, None, out, config, assign=assign)
    summary = done.summary()
    labels = "".join(f", {name} {value:.4f}" for name, value in summary.get("labels", {}).items())
    print(f"Objective {summary['objective_value']:.6g}, {summary['sizes']['empty']} clusters empty{labels}.")
    print(f"The cluster of each image, with its path: pandas.read_parquet({str(done.assignments)!r}).")


def clusterfit(arguments: Sequence[str]) -> None:
    """Run ClusterFit: `raysl clusterfit --teacher CKPT --data D --k K --run R`."""
    from raysl.clustering.cluster_and_fit import ClusterfitConfig

    given, rest = tyro.cli(
        ClusterfitConfig, prog="raysl clusterfit", args=list(arguments), return_unknown_args=True
    )
    student = parse([*rest, "--method", "clusterfit"], "raysl clusterfit").given
    run = api.clusterfit(given.teacher, config=given, student=student)
    config = run.config()
    print(f"The student is at {run.folder}. Next:\n{_next_commands(run, config.data, config.sources())}")


@dataclass(frozen=True)
class ViewsFlags:
    """Draw the views of a method. Also takes the flags of `raysl pretrain` except --run, such as --data and --method.

    Args:
        out: file of the picture, a PNG; a path or a URI.
        images: number of images.
    """

    out: str = "views.png"
    images: int = 8


def views(arguments: Sequence[str]) -> None:
    """Draw the views of a method: `raysl views --data D --method pirl-jigsaw --out views.png`."""
    given, rest = tyro.cli(ViewsFlags, prog="raysl views", args=list(arguments), return_unknown_args=True)
    flags = parse([*rest, "--run", "-"], "raysl views")
    picture = api.views(out=given.out, images=given.images, **flags.given)
    drawn = min(given.images, dataset(flags.config.data).num_images)
    print(
        f"{picture}: {counted(drawn, 'image')} as {flags.config.method} sees {'it' if drawn == 1 else 'them'}."
    )


def methods(pages: Path | None = None, plugin: tuple[str, ...] = ()) -> None:
    """List objectives, transforms, their combinations, and recipes: `raysl methods`.

    Args:
        pages: folder to write pages of documentation to, instead of the list.
        plugin: your own files or modules that define objectives or transforms, which are listed too.
    """
    plugins.add_and_trust(plugin)
    if pages is not None:
        from raysl.reporting import method_pages

        method_pages.write(pages, dataset(method_pages.DATA), dataset(method_pages.CLIPS))
        print(f"{pages}: {len(method_pages.names())} pages with pictures of the views.")
        return
    from rich.console import Console

    from raysl.reporting.combinations import describe, listing
    from raysl.training import recipes

    listed = listing("Recipes: raysl pretrain --recipe RECIPE", "recipe", "description")
    for name in recipes.names():
        listed.add_row(name, recipes.summary(name))
    console = Console()
    for part in (*describe(), listed):
        console.print(part)


def sweep(arguments: Sequence[str]) -> None:
    """Try values: `raysl sweep --data D --method pirl-jigsaw --vary temperature lam --out S`."""
    # The configuration of a sweep looks for its probe.
    plugins.add_and_trust(peek_all(arguments, "--plugin", ()))
    given, rest = tyro.cli(SweepConfig, prog="raysl sweep", args=list(arguments), return_unknown_args=True)
    flags = parse([*rest, "--run", "-"], "raysl sweep")
    rows = api.sweep(config=given, base=flags.given)
    from rich.console import Console

    from raysl.tuning.results import SweepResults, render

    Console().print(render(SweepResults.open(given.out)))
    first = f"{_trusting()} " if flags.config.sources() else ""
    print(f"`{first}raysl report {shlex.quote(given.out)}` writes a page of figures.")
    failed = [str(row["trial"]) for row in rows if row["state"] == "failed"]
    if failed:
        again = "give another --out" if given.scheduler in POPULATION else "the same command with --retry"
        print(f"Trials {', '.join(failed)} failed. To try them again: {again}.")
        raise SystemExit(1)


def report(
    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SWEEP|RUNS")],
    config: Annotated[ReportConfig, _FLAGS],
) -> None:
    """Write an HTML page of figures and tables: `raysl report SWEEP`, `raysl report RUNS...`.

    Args:
        folders: folder of a sweep, finished or not; or folders of runs, which are compared.
        config: see `ReportConfig`.
    """
    print(api.report(folders, config))


def export(run: _Run, config: Annotated[ExportConfig, _FLAGS]) -> None:
    """Write the backbone of a run for other programs, with a model card: `raysl export RUN --format torchvision`.

    Args:
        run: folder of the run.
        config: see `ExportConfig`.
    """
    folder = api.export(run, config)
    print(f"{folder}: README.md in it shows how to load the weights.")


def reproduce(run: _Run, config: Annotated[ReproduceConfig, _FLAGS]) -> None:
    """Train a run again and compare to the last bit: `raysl reproduce RUN`. Exit with 1 if a number differs.

    Args:
        run: folder of the run.
        config: see `ReproduceConfig`.
    """
    found = api.reproduce(run, config)
    for line in found.result_differences:
        print(f"differs: {line}")
    if not found.same:
        raise SystemExit(1)
    print(
        f"The first {counted(found.steps, 'step')} gave the same {' and '.join(found.compared)}, to the last bit."
    )


def doctor(arguments: Sequence[str]) -> None:
    """Measure the stages of a run, or survey a cluster.

    Exit with 1 if machines of the cluster run other code or packages, or the run would be refused.
    """
    from raysl.diagnostics import DoctorConfig

    found: Any = api.doctor(read(DoctorConfig, "raysl doctor", arguments))
    if getattr(found, "stale", ()) or getattr(found, "refused", ""):
        raise SystemExit(1)


def cache(arguments: Sequence[str]) -> None:
    """List and remove copies in the cache: `raysl cache`."""
    from raysl.cli import cache as listing

    config = read(listing.CacheConfig, "raysl cache", arguments)
    listing.cache(config)  # After the flags, because it loads more than the help needs.


def demo(arguments: Sequence[str]) -> None:
    """Run a small experiment end to end: `raysl demo`."""
    from raysl.cli import demo as story

    story.demo(read(story.DemoConfig, "raysl demo", arguments))
