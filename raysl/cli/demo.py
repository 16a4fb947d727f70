"""A small experiment from end to end: ingest images, pretrain, probe, and print a table and a verdict."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from raysl import console as console_log
from raysl import ray_cluster
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.fields import Bounds, CheckedTop, Seed
from raysl.optim import OptimConfig

_log = logging.getLogger("raysl.cli.demo")
# Two minutes on two cores are enough for these and not for photos: a shape has few sizes and a texture of its own.
DRAWN = "shapes:6000?plain=1"


@dataclass(frozen=True)
class DemoConfig(CheckedTop):
    """Pretrain SimCLR on a few thousand images without labels and measure what it has learned.

    Args:
        data: labeled images: "shapes" draws its own; "fashion-mnist", a folder, Parquet files or any other source
            of `raysl ingest`. A source with splits is used as "train" and "test"; of any other, kNN alone is measured,
            on the same images.
        out: folder for the run and the picture; by default a new temporary folder.
        epochs: number of passes over the images.
        seed: seed of the network, of the order of the images and of the augmentation.
        workers: training workers; 0 for as many as suit the machine.
    """

    data: str = "shapes"
    out: Path | None = None
    epochs: Annotated[float, Bounds(above=0, high=1e9)] = 10
    seed: Seed = 0
    workers: Annotated[int, Bounds(low=0, high=10**6, hint="0 for as many as suit the machine")] = 0


def demo(config: DemoConfig) -> None:
    """Run the demo and print its table.

    Raises:
        UserError: the data cannot be read, or has no labels.
    """
    console_log.add_handler()
    ray_cluster.start()
    from raysl.evaluation.evaluate import probe
    from raysl.evaluation.results import verdicts
    from raysl.ingestion import open_or_ingest, splits
    from raysl.model import Model
    from raysl.ray_cluster import placement
    from raysl.reporting import pictures
    from raysl.training.launch import pretrain

    console = Console()
    out = config.out or Path(tempfile.mkdtemp(prefix="raysl-demo-"))
    train, test = splits(DRAWN if config.data == "shapes" else config.data)
    logging.getLogger("raysl.ingestion").setLevel(logging.WARNING)
    with console_log.working("Preparing the images ..."):
        dataset, eval_set = open_or_ingest(train), open_or_ingest(test)
    if not dataset.has_labels:
        raise UserError(
            f"The demo measures with labels and {config.data!r} has none. Use `raysl pretrain` on it."
        )
    counts = counted(dataset.num_images, "image"), f"{eval_set.num_images:,}"
    _log.info("%s to learn from, without labels; %s to test on.", *counts)
    # The demo shows workers on Ray, also where one worker would do without.
    several = placement.default_workers() if placement.machines().has_gpus else 2
    settings = _settings(config, dataset, out, config.workers or several)
    grid = out / "views.png"
    views = Model.of(settings, dataset).views()
    pictures.save(pictures.views_grid(dataset, views, settings.seed), str(grid))
    run = pretrain(settings)
    # On the images that it learns from, kNN leaves each image out of its own vote; a classifier cannot.
    probes = ("knn",) if train == test else ("knn", "linear")
    with console_log.working("Probing the trained network, the untrained one, and raw pixels ..."):
        rows = probe(run, dataset, eval_set, probes=probes)
    console.print(_table(rows))
    console.print("\n".join(verdicts(rows)), markup=False)
    console.print(f"\nWhat the method sees:  {grid}", soft_wrap=True, highlight=False)
    console.print(f"The run:               {run.folder}", soft_wrap=True, highlight=False)
    console.print("\nNext, your own images: raysl pretrain --data PHOTOS --run runs/first", highlight=False)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the primary metric of every probe and encoder."""
    from raysl.evaluation.results import TITLES, format_row_value

    primary = [row for row in rows if row["primary"]]
    probes = list(dict.fromkeys(row["probe"] for row in primary))
    table = Table("features", *probes)
    for encoder in dict.fromkeys(row["encoder"] for row in primary):
        value = {row["probe"]: format_row_value(row) for row in primary if row["encoder"] == encoder}
        table.add_row(TITLES.get(encoder, encoder), *(value.get(probe, "") for probe in probes))
    return table


def _settings(config: DemoConfig, dataset: DataSet, out: Path, workers: int) -> Pretraining:
    return Pretraining(
        data=str(dataset.folder),
        run=str(out / "run"),
        method="simclr",
        epochs=config.epochs,
        seed=config.seed,
        workers=workers,
        batch_size=64 * workers,
        view=ViewConfig(image_size=32, min_scale=0.4),
        optim=OptimConfig(lr=0.12, warmup=0.05),
        parts={"simclr": {"temperature": 0.2, "norm": "batch"}},
    )
