"""What SECURITY.md promises and no other test shows."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import stat
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.backbone.external_weights import parse, read_file
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining
from raysl.config.command import command
from raysl.errors import UserError
from raysl.model import Model
from raysl.model_export import ExportConfig, export
from raysl.reporting import ReportConfig, report
from raysl.run import MetricsLog, Run
from raysl.storage import Folder
from raysl.storage.records import write_record
from raysl.tuning.journal import FORMAT
from raysl.tuning.results import SweepResults
from tests.data import make_dataset
from tests.ingestion.reading import jpeg, opened, write_odd_tar

ROOT = Path(__file__).parents[1]


def test_security_md_names_tests_that_exist() -> None:
    rows = re.findall(r"^\|.*\|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)[2:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test: {row}"
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_weights_does_not_run(tmp_path: Path) -> None:
    torch.save({"fc.weight": Harmful(tmp_path / "ran")}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError):
            parse(read_file(str(tmp_path / name)), name)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    """A stranger can make the checksums of his checkpoint fit."""
    saver = Saver(Folder(str(tmp_path)), SaveConfig(), 0, 1)
    saver.save(1, {"network": {}}, None)
    saver.wait()
    (checkpoint,) = tmp_path.iterdir()
    stream = io.BytesIO()
    torch.save({"network": Harmful(tmp_path / "ran")}, stream)
    data = stream.getvalue()
    (checkpoint / "state.pt").write_bytes(data)
    manifest = {"files": {"state.pt": {"bytes": len(data), "crc32": zlib.crc32(data)}}}
    write_record(Folder(str(checkpoint)), "manifest-0000-of-0001.json", manifest)
    from raysl.checkpoint import newest_checkpoint

    found = newest_checkpoint(Folder(str(tmp_path)))
    assert found is not None
    with pytest.raises(UserError):
        found.state()
    assert not (tmp_path / "ran").exists()


def test_names_in_archives_are_no_paths(tmp_path: Path) -> None:
    """Nothing is unpacked, and links and devices are not opened."""
    _, rows = opened(write_odd_tar(tmp_path / "a.tar", "../../out.jpg", "/etc/raysl.jpg", "ok.jpg"))
    assert all(row.image in (None, jpeg()) for row in rows)
    assert {row.path for row in rows if row.image} <= {
        "a.tar/../../out.jpg",
        "a.tar//etc/raysl.jpg",
        "a.tar/ok.jpg",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert not (tmp_path.parent.parent / "out.jpg").exists()
    assert not Path("/etc/raysl.jpg").exists()


@pytest.mark.parametrize("name", ["--plugin evil.py", "-x", "a; rm b", "$(x)", "a\nb", "'"])
def test_names_are_no_flags_and_no_shell(name: str) -> None:
    """The command that a report shows holds a name as one word behind its flag."""
    words = shlex.split(command(Pretraining("data", name, method="predict-rotation")))
    assert words[words.index("--run") + 1] == name
    assert words.count("--plugin") == 0


def test_files_have_the_umask_of_the_user(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Folder(str(tmp_path / "x")).write("y", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x" / "y").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750


SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "RAY_AUTH_TOKEN",
    "GITHUB_TOKEN",
)


def test_secrets_of_the_environment_are_written_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    for name in SECRETS:
        monkeypatch.setenv(name, f"planted-{name}")
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted-key")
    dataset = make_dataset(tmp_path / "set", 24)
    config = Pretraining(
        str(tmp_path / "set"), str(tmp_path / "run"), batch_size=8, method="predict-rotation"
    )
    model = Model.of(config, dataset)
    run = Run.begin(config, dataset, model.describe())
    log = MetricsLog(run, 0)
    log.add({"step": 1, "epoch": 1.0, "loss": 1.0, "images_per_s": 5.0})
    log.flush()
    saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
    saver.save(3, {"network": model.state_dict()}, None)
    saver.wait()
    report([str(run.folder)], ReportConfig(str(tmp_path / "report")))
    export(run, ExportConfig("safetensors", str(tmp_path / "export")))
    with caplog.at_level("DEBUG"), pytest.raises(UserError) as refused:
        Folder("s3://bucket/x").read("y")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"planted-" in path.read_bytes()] == []
    output = capfd.readouterr()
    assert "planted-" not in output.out + output.err + caplog.text + str(refused.value)


def test_arrays_with_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    np.save(
        tmp_path / "images" / "x.npy", np.array([Harmful(tmp_path / "ran")], dtype=object), allow_pickle=True
    )
    with pytest.raises(UserError):
        opened(tmp_path / "images" / "x.npy")
    assert not (tmp_path / "ran").exists()


def test_opening_a_sweep_runs_no_code(tmp_path: Path) -> None:
    plugin = tmp_path / "evil.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    base = {**Pretraining("data", "-").to_json(), "plugin": [str(plugin)]}
    header = {
        "event": "sweep",
        "format": FORMAT,
        "base": base,
        "config": {"seeds": [0]},
        "space": [],
        "uris": {},
    }
    (tmp_path / "sweep.jsonl").write_text(json.dumps(header) + "\n")
    with pytest.raises(UserError, match=r"uses the code in .*evil\.py"):
        _ = SweepResults.open(str(tmp_path)).base
    assert not (tmp_path / "ran").exists()
