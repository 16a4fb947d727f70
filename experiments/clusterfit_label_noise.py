"""ClusterFit under label noise: which student of a supervised teacher transfers best when its labels were wrong?

Command:  python experiments/clusterfit_label_noise.py --data DATA --out results/clusterfit-label-noise
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     about 30 minutes at the defaults on CIFAR-10, as planned; with --local, on drawn images, a few minutes.
Expect:   the teacher falls as noise grows; distillation lies above it and ClusterFit above both (figure of the
          ClusterFit paper, arXiv 1912.03330), if the method does at this size what it does at ImageNet's.

DATA has the splits "train" and "test", such as CIFAR-10 in Hugging Face's Parquet layout. Teachers and students see
the training images of the first half of the classes; the linear probe is trained and scored on the other half, so no
label that was corrupted, and none that was taught, is ever tested. Noise p replaces the label of an image, with chance
p, by one of the other classes, uniformly and once for each seed. All networks of one seed have the same budget.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from statistics import mean, pstdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from raysl import cluster, rng
from raysl.clusterfit import ClusterfitConfig, clusterfit
from raysl.config import Pretraining
from raysl.dataset import MANIFEST, SHARDS, DataSet, Manifest, Shard
from raysl.ingest import resolve
from raysl.optim import OptimConfig
from raysl.pretrain import pretrain
from raysl.probe import probe
from raysl.run import Run, jsonl
from raysl.storage import Folder

_SHARD, _GROUP = 8192, 512
ARMS = ("teacher", "distillation", "ClusterFit")


@dataclass(frozen=True)
class Flags:
    """Trains teachers, distilled students and ClusterFit students at each noise, and probes them all.

    Args:
        data: images with the splits "train" and "test"; drawn shapes by default.
        out: where rows and figure go, a path or a URI.
        runs: where the runs go, and are found again when the same command is given; by default a temporary folder.
        noises: shares of wrong labels.
        seeds: one teacher and two students each, at each noise.
        epochs: visits to every image, of each network.
        k: clusters.
        workers: Ray Train workers.
        local: a few thousand drawn images, two noises and one epoch, to see that it works.
    """

    data: str = "shapes:20000"
    out: str = "results/clusterfit-label-noise"
    runs: str = ""
    noises: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float = 4
    k: int = 500
    workers: int = 2
    local: bool = False


def main(flags: Flags) -> None:
    """Runs all arms, and writes one file of rows and a figure."""
    if flags.local:
        flags = replace(flags, data="shapes:3000", noises=(0.0, 0.5), seeds=(0,), epochs=1, k=50)
    cluster.start()
    runs = Folder(flags.runs or tempfile.mkdtemp(prefix="raysl-label-noise-"))
    test = "shapes:1000#test" if flags.data.startswith("shapes:") else f"{flags.data}#test"
    images, judged = resolve(f"{flags.data}#train"), resolve(test)
    half = len(images.manifest.classes) // 2
    taught, unseen = range(half), range(half, len(images.manifest.classes))
    probed = (derive(images, runs / "probe-train", unseen), derive(judged, runs / "probe-test", unseen))
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        for noise in flags.noises:
            place = runs / f"seed-{seed}-noise-{round(100 * noise)}"
            data = derive(images, place / "data", taught, noise, seed)
            for arm, run in zip(ARMS, networks(flags, place, data, seed), strict=True):
                found = probe(run, *probed, ("linear",), encoders=("trained",))
                rows += [
                    {**row, "arm": arm, "noise": noise, "seed": seed} for row in found if row["headline"]
                ]
                Folder(flags.out).write("rows.jsonl", jsonl(rows))
    figure(rows, flags.out)


def networks(flags: Flags, place: Folder, data: str, seed: int) -> tuple[Run, Run, Run]:
    """The teacher and its two students."""
    common = Pretraining(
        data=data,
        run=str(place / "teacher"),
        method="supervised",
        epochs=flags.epochs,
        workers=flags.workers,
        seed=seed,
        optim=OptimConfig(lr=0.12),
    )
    teacher = pretrain(common)
    to_teacher = {"distill": {"teacher": str(teacher.folder)}}
    distilled = pretrain(
        replace(common, run=str(place / "distilled"), method="distill", parts=to_teacher, seed=seed + 1000)
    )
    fresh = replace(common, run=str(place / "clusterfit"), method="clusterfit", parts={}, seed=seed + 1000)
    student = clusterfit(ClusterfitConfig(teacher=str(teacher.folder), k=flags.k), fresh)
    return teacher, distilled, student


def derive(dataset: DataSet, folder: Folder, classes: range, noise: float = 0.0, seed: int = 0) -> str:
    """A data set of the images of some classes, with a share of their labels replaced; its folder.

    The whole set passes through memory.
    """
    if DataSet.is_one(str(folder)):
        return str(folder)
    table = dataset.read(np.arange(dataset.num_images, dtype=np.int64))
    table = table.filter(np.isin(table.column("label").to_numpy(), np.array(classes)))
    labels_n = table.column("label").to_numpy() - classes.start
    generator = rng.generator(seed, "label noise")
    wrong_n = generator.random(len(labels_n)) < noise
    others_n = (labels_n + generator.integers(1, len(classes), len(labels_n))) % len(classes)
    columns = {
        "index": pa.array(np.arange(len(labels_n), dtype=np.int64)),
        "image": table.column("image"),
        "label": pa.array(np.where(wrong_n, others_n, labels_n)),
    }
    derived, shards = pa.table(columns), []
    for number, start in enumerate(range(0, len(labels_n), _SHARD)):
        part = derived.slice(start, _SHARD)
        name = f"{number:05d}.parquet"
        with (folder / SHARDS).writing(name) as stream:
            pq.write_table(part, stream, row_group_size=_GROUP)
            num_bytes = stream.tell()
        groups = tuple(min(_GROUP, len(part) - first) for first in range(0, len(part), _GROUP))
        shards.append(Shard(name, groups, num_bytes))
    made_of = json.dumps([dataset.manifest.fingerprint, list(classes), noise, seed])
    manifest = Manifest(
        source=f"{dataset.manifest.source}, classes {classes.start} to {classes.stop - 1}, noise {noise}",
        shards=tuple(shards),
        classes=tuple(dataset.manifest.classes[i] for i in classes),
        fingerprint=hashlib.blake2b(made_of.encode(), digest_size=32).hexdigest(),
        num_bad=0,
    )
    folder.write_json(MANIFEST, manifest.to_json())
    return str(folder)


def figure(rows: list[dict[str, Any]], out: str) -> None:
    """Prints the mean and the spread over seeds of each arm at each noise, and draws them where matplotlib is there."""
    noises = sorted({row["noise"] for row in rows})
    values = {
        arm: [[row["value"] for row in rows if (row["arm"], row["noise"]) == (arm, n)] for n in noises]
        for arm in ARMS
    }
    for arm, found in values.items():
        cells = "  ".join(
            f"{100 * n:.0f} %: {mean(v):.4f} ± {pstdev(v):.4f}" for n, v in zip(noises, found, strict=True)
        )
        print(f"{arm:<13} {cells}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("Without matplotlib there is no figure.")
        return
    picture = Figure(figsize=(5, 4), layout="constrained")
    axes = picture.add_subplot()
    for arm, found in values.items():
        axes.errorbar(
            [100 * n for n in noises],
            [mean(v) for v in found],
            [pstdev(v) for v in found],
            marker="o",
            capsize=3,
            label=arm,
        )
    axes.set(xlabel="wrong labels of the teacher, %", ylabel="linear probe on other classes, top-1")
    axes.legend()
    with Folder(out).writing("label-noise.png") as stream:
        picture.savefig(stream, format="png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Flags))
