"""Flags, runs for each seed, and rows that the scripts in `experiments/` share.

They are part of the library because `ray submit` copies a single script to the cluster.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import tyro
from rich.console import Console

from raysl import console
from raysl.config import Pretraining
from raysl.dataset import DataSet
from raysl.errors import UserError, exit_on_errors
from raysl.evaluation.evaluate import probe
from raysl.evaluation.results import rows_of_probe, tables
from raysl.ingestion import open_or_ingest, splits
from raysl.ingestion.subset import drawn as drawn_indices
from raysl.ingestion.subset import part, subset
from raysl.reporting import ReportConfig, check_installed, report
from raysl.run import Run, jsonl
from raysl.storage import Folder
from raysl.training.launch import pretrain
from raysl.tuning.config import SweepConfig
from raysl.tuning.results import SweepResults, render
from raysl.tuning.sweep import sweep

_log = logging.getLogger("raysl.experiment")
# Largest number of images that the trials of a sweep are compared on.
_VALIDATION = 5000


@dataclass(frozen=True)
class Flags:
    """The flags of every experiment.

    Args:
        data: labeled images, with splits "train" and "test" if there are any; generated shapes by default.
        out: folder of rows and figures, a path or a URI.
        runs: folder of the runs, a path or a URI that all machines see; finished runs are not repeated.
        seeds: the experiment is repeated for each seed.
        workers: Ray Train workers of a run; 0 trains in this process, without Ray Train, as `raysl pretrain --local`
            does (for `raysl pretrain`, 0 lets raysl choose the number). A trial of a sweep then has one worker.
        local: not the --local of `raysl pretrain`: make everything so small that it takes minutes on two cores, with
            one seed unless seeds are given, and train in this process instead of on Ray Train. Runs and results go to
            a temporary folder unless folders are given.
    """

    data: str = "shapes:20000"
    out: str = "results"
    runs: str = "runs"
    seeds: tuple[int, ...] = (0, 1)
    workers: int = 2
    local: bool = False

    @property
    def in_process(self) -> bool:
        """Whether runs train in this process, without Ray Train."""
        return self.local or self.workers == 0

    @property
    def run_workers(self) -> int:
        """Number of workers of a run."""
        return 1 if self.in_process else self.workers


F = TypeVar("F", bound=Flags)


def command(experiment: Callable[[F], None], flags: type[F]) -> None:
    """Read the command line and run the experiment. Exit as the `raysl` command does."""
    console.add_handler()
    with exit_on_errors("experiment"):
        given, usual = tyro.cli(flags), flags()
        with _scratch() if given.local else nullcontext() as folder:
            if folder:
                runs = f"{folder}/runs" if given.runs == usual.runs else given.runs
                given = replace(
                    given, runs=runs, out=f"{folder}/out" if given.out == usual.out else given.out
                )
            experiment(given)


@contextmanager
def _scratch() -> Iterator[str]:
    """Make a temporary folder, say where it is if results are in it at the end, and remove it otherwise."""
    folder = tempfile.mkdtemp(prefix="raysl-local-")
    try:
        yield folder
    finally:
        try:
            os.rmdir(folder)
        except OSError:
            _log.info(
                "Runs and results are in %s, which the system may delete. To go on with the runs, add --runs %s.",
                *(folder, f"{folder}/runs"),
            )


def locally(flags: F, **small: Any) -> F:
    """Return the flags for `--local`: the first seed, and these values, for flags that were not given."""
    if not flags.local:
        return flags
    usual = type(flags)()
    small = {"seeds": usual.seeds[:1], **small}
    left = {name: new for name, new in small.items() if getattr(flags, name) == getattr(usual, name)}
    return replace(flags, **left)


def pretrained(config: Pretraining, flags: Flags) -> Run:
    """Pretrain a run; with `--local` or no workers, in this process."""
    return pretrain(config, local=flags.in_process or None)


def pretrain_seeds(base: Pretraining, flags: Flags) -> list[dict[str, Any]]:
    """Train `base` for each seed, probe the runs, print their tables, write rows.jsonl and return all rows.

    Args:
        base: configuration of the run; data, seed, folder and workers are replaced by the flags'.
    """
    train, test = splits(flags.data)
    rows: list[dict[str, Any]] = []
    for seed in flags.seeds:
        run = str(Folder(flags.runs) / f"{base.method}-{seed}")
        config = replace(base, data=train, run=run, seed=seed, workers=flags.run_workers)
        rows += probed(config, train, test, flags)
        Folder(flags.out).write("rows.jsonl", jsonl(rows))
    for found in tables(rows):
        Console().print(found)
    return rows


def probed(config: Pretraining, train: str, test: str, flags: Flags) -> list[dict[str, Any]]:
    """Train and probe a run as far as that is not done, and return its rows.

    Raises:
        UserError: the folder holds another run; or as `pretrain` and `probe`.
    """
    print(f"{config.method}, seed {config.seed}: {config.run}", flush=True)
    run = pretrained(config, flags)
    # Scored on its own training images, a classifier would only show how well it memorizes.
    names = ("knn",) if train == test else ("knn", "linear")
    seen, judged = (open_or_ingest(split).manifest.fingerprint for split in (train, test))
    there = [rows_of_probe(run, name, seen, judged, step=run.newest().step) for name in names]
    return [row for rows in there for row in rows] if all(there) else probe(run, train, test, probes=names)


def drawn(flags: Flags, num_images: int) -> DataSet:
    """Return a sample of the train split, drawn once and stored among the runs; all images if there are no more."""
    images = open_or_ingest(splits(flags.data)[0])
    if num_images >= images.num_images:
        return images
    return subset(images, num_images, Folder(flags.runs) / f"images-{num_images}")


def held_out(flags: Flags, images: DataSet) -> str:
    """Return images of the train split that `drawn` did not draw, at most 5,000, stored among the runs.

    Returns "" if all were drawn; a sweep then holds out a tenth of what its probes learn from.
    """
    everything = open_or_ingest(splits(flags.data)[0])
    if images.num_images == everything.num_images:
        return ""
    total = everything.num_images
    rest_n = np.setdiff1d(np.arange(total), drawn_indices(total, images.num_images))
    chosen_k = rest_n[drawn_indices(len(rest_n), min(len(rest_n), _VALIDATION))]
    return str(part(everything, chosen_k, Folder(flags.runs) / f"validation-{images.num_images}").folder)


def sweep_and_report(base: Pretraining, config: SweepConfig, flags: Flags) -> None:
    """Run or complete a sweep, score the chosen trial once on the test split, print the table, and write the report.

    Raises:
        UserError: as `sweep`; or trials have failed (after all others are done and reported).
    """
    check_installed()  # before the sweep, which takes long
    train, test = splits(flags.data)
    rows = sweep(base, replace(config, test="" if test == train else test))
    Console().print(render(SweepResults.open(config.out)))
    Folder(flags.out).write("rows.jsonl", jsonl(rows))
    print(f"{report(config.out, ReportConfig(out=flags.out))}/index.html")
    failed = [str(row["trial"]) for row in rows if row["state"] == "failed"]
    if failed:
        raise UserError(
            f"Trials {', '.join(failed)} failed; the report names the reasons. The results of the others are kept. "
            "Repeat the command with --retry to try these again."
        )
