"""The command: mistakes leave with code 2 and one message, before anything is started or written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from raysl import ray_cluster
from raysl.__main__ import main
from raysl.cli import verbs
from raysl.cli.flags import peek_all
from raysl.run import Run
from raysl.storage import Folder
from tests.data import make_dataset

PRETRAIN = "pretrain --data nothing --run run"
# The run of `make gpu-science`, without its data.
_MAKE = (Path(__file__).parents[2] / "Makefile").read_text()
SCIENCE = re.sub(r"\\\n", " ", re.findall(r"^SCIENCE := ((?:.*\\\n)*.*)", _MAKE, re.MULTILINE)[0])


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "start", lambda: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Resources": {"CPU": 2.0}, "Alive": True}])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on its way out."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("pretrian", "Did you mean 'pretrain'"),
        (f"{PRETRAIN} --method pril-jigsaw", "Did you mean 'pirl-jigsaw'"),
        (f"{PRETRAIN} --method pirl-jigsw", "Did you mean 'jigsaw'"),
        (f"{PRETRAIN} --pirl.temprature 1", "--pirl.temperature"),
        (f"{PRETRAIN} --pirl.temperature 0", "temperature is 0.0; it must be above 0"),
        (f"{PRETRAIN} --batch-size 0", "--batch-size is 0"),
        (f"{PRETRAIN} --batch-size 1 --workers 2", "less than one image for each of 2 workers"),
        (f"{PRETRAIN} --optim.name sgdd", "sgdd"),
        ("pretrain --run run", "--data"),
        (PRETRAIN, "'.*nothing' does not exist"),
        (f"{SCIENCE} --data nothing --train nothing --test nothing", "'.*nothing' does not exist"),
        ("ingest nothing data", "'.*nothing' does not exist"),
        ("ingest a b c", "takes one SOURCE and one DEST, and behind them stands 'c'. .* a CSV file"),
        ("ingest *.png data", "'.*png' is a pattern, and raysl takes one source. .* a CSV file"),
        ("pretrain --data a b c --run run", "--data takes one source, and behind it stands also 'b', 'c'"),
        ("export a b", "`raysl export` does not take 'b'"),
        ("demo --workers=-1", "--workers is -1"),
        ("demo --data nothing --out out", "'.*nothing' does not exist"),
        ("views --data nothing --out views.doc", "ends in .png"),
        ("views --data nothing --images 0", "images is 0"),
    ],
)
def test_mistakes(
    command: str,
    answer: str,
    no_ray: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))
    said = refused(capsys, *command.split())
    assert re.search(answer, said), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["keypoints", "normals", "video", "localization", "detection", "voc_svm"])
def test_probes_of_other_data_are_refused_before_ray_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "start", lambda: pytest.fail("Ray starts"))
    train, test = (make_dataset(tmp_path / f"{seed}", 8, seed=seed).folder for seed in (0, 1))
    out = tmp_path / "out"
    data = f"--train {train} --test {test} --out {out}".split()
    assert re.search(
        rf"The probe {name}\b.* needs".replace("_", "."),
        refused(capsys, "probe", "random", "--probes", name, *data),
    )
    assert not out.exists()


def test_views_makes_the_folder_of_its_picture_and_lists_what_changes_it(
    no_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raysl")
    data = make_dataset(tmp_path / "set", 40)
    views = f"views --data {data.folder} --pirl.num-negatives 8 --images 2 --out"
    picture = tmp_path / "new" / "views.png"
    main([*views.split(), str(picture)])
    assert re.findall(r"  --(\S+)", caplog.text) == ["method", "view.image-size", "jigsaw.grid"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "views.png: 2 images as pirl-jigsaw sees them" in capsys.readouterr().out
    main([*views.replace("--images 2", "--images 50").split(), str(picture)])
    assert "views.png: 40 images as pirl-jigsaw sees them" in capsys.readouterr().out
    assert "Cannot write" in refused(capsys, *views.split(), str(picture / "below.png"))


def test_ingest_proposes_a_run_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("first", "photos", "photos-2"):
        main(["ingest", "shapes:10", "data/photos"])
        assert f"--data data/photos --run runs/{run}\n" in capsys.readouterr().out
        (tmp_path / "runs" / run).mkdir(parents=True)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["RUN"], ["knn"]),
        (["--probes", "svm", "knn", "svm", "--train", "x"], ["svm", "knn"]),
        (["RUN", "--probes=svm", "--train", "x"], ["svm"]),
        (["--probes", "svm", "--train=/my photos"], ["svm"]),
    ],
)
def test_flags_of_several_values_are_seen_before_all_are_parsed(
    arguments: list[str], found: list[str]
) -> None:
    assert peek_all(arguments, "--probes", ("knn",)) == found


@pytest.mark.parametrize(
    ("main", "code", "errors"),
    [
        ("print('x' * 9)", 0, ""),
        ("sys.exit(141)", 141, ""),
        ("sys.exit('stopped')", 1, "stopped"),
        ("sys.exit()", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_the_program_ends_at_once_with_its_exit_code_and_after_other_exit_functions(
    main: str, code: int, errors: str
) -> None:
    program = (
        "import atexit, sys; from raysl import __main__\n"
        f"def main():\n    atexit.register(print, 'closed')\n    {main}\n"
        "__main__.main = main; __main__.program()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "closed")
    assert errors in done.stderr


def test_the_next_commands_can_be_pasted() -> None:
    said = verbs._next_commands(Run(Folder("/my runs/a b")), "my photos")
    assert "raysl probe '/my runs/a b' --train" in said
    assert "raysl features '/my runs/a b' --data 'my photos' --out" in said
    assert "raysl export '/my runs/a b' " in said
    assert "RAYSL_PLUGINS" not in said


def test_the_next_commands_may_run_the_code_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSL_PLUGINS", "/my code/flip.py")
    said = verbs._next_commands(Run(Folder("/a")), "photos", {"/my code/flip.py": ""})
    assert said.startswith("  export RAYSL_PLUGINS='/my code/flip.py' ")
