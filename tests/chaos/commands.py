"""The commands that the chaos program disturbs: small work of each verb, and a digest of its result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raysl.clustering.lloyd import Clustering
from raysl.dataset import DataSet
from raysl.evaluation.results import rows_of
from raysl.run import Run
from raysl.storage import Folder
from raysl.storage.feature_store import FeatureStore
from raysl.tuning.results import SweepResults

# Parts of a report that hold the time of day or a speed.
_CHANGING = re.compile(rb"\d{4}-\d\d-\d\d[T ][\d:+.]+|[\d.,]+ (images/s|s|min)\b")


def _digest(*values: Any) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def _pretrained(uri: str) -> dict[str, str]:
    run = Run.open(uri)
    state, banks = run.newest().load()
    network = [(name, value.numpy().tobytes()) for name, value in sorted(state["network"].items())]
    rows = [(row["step"], row["loss"]) for row in run.metrics()]
    parts = [(name, np.asarray(value).tobytes()) for part in banks for name, value in sorted(part.items())]
    return {"losses": _digest(rows), "weights": _digest(network), "bank": _digest(parts)}


def _swept(uri: str) -> dict[str, str]:
    rows = SweepResults.open(uri).rows()
    return {"scores": _digest([(row["trial"], row["state"], row["values"], row["seeds"]) for row in rows])}


def _ingested(uri: str) -> dict[str, str]:
    dataset = DataSet.open(uri)
    table = dataset.read(np.arange(dataset.num_images), ("image", "path", "label"))
    return {"rows": _digest(table.to_pylist()), "fingerprint": dataset.manifest.fingerprint}


def _extracted(uri: str) -> dict[str, str]:
    return {"rows": _digest(np.asarray(FeatureStore.open(uri, "pooled").load()).tobytes())}


def _clustered(uri: str) -> dict[str, str]:
    found = Clustering.open(uri)
    return {
        "centroids": _digest(found.centroids().tobytes()),
        "objective": str(found.summary()["objective_value"]),
    }


def _probed(uri: str) -> dict[str, str]:
    rows = rows_of(Run(Folder(uri)))
    return {"rows": _digest(sorted((row["encoder"], row["name"], row["value"]) for row in rows))}


def _exported(uri: str) -> dict[str, str]:
    folder = Folder(uri)
    return {name: _digest(folder.read(name)) for name in folder.list() if name.endswith("safetensors")}


def _reported(uri: str) -> dict[str, str]:
    folder = Folder(uri)
    page = _CHANGING.sub(b"", folder.read("index.html"))
    # The page names the folders of the run and of its data.
    page = re.sub(rb"[\w:/.-]*/(pretrain|ingest)\b", b"", page)
    return {"page": _digest(page), "files": _digest(folder.list())}


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
    result: Callable[[str], dict[str, str]]
    weight: int

    def needs(self) -> list[str]:
        """Return the names of the commands that this one uses the results of, directly or not; earlier ones first."""
        before = [one for one in COMMANDS if f"{{{one.name}}}" in self.arguments]
        return list(dict.fromkeys(name for one in before for name in (*one.needs(), one.name)))

    def argv(self, places: Mapping[str, Path | str]) -> list[str]:
        return self.arguments.format(**places).split()


_TRAIN = "--method pirl-rotation --view.image-size 16 --batch-size 24 --pirl.num-negatives 32"
_RUN = f"pretrain --data {{ingest}} --run {{out}} {_TRAIN} --epochs 12 --save.every-steps 10 --log-every 1"
# Each uses the undisturbed results of commands before it.
COMMANDS = (
    Command("ingest", "ingest {images} {out} --shard-images 20", _ingested, 2),
    Command("pretrain-local", f"{_RUN} --local", _pretrained, 3),
    Command("pretrain", f"{_RUN} --workers 2", _pretrained, 5),
    Command("clips", "ingest clips:48?seed=0&size=32&frames=12 {out}", _ingested, 1),
    Command(
        "pretrain-clips",
        "pretrain --data {clips} --run {out} --method predict-frame_order --view.image-size 32 --batch-size 12 "
        "--epochs 12 --save.every-steps 10 --log-every 1 --workers 2",
        _pretrained,
        2,
    ),
    Command("export", "export {pretrain} --format safetensors --out {out}", _exported, 1),
    Command("report", "report {pretrain} --out {out}", _reported, 1),
    Command("features", "features {pretrain} --data {ingest} --layer pooled --out {out}", _extracted, 2),
    Command("k-means", "cluster {features} --k 8 --restarts 3 --actors 2 --out {out}", _clustered, 2),
    Command(
        "sweep",
        "sweep --data {ingest} --train {ingest} --validation {ingest} --out {out} --vary pirl.temperature=0.1,0.5 "
        f"--seeds 0 {_TRAIN} --workers 1 --epochs 4",
        _swept,
        2,
    ),
    Command(
        "probe", "probe {pretrain} --train {ingest} --test {ingest} --probes knn --out {out}", _probed, 1
    ),
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
