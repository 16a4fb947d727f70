"""A small run for an objective: its backbone, what it may know, what it must be given, and a batch of random views."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysl import pretext
from raysl.backbone.network import Backbone, BackboneConfig, build
from raysl.checkpoint import SaveConfig, Saver
from raysl.dataset import Rows
from raysl.objectives import Setup
from raysl.pretext import Geometry, jigsaw
from raysl.storage import Folder
from raysl.stream.reader import Batch

N = 64
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def setup(
    transform: str = "", num_classes: int = 0, predicted: bool = False, permutations: int | None = None
) -> tuple[Backbone, Setup]:
    """A backbone whose images do not see each other, of equal weights in every call."""
    torch.manual_seed(0)
    geometry = Geometry(image_size=16, predicted=predicted)
    parts = {"jigsaw": jigsaw.Config(grid=2, patch_size=6, num_permutations=permutations)}
    backbone = build(BackboneConfig(norm="group"))
    return backbone, Setup(
        pretext=pretext.build(transform, parts, geometry) if transform else None,
        identity=pretext.build("identity", {}, geometry),
        width=backbone.width,
        num_images=N,
        num_classes=num_classes,
        seed=0,
        backbone=backbone,
    )


def batch(objective: Any, b: int = 4, step: int = 0) -> Batch:
    """Random views of the images 0, 7, 14, ... as the objective asks for them."""
    generator = torch.Generator().manual_seed(step)
    views = {}
    for name, transform in objective.views.items():
        side = 6 if transform.num_crops > 1 else 16
        shape = (b, transform.num_crops, 3, side, side)
        views[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows = Rows((np.arange(b) + step * b) * 7 % N, np.zeros(b, np.int64))
    return Batch(step, rows, torch.arange(b) % 4, views, {})


@cache
def given(objective: str, num_images: int) -> dict[str, Any]:
    """What the Config of an objective must be given, besides its defaults: labels of the images, a teacher."""
    # One of each process: those of a fork server share what a module makes.
    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    if objective == "clusterfit":
        return {"labels": clusters(folder / f"{num_images}.parquet", np.arange(num_images) % 5)}
    if objective == "distill":
        return {"teacher": teacher(folder / "teacher")}
    return {}


def clusters(file: Path, clusters_n: Any, **metadata: str) -> str:
    """A table of cluster ids, the images in another order than their index; returns its place."""
    index = np.random.default_rng(0).permutation(len(clusters_n))
    table = pa.table({"index": index, "cluster": np.asarray(clusters_n)[index]})
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return str(file)


def teacher(
    folder: Path,
    method: str = "supervised",
    classes: int = 4,
    width: int = 192,
    step: int = 3,
    joins_crops: bool = False,
) -> str:
    """A run with one checkpoint, of random weights, whose classifier takes `width` features; returns its place."""
    with torch.random.fork_rng():
        torch.manual_seed(step)
        network = torch.nn.ModuleDict({"backbone": build(BackboneConfig())})
        heads: dict[str, torch.nn.Module] = {"classify": torch.nn.Linear(width, classes)}
        if joins_crops:
            heads["project"] = torch.nn.Sequential(torch.nn.Linear(192, width // 2))
        network["objective"] = torch.nn.ModuleDict(heads)
    run = Folder(str(folder))
    run.write_json("metadata.json", {"config": {"method": method, "backbone": {"name": "small"}}})
    saver = Saver(run / "checkpoints", SaveConfig(), rank=0, world=1)
    saver.save(step, {"network": network.state_dict()}, None)
    saver.wait()
    return str(run)
