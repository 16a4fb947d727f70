"""Files are written whole or not at all, at any URI."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pyarrow.fs
import pytest

from raysl import storage
from raysl.errors import UserError
from raysl.storage import Folder, StorageError, failure, filesystem, retry
from raysl.storage.records import verified


@pytest.fixture(params=["", "file://", "memory://"], ids=["path", "file", "fsspec"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """One folder, named in three ways."""
    place = tmp_path / "a b" / "é"
    return Folder(f"{request.param}{place}")


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


def test_the_name_of_a_file_does_not_change_its_content(folder: Folder) -> None:
    folder.write("x.gz", b"123")
    with folder.writing("y.gz") as stream:
        stream.write(b"123")
    assert folder.read("x.gz") == folder.read("y.gz") == b"123"


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


def test_two_processes_may_delete_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, local = Folder(str(tmp_path / "f")), pyarrow.fs.LocalFileSystem()
    folder.write("deep/x", b"1")

    class Overtaken:
        """Another process deletes the folder after this one has listed it."""

        get_file_info = local.get_file_info

        def delete_dir(self, path: str) -> None:
            local.delete_dir(path)
            local.delete_dir(path)

    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0)
    monkeypatch.setattr(storage, "filesystem", lambda uri: (Overtaken(), uri))
    folder.delete("deep")
    assert list((tmp_path / "f").iterdir()) == []


def test_a_patience_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.RETRY_VARIABLE, "abc")
    with pytest.raises(UserError, match=r"RAYSL_STORAGE_RETRY_S is 'abc'.* Give seconds, such as 90"):
        Folder("x").exists()


def test_what_is_not_there(folder: Folder) -> None:
    folder.write("x", b"1")
    for name in ("nothing", "x/inside"):
        with pytest.raises(FileNotFoundError, match=f"^{folder}/{name} does not exist$"):
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
    message = str(failure("/runs/1", "write", OSError(errno.ENOSPC, "No space left on device")))
    assert "/runs/1" in message
    assert "Free some space" in message


def flaky(errors: Sequence[Exception]) -> Callable[[], str]:
    """An action that raises each of `errors` in turn and then succeeds."""

    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("s3://bucket/x", OSError("AWS Error SLOW_DOWN during PutObject operation: 503")),
        ("s3://bucket/x", OSError("curlCode: 7, Couldn't connect to server")),
        (
            "s3://b/runs/400/y.json",
            OSError("For key 'runs/400/y.json' in bucket 'b': AWS Error SLOW_DOWN: 503"),
        ),
        ("s3://credentials/a 301 b", OSError("For key 'a 301 b' in bucket 'credentials': Couldn't connect")),
        ("s3://b/signature/x", OSError("Listing 'signature/', then http://b/signature/x/403: time-out")),
        (
            "gs://b/x",
            OSError("google::cloud::Status(UNAVAILABLE: No OAuth2 token to authenticate the request"),
        ),
        ("/mnt/nfs/x", OSError(errno.ESTALE, "Stale file handle")),
    ],
)
def test_a_request_that_fails_for_a_while_is_repeated(place: str, error: OSError) -> None:
    assert retry(place, "read", flaky([error, error])) == "done"


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("s3://bucket/x", OSError("AWS Error ACCESS_DENIED during HeadObject operation: HTTP 403")),
        ("s3://bucket/x", OSError("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: no")),
        ("s3://bucket/x", OSError("AWS Error REQUEST_TIME_TOO_SKEWED during ListObjectsV2 operation: no")),
        ("s3://bucket/x", OSError("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation")),
        ("s3://bucket/x", OSError("Bucket 'bucket' not found")),
        ("s3://400/x", OSError("For key 'x' in bucket '400': AWS Error UNKNOWN (HTTP status 400)")),
        ("gs://b/x", OSError("google::cloud::Status(UNAUTHENTICATED: no credentials")),
        ("s3://bucket/x", PermissionError("no")),
        ("/data/x", OSError(errno.EACCES, "Permission denied")),
        ("/data/x", OSError(errno.EROFS, "Read-only file system")),
    ],
)
def test_a_request_that_cannot_succeed_is_one_sentence_at_once(place: str, error: OSError) -> None:
    with pytest.raises(StorageError, match=f"Cannot read {place}"):
        retry(place, "read", flaky([error]))


def test_an_error_of_arrow_names_the_place_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(
        StorageError, match=rf"^Cannot read {tmp_path}/a: is a directory\. Name a file in it\.$"
    ):
        Folder(str(tmp_path)).read("a")
    with pytest.raises(StorageError, match=r"x{300}: File name too long\."):
        Folder(str(tmp_path)).read("x" * 300)


def test_a_store_that_does_not_tell_its_region_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arrow:
        @staticmethod
        def from_uri(uri: str) -> str:
            return answer()

    answer = flaky([OSError("When resolving region for bucket 'far': Couldn't connect")])

    monkeypatch.setattr(pyarrow.fs, "FileSystem", Arrow)
    assert filesystem("s3://far/x") == "done"  # type: ignore[comparison-overlap]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "0.1")
    with pytest.raises(StorageError, match="Couldn't connect"):
        retry("s3://bucket/x", "read", flaky([OSError("Couldn't connect")] * 9))
    # How long it lasts is said before.
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "70")
    assert retry("s3://bucket/x", "read", flaky([OSError("Couldn't connect")])) == "done"
    assert caplog.messages[-1].endswith("Trying again for about 70 s (RAYSL_STORAGE_RETRY_S).")


class LostError(Exception):
    """An error as httpx defines it: no OSError, and of a package that raysl does not import."""

    __module__ = "httpx9.errors"


class AddressError(ValueError):
    __module__ = "some_hub.errors"


def test_errors_that_packages_of_fsspec_define_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = LostError("Name or service not known")
    assert retry("hf://datasets/a/b", "read", flaky([lost])) == "done"
    with pytest.raises(
        StorageError, match=r"a/b@: Empty revision\. Check the name\. It reads as hf://datasets/"
    ):
        retry("hf://datasets/a/b@", "read", flaky([AddressError("Empty revision.")]))
    with pytest.raises(StorageError, match=r"401 .*HF_TOKEN"):
        retry("hf://datasets/a/b", "read", flaky([OSError("401 Client Error. Cannot access gated repo")]))
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "0")
    with pytest.raises(StorageError, match="Cannot read hf://datasets/a/b: Name or service not known"):
        retry("hf://datasets/a/b", "read", flaky([lost]))


def test_a_mistake_of_raysl_is_not_taken_for_an_error_of_a_store() -> None:
    for mistake in (TypeError("x"), UserError("x"), KeyError("x")):
        with pytest.raises(type(mistake)) as raised:
            retry("hf://datasets/a/b", "read", flaky([mistake]))
        assert raised.value is mistake
    with pytest.raises(ValueError, match="no JSON object"):
        retry("hf://datasets/a/b", "read", lambda: verified([]))
    with pytest.raises(LostError):
        retry("/data/x", "read", flaky([LostError()]))


def test_an_address_of_the_hub_without_a_repository_is_one_sentence() -> None:
    pytest.importorskip("huggingface_hub")
    for uri in ("hf://datasets", "hf://datasets/a", "hf://datasets/a/b@"):
        with pytest.raises(StorageError, match=f"Cannot read {uri}"):
            Folder(uri).exists()


def test_an_expected_file_is_waited_for() -> None:
    assert retry("/data/x", "read", flaky([FileNotFoundError("x")]), is_gone=lambda: False) == "done"
    with pytest.raises(FileNotFoundError):
        retry("/data/x", "read", flaky([FileNotFoundError("x")]))


def test_a_file_that_was_deleted_is_not_waited_for(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_ABSENT_S", 0.0)
    folder.write("shards/other", b"1")
    with pytest.raises(StorageError, match="shards/gone: the file was deleted"):
        folder.read_ranges("shards/gone", [(0, 1)])
    # So is the only file of its folder, if other files lie beside the folder.
    folder.delete("shards/other")
    folder.write("manifest.json", b"1")
    with pytest.raises(StorageError, match="shards/gone: the file was deleted"):
        folder.read_ranges("shards/gone", [(0, 1)])
    # A file system that is away shows an empty folder.
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "0")
    folder.delete("manifest.json")
    with pytest.raises(StorageError, match=r"Cannot read .*shards/gone") as raised:
        folder.read_ranges("shards/gone", [(0, 1)])
    assert "the file was deleted" not in str(raised.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    Folder(str(tmp_path / "x")).write("y", b"1")
    (tmp_path / "x").chmod(0)
    folder = Folder(str(tmp_path / "x"))
    actions: list[Callable[[], object]] = [
        lambda: folder.read("y"),
        folder.list,
        lambda: folder.write("z", b"1"),
    ]
    for action in actions:
        with pytest.raises(StorageError, match="Permission denied"):
            action()


@pytest.mark.parametrize(
    "uri", ["s3://AKIA:hunter2@bucket/x", "s3://bucket/x?secret_key=hunter2", "https://u:hunter2@host/x"]
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match="holds credentials") as raised:
        Folder(uri)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        *(
            ("", "is empty"),
            ("  ", "is empty"),
            ("a\0b", "holds a NUL character"),
            ("~\0", "holds a NUL character"),
        ),
        *((uri, "names nothing behind ://") for uri in ("s3://", "s3:///", "file://")),
        ("~no-such-user/x", "begins with the home of an unknown user"),
    ],
)
def test_a_path_that_names_no_place_is_refused(uri: str, why: str) -> None:
    with pytest.raises(UserError) as raised:
        Folder(uri)
    assert str(raised.value) == f"The path {uri!r} {why}. Give a local path or a URI."


def test_a_file_uri_is_unquoted(tmp_path: Path) -> None:
    assert str(Folder(f"file://{tmp_path}/a%20b%23c")) == f"{tmp_path}/a b#c"


def test_paths_become_absolute_and_survive_pickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("here")
    assert str(folder) == str(tmp_path / "here")
    assert folder.is_local
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert str(Folder("s3://bucket/x/")) == "s3://bucket/x"
    assert Folder(f"file://{tmp_path}") == Folder(str(tmp_path))


def test_the_client_of_google_has_a_short_patience_of_its_own() -> None:
    for uri, retry_s in (("gs://bucket/a", 5), ("gs://bucket/a?retry_limit_seconds=20", 20)):
        client, path = filesystem(uri)
        assert path == "bucket/a"
        assert client.__reduce__()[1][0]["retry_time_limit"] == timedelta(seconds=retry_s)


def test_an_unknown_scheme() -> None:
    with pytest.raises(UserError, match="nosuch://x"):
        filesystem("nosuch://x")
