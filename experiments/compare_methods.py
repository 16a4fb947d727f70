"""Every method on the same images: the same trunk, schedule and number of images seen, probed beside an untrained one.

Command:  python experiments/compare_methods.py --data DATA --out results/methods/cifar10 --runs RUNS
Hardware: 2 CPU cores, 24 GB, no GPU; 2 Ray Train workers.
Time:     2 to 4 minutes a run; 14 methods and 2 seeds take an hour or more. With --local: one method, one minute.
Expect:   contrast against the memory bank ahead of prediction at the last layer; see results/methods.

What is in RUNS is not done again, so the same command goes on, and with more --seeds or --methods it adds to the
comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from raysl.config import Pretraining, ViewConfig
from raysl.experiment import Flags, command, probed
from raysl.ingest import resolve, splits
from raysl.network.trunk import TrunkConfig
from raysl.objectives.moco import Config as Moco
from raysl.objectives.npid import Config as Npid
from raysl.objectives.pirl import Config as Pirl
from raysl.objectives.simclr import Config as Simclr
from raysl.optim import OptimConfig
from raysl.run import jsonl
from raysl.storage import Folder

# The dials in which a small trunk and a short run want something else than the papers' defaults.
PIRL = {"pirl": Pirl(temperature=0.2, head="bn")}
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
    "npid": {"parts": NPID},
    "pirl-rotation": {"parts": PIRL},
    "pirl-jigsaw": {"parts": PIRL},
    "pirl-rotation+jigsaw": {"parts": PIRL},
    "simclr": {"parts": {"simclr": Simclr(temperature=0.2, norm="batch")}},
    # A queue much longer than the data set would hold several keys of most images.
    "moco": {"parts": {"moco": Moco(momentum=0.99, queue=2048)}},
    "cpc-patch_grid": {"trunk": TrunkConfig(norm="group")},
}


@dataclass(frozen=True)
class CompareFlags(Flags):
    """Pretrains and probes every method for each seed.

    Args:
        methods: which of them; all by default.
        images: seen by every run, patches of one counted once.
        batch_size: images in a step, of all workers.
        image_size: side of an ordinary view in pixels.
    """

    data: str = "shapes:50000"
    out: str = "results/methods"
    runs: str = "runs/methods"
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))
    images: int = 51_200
    batch_size: int = 128
    image_size: int = 32


def main(flags: CompareFlags) -> None:
    """Runs what is missing; rows and table are written after every run."""
    if flags.local:
        flags = replace(flags, data="shapes:2000", methods=("predict-rotation",), seeds=(0,), images=4000)
    train, test = splits(flags.data)
    runs = Folder(flags.runs)
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        for method in flags.methods:
            config = settings(flags, method, seed, train, runs)
            found = probed(config, train, test, encoders=("trained", "random"), cache=runs / "features")
            rows += [{**row, "method": method, "images": flags.images} for row in found]
            Folder(flags.out).write("rows.jsonl", jsonl(rows))
            Folder(flags.out).write("table.md", table(rows).encode())
    print(table(rows))


def settings(flags: CompareFlags, method: str, seed: int, train: str, runs: Folder) -> Pretraining:
    """The run of a method. Distillation learns from the supervised run of the same seed."""
    own = dict(METHODS.get(method, {}))
    if method == "distill":
        own["parts"] = {"distill": {"teacher": str(runs / f"supervised-{seed}")}}
    return Pretraining(
        data=train,
        run=str(runs / f"{method}-{seed}"),
        method=method,
        epochs=flags.images / resolve(train).num_images,
        batch_size=flags.batch_size,
        workers=flags.workers,
        seed=seed,
        view=ViewConfig(image_size=flags.image_size),
        optim=OptimConfig(lr=0.12, warmup=0.05),
        **own,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method, percent, the mean over seeds and in brackets each of them."""
    lines = ["| method | kNN | untrained | linear | untrained |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            _cell([row for row in rows if row["method"] == method], probe, encoder)
            for probe in ("knn", "linear")
            for encoder in ("trained", "random")
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[Mapping[str, Any]] | list[dict[str, Any]], probe: str, encoder: str) -> str:
    values = [
        100 * row["value"]
        for row in rows
        if row["headline"] and row["probe"] == probe and row["encoder"] == encoder
    ]
    return f"{mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})" if values else ""


if __name__ == "__main__":
    command(main, CompareFlags)
