"""A folder on a disk of the head is refused before a machine starts; buckets and network file systems are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysl.errors import UserError
from raysl.ray_cluster import autoscaler, shared_paths
from raysl.ray_cluster.autoscaler import Capacity
from raysl.ray_cluster.shared_paths import refuse_local

WORKER: dict[str, Any] = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 8}


def grow(monkeypatch: pytest.MonkeyPatch, head_cpus: int) -> None:
    kinds = {"head": {"resources": {"CPU": head_cpus}}, "gpu": WORKER}
    capacity = Capacity.of({"available_node_types": kinds, "head_node_type": "head", "max_workers": 8})
    monkeypatch.setattr(autoscaler, "capacity", lambda: capacity)


def test_a_folder_of_a_head_without_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grow(monkeypatch, head_cpus=0)
    with pytest.raises(UserError, match=r"--run .*runs/1 is on a disk of the head.*--run s3://.*No machine"):
        refuse_local({"--run": f"{tmp_path}/runs/1"})
    refuse_local({"--run": "s3://bucket/runs/1"})


def test_a_network_file_system_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grow(monkeypatch, head_cpus=0)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"overlay / overlay rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(shared_paths, "_MOUNTS", mounts)
    refuse_local({"--run": f"{tmp_path}/runs/1"})


def test_local_paths_are_taken_where_the_head_works_or_nothing_grows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grow(monkeypatch, head_cpus=4)
    refuse_local({"--run": str(tmp_path)})
    monkeypatch.setattr(autoscaler, "capacity", lambda: None)
    refuse_local({"--run": str(tmp_path)})
