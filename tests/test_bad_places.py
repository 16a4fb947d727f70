"""Every verb at a place that cannot be read or written: exit code 2, one paragraph that names it, nothing changed.

It is refused before Ray starts. The bad place is where a verb writes its result, or where it reads its input.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysl.__main__ import main
from raysl.checkpoint import SaveConfig, Saver
from raysl.config import Pretraining, ViewConfig
from raysl.model import Model
from raysl.run import Run
from tests.data import make_dataset
from tests.test_corruption import make

_SIZES = (
    "--view.image-size 16 --batch-size 8 --pirl.num-negatives 8 --workers 1 --epochs 1 --method pirl-rotation"
)
# {bad} is the bad place; the others are good ones.
WRITES = {
    "ingest": "ingest {images} {bad}",
    "pretrain": f"pretrain --data {{set}} --run {{bad}} {_SIZES}",
    "features": "features random --data {set} --layer pooled --out {bad}",
    "cluster": "cluster {features} --k 2 --out {bad}",
    "probe": "probe {run} --train {set} --test {set} --probes knn --out {bad}",
    "sweep": f"sweep --data {{set}} --train {{set}} --validation {{set}} --vary temperature --out {{bad}} {_SIZES}",
    "report": "report {run} --out {bad}",
    "export": "export {run} --format safetensors --out {bad}",
    "views": "views --data {set} --out {bad}/views.png",
}
READS = {
    "ingest": "ingest {bad} {new}",
    "pretrain": f"pretrain --data {{bad}} --run {{new}} {_SIZES}",
    "features of a run": "features {bad} --data {set} --out {new}",
    "features of data": "features random --data {bad} --out {new}",
    "cluster": "cluster {bad} --k 2 --out {new}",
    "probe a run": "probe {bad} --train {set} --test {set} --probes knn --out {new}",
    "probe on data": "probe {run} --train {bad} --test {set} --out {new}",
    "sweep": f"sweep --data {{bad}} --train {{set}} --validation {{set}} --vary temperature --out {{new}} {_SIZES}",
    "report": "report {bad} --out {new}",
    "export": "export {bad} --out {new}",
    "views": "views --data {bad} --out {new}/views.png",
}


@pytest.fixture(scope="module")
def good() -> Iterator[dict[str, str]]:
    """Places with a data set, a run, features and images, which every user may read."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        dataset = make_dataset(root / "set", 24)
        (root / "images" / "a").mkdir(parents=True)
        for number, data in enumerate(dataset.read(np.arange(4), ("image",))["image"].to_pylist()):
            (root / "images" / "a" / f"{number}.png").write_bytes(data)
        config = Pretraining(
            str(root / "set"),
            str(root / "run"),
            batch_size=8,
            method="predict-rotation",
            view=ViewConfig(image_size=16),
        )
        model = Model.of(config, dataset)
        run = Run.begin(config, dataset, model.describe())
        saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
        saver.save(3, {"network": model.state_dict()}, None)
        saver.wait()
        (root / "made").mkdir()
        make(root / "made")
        yield {name: str(root / name) for name in ("set", "run", "images")} | {
            "features": str(root / "made" / "features")
        }


class Forbidden(http.server.BaseHTTPRequestHandler):
    """A store that answers 403, as S3 does to wrong credentials."""

    protocol_version = "HTTP/1.1"

    def _refuse(self) -> None:
        body = (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        )
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _refuse

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory at a folder; skip the test where that is not possible."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Give up the rights of root, to which no file is forbidden."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@contextlib.contextmanager
def bad_place(kind: str, root: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make a bad place and yield its path or URI."""
    patch.setenv("RAYSL_STORAGE_RETRY_S", "0.5")
    place = root / "bad"
    with contextlib.ExitStack() as stack:
        if kind == "a file":
            place.write_bytes(b"old")
        elif kind == "below a file":
            (root / "file").write_bytes(b"old")
            place = root / "file" / "bad"
        elif kind == "forbidden":
            place.mkdir(mode=0o700)
            stack.enter_context(ordinary_user())
        elif kind in ("read-only", "full"):
            stack.enter_context(
                mounted(root / "disk", "ro" if kind == "read-only" else "size=4k,nr_inodes=8")
            )
            if kind == "full":
                (root / "disk" / "filler").write_bytes(bytes(4096))
            place = root / "disk" / "bad"
        elif kind in ("dead endpoint", "wrong credentials"):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidden)
            port = server.server_address[1]
            if kind == "dead endpoint":
                server.server_close()
            else:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
                patch.setenv(name, "us-east-1")
            yield "s3://bucket/bad"
            return
        yield str(place)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(command: str, places: dict[str, str], capture: pytest.CaptureFixture[str]) -> None:
    """Run a command and require exit code 2 and one paragraph that names the bad place."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command.format(**places).split())
    output = capture.readouterr()
    assert ended.value.code == 2, output.err
    (paragraph,) = output.err.strip().splitlines()[-1:]
    assert paragraph.startswith("raysl: ")
    assert "Traceback" not in output.err
    assert places["bad"] in paragraph


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a command starts Ray, before it refuses a place."""
    import ray

    from raysl import ray_cluster

    monkeypatch.setattr(ray_cluster, "start", lambda: pytest.fail("Ray starts"))
    monkeypatch.setattr(ray, "shutdown", lambda: None)


# The client of S3 tries each again for six seconds.
REMOTE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dead endpoint", "wrong credentials")]
WRITING = ("a file", "below a file", "forbidden", "read-only", "full", *REMOTE)
READING = ("absent", "a file", "forbidden", *REMOTE)


@pytest.mark.parametrize("verb", WRITES)
@pytest.mark.parametrize("kind", WRITING)
def test_a_result_that_cannot_be_written(
    kind: str,
    verb: str,
    good: dict[str, str],
    no_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = {name: files(Path(place)) for name, place in good.items()}
    with bad_place(kind, _public(tmp_path), monkeypatch) as bad:
        there = files(tmp_path)
        refused(WRITES[verb], {**good, "bad": bad}, capfd)
        assert files(tmp_path) == there
    assert {name: files(Path(place)) for name, place in good.items()} == before


@pytest.mark.parametrize("verb", READS)
@pytest.mark.parametrize("kind", READING)
def test_an_input_that_cannot_be_read(
    kind: str,
    verb: str,
    good: dict[str, str],
    no_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if kind == "a file" and verb in ("features of a run", "probe a run"):
        pytest.skip("a file may hold weights, which are read later")
    root = _public(tmp_path)
    (root / "results").mkdir(mode=0o777)
    (root / "results").chmod(0o777)
    with bad_place(kind, root, monkeypatch) as bad:
        refused(READS[verb], {**good, "bad": bad, "new": str(root / "results" / "new")}, capfd)
    assert not files(root / "results")


def _public(folder: Path) -> Path:
    """Let other users pass through the folders of pytest."""
    for parent in (folder, *folder.parents[:3]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    return folder
