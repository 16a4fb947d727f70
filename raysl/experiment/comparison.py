"""Compare methods under equal conditions: the same images, backbone, schedule and probes, and one report.

Finished runs and probes are not repeated, so experiments share their runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from raysl import extraction
from raysl.backbone.network import BackboneConfig
from raysl.clustering.cluster_and_fit import ClusterfitConfig, clusterfit, round_folder
from raysl.config import Pretraining, ViewConfig
from raysl.contrastive.bank import BankConfig
from raysl.evaluation.evaluate import probe
from raysl.evaluation.results import ENCODERS, rows_of_probe
from raysl.evaluation.train_test_overlap import refuse_same_images
from raysl.experiment.script import Flags, locally, pretrained
from raysl.ingestion import open_or_ingest, splits
from raysl.objectives.moco import Config as Moco
from raysl.objectives.npid import Config as Npid
from raysl.objectives.pirl import Config as Pirl
from raysl.objectives.predict import Config as Predict
from raysl.objectives.simclr import Config as Simclr
from raysl.optim import OptimConfig
from raysl.pretext.jigsaw import Config as Jigsaw
from raysl.reporting import ReportConfig, check_installed, report
from raysl.reporting.report_runs import groups, labeled_rows
from raysl.reporting.tables import tables
from raysl.run import Run, jsonl
from raysl.storage import Folder

# Hyperparameters that differ from the papers' because the backbone is small and the run is short: see results/recipes.
BANK = BankConfig(momentum=0.0)
PIRL = {"pirl": Pirl(temperature=0.2, head="bn")}
PIRL_JIGSAW = {**PIRL, "jigsaw": Jigsaw(grid=2)}
NPID = {"npid": Npid(temperature=0.2, head="bn")}
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "distill": {},
    "predict-rotation": {},
    "predict-jigsaw": {},
    "predict-relative_position": {},
    "predict-colorization": {},
    "predict-inpainting": {},
    "multitask-relative_position,colorization": {},
    "npid": {"bank": BANK, "parts": NPID},
    "pirl-rotation": {"bank": BANK, "parts": PIRL},
    "pirl-jigsaw": {"bank": BANK, "parts": PIRL_JIGSAW},
    "pirl-rotation+jigsaw": {"bank": BANK, "parts": PIRL_JIGSAW},
    "simclr": {"parts": {"simclr": Simclr(temperature=0.2, norm="batch")}},
    # A queue much longer than the data set would hold several keys of most images.
    "moco": {"parts": {"moco": Moco(momentum=0.99, queue=2048)}},
    "cpc-patch_grid": {"backbone": BackboneConfig(norm="group")},
    "clusterfit": {},
}
# Methods of clips. The order of frames shows in places, which pooled features do not say, and in their comparison.
# Strong crops and colors would move the frame more than its objects move: see results/video.
OF_CLIPS: dict[str, dict[str, Any]] = {
    "predict-frame_order": {
        "parts": {"predict": Predict(cells=4, hidden=512)},
        "view": ViewConfig(min_scale=0.8, recipe="plain"),
        "optim": OptimConfig("adamw", lr=0.004, warmup=0.05),
    },
}
_LOCAL_DATA = "shapes:5000"


@dataclass(frozen=True)
class ComparisonFlags(Flags):
    """Flags of an experiment that compares methods.

    Args:
        methods: names of the methods.
        images: number of images that each run sees; patches of an image count once.
        batch_size: images in a step, of all workers.
        image_size: side of an ordinary view in pixels.
        teacher: method whose features "clusterfit" clusters, for each seed.
        clusters: number of clusters of these features.
    """

    data: str = "shapes:50000"
    runs: str = "runs/methods"
    methods: tuple[str, ...] = ()
    images: int = 51_200
    batch_size: int = 128
    image_size: int = 32
    teacher: str = "predict-jigsaw"
    clusters: int = 300


L = TypeVar("L", bound=ComparisonFlags)


def small(flags: L, local_data: str = _LOCAL_DATA) -> L:
    """Return the flags for `--local`: one seed, few images, and generated ones, unless others are given."""
    return locally(flags, data=local_data, images=2560)


def settings(flags: ComparisonFlags, method: str, seed: int, train: str, runs: Folder) -> Pretraining:
    """Return the configuration of a run.

    Distillation learns from the supervised run of the same seed. For "clusterfit", this is the configuration of the
    student that `raysl.clustering.cluster_and_fit.clusterfit` takes.
    """
    own = dict((METHODS | OF_CLIPS).get(method, {}))
    name = method
    if method == "clusterfit":
        name, method = f"clusterfit-{flags.teacher}-{flags.clusters}", flags.teacher
    if method == "distill":
        own["parts"] = {"distill": {"teacher": str(runs / f"supervised-{seed}")}}
    own.setdefault("optim", OptimConfig(lr=0.12, warmup=0.05))
    num_images = open_or_ingest(train).num_images
    own["parts"] = with_negatives(own.get("parts", {}), num_images - 1)
    return Pretraining(
        data=train,
        run=str(runs / f"{name}-{seed}"),
        method=method,
        epochs=flags.images / num_images,
        batch_size=flags.batch_size,
        workers=flags.run_workers,
        seed=seed,
        view=replace(own.pop("view", ViewConfig()), image_size=flags.image_size),
        **own,
    )


def with_negatives(parts: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Return the parts of a method with at most as many negatives; few images have no more."""
    return {
        name: replace(part, num_negatives=min(part.num_negatives, most))
        if hasattr(part, "num_negatives")
        else part
        for name, part in parts.items()
    }


