"""Compare ClusterFit students with their self-supervised teachers, and with teachers trained twice as long.

Command:  python experiments/clusterfit_jigsaw.py --data DATA --out results/clusterfit-jigsaw
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     planned: an hour for each seed on CIFAR-10; with --local, a few minutes on drawn images.
Expect:   students above both teachers on most data sets (published with ResNet-50 on ImageNet: RotNet 48.2 to 53.6 %
          top-1 of a linear probe), and a broad best K.

All networks of a seed have the same backbone and the same images. The control trains the teacher's method for twice as
many epochs, as many as teacher and student have together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raysl.clustering.cluster_and_fit import ClusterfitConfig, clusterfit
from raysl.config import Pretraining
from raysl.evaluation.evaluate import probe
from raysl.experiment.script import Flags, command, locally, pretrained
from raysl.ingestion import splits
from raysl.optim import OptimConfig
from raysl.run import Run, jsonl
from raysl.storage import Folder


@dataclass(frozen=True)
class StudentFlags(Flags):
    """Train teachers, controls and students, and probe them on every data set.

    Args:
        probes: more data sets to probe on, with the splits "train" and "test".
        methods: methods of the teachers.
        ks: numbers of clusters.
        epochs: epochs of teachers and of students.
    """

    out: str = "results/clusterfit-jigsaw"
    runs: str = "runs/clusterfit-jigsaw"
    probes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("predict-jigsaw", "predict-rotation")
    ks: tuple[int, ...] = (100, 300, 1000)
    epochs: float = 4


def main(flags: StudentFlags) -> None:
    """Run everything, print a table and write one file of rows."""
    flags = locally(flags, data="shapes:3000", methods=("predict-rotation",), ks=(50,), epochs=1)
    runs = Folder(flags.runs)
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        for method in flags.methods:
            for arm, run in networks(flags, runs / f"{method}-{seed}", method, seed).items():
                for data in (flags.data, *flags.probes):
                    found = probe(run, *splits(data), encoders=("trained",))
                    common = {
                        "arm": arm,
                        "teacher": method,
                        "seed": seed,
                        "data": data.rstrip("/").split("/")[-1],
                    }
                    rows += [{**row, **common} for row in found if row["primary"]]
                    Folder(flags.out).write("rows.jsonl", jsonl(rows))
    for row in rows:
        print(
            f"{row['teacher']:<17} {row['arm']:<18} seed {row['seed']} {row['data']:<16} {row['probe']:<7} "
            f"{row['value']:.4f}"
        )


def networks(flags: StudentFlags, place: Folder, method: str, seed: int) -> dict[str, Run]:
    """Train the teacher, the control, and a student for each K."""
    common = Pretraining(
        data=splits(flags.data)[0],
        run=str(place / "teacher"),
        method=method,
        epochs=flags.epochs,
        workers=flags.run_workers,
        seed=seed,
        optim=OptimConfig(lr=0.12),
    )
    made = {"teacher": pretrained(common, flags)}
    made["twice as long"] = pretrained(
        replace(common, run=str(place / "twice"), epochs=2 * flags.epochs), flags
    )
    for k in flags.ks:
        student = replace(common, run=str(place / f"k{k}"), method="clusterfit", parts={}, seed=seed + 1000)
        made[f"ClusterFit K={k}"] = clusterfit(
            ClusterfitConfig(teacher=str(made["teacher"].folder), k=k), student, local=flags.in_process
        )
    return made


if __name__ == "__main__":
    command(main, StudentFlags)
