"""Files are written whole or not at all, at any URI."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from raysl.errors import UserError
from raysl.storage import Folder, filesystem, write_error


@pytest.fixture(params=["path", "file", "fsspec"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """One folder, named in three ways."""
    place = tmp_path / "a b" / "é"
    return Folder(
        {"path": str(place), "file": f"file://{place}", "fsspec": f"memory://{place}"}[request.param]
    )


def test_what_is_written_can_be_read(folder: Folder) -> None:
    assert not folder.exists()
    assert folder.list() == []
    folder.write("deep/x.bin", b"123")
    folder.write_json("y.json", {"b": [1], "a": None})
    assert folder.read("deep/x.bin") == b"123"
    assert folder.read_json("y.json") == {"a": None, "b": [1]}
    assert folder.list() == ["deep", "y.json"]
    assert folder.exists("deep")
    assert (folder / "deep").list() == ["x.bin"]
    with folder.open("deep/x.bin") as stream:
        stream.seek(1)
        assert stream.read() == b"23"


def test_writing_again_replaces(folder: Folder) -> None:
    folder.write("x", b"old")
    with folder.writing("x") as stream:
        stream.write(b"n")
        stream.write(b"ew")
    assert folder.read("x") == b"new"


def test_deleting(folder: Folder) -> None:
    folder.write("x", b"1")
    folder.write("deep/y", b"1")
    folder.delete("nothing")
    folder.delete("x")
    assert folder.list() == ["deep"]
    folder.delete()
    assert not folder.exists("deep")


def test_what_is_not_there(folder: Folder) -> None:
    folder.write("x", b"1")
    for name in ("nothing", "x/inside"):
        with pytest.raises(FileNotFoundError):
            folder.read(name)


def write_half(folder: Folder, error: type[BaseException]) -> None:
    with folder.writing("x") as stream:
        stream.write(b"half")
        raise error


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("x", b"old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(folder, error)
    with pytest.raises(UserError, match="No space left"), folder.writing("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert folder.read("x") == b"old"
    assert folder.list() == ["x"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="Cannot write"):
        Folder(str(tmp_path / "file")).write("x", b"1")


def test_a_full_disk_is_named() -> None:
    message = str(write_error("/runs/1", OSError(errno.ENOSPC, "No space left on device")))
    assert "/runs/1" in message
    assert "Free some space" in message


def test_paths_become_absolute_and_survive_pickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("here")
    assert str(folder) == str(tmp_path / "here")
    assert folder.is_local
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert str(Folder("s3://bucket/x/")) == "s3://bucket/x"
    assert Folder(f"file://{tmp_path}") == Folder(str(tmp_path))


def test_an_unknown_scheme() -> None:
    with pytest.raises(UserError, match="nosuch://x"):
        filesystem("nosuch://x")
