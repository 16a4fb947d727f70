"""The commands that the chaos program disturbs: small work of each verb, and a digest of its result."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raysl.clustering.lloyd import Clustering
from raysl.feature_store.store import FeatureStore
from raysl.run import Run
from raysl.tuning.results import SweepResults

# Parts of a report that hold the time of day or a speed.
_CHANGING = re.compile(rb"\d{4}-\d\d-\d\d[T ][\d:+.]+|[\d.,]+ (images/s|s|min)\b")


def _digest(*values: Any) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def _pretrained(folder: Path) -> dict[str, str]:
    run = Run.open(str(folder))
    state, banks = run.newest().load()
    network = [(name, value.numpy().tobytes()) for name, value in sorted(state["network"].items())]
    rows = [(row["step"], row["loss"]) for row in run.metrics()]
    parts = [(name, np.asarray(value).tobytes()) for part in banks for name, value in sorted(part.items())]
    return {"losses": _digest(rows), "weights": _digest(network), "bank": _digest(parts)}


def _swept(folder: Path) -> dict[str, str]:
    rows = SweepResults.open(str(folder)).rows()
    return {"scores": _digest([(row["trial"], row["state"], row["values"], row["seeds"]) for row in rows])}


def _ingested(folder: Path) -> dict[str, str]:
    files = [folder / "manifest.json", *sorted((folder / "shards").iterdir())]
    return {file.name: _digest(file.read_bytes()) for file in files}


def _extracted(folder: Path) -> dict[str, str]:
    return {"rows": _digest(np.asarray(FeatureStore.open(str(folder), "pooled").load()).tobytes())}


def _clustered(folder: Path) -> dict[str, str]:
    found = Clustering.open(str(folder))
    return {
        "centroids": _digest(found.centroids().tobytes()),
        "objective": str(found.summary()["objective_value"]),
    }


def _reported(folder: Path) -> dict[str, str]:
    page = _CHANGING.sub(b"", (folder / "index.html").read_bytes())
    return {"page": _digest(page), "files": _digest(sorted(path.name for path in folder.iterdir()))}


class Command(NamedTuple):
    """A command to disturb.

    Args:
        name: name in the table.
        arguments: its arguments; {out}, {images} and the names of other commands in braces stand for paths.
        result: returns digests of what must not differ, of the folder {out}.
        weight: how often it is chosen, compared with others.
    """

    name: str
    arguments: str
    result: Callable[[Path], dict[str, str]]
    weight: int

    def argv(self, places: dict[str, Path]) -> list[str]:
        return [sys.executable, "-m", "raysl", *self.arguments.format(**places).split()]


_TRAIN = "--method pirl-rotation --view.image-size 16 --batch-size 24 --pirl.num-negatives 32 --workers 1"
# Each uses the undisturbed results of commands before it.
COMMANDS = (
    Command("ingest", "ingest {images} {out} --shard-images 20", _ingested, 2),
    Command(
        "pretrain",
        f"pretrain --data {{ingest}} --run {{out}} {_TRAIN} --epochs 12 --save.every-steps 10 --log-every 1",
        _pretrained,
        5,
    ),
    Command("features", "features {pretrain} --data {ingest} --layer pooled --out {out}", _extracted, 2),
    Command("k-means", "cluster {features} --k 8 --restarts 3 --actors 2 --out {out}", _clustered, 2),
    Command(
        "sweep",
        "sweep --data {ingest} --train {ingest} --validation {ingest} --out {out} --vary pirl.temperature=0.1,0.5 "
        f"--seeds 0 {_TRAIN} --epochs 4",
        _swept,
        3,
    ),
    Command("report", "report {pretrain} --out {out}", _reported, 1),
)


def write_images(folder: Path) -> None:
    """Write 120 images in three classes."""
    generator = np.random.default_rng(0)
    for number in range(120):
        place = folder / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")


def load(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; none if it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
