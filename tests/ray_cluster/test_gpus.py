"""A GPU that torch cannot use is named in a sentence, and no command computes on the CPU in its place."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raysl.clustering import kmeans_worker
from raysl.errors import UserError
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


@pytest.mark.parametrize(
    ("task", "assigned", "usable", "expected"),
    [
        (None, [], True, "cuda"),
        (None, [], False, "cpu"),
        ("a task", [], True, "cpu"),
        ("a task", ["0"], True, "cuda"),
        ("a task", ["0"], False, None),
    ],
)
def test_the_device_is_the_one_that_ray_assigns(
    task: Any, assigned: list[str], usable: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_task_id=lambda: task))
    monkeypatch.setattr("ray.get_gpu_ids", lambda: assigned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    if expected is None:
        with pytest.raises(UserError, match="cannot use it"):
            gpus.device()
    else:
        assert gpus.device() == torch.device(expected)


@pytest.mark.parametrize("assigned", [True, False])
def test_kmeans_searches_on_an_assigned_gpu_only(assigned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    made: list[str] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: made.append("memory"), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda memory, device, index: index, raising=False)
    kmeans_worker._gpu_memory.cache_clear()
    rows_nd = torch.randn(4, 8).numpy()
    searches = [kmeans_worker.FaissSearch(rows_nd, 1, assigned) for _ in range(2)]
    assert [search.on_gpu for search in searches] == [assigned, assigned]
    assert made == ["memory"] * assigned
    kmeans_worker._gpu_memory.cache_clear()


# Ray is told of a GPU that this machine does not have, or that its torch cannot use.
PROGRAM = """
    import sys
    import time
    import ray
    from raysl.backbone.network import BackboneConfig
    from raysl.config import Pretraining, ViewConfig
    from raysl.errors import UserError
    from raysl.extraction import FeatureProtocol, RandomBackbone, extract_all
    from raysl.ingestion import ingest
    from raysl.probes._task import run_tasks
    from raysl.ray_cluster import gpus, local_ray
    from raysl.storage import Folder
    from raysl.training.launch import pretrain

    folder = sys.argv[1]
    local_ray.start(num_cpus=2, num_gpus=1, log_to_driver=False)
    data = ingest("shapes:64", f"{folder}/data")
    parts, view = {"pirl": {"num_negatives": 16}}, ViewConfig(image_size=16)
    config = Pretraining(
        f"{folder}/data", f"{folder}/run", epochs=1, batch_size=32, workers=1, view=view, parts=parts
    )
    wanted = [(RandomBackbone(BackboneConfig("small"), 0), data, FeatureProtocol(image_size=16))]
    commands = {
        "pretrain": lambda: pretrain(config),
        "features": lambda: extract_all(wanted, Folder(f"{folder}/features")),
        "probe": lambda: run_tasks(gpus.device, [()]),
    }
    for name, command in commands.items():
        try:
            command()
        except UserError as error:
            print(name, "refused:", error)
    groups = ray.util.placement_group_table().values()
    print("groups", [group["state"] for group in groups if group["state"] != "REMOVED"])
    # Actors of features take a moment to leave.
    until_s = time.monotonic() + 60
    while not ray.available_resources().get("GPU") and time.monotonic() < until_s:
        time.sleep(0.1)
    print("free", ray.available_resources().get("GPU"))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine can be used")
def test_no_command_computes_on_the_cpu_in_place_of_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    refused = {line.split()[0] for line in said.splitlines() if "refused: Ray gives a worker a GPU" in line}
    assert refused == {"pretrain", "features", "probe"}, said
    assert "groups []" in said
    assert "free 1.0" in said
