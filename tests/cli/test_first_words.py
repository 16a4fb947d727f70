"""Test that simple commands do not load torch, Ray and Arrow, and that flags change only on purpose."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raysl.__main__ import VERBS

ROOT = Path(__file__).parents[2]
FLAGS = Path(__file__).with_name("flags.txt")
HEAVY = ("torch", "torchvision", "ray", "pyarrow", "scipy", "matplotlib")


def raysl(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; its last line of output names the heavy packages that it loaded."""
    program = (
        "import sys\nfrom raysl.__main__ import main\n"
        f"try:\n    main({list(arguments)!r})\n"
        f"finally:\n    sys.stdout.flush(); print([name for name in {HEAVY} if name in sys.modules])"
    )
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_no_heavy_package(verb: str) -> None:
    done = raysl(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: raysl" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("pretrain --data d --run r --methd pirl", "--method"),
        ("pretrain --data d --run r --method pril-jigsaw", "Did you mean 'pirl-jigsaw'"),
        ("pretrain --data d --run r --pirl.temperature 0", "temperature is 0.0"),
        ("pretrain --data d --run r --backbone resnet18 --pirl.temperature 0", "temperature is 0.0"),
        ("pretrain --data d --run r --optim=sgdd", "--optim.name"),
        ("pretrain --data d --run r --image-size 1", "image-size is 1"),
        ("sweep --data d --test t --out o --vary temperature --seeds 0 0", "each once"),
        ("probe run --train a --test b --probes knm", "Did you mean 'knn'"),
        ("cluster features --k 0", "k is 0"),
    ],
)
def test_refusals_load_no_heavy_package(command: str, answer: str) -> None:
    done = raysl(*command.split())
    assert done.returncode == 2, done.stderr
    assert answer in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "ingest /nowhere out",
        "pretrain --data /nowhere --run run",
        "features random --data /nowhere --out out",
        "probe random --train /nowhere --test /nowhere --out out",
        "pretrain --data shapes:9 --run run --backbone.weights /nowhere",
        "probe /nowhere --train shapes:9 --test shapes:9#test",
        "features /nowhere --data shapes:9 --out out",
        "clusterfit --teacher /nowhere --data shapes:9 --k 2 --run run",
        "export /nowhere",
        "reproduce /nowhere",
    ],
)
def test_a_mistyped_path_is_answered_before_torch_and_ray(command: str) -> None:
    done = raysl(*command.split())
    assert done.returncode == 2, done.stderr
    assert "/nowhere" in done.stderr
    assert not {"torch", "ray"} & set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))


def test_a_function_of_python_prints_its_first_line_before_torch_is_loaded() -> None:
    program = "import sys, raysl; raysl.pretrain; print('torch' in sys.modules); raysl.export('/nowhere')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("False\nraysl 0.")
    assert "No run at '/nowhere'" in done.stderr


def test_a_reader_that_stops_is_no_error() -> None:
    shell = f"{sys.executable} -m raysl pretrain --help | head -1"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: raysl pretrain" in done.stdout
    assert done.stderr == ""


def test_version() -> None:
    assert raysl("--version").stdout.startswith("raysl 0.")


def test_flags_change_on_purpose() -> None:
    """After a change of flags, write the list again: `python -m tests.cli.test_first_words > tests/cli/flags.txt`."""
    assert listed() == FLAGS.read_text()


def listed() -> str:
    """Return every flag of every verb, a line each."""
    lines = []
    for verb in VERBS:
        text = raysl(verb, "--help").stdout
        lines += [
            f"{verb} {flag}" for flag in sorted(set(re.findall(r"^[│ ]*(--[\w.-]+)", text, re.MULTILINE)))
        ]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    print(listed(), end="")
