"""Check a run before it starts: its configuration, its data, and the space for its checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysl import checkpoint
from raysl.config import Pretraining, defaults
from raysl.dataset import DataSet
from raysl.errors import UserError, counted
from raysl.ingestion.cache import finished_folder
from raysl.model import DatasetInfo, Model, model_config
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.plan import Plan

_log = logging.getLogger("raysl.training")


def check_and_plan(config: Pretraining, dataset: DataSet) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of a run, and the facts for its metadata.

    Raises:
        UserError: the data set reveals a mistake in the configuration, the run was begun with other ones, or its disk
            has no space for a checkpoint.
    """
    # First: what follows would blame a value that is taken from the run.
    Run.resumable_metadata(config, dataset)
    run = Run(Folder(config.run))
    model = Model.of(model_config(config, run.checkpoints), dataset)
    model.check()
    plan = config.plan(dataset)
    if checkpoint.newest_step(run.checkpoints) < plan.num_steps:
        _check_space(config, model, dataset.num_images)
        _warn_of_silence(model, dataset)
    return plan, model.describe()


def check_before_ingest(asked: Pretraining, given: Mapping[str, Any]) -> None:
    """Raise UserError for a mistake in the method or the network that no images can correct, before the slow ingest.

    What raysl chooses depends on the images and on the GPUs of the cluster, so that all choices must be impossible.

    Args:
        asked: the configuration without choices.
        given: the fields that the user gives; see `raysl.config.defaults.choose_defaults`.
    """
    # A teacher makes the labels of ClusterFit first. An existing run, or data set, is checked as it is.
    if asked.method == "clusterfit" or finished_folder(asked.data) or Run.find(asked.run):
        return
    refused: list[UserError] = []
    with torch.random.fork_rng(devices=[]):
        for config in defaults.possible_configs(given):
            try:
                Model(config, DatasetInfo(1 << 31, num_classes=2)).check()
                return
            except UserError as error:
                refused.append(error)
    raise refused[-1]


def is_done(config: Pretraining, end: int, num_steps: int) -> bool:
    """Return True, and say so, if a run has a checkpoint of the step `end` or later, of its `num_steps`."""
    saved = checkpoint.newest_step(Run(Folder(config.run)).checkpoints)
    if saved >= end:
        state = "finished" if saved >= num_steps else "at this step"
        _log.info("The run at %s is already %s (%s).", config.run, state, counted(saved, "step"))
    return saved >= end


def _check_space(config: Pretraining, model: Model, num_images: int) -> None:
    """Raise UserError if the disk of the run surely cannot hold one checkpoint: the weights and the memory bank.

    The state of the optimizer is not counted, because its size is not known before the first step.
    """
    folder = Folder(config.run)
    if not folder.is_local:
        return
    weights = sum(one.nbytes for one in model.state_dict().values() if isinstance(one, Tensor))
    bank = num_images * model.objective.bank_dim * (2 if config.bank.dtype == "float16" else 4)
    above = next(path for path in (Path(folder.uri), *Path(folder.uri).parents) if path.exists())
    free = shutil.disk_usage(above).free
    if free < weights + bank:
        raise UserError(
            f"The disk of --run {config.run!r} has {free / 1e6:,.1f} MB free, and one checkpoint of this run takes at "
            f"least {(weights + bank) / 1e6:,.1f} MB: {weights / 1e6:,.1f} MB of weights and {bank / 1e6:,.1f} MB of "
            "the memory bank. Free some space, or give --run a folder on another disk."
        )


def _warn_of_silence(model: Model, dataset: DataSet) -> None:
    """Say if a method learns from sound, and some clips have none."""
    columns = {column for view in model.views().values() for column in view.columns}
    silent = dataset.num_images - int(dataset.manifest.clips.get("with_sound", dataset.num_images))
    if "sound" in columns and silent:
        _log.warning(
            "%s of %s have no sound: the network learns that silence belongs to their frames. Ingest only videos with "
            "an audio track to leave them out.",
            f"{silent:,}",
            counted(dataset.num_images, "clip"),
        )
