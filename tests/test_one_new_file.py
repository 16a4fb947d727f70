"""The files of `examples/` become part of the package by a copy: the contract tests with them are green."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FILES = {"color_order": "pretext", "uniformity": "objectives", "class_separation": "probes"}
# The tests that walk over all transforms, objectives and probes.
CONTRACTS = (
    "tests/test_pretext_contract.py",
    "tests/test_objective_contract.py",
    "tests/test_pretext_in_use.py",
    "tests/stream/test_views.py",
    "tests/reporting",
    "tests/probes/test_contract.py",
    "tests/config/test_config.py",
    "tests/config/test_methods.py",
    "tests/test_repo_rules.py",
)


@pytest.mark.slow
def test_the_suite_of_a_copy_with_new_files_is_green(tmp_path: Path) -> None:
    for name in ("raysl", "tests", "docs", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "experiments").mkdir()
    for name, room in FILES.items():
        shutil.copy(ROOT / "examples" / f"{name}.py", tmp_path / "raysl" / room)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not ray", *CONTRACTS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert (
        "color_order"
        in subprocess.run(
            [
                sys.executable,
                "-c",
                "from raysl import pretext; from raysl.config import methods; "
                "print(pretext.names(), methods.objective_names())",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
