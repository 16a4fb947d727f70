"""The check of GPUs runs to its end on a machine without one, and names what it could not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raysl.diagnostics import gpu_check
from tests.data import make_dataset


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes with a GPU; `make gpu-check` runs it")
def test_every_check_runs_without_a_gpu(ray_session: None, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 200, side=32)
    gpu_check.check(dataset, str(tmp_path / "out" / "certificate.json"))
    made = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert set(made["checks"]) == set(gpu_check.CHECKS)
    assert set(made["not_done"]) == {"GPU", "several GPUs"}
    assert made["checks"]["exactness"]["losses_equal"]
    assert made["checks"]["views"]["loss_equal"]
    assert "ray" in made["machine"]["versions"]["packages"]
