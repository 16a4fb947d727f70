"""`raysl cache` lists the copies of ingested sources and removes those that nothing needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from raysl.__main__ import main
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingestion import ingest, open_or_ingest
from raysl.run import METADATA
from raysl.storage import Folder
from raysl.storage.lock import DriverLock
from raysl.storage.records import write_record


def _photos(folder: Path, value: int) -> DataSet:
    """Write one image into a folder of photos, and open the copy of the folder in the cache."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16), (value, 0, 0)).save(folder / f"{value}.png")
    return open_or_ingest(str(folder))


def _unfinished_run(folder: Path, data: str) -> None:
    config = {"batch_size": 2, "epochs": 1}
    images = {"uri": data, "fingerprint": "x", "num_images": 8, "num_classes": 0}
    write_record(Folder(str(folder)), METADATA, {"config": config, "data": images, "sessions": []})


def test_superseded_copies_are_removed_unless_something_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))
    strange = tmp_path / "cache" / "mine-0123456789abcdef"
    strange.mkdir(parents=True)
    of_run, written, old, now = (str(_photos(tmp_path / "photos", value).folder) for value in range(4))
    gone = str(_photos(tmp_path / "gone", 9).folder)
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    left = Path(f"{now[:-16]}{'0' * 16}.removed")
    left.mkdir()
    _unfinished_run(tmp_path / "runs" / "a", of_run)
    main(["cache"])
    said = capsys.readouterr().out
    assert f"{of_run}: superseded, 1 image, 0.0 MB, last read 2" in said
    assert "used by the unfinished run runs/a" in said
    assert f"{now}: current, 4 images" in said
    assert f"{gone}: source not found, 1 image" in said
    assert "--remove-superseded deletes 3 folders" in said
    with pytest.raises(SystemExit):
        main(["cache", "--remove-superseded", "--runs", "nowhere"])
    assert "There is no folder 'nowhere'" in capsys.readouterr().err
    with DriverLock(Folder(written)), monkeypatch.context() as other:
        other.setattr("raysl.storage.lock.os.getpid", lambda: os.getppid())
        main(["cache", "--remove-superseded"])
    assert "Kept" in (said := capsys.readouterr().out)
    assert "Removed 2 folders" in said
    kept = {Path(folder).name for folder in (of_run, written, now, gone)} | {strange.name}
    assert {one.name for one in (tmp_path / "cache").iterdir()} == kept
    assert old not in kept


def test_all_paths_of_a_folder_have_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))
    copy = _photos(tmp_path / "photos", 1).folder
    (tmp_path / "deep" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "inside")
    monkeypatch.chdir(tmp_path / "deep")
    for path in ("../photos", "../photos/", "inside/../../photos", f"{tmp_path}/link/../../photos"):
        assert open_or_ingest(path).folder == copy
    with pytest.raises(UserError, match=r"'\.\./nothing' does not exist"):
        open_or_ingest("../nothing")


def test_messages_call_a_copy_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))
    copy = _photos(tmp_path / "photos", 1)
    with pytest.raises(UserError, match=f"The data set '{tmp_path}/photos' has no labels"):
        copy.labels()
    made = ingest(str(tmp_path / "photos"), str(tmp_path / "set"))
    assert made.name == str(tmp_path / "set")
