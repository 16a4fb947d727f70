"""Every kind of source is read from a store that fails at every other request as from the disk."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl import storage
from raysl.api import arguments
from raysl.errors import UserError
from raysl.storage import Folder
from raysl.storage.remote_file import RemoteFile
from tests.ingestion.reading import noise, opened, put, refused, write_tar, write_zip

IMAGES = {f"{'cat' if n % 2 else 'dog'}/{n}.png": noise(n) for n in range(7)}


def _folder(place: Path) -> None:
    for name, data in IMAGES.items():
        put(place, name, data=data)


def _parquet(place: Path) -> None:
    table = pa.table({"image": list(IMAGES.values()), "label": [name[:3] for name in IMAGES]})
    pq.write_table(table, place / "a.parquet", row_group_size=3)


def _csv(place: Path) -> None:
    _folder(place)
    lines = ["path,label", *(f"{name},{name[:3]}" for name in IMAGES)]
    (place / "table.csv").write_text("\n".join(lines))


def _idx(place: Path) -> None:
    pixels = np.arange(7 * 8 * 8, dtype=np.uint8).reshape(7, 8, 8)
    for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(7, dtype=np.uint8) % 2)):
        head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (place / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def _npz(place: Path) -> None:
    pixels = np.arange(7 * 8 * 8, dtype=np.uint8).reshape(7, 8, 8)
    np.savez_compressed(place / "a.npz", images=pixels, labels=np.arange(7) % 2)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        pytest.param(_folder, "", id="folder"),
        pytest.param(lambda place: write_tar(place / "a.tar", IMAGES), "", id="tar"),
        pytest.param(lambda place: write_tar(place / "a.tar.gz", IMAGES, "w:gz"), "", id="tar.gz"),
        pytest.param(lambda place: write_zip(place / "a.zip", IMAGES), "", id="zip"),
        pytest.param(_parquet, "", id="parquet"),
        pytest.param(_csv, "/table.csv", id="csv"),
        pytest.param(_idx, "", id="idx"),
        pytest.param(_npz, "/a.npz", id="npz"),
    ],
)
def test_reads_that_fail_are_repeated(
    write: Callable[[Path], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    remote = Folder(f"memory://{tmp_path}")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            remote.write(str(file.relative_to(tmp_path)), file.read_bytes())
    calls, call = [0], RemoteFile._call

    def fails_at_every_other(file: RemoteFile, function: Callable[[Any], Any]) -> Any:
        def checked(arrow_file: Any) -> Any:
            calls[0] += 1
            if calls[0] % 2:
                raise OSError("AWS Error SLOW_DOWN during GetObject operation")
            return function(arrow_file)

        return call(file, checked)

    monkeypatch.setattr(RemoteFile, "_call", fails_at_every_other)
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.0)
    found, rows = opened(f"{remote}{name}")
    assert calls[0] > 1
    expected, expected_rows = opened(f"{tmp_path}{name}")
    assert rows == expected_rows
    assert len(rows) == 7
    assert found.classes == expected.classes


class LostError(Exception):
    """The network is lost, in a class of a package that raysl does not know."""

    __module__ = "httpx9.errors"


def test_the_hub_without_a_network_or_a_repository_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("RAYSL_STORAGE_RETRY_S", "0")

    def lost(*_: object, **__: object) -> None:
        raise LostError("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "repo_info", lost)
    assert "Cannot read hf://datasets/no/net: Name or service not known." in refused("hf://datasets/no/net")
    with pytest.raises(UserError, match="Cannot read hf://datasets/no/net: Name"):
        arguments.check_source("hf://datasets/no/net#train")

    def missing(file_system: object, path: str, **_: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(hub.HfFileSystem, "resolve_path", missing)
    message = refused("hf://datasets/no/such#train")
    assert (
        "'hf://datasets/no/such' does not exist. A private or gated repository needs `hf auth login`"
        in message
    )


class Forbidding(SimpleHTTPRequestHandler):
    """Give nobody a file."""

    def do_GET(self) -> None:
        self.send_error(403)

    do_HEAD = do_GET


def test_the_web_is_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    write_zip(tmp_path / "photos.zip", IMAGES)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        assert len(opened(f"{place}/photos.zip")[1]) == len(IMAGES)
        message = refused(f"{place}/none.zip")
        assert "the server has no such file" in message
        assert "raysl reads single archives and tables" in message
        server.shutdown()
    with ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert "403" in refused(f"http://127.0.0.1:{server.server_port}/photos.zip")
        server.shutdown()
