"""What a training worker refuses before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.ray_cluster.placement import Placement
from raysl.run import Run
from raysl.storage import Folder
from raysl.stream.reader import DataShare
from raysl.training.worker import Job, Worker
from tests.data import make_dataset


def test_a_run_on_another_machine_is_refused_before_it_is_trained_in_vain(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    config = Pretraining(
        data=str(tmp_path / "set"), run="-", batch_size=8, parts={"pirl": Pirl(num_negatives=8)}
    )
    elsewhere = Run(Folder(str(tmp_path / "of-another-machine")))
    job = Job(config.to_json(), elsewhere, dataset, Placement(1, 0, DataShare(), 1))
    with pytest.raises(UserError, match=r"cannot see the run in '.*of-another-machine'.* s3://"):
        Worker(job, torch.device("cpu")).restore()