def folder_of(flags: ComparisonFlags, method: str, seed: int, train: str, runs: Folder) -> str:
    """Return the folder of the run that `run_of` returns."""
    run = settings(flags, method, seed, train, runs).run
    return str(round_folder(run, 1) / "run") if method == "clusterfit" else run


def trained(flags: ComparisonFlags, names: Sequence[str]) -> list[Run]:
    """Train all methods and seeds and return their runs.

    Args:
        names: names of the probes that follow; data that they cannot use are refused before training.
    """
    check_installed()
    refuse_same_images(names, *(open_or_ingest(split) for split in splits(flags.data)))
    return [run_of(flags, method, seed) for method in flags.methods for seed in flags.seeds]


def run_of(
    flags: ComparisonFlags, method: str, seed: int, train: str = "", runs: Folder | None = None
) -> Run:
    """Train one method and return its run; for "clusterfit" the student, after its teacher.

    Args:
        train: images; by default the train split of the flags.
        runs: folder of the runs; by default the folder of the flags.
    """
    train, runs = train or splits(flags.data)[0], runs or Folder(flags.runs)
    config = settings(flags, method, seed, train, runs)
    if method != "clusterfit":
        return pretrained(config, flags)
    teacher = run_of(flags, flags.teacher, seed, train, runs)
    return clusterfit(
        ClusterfitConfig(teacher=str(teacher.folder), k=flags.clusters), config, local=flags.in_process
    )


def measured(
    runs: Sequence[Run],
    flags: ComparisonFlags,
    names: Sequence[str],
    *,
    layers: Sequence[str] = ("pooled",),
    configs: Mapping[str, Any] | None = None,
) -> None:
    """Probe the runs on the labeled data of the flags, as far as results are missing.

    Baselines are probed once for all runs that started from the same weights. See `raysl.evaluation.evaluate.probe`.
    """
    train, test = splits(flags.data)
    seen, judged = (open_or_ingest(split).manifest.fingerprint for split in (train, test))
    starts = set()
    for run in runs:
        start = extraction.untrained(run)
        own = ENCODERS[:1] if start in starts else ENCODERS[:2]
        starts.add(start)
        stages = extraction.stages(extraction.Trained(run, run.newest()))
        wanted = {one for layer in layers for one in (stages if layer == "all" else [layer])}
        missing = []
        for name in names:
            found = rows_of_probe(run, name, seen, judged, (configs or {}).get(name), run.newest().step)
            layers_of = {one: {row["layer"] for row in found if row["encoder"] == one} for one in own}
            if not all(there >= wanted for there in layers_of.values()):
                missing.append(name)
        if missing:
            how: dict[str, Any] = {"layers": layers, "encoders": own, "configs": configs or {}}
            probe(run, train, test, probes=missing, cache=Folder(flags.runs) / "features", **how)


def reported(runs: Sequence[Run], flags: Flags, names: Sequence[str], besides: Collection[str] = ()) -> None:
    """Print the tables of probes, and write their rows and the report.

    Args:
        besides: names of numbers to print in addition to the primary metrics.
    """
    places = [str(run.folder) for run in runs]
    rows = labeled_rows(groups(places))
    shown = [
        replace(item, row={**item.row, "primary": item.row["primary"] or item.row["name"] in besides})
        for item in rows
        if item.row["probe"] in names
    ]
    for one in tables(shown):
        printed = Table(title=one.probe, caption=f"{one.caption}; = is a tie with the best")
        printed.add_column("")
        for layer, name in one.columns:
            printed.add_column(f"{layer} {name}", justify="right")
        for label, cells in one.lines:
            marks = ["" if cell and not one.tied(i, cell) else " =" for i, cell in enumerate(cells)]
            texts = [f"{cell}{mark}" if cell else "" for cell, mark in zip(cells, marks, strict=True)]
            printed.add_row(label, *texts)
        Console().print(printed)
    Folder(flags.out).write("rows.jsonl", jsonl({**item.row, "label": item.label} for item in rows))
    print(f"{report(places, ReportConfig(out=flags.out))}/index.html")
