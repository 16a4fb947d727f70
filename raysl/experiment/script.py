"""What the scripts in `experiments/` have in common: their flags, their runs for each seed, their rows, and a mistake
answered with a paragraph. A script is left with what it tries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import tyro
from rich.console import Console

from raysl import ray_cluster
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError, answered
from raysl.evaluation.evaluate import probe
from raysl.evaluation.results import rows_under, tables
from raysl.ingestion import resolve, splits
from raysl.ingestion.subset import subset
from raysl.reporting import ReportConfig, check_installed, report
from raysl.run import jsonl
from raysl.storage import Folder
from raysl.training.launch import pretrain
from raysl.tuning import table
from raysl.tuning.config import SweepConfig
from raysl.tuning.driver import sweep


@dataclass(frozen=True)
class Flags:
    """The flags of every experiment.

    Args:
        data: labelled images, with the splits "train" and "test" where there are splits; drawn shapes by default.
        out: where rows and figures go, a path or a URI.
        runs: where the runs are kept, a path or a URI that all machines see; what is there is not done again.
        seeds: everything once for each.
        workers: Ray Train workers of a run.
        local: so little of everything that it takes about two minutes on two cores, to see that it works. Runs and
            results go to a temporary folder, unless a place is given.
    """

    data: str = "shapes:20000"
    out: str = "results"
    runs: str = "runs"
    seeds: tuple[int, ...] = (0, 1)
    workers: int = 2
    local: bool = False


F = TypeVar("F", bound=Flags)


def command(experiment: Callable[[F], None], flags: type[F]) -> None:
    """Reads the command line and runs the experiment on the Ray that is there. Exits as the `raysl` command does."""
    with answered("experiment"):
        given, usual = tyro.cli(flags), flags()
        if given.local:
            scratch = tempfile.mkdtemp(prefix="raysl-local-")
            given = replace(
                given,
                runs=f"{scratch}/runs" if given.runs == usual.runs else given.runs,
                out=f"{scratch}/out" if given.out == usual.out else given.out,
            )
        ray_cluster.start()
        experiment(given)


def locally(flags: F, **small: Any) -> F:
    """With `--local`: one seed, and these values in the place of those that nobody has asked for."""
    if not flags.local:
        return flags
    usual = type(flags)()
    small = {name: value for name, value in small.items() if getattr(flags, name) == getattr(usual, name)}
    return replace(flags, seeds=flags.seeds[:1], **small)


def pretrain_seeds(base: Pretraining, flags: Flags) -> list[dict[str, Any]]:
    """Runs `base` once for each seed, probes every run, prints their tables and writes one file of rows.

    Args:
        base: the run, but for data, seed, folder and workers, which follow from the flags.

    Returns:
        The rows of all probes.
    """
    train, test = splits(flags.data)
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        run = str(Folder(flags.runs) / f"{base.method}-{seed}")
        config = replace(base, data=train, run=run, seed=seed, workers=flags.workers)
        rows += probed(config, train, test)
        Folder(flags.out).write("rows.jsonl", jsonl(rows))
    for found in tables(rows):
        Console().print(found)
    return rows


def probed(config: Pretraining, train: str, test: str) -> list[dict[str, Any]]:
    """The rows of a run, which is trained and probed where that has not been done. See `raysl.evaluation.evaluate.probe`.

    Raises:
        UserError: another run lies in the folder; or as `pretrain` and `probe`.
    """
    print(f"{config.method}, seed {config.seed}: {config.run}", flush=True)
    run = pretrain(config)
    # A classifier that is scored on the images it has learned from would show how well it remembers.
    names = ("knn",) if train == test else ("knn", "linear")
    seen, judged = (resolve(split).manifest.fingerprint for split in (train, test))
    there = [rows_under(run, name, seen, judged, step=run.newest().step) for name in names]
    return [row for rows in there for row in rows] if all(there) else probe(run, train, test, probes=names)


def drawn(flags: Flags, num_images: int) -> DataSet:
    """So many images of the train split, drawn once and kept among the runs; all, if there are no more."""
    images = resolve(splits(flags.data)[0])
    if num_images >= images.num_images:
        return images
    return subset(images, num_images, Folder(flags.runs) / f"images-{num_images}")


def judged_on(flags: Flags, images: DataSet) -> str:
    """The test split; where there is none the images that are learned from, of which kNN leaves each out of its own
    vote."""
    train, test = splits(flags.data)
    return str(images.folder) if train == test else test


def sweep_and_report(base: Pretraining, config: SweepConfig, flags: Flags) -> None:
    """Runs what is missing of a sweep, prints its table, and writes rows and report.

    Raises:
        UserError: as `sweep`; or trials have failed, when all others are done and reported.
    """
    check_installed()  # and not when the sweep has been paid for
    rows = sweep(base, config)
    Console().print(table.render(rows, config.probe, base.epochs))
    Folder(flags.out).write("rows.jsonl", jsonl(rows))
    print(f"{report(config.out, ReportConfig(out=flags.out))}/index.html")
    failed = [str(row["trial"]) for row in rows if row["state"] == "failed"]
    if failed:
        raise UserError(
            f"Trials {', '.join(failed)} failed, for the reasons in the report. What others found is kept; the same "
            "command with --retry tries these again."
        )
