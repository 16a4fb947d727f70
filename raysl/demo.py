"""The whole story in three minutes on two cores: ingest, pretrain, probe, a table and a picture."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from raysl import cluster, pictures
from raysl.config import Pretraining, ViewConfig
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingest import resolve
from raysl.objectives.pirl import Config as Pirl
from raysl.optim import OptimConfig
from raysl.pretrain import pretrain
from raysl.probe import probe, tables
from raysl.train import Network

DRAWN = "shapes:6000"


@dataclass(frozen=True)
class DemoConfig:
    """Pretrains PIRL with a jigsaw on a few thousand images and shows what that is worth.

    Args:
        data: labelled images: "shapes" draws its own; "fashion-mnist", a folder, Parquet files or any other source
            of `raysl ingest`. Where the source has splits, "train" and "test" are used.
        out: folder for the run and the picture; by default a new temporary folder.
        epochs: visits to every image.
        workers: Ray Train workers.
    """

    data: str = "shapes"
    out: Path | None = None
    epochs: float = 4
    workers: int = 2


def demo(config: DemoConfig) -> None:
    """Runs the demo and prints its table.

    Raises:
        UserError: the data cannot be read, or has no labels.
    """
    console = Console()
    started = time.monotonic()
    out = config.out or Path(tempfile.mkdtemp(prefix="raysl-demo-"))

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.0f} s[/dim]  {line}", highlight=False)

    say("Starting Ray on this machine.")
    cluster.start()
    train, test = _splits(config.data)
    dataset, judged = resolve(train), resolve(test)
    if not dataset.has_labels:
        raise UserError(
            f"The demo measures with labels and {config.data!r} has none. Use `raysl pretrain` on it."
        )
    say(
        f"Data: {dataset.num_images:,} images to learn from (labels unused), {judged.num_images:,} to be judged on."
    )
    settings = _settings(config, dataset, out)
    sheet = out / "views.png"
    out.mkdir(parents=True, exist_ok=True)
    network = Network(settings, dataset.num_images, len(dataset.manifest.classes))
    pictures.views_sheet(dataset, network.views(settings), settings.seed).save(sheet)
    run = pretrain(settings, say)
    say("Probing the trained trunk, the same trunk untrained, and raw pixels.")
    rows = probe(run, str(dataset.folder), str(judged.folder), ("knn", "linear"), say)
    for table in tables(rows):
        console.print(table)
    say(f"What the method saw: {sheet}")
    say(f"The run: {run.folder}")


def _splits(data: str) -> tuple[str, str]:
    """What to train on and what to test on."""
    if data == "shapes":
        return f"{DRAWN}#train", "shapes:1000#test"
    return (data, data) if "#" in data or DataSet.is_one(data) else (f"{data}#train", f"{data}#test")


def _settings(config: DemoConfig, dataset: DataSet, out: Path) -> Pretraining:
    return Pretraining(
        data=str(dataset.folder),
        run=str(out / "run"),
        epochs=config.epochs,
        workers=config.workers,
        batch_size=64 * config.workers,
        view=ViewConfig(image_size=32),
        optim=OptimConfig(lr=0.12),
        parts={"pirl": Pirl(num_negatives=min(1024, dataset.num_images - 1), temperature=0.1)},
    )
