"""Search the recipe of PIRL for small images at equal CPU time, and compare it with other methods.

Command:  python experiments/small_recipe.py --data DATA --out OUT --runs RUNS --cpu-minutes 10
Hardware: 1 CPU core, no GPU; every run trains in this process, without Ray.
Time:     the number of runs times --cpu-minutes, and a fifth more for probes. With --local: 10 minutes.
Expect:   OUT/STAGE.jsonl and OUT/STAGE-cpu-knn.png, CPU time against kNN; see results/recipes.

`--stage search` compares variants of PIRL on a part of the train split, judged on other images of the train split.
`--stage compare` trains the methods on the whole train split, judged on the test split. Finished runs are not repeated.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from raysl import checkpoint, rng
from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, defaults
from raysl.dataset import DataSet
from raysl.evaluation.evaluate import probe
from raysl.experiment.script import Flags, command, locally
from raysl.ingestion import open_or_ingest, splits
from raysl.ingestion.subset import relabeled
from raysl.optim import OptimConfig
from raysl.run import jsonl
from raysl.storage import Folder
from raysl.training.launch import pretrain

Fields = Mapping[str, Any]
PIRL: Fields = {"pirl": {"temperature": 0.2, "head": "bn", "num_negatives": 1024}}
GRID2: Fields = {**PIRL, "jigsaw": {"grid": 2}}
CHOSEN: Fields = {**GRID2, "bank": {"momentum": 0.0}}


def _pirl(**fields: Any) -> Fields:
    """Return the chosen recipe with other values of the objective."""
    return {**CHOSEN, "pirl": {**CHOSEN["pirl"], **fields}}


def _optimizer(name: str, lr: float) -> Fields:
    """Return the chosen recipe with another optimizer."""
    return {**CHOSEN, "optim": {"name": name, "lr": lr}}


# One factor at a time; from the third on, changes of the chosen recipe.
VARIANTS: dict[str, Fields] = {
    "grid 3, bank momentum 0.5": PIRL,
    "grid 2, bank momentum 0.5": GRID2,
    "grid 2, bank momentum 0": CHOSEN,
    **{f"batch {size}": {**CHOSEN, "batch_size": size} for size in (64, 256)},
    "colors mocov2": {**CHOSEN, "view": {"recipe": "mocov2"}},
    "crops of 40 % or more": {**CHOSEN, "view": {"min_scale": 0.4}},
    "temperature 0.1": _pirl(temperature=0.1),
    "lambda 0.25": _pirl(lam=0.25),
    "head mlp": _pirl(head="mlp"),
    "learning rate 0.3": {**CHOSEN, "optim": {"lr": 0.3}},
    "joint BatchNorm": {**CHOSEN, "backbone": {"norm": "joint"}},
    **{f"AdamW, learning rate {lr}": _optimizer("adamw", lr) for lr in (0.001, 0.003, 0.01)},
    **{f"LARS, learning rate {lr}": _optimizer("lars", lr) for lr in (1.0, 3.0, 10.0)},
}
# The best of sixteen trials of `sweep_pirl.py --figure recipe`; see results/recipes.
SWEPT: Fields = {
    "pirl": {"temperature": 0.09, "head": "bn", "num_negatives": 286, "lam": 0.24},
    "jigsaw": {"grid": 2},
    "bank": {"momentum": 0.5},
    "view": {"min_scale": 0.21},
    "optim": {"lr": 0.06, "warmup": 0.2},
}
METHODS: dict[str, Fields] = {
    "pirl-jigsaw": CHOSEN,
    "pirl-jigsaw, swept": SWEPT,
    "pirl-jigsaw, as before": PIRL,
    "simclr": {"method": "simclr", "simclr": {"temperature": 0.2, "norm": "batch"}},
    "moco": {"method": "moco", "moco": {"momentum": 0.99, "queue": 2048}},
    "npid": {"method": "npid", "npid": {"temperature": 0.2, "head": "bn", "num_negatives": 1024}},
    "byol": {"method": "byol"},
    "vicreg": {"method": "vicreg"},
}


@dataclass(frozen=True)
class RecipeFlags(Flags):
    """Train each variant or method for the same CPU time, and probe it on the way.

    Args:
        stage: "search" or "compare".
        cpu_minutes: CPU time of the training of each run.
        names: names of the variants or methods; empty for all.
        shares: shares of the run after which it is probed.
        images: images of the train split that the search learns from; 3,000 others judge it.
    """

    data: str = "shapes:20000"
    out: str = "results/recipes"
    runs: str = "runs/recipes"
    workers: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    stage: Literal["search", "compare"] = "compare"
    cpu_minutes: float = 10
    names: tuple[str, ...] = ()
    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 1)
    images: int = 5000


def main(flags: RecipeFlags) -> None:
    """Run everything; write rows and the picture after every run."""
    flags = locally(flags, data="shapes:8000", cpu_minutes=0.5, shares=(1,))
    known = VARIANTS if flags.stage == "search" else METHODS
    train, judge = _split(flags)
    rows: list[dict[str, Any]] = []
    for name in flags.names or known:
        for seed in flags.seeds:
            rows += _measured(flags, name, known[name], seed, train, judge)
            Folder(flags.out).write(f"{flags.stage}.jsonl", jsonl(rows))
    Folder(flags.out).write(f"{flags.stage}-cpu-knn.png", figure(rows))


def _split(flags: RecipeFlags) -> tuple[DataSet, DataSet]:
    """Return the images to learn from, and those to judge on: of the test split, or in a search of the train split."""
    train, test = (open_or_ingest(split) for split in splits(flags.data))
    if flags.stage == "compare":
        return train, test
    order_n = rng.generator("recipe search").permutation(train.num_images)
    parts = {"judge": order_n[:3000], "train": order_n[3000 : 3000 + flags.images]}
    made = {}
    for name, chosen_k in parts.items():
        chosen_k = np.sort(chosen_k)
        labels_k, folder = train.labels()[chosen_k], Folder(flags.runs) / f"data-{name}"
        made[name] = relabeled(
            train, chosen_k, labels_k, train.manifest.classes, folder, f"{name} of the search"
        )
    return made["train"], made["judge"]


def _measured(
    flags: RecipeFlags, name: str, fields: Fields, seed: int, train: DataSet, judge: DataSet
) -> list[dict[str, Any]]:
    """Train one run for the CPU time of the flags, and return a row for each share."""
    base = Pretraining(
        str(train.folder), "-", batch_size=128, workers=1, seed=seed, optim=OptimConfig(lr=0.12, warmup=0.05)
    )
    config = defaults.replaced(base, fields)
    place = Folder(flags.runs) / flags.stage / name.replace(" ", "_").replace(",", "")
    step_s = _step_s(config, place, train)
    steps = max(1, round(60 * flags.cpu_minutes / step_s))
    kept = tuple(sorted({max(1, round(share * steps)) for share in flags.shares}))
    config = replace(_steps(config, steps, f"{place}-{seed}", train), save=SaveConfig(keep_steps=kept))
    rows = []
    for step in kept:
        run = pretrain(config, until=step, local=True)
        at = next(one for one in checkpoint.complete(run.checkpoints) if one.step == step)
        for row in probe(run, train, judge, probes=("knn", "collapse"), encoders=("trained",), checkpoint=at):
            facts = {
                "label": name,
                "method": config.method,
                "images": step * config.batch_size,
                "cpu_s": step * step_s,
            }
            rows.append({**row, **facts})
    return rows


def _steps(config: Pretraining, steps: int, run: str, train: DataSet) -> Pretraining:
    return replace(config, run=run, epochs=steps * config.batch_size / train.num_images)


def _step_s(config: Pretraining, place: Folder, train: DataSet) -> float:
    """Return the CPU seconds of a step in this process and its data processes, measured once for a name.

    Two short runs differ by 40 steps, and by nothing of the start.
    """
    if not place.exists("step_s.json"):
        spent = []
        for steps in (5, 45):
            before = _cpu_s()
            pretrain(_steps(config, steps, str(place / f"{steps}-steps"), train), local=True)
            spent.append(_cpu_s() - before)
        place.write_json("step_s.json", (spent[1] - spent[0]) / 40)
    return float(place.read_json("step_s.json"))


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of kNN against CPU time: a line for each name, the mean over seeds, and a dot for each seed."""
    from raysl.reporting.figure import plot_png

    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["probe"] == "knn" and row["primary"]:
            curves.setdefault(row["label"], {}).setdefault(row["step"], []).append(
                (row["cpu_s"], row["value"])
            )

    def draw(axes: Any) -> None:
        for label, by_step in curves.items():
            if set(by_step) == {0}:  # a baseline
                height = float(np.mean([y for _, y in by_step[0]]))
                axes.axhline(
                    100 * height, linestyle=":" if label == "raw pixels" else "--", color="gray", label=label
                )
                continue
            points = [np.mean(found, axis=0) for _, found in sorted(by_step.items())]
            (line,) = axes.plot([x / 60 for x, _ in points], [100 * y for _, y in points], "-", label=label)
            dots = [point for found in by_step.values() for point in found]
            axes.plot(
                [x / 60 for x, _ in dots], [100 * y for _, y in dots], ".", color=line.get_color(), alpha=0.4
            )
        axes.set_xlabel("CPU minutes of training")
        axes.set_ylabel("kNN top-1, %")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

    return plot_png(draw, width=8)


if __name__ == "__main__":
    command(main, RecipeFlags)
