"""Compare how students of supervised teachers transfer when some labels of the teachers were wrong.

Command:  python experiments/clusterfit_label_noise.py --data DATA --out results/clusterfit-label-noise
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: 30 minutes on CIFAR-10; with --local, a few minutes on drawn images.
Expect:   with 75 % wrong labels, ClusterFit loses less than its teacher, as in the ClusterFit paper (arXiv 1912.03330);
          with right labels it is level or behind, unlike in the paper. See results/lectures and results/clusterfit.

Teachers and students see the training images of the first half of the classes. The linear probe learns from and is
scored on the other half, so it tests no class that a network was taught. With probability p, label noise p replaces the
label of an image by one of the other classes, uniformly, once for each seed. All networks of a seed have the same
budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import mean, pstdev
from typing import Any

import numpy as np

from raysl import rng
from raysl.clustering.cluster_and_fit import ClusterfitConfig, clusterfit
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.evaluation.evaluate import probe
from raysl.experiment.script import Flags, command, locally, pretrained
from raysl.ingestion import open_or_ingest, splits
from raysl.ingestion.subset import relabeled
from raysl.optim import OptimConfig
from raysl.run import Run, jsonl
from raysl.storage import Folder

ARMS = ("teacher", "distillation", "ClusterFit")


@dataclass(frozen=True)
class NoiseFlags(Flags):
    """Train teachers, distilled students and ClusterFit students at each noise level, and probe them.

    Args:
        noises: shares of wrong labels.
        epochs: epochs of each network.
        k: number of clusters.
    """

    out: str = "results/clusterfit-label-noise"
    runs: str = "runs/clusterfit-label-noise"
    seeds: tuple[int, ...] = (0, 1, 2)
    noises: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    epochs: float = 4
    k: int = 500


def main(flags: NoiseFlags) -> None:
    """Run all arms, and write one file of rows and a figure."""
    flags = locally(flags, data="shapes:3000", noises=(0.0, 0.5), epochs=1, k=50)
    runs = Folder(flags.runs)
    images, judged = (open_or_ingest(part) for part in splits(flags.data))
    half = len(images.manifest.classes) // 2
    taught, unseen = range(half), range(half, len(images.manifest.classes))
    probed = (derive(images, runs / "probe-train", unseen), derive(judged, runs / "probe-test", unseen))
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        for noise in flags.noises:
            place = runs / f"seed-{seed}-noise-{round(100 * noise)}"
            data = derive(images, place / "data", taught, noise, seed)
            for arm, run in zip(ARMS, networks(flags, place, data, seed), strict=True):
                found = probe(run, *probed, probes=("linear",), encoders=("trained",))
                rows += [{**row, "arm": arm, "noise": noise, "seed": seed} for row in found if row["primary"]]
                Folder(flags.out).write("rows.jsonl", jsonl(rows))
    figure(rows, flags.out)


def networks(flags: NoiseFlags, place: Folder, data: str, seed: int) -> tuple[Run, Run, Run]:
    """Train the teacher and its two students."""
    common = Pretraining(
        data=data,
        run=str(place / "teacher"),
        method="supervised",
        epochs=flags.epochs,
        workers=flags.run_workers,
        seed=seed,
        optim=OptimConfig(lr=0.12),
    )
    teacher = pretrained(common, flags)
    to_teacher = {"distill": {"teacher": str(teacher.folder)}}
    distilled = pretrained(
        replace(common, run=str(place / "distilled"), method="distill", parts=to_teacher, seed=seed + 1000),
        flags,
    )
    fresh = replace(common, run=str(place / "clusterfit"), method="clusterfit", parts={}, seed=seed + 1000)
    student = clusterfit(
        ClusterfitConfig(teacher=str(teacher.folder), k=flags.k), fresh, local=flags.in_process
    )
    return teacher, distilled, student


def derive(dataset: DataSet, folder: Folder, classes: range, noise: float = 0.0, seed: int = 0) -> str:
    """Make a data set of the images of some classes with a share of their labels replaced; return its folder."""
    labels_n = dataset.labels()
    chosen_k = np.flatnonzero(np.isin(labels_n, np.array(classes)))
    labels_k = labels_n[chosen_k] - classes.start
    generator = rng.generator(seed, "label noise")
    wrong_k = generator.random(len(labels_k)) < noise
    others_k = (labels_k + generator.integers(1, len(classes), len(labels_k))) % len(classes)
    names = [dataset.manifest.classes[i] for i in classes]
    source = f"{dataset.manifest.source}, classes {classes.start} to {classes.stop - 1}, noise {noise}"
    made = relabeled(dataset, chosen_k, np.where(wrong_k, others_k, labels_k), names, folder, source)
    return str(made.folder)


def figure(rows: list[dict[str, Any]], out: str) -> None:
    """Print mean and standard deviation of each arm at each noise, and draw them if matplotlib is installed."""
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
        print("The figure needs matplotlib: install raysl[report].")
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
    command(main, NoiseFlags)
