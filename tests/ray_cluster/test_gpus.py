"""A GPU that torch cannot use is named in a sentence, with the versions that do not match."""

from __future__ import annotations

import pytest
import torch

from raysl.ray_cluster import gpus


def test_a_gpu_that_torch_cannot_use_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "driver", lambda: "570.86")
    said = gpus.problem()
    assert said.startswith(f"Ray gives a worker a GPU, but torch {torch.__version__}")
    assert "NVIDIA driver: 570.86" in said
    assert "driver 580 or newer" in said


def test_nothing_is_said_of_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpus.problem() == ""
