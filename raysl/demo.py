"""The whole story in a few minutes on two cores: ingest, pretrain, probe, a table and a picture."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from raysl import ray_cluster
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.optim import OptimConfig

DRAWN = "shapes:6000"


@dataclass(frozen=True)
class DemoConfig:
    """Pretrains PIRL with a jigsaw on a few thousand images and shows what that is worth.

    Args:
        data: labelled images: "shapes" draws its own; "fashion-mnist", a folder, Parquet files or any other source
            of `raysl ingest`. Where the source has splits, "train" and "test" are used; else kNN alone is measured,
            on the same images.
        out: folder for the run and the picture; by default a new temporary folder.
        epochs: visits to every image.
        workers: Ray Train workers; 0 for two, or for one where there is one GPU.
    """

    data: str = "shapes"
    out: Path | None = None
    epochs: float = 4
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}; it must be at least 1, or 0 for the usual number.")


def demo(config: DemoConfig) -> None:
    """Runs the demo and prints its table.

    Raises:
        UserError: the data cannot be read, or has no labels.
    """
    from raysl.documentation import pictures
    from raysl.evaluation.evaluate import probe
    from raysl.evaluation.results import tables, verdicts
    from raysl.ingestion import resolve, splits
    from raysl.model import Model
    from raysl.ray_cluster import placement
    from raysl.training.launch import pretrain

    console = Console()
    started = time.monotonic()
    out = config.out or Path(tempfile.mkdtemp(prefix="raysl-demo-"))

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.0f} s[/dim]  {line}", highlight=False)

    say("Starting Ray on this machine.")
    ray_cluster.start()
    train, test = splits(DRAWN if config.data == "shapes" else config.data)
    dataset, judged = resolve(train), resolve(test)
    if not dataset.has_labels:
        raise UserError(
            f"The demo measures with labels and {config.data!r} has none. Use `raysl pretrain` on it."
        )
    say(
        f"Data: {dataset.num_images:,} images to learn from (labels unused), {judged.num_images:,} to be judged on."
    )
    settings = _settings(config, dataset, out, config.workers or placement.usual_workers())
    sheet = out / "views.png"
    views = Model.of(settings, dataset).views()
    pictures.save(pictures.views_sheet(dataset, views, settings.seed), sheet)
    run = pretrain(settings)
    say("Probing the trained backbone, the same backbone untrained, and raw pixels.")
    # Scored on the images that they learn from, neighbours leave each image out of its own vote; a classifier cannot.
    probes = ("knn",) if train == test else ("knn", "linear")
    rows = probe(run, dataset, judged, probes=probes)
    for table in tables(rows):
        console.print(table)
    console.print("\n".join(verdicts(rows)), markup=False)
    say(f"What the method saw: {sheet}")
    say(f"The run: {run.folder}")


def _settings(config: DemoConfig, dataset: DataSet, out: Path, workers: int) -> Pretraining:
    return Pretraining(
        data=str(dataset.folder),
        run=str(out / "run"),
        epochs=config.epochs,
        workers=workers,
        batch_size=64 * workers,
        view=ViewConfig(image_size=32),
        optim=OptimConfig(lr=0.12),
        parts={
            "pirl": {
                "num_negatives": min(1024, dataset.num_images - 1),
                "temperature": 0.2,
                "head": "bn",
            }
        },
    )
