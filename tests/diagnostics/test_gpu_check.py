"""The check of GPUs runs to its end on a machine without one, and names what it could not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raysl.diagnostics import decoding, gpu_check
from raysl.diagnostics.bench import Bench
from tests.data import make_dataset


@pytest.mark.parametrize(
    ("eager_s", "compiled_s", "flag"),
    [(0.05, 0.04, "--compile"), (0.05, 0.0499, "--no-compile"), (0.04, 0.05, "--no-compile")],
)
def test_the_flag_is_that_of_the_faster_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager_s: float, compiled_s: float, flag: str
) -> None:
    bench = Bench(make_dataset(tmp_path / "set", 40, side=32), on_gpu=False)
    measured = iter([eager_s, compiled_s])
    monkeypatch.setattr(bench, "seconds", lambda _: next(measured))
    found = gpu_check.compiled_step(bench)
    assert (found["flag"], found["faster"]) == (flag, "compiled" if flag == "--compile" else "eager")
    on_gpu = gpu_check.Certificate({"gpu": {"count": 1, "name": "X1"}}, {"compile": found})
    assert f"Use {flag}: a step takes" in gpu_check._page(on_gpu)
    assert f"| compile | flag | {flag} |" in gpu_check._page(on_gpu)
    assert "Use --" not in gpu_check._page(gpu_check.Certificate({}, {"compile": found}))


def test_torchvision_decodes_as_the_stream_does_on_the_cpu(tmp_path: Path) -> None:
    found = decoding.decoding(Bench(make_dataset(tmp_path / "set", 40, side=32), on_gpu=False))
    assert found["mean_difference"] == found["largest_difference"] == 0, "both are libjpeg-turbo"
    assert found["resizes_bytes_on_device"] is True
    assert float(found["cores_replaced"]) > 0
    assert 60_000 < len(decoding.photo(0)) < 200_000


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes with a GPU; `make gpu-check` runs it")
def test_every_check_runs_without_a_gpu(ray_session: None, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 200, side=32)
    gpu_check.check(dataset, str(tmp_path / "out" / "certificate.json"))
    made = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert set(made["not_done"]) == {"GPU", "several GPUs"}, made["not_done"]
    assert set(made["checks"]) == set(gpu_check.CHECKS)
    assert made["checks"]["exactness"]["losses_equal"]
    assert made["checks"]["views"]["loss_equal"]
    assert "ray" in made["machine"]["versions"]["packages"]
