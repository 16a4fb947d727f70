"""Refuse a folder for a run or a sweep that holds something else."""

from __future__ import annotations

import re

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.storage import Folder
from raysl.storage.lock import is_lock

METADATA = "metadata.json"
# The metadata file of raysl 0.1.
OLD_METADATA = "passport.json"
# What a folder may hold before the metadata: what raysl itself writes there (also a copied checkpoint of a sweep, the
# rounds of a clusterfit, and what a killed process leaves), hidden files, and what people, shells and other loggers put
# beside a run: texts, scripts, the picture of its views. Photographs, tables and other folders are none of these.
_MAY_HOLD = re.compile(
    r"\..*|lost\+found|checkpoints|tensorboard|metrics(-\d{6})?\.jsonl|features(-.+)?|probes|report|round-\d+"
    r"|.+\.[0-9a-f]{8}\.tmp|.*\.(log|out|err|txt|md|ya?ml|toml|json|sh|sbatch|py|ipynb|pkl)|views.*\.png"
    r"|wandb|mlruns|slurm.*|logs?|data|events\.out\..*"
)

SWEEP_JOURNAL = "sweep.jsonl"
_OF_SWEEP = {"images", "trials", "_ray_tune"}


def check_free(uri: str, flag: str = "--run") -> None:
    """Raise UserError if a folder holds neither a run nor what raysl writes before the metadata of one.

    Args:
        uri: the folder, which need not exist.
        flag: the flag that names it, for the message.
    """
    names = Folder(uri).list()
    if METADATA not in names and OLD_METADATA not in names:
        _refuse(uri, flag, "run", _others(names))


def check_free_for_sweep(uri: str) -> None:
    """Raise UserError if a folder holds neither a sweep nor what raysl writes before the journal of one."""
    names = Folder(uri).list()
    if SWEEP_JOURNAL not in names:
        if {METADATA, OLD_METADATA} & set(names):
            raise UserError(f"--out is {uri!r}, which is the folder of a run. Give another folder to --out.")
        _refuse(uri, "--out", "sweep", [name for name in _others(names) if name not in _OF_SWEEP])


def _others(names: list[str]) -> list[str]:
    return [name for name in names if not (_MAY_HOLD.fullmatch(name) or is_lock(name))]


def _refuse(uri: str, flag: str, what: str, others: list[str]) -> None:
    if others and DataSet.exists_at(uri):
        raise UserError(f"{flag} is {uri!r}, which is a data set. Give another folder to {flag}.")
    if others:
        raise UserError(
            f"{flag} is {uri!r}, a folder that is not empty and holds no {what}: {others[0]!r} is in it. Give {flag} a "
            f"new folder, such as {what}s/first, or the folder of a {what} to go on with it."
        )
