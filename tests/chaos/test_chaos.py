"""Small work survives kills, stops, signals, a full disk, and storage that goes away or fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raysl.storage import Folder
from tests.chaos.store import BUCKET, CONDITIONS, Store

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]


def test_files_in_an_object_store_that_fails_or_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # Restored in the end.
    store = Store()
    store.open_bucket()
    for number, condition in enumerate(CONDITIONS):
        folder = Folder(f"s3://{BUCKET}/{number}")
        names = [f"x{name}" for name in range(8)]
        with store.under(condition):
            for name in names:
                folder.write(name, name.encode() * 1000)
            with folder.writing("large") as stream:
                stream.write(bytes(12 << 20))
            assert [folder.read(name) for name in names] == [name.encode() * 1000 for name in names]
            assert folder.list() == ["large", *names]
            assert len(folder.read("large")) == 12 << 20


def test_five_minutes_of_chaos(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--minutes", "5", "--work", str(tmp_path)]
    # The others cost more time undisturbed than there is.
    command += ["--commands", "ingest", "pretrain-local", "pretrain"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_commands_with_an_object_store_that_fails_or_goes_away(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos.store", "--work", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
