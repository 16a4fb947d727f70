"""The files for Slurm and SkyPilot: their form, and the commands that they run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.ray_cluster.autoscaling import ROOT, read

SLURM = {
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "96",
    "SLURM_JOB_ID": "7",
}


def sbatch(folder: Path, code: int, **variables: str) -> tuple[int, str]:
    """Run the script with stand-ins for Slurm's commands; return its exit code, and what it called."""
    stand_ins = {
        "srun": f'echo "srun $*" >> {folder}/calls; exit {code}',
        "scontrol": f'echo "scontrol $*" >> {folder}/calls; [ "$1" = show ] && printf "n1\\nn2\\n" || true',
    }
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    command = ["bash", str(ROOT / "deploy/slurm.sbatch"), "pretrain", "--run", "/shared/runs/a b"]
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **SLURM, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    calls = folder / "calls"
    return done.returncode, (calls.read_text() if calls.exists() else "") + done.stderr


def test_slurm_starts_ray_on_every_node_and_the_command_on_the_first(tmp_path: Path) -> None:
    code, calls = sbatch(tmp_path, 0, RAYSL_VENV="/shared/venv", RAYSL_CACHE="/shared/cache")
    assert code == 0
    assert "ray symmetric-run --address n1:6379 --min-nodes 2 --num-cpus 96" in calls
    assert "-- python -m raysl pretrain --run /shared/runs/a b" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(("code", "again"), [(143, True), (2, False)])
def test_a_job_that_saved_at_its_limit_is_queued_again(tmp_path: Path, code: int, again: bool) -> None:
    ended, calls = sbatch(tmp_path, code, RAYSL_VENV="/shared/venv", RAYSL_CACHE="/shared/cache")
    assert ended == code
    assert ("scontrol requeue 7" in calls) is again


def test_what_is_not_set_is_named_before_anything_starts(tmp_path: Path) -> None:
    code, calls = sbatch(tmp_path, 0)
    assert code != 0
    assert "Set RAYSL_VENV to the virtual environment" in calls
    assert "srun" not in calls


def test_skypilot_reads_the_file_and_its_commands_parse() -> None:
    task = read("deploy/skypilot.yaml")
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    # These would end SkyPilot's own Ray.
    assert "ray stop" not in task["run"]
    assert "symmetric-run" not in task["run"]
