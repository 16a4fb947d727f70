"""Every long verb stops by a signal with one sentence and a code, and the same command completes the work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysl.config import Pretraining
from raysl.storage import lock
from raysl.training.launch import pretrain
from tests.clustering.blobs import write
from tests.data import make_dataset

SLOW = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = "--batch-size 16 --view.image-size 16 --view.recipe plain --pirl.num-negatives 32"
TWO_SETS = "--train {data} --test {test}"
PRETRAINS = ".*(begins|resumes)"
# Each command, and a pattern of the line at which it has begun its work.
VERBS = {
    "ingest": ("shapes:4000 out --shard-images 200", "Ingesting 4,000 images"),
    "pretrain": ("--data {data} --run out --workers 1 --epochs 1 " + SMALL, PRETRAINS),
    "probe": (
        "random --backbone.name small --out out --probes knn linear " + TWO_SETS,
        "Computing the features",
    ),
    "features": ("random --backbone.name small --data {data} --out out", "Computing"),
    "cluster": ("{features} --k 1000 --tolerance 0 --iterations 300 --out out", "iteration"),
    "clusterfit": ("--teacher random --data {data} --k 5 --run out --workers 1 --epochs 1", "Round 1"),
    "sweep": (
        "--data {data} --test {test} --out out --vary optim.lr=0.01,0.1 --workers 1 "
        "--epochs 2 --seeds 0 --method predict-rotation --view.image-size 16 --batch-size 16",
        "2 trials",
    ),
    "local": ("--data {data} --run out --local --epochs 1 " + SMALL, PRETRAINS),
    "report": ("{run} --out out", "raysl"),
}
# The signals of one stop, and the code that the command ends with. Every verb gets Ctrl-C and one of the others.
CTRL_C = ([signal.SIGINT], 130)
OTHERS = [([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143), ([signal.SIGHUP], 129)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Labeled images, a run on them, and features."""
    folder = tmp_path_factory.mktemp("given")
    data = make_dataset(folder / "data", 400)
    config = Pretraining(str(data.folder), str(folder / "run"), "predict-rotation", workers=1, epochs=0.2)
    run = pretrain(replace(config, batch_size=16), local=True)
    test = make_dataset(folder / "test", 40, seed=1)
    # Without clusters in them, k-means takes many iterations.
    noise_nd = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    features = write(folder / "features", noise_nd)
    return {"data": str(data.folder), "test": str(test.folder), "run": str(run.folder), "features": features}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "report" else SLOW) for name in VERBS]
)
def test_a_signal_stops_a_verb_and_the_same_command_completes_it(
    name: str, given: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C and the end of a terminal reach all of its processes; a second signal ends the command at once."""
    arguments, begun = VERBS[name]
    verb = "pretrain" if name == "local" else name
    command = [sys.executable, "-m", "raysl", verb, *arguments.format(**given).split()]
    for numbers, code in (OTHERS[list(VERBS).index(name) % 3], CTRL_C):
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as driver:
            assert driver.stdout is not None
            said = []
            for line in driver.stdout:
                said.append(line)
                if re.match(begun, line):
                    break
            for number in numbers:
                (os.kill if number == signal.SIGTERM else os.killpg)(driver.pid, number)
            after = driver.stdout.read()
        assert driver.returncode == code, (numbers, "".join(said), after)
        assert "Traceback" not in after
        assert re.search(r"The same command resumes", " ".join(after.split())), after
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".new") or path.name == lock.NAME]
    assert not left
