"""Ingest as a whole: indices, bad images, fingerprint, interruption, refusals."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl import api, ray_cluster
from raysl.dataset import DataSet, Manifest
from raysl.errors import UserError
from raysl.ingestion import IngestConfig, open_or_ingest, pipeline, tasks
from raysl.ingestion.shard import move, write
from raysl.ingestion.sources import Row
from raysl.storage import Folder, lock
from raysl.storage.lock import DriverLock
from tests.ingestion.reading import jpeg, noise, put

TWO = IngestConfig(shard_images=2, row_group_images=1)
# One task at a time on two CPUs, so that an error in the last unit finds the others done.
ONE_BY_ONE = IngestConfig(shard_images=2, row_group_images=1, cpus_per_task=2)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What ingest says. Only tests of Ray need it for a few small shards."""
    monkeypatch.setattr(tasks, "_MOST_HERE", 100)
    caplog.set_level(logging.INFO, "raysl.ingestion")
    return caplog


def ingest(source: object, dest: Path, config: IngestConfig = TWO) -> DataSet:
    return pipeline.ingest(str(source), str(dest), config)


def refused(source: object, dest: Path) -> str:
    with pytest.raises(UserError) as error:
        ingest(source, dest)
    return str(error.value)


def photos(folder: Path, bad: tuple[int, ...] = (), count: int = 7) -> Path:
    """Images 0.jpg, 1.jpg, ... in the class folders even and odd, some of them broken."""
    for i in range(count):
        path = folder / ("even", "odd")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if i in bad else jpeg(20 * i))
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def assert_sound(data_set: DataSet) -> None:
    """Every index is there once, in its place."""
    table = data_set.read(np.arange(data_set.num_images))
    assert table["index"].to_pylist() == list(range(data_set.num_images))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_folder_becomes_a_data_set(tmp_path: Path) -> None:
    data_set = ingest(photos(tmp_path / "in"), tmp_path / "out")
    assert data_set.num_images == 7
    assert data_set.manifest.classes == ("even", "odd")
    assert data_set.manifest.source == str(tmp_path / "in")
    assert [shard.row_groups for shard in data_set.manifest.shards] == [(1, 1), (1, 1), (1, 1), (1,)]
    assert_sound(data_set)
    rows = data_set.read(np.array([4, 0]))
    assert rows["label"].to_pylist() == [1, 0]
    assert rows["image"].to_pylist() == [jpeg(20), jpeg(0)]
    assert data_set.folder.list() == ["labels.parquet", "manifest.json", "shards"]
    assert data_set.paths(np.array([4, 0])) == ["odd/1.jpg", "even/0.jpg"]
    assert data_set.labels().tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert DataSet.open(str(tmp_path / "out")) == data_set


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_bad_images_are_listed_and_leave_no_hole(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    # In order: even/0 2 4 6, odd/1 3 5. The units are (0 2) (4 6) (1 3) (5): one loses an image, one loses both.
    data_set = ingest(photos(tmp_path / "in", bad=(2, 1, 3)), tmp_path / "out")
    assert data_set.manifest.num_bad == 3
    assert any("3 images could not be decoded (3 '" in message for message in said.messages)
    assert [row["path"] for row in data_set.bad_images()] == ["even/2.jpg", "odd/1.jpg", "odd/3.jpg"]
    assert all(row["reason"] for row in data_set.bad_images())
    assert_sound(data_set)
    assert data_set.read(np.arange(4))["image"].to_pylist() == [jpeg(20 * i) for i in (0, 4, 6, 5)]
    shutil.rmtree(tmp_path / "in" / "odd")
    assert ingest(tmp_path / "in", tmp_path / "again").manifest.fingerprint != data_set.manifest.fingerprint


def test_the_same_images_have_the_same_fingerprint(tmp_path: Path) -> None:
    first = ingest(photos(tmp_path / "in"), tmp_path / "a")
    alone = ingest(tmp_path / "in", tmp_path / "b", ONE_BY_ONE)
    assert first.manifest == alone.manifest
    assert first.read(np.arange(7)) == alone.read(np.arange(7))
    (tmp_path / "in" / "odd" / "5.jpg").write_bytes(jpeg(255))
    assert ingest(tmp_path / "in", tmp_path / "c").manifest.fingerprint != first.manifest.fingerprint


def test_a_finished_data_set_is_left_alone_and_ray_does_not_start(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(photos(tmp_path / "in"), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    said.clear()
    ingest(tmp_path / "in", tmp_path / "out")
    assert "is complete: 7 images" in said.messages[0]
    monkeypatch.setattr(ray_cluster, "start", lambda *_: pytest.fail("Ray starts for nothing"))
    assert api.ingest(tmp_path / "in", tmp_path / "out").num_images == 7
    assert "already holds a data set of another source" in refused(photos(tmp_path / "in2"), tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    # A change of the source is said; the data set stays.
    (tmp_path / "in" / "odd" / "new.jpg").write_bytes(jpeg(9))
    said.clear()
    assert api.ingest(tmp_path / "in", tmp_path / "out").num_images == 7
    assert "files of the source were added, removed or written since" in said.messages[-1]
    assert "delete that folder or give another DEST" in said.messages[-1]
    assert snapshot(tmp_path / "out") == before


def write_tables(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        images = [jpeg(10 * number + i) for i in range(2)]
        table = pa.table({"image": images, "label": [number] * 2})
        path, plain = folder / f"{number}.parquet", {"use_dictionary": False, "write_statistics": False}
        pq.write_table(table, path, write_page_checksum=True, **plain)


def overwrite(path: Path, data: bytes) -> None:
    """Change a file without a trace in the listing: its size and time stay."""
    before = path.stat()
    path.write_bytes(data)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def stopped(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """An ingest that stopped at the last of three tables; its source, its destination, the undamaged table."""
    write_tables(tmp_path / "in")
    table, out = tmp_path / "in" / "2.parquet", tmp_path / "out"
    good = table.read_bytes()
    overwrite(table, good[:300] + b"?" + good[301:])
    with pytest.raises(UserError, match="Cannot read the Parquet file"):
        ingest(tmp_path / "in", out, ONE_BY_ONE)
    return tmp_path / "in", out, good


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_an_interrupted_ingest_resumes(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    source, out, good = stopped(tmp_path)
    with pytest.raises(UserError, match="No data set"):
        DataSet.open(str(out))
    assert "unfinished data set of another source" in refused(photos(tmp_path / "other"), out)
    before = snapshot(out / "shards")
    assert len(before) == 2
    (out / "shards" / "00002.parquet.0123.tmp").write_bytes(b"half")

    overwrite(source / "2.parquet", good)
    said.clear()
    data_set = ingest(source, out, ONE_BY_ONE)
    assert "2 of 3 shards are done" in said.messages[0]
    assert before.items() <= snapshot(out / "shards").items()
    assert len(snapshot(out / "shards")) == 3
    assert data_set.manifest == ingest(source, tmp_path / "whole").manifest
    assert data_set.manifest.classes == ("0", "1", "2")
    assert_sound(data_set)


def test_a_source_that_changed_starts_again(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    source, out, _ = stopped(tmp_path)
    (source / "2.parquet").unlink()
    said.clear()
    assert ingest(source, out, ONE_BY_ONE).num_images == 4
    assert "have changed" in said.messages[0]


def test_a_class_without_an_image_is_named(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "in", "a.jpg")
    rows = ("file_name,label", "gone.jpg,dog", "lost.jpg,ape", "a.jpg,cat")
    (tmp_path / "in" / "list.csv").write_text("\n".join(rows))
    ingest(tmp_path / "in" / "list.csv", tmp_path / "out")
    assert "Ingested 1 image in 3 classes, of which 2 have no image (ape, dog), into" in said.text


def test_moving_a_shard_rewrites_its_indices(tmp_path: Path) -> None:
    rows = [Row(jpeg(i), "abc"[i], f"{i}.jpg") for i in range(3)]
    folder = Folder(str(tmp_path))
    written = write(folder, 0, 7, rows, decoding=None, classes="abc", rows_per_group=2)
    moved = move(folder, written, 0)
    assert moved.row_groups == (2, 1)
    manifest = Manifest("made", (moved.shard,), ("a", "b", "c"), "f00d", 0)
    data_set = DataSet.create(folder, manifest, [np.arange(3)])
    assert_sound(data_set)
    assert data_set.paths() == ["0.jpg", "1.jpg", "2.jpg"]
    assert data_set.read(np.arange(3))["label"].to_pylist() == data_set.labels().tolist() == [0, 1, 2]


def test_an_error_of_the_source_is_told_from_one_of_the_destination(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield Row(jpeg(), None, "0.jpg")
        raise FileNotFoundError("gone")

    with pytest.raises(UserError, match=r"^Cannot read the source: gone"):
        write(Folder(str(tmp_path)), 0, 0, rows(), decoding=None, classes="", rows_per_group=2)


def test_what_was_found_is_said_before_and_after(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    table = pa.table({"image": [jpeg(i) for i in range(3)], "label": pa.array([0, -1, 1], pa.int64())})
    pq.write_table(table, tmp_path / "x.parquet")
    data_set = ingest(tmp_path / "x.parquet", tmp_path / "out")
    assert not data_set.has_labels
    assert data_set.read(np.array([0])).column_names == ["index", "image"]
    assert said.messages[0].startswith("Found:\n")
    assert "layout    one table (parquet)" in said.messages[0]
    assert "labels: none, although there is a column 'label'" in said.messages[-1]


def before_the_end(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something while an ingest has written all shards and has not ended; drivers look often for each other."""
    move = pipeline._renumber_all

    def renumber_all(*given: Any) -> None:
        monkeypatch.setattr(pipeline, "_renumber_all", move)
        action()
        move(*given)

    monkeypatch.setattr(pipeline, "_renumber_all", renumber_all)
    monkeypatch.setattr(DriverLock.__init__, "__defaults__", ("sweep", 0.1, False))


def test_a_second_ingest_into_one_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, said = photos(tmp_path / "in"), tmp_path / "out", []
    before_the_end(monkeypatch, lambda: said.append(refused(source, out)))
    assert ingest(source, out).read(np.arange(7)).num_rows == 7
    assert "works on the data set" in said[0]
    assert not (out / lock.NAME).exists()


def test_two_commands_that_need_the_same_source_ingest_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    source, cache = str(photos(tmp_path / "in")), tmp_path / "cache"
    with ThreadPoolExecutor(1) as pool:
        second: list[Future[DataSet]] = []
        waits = threading.Event()
        wait = DriverLock._wait_until_stale

        def watched(lock: DriverLock, found: dict[str, Any]) -> None:
            waits.set()
            wait(lock, found)

        def begin_second() -> None:
            second.append(pool.submit(open_or_ingest, source, cache))
            assert waits.wait(30)

        monkeypatch.setattr(DriverLock, "_wait_until_stale", watched)
        before_the_end(monkeypatch, begin_second)
        first = open_or_ingest(source, cache)
        assert second[0].result(timeout=60).folder == first.folder
    assert said.text.count("Ingested 7 images") == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_an_ingest_whose_place_was_taken_over_ends_without_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    before_the_end(monkeypatch, lambda: Folder(str(out)).write_json(lock.NAME, {"id": "another"}))
    assert "taken over" in refused(source, out)
    assert not DataSet.exists_at(str(out))


def test_an_object_is_not_taken_for_what_another_process_wrote_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = sorted(photos(tmp_path / "in").rglob("*.jpg")), tmp_path / "out"
    enter = DriverLock.__enter__

    def another_ends_first(lock: DriverLock) -> DriverLock:
        monkeypatch.setattr(DriverLock, "__enter__", enter)
        pipeline.ingest([str(file) for file in files], str(out))
        return enter(lock)

    monkeypatch.setattr(DriverLock, "__enter__", another_ends_first)
    with pytest.raises(UserError, match="another source of the same name"):
        pipeline.ingest([str(file) for file in reversed(files)], str(out))
    assert DataSet.open(str(out)).num_images == 7
    assert not (out / "_source").exists()


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(photos(tmp_path / "in", bad=tuple(range(7))), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_refusals_touch_nothing(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(tmp_path / "empty", out)
    assert "does not exist" in refused(tmp_path / "nowhere", out)
    assert "no split" in refused(f"{source}#train", out)
    assert "inside the source" in refused(source, source / "out")
    assert not out.exists()
    assert not (source / "out").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "not empty" in refused(source, tmp_path / "mine")
    assert "is a file" in refused(source, tmp_path / "mine" / "thesis.txt")
    assert "Cannot write" in refused(source, tmp_path / "mine" / "thesis.txt" / "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("way", ["link/out", "link/../in/out"])
def test_a_destination_inside_of_the_source_is_refused_also_by_a_link(tmp_path: Path, way: str) -> None:
    source = photos(tmp_path / "in")
    (tmp_path / "link").symlink_to(source)
    assert "inside the source" in refused(source, tmp_path / way)
    assert "inside the source" in refused(tmp_path / "link", source / "out")
    assert sorted(path.name for path in source.iterdir()) == ["even", "odd"]


def test_a_destination_or_a_list_with_names_that_are_not_utf_8_is_refused(tmp_path: Path) -> None:
    source, name = photos(tmp_path / "in"), os.fsdecode(b"\xff")
    assert "is not in UTF-8" in refused(source, tmp_path / name)
    put(tmp_path / "full", name)
    assert "not empty: it holds a name that is not in UTF-8" in refused(source, tmp_path / "full")
    with pytest.raises(UserError, match="is not in UTF-8"):
        pipeline.ingest([tmp_path / "full" / name], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is not in UTF-8"):
        open_or_ingest(str(tmp_path / name))


def test_no_image_at_all_can_be_decoded(tmp_path: Path) -> None:
    message = refused(photos(tmp_path / "in", bad=tuple(range(7))), tmp_path / "out")
    assert "None of the 7 images" in message
    assert "even/0.jpg: " in message
    assert not (tmp_path / "out").exists()
    # Once the source is corrected, the same command succeeds.
    assert ingest(photos(tmp_path / "in"), tmp_path / "out").num_images == 7
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.jpg").write_bytes(b"")
    assert "The only image of" in (message := refused(tmp_path / "one", tmp_path / "no"))
    assert "cannot be decoded: 1.jpg: is empty. Nothing" in message
    (tmp_path / "list.csv").write_text("file_name,label\n")
    assert refused(tmp_path / "list.csv", tmp_path / "no").endswith(
        "holds no images: it is empty, or has no rows."
    )


def test_a_source_is_ingested_again_when_it_changes(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    source, cache = photos(tmp_path / "in"), tmp_path / "cache"
    first = open_or_ingest(str(source), cache)
    assert "once" in said.messages[0]
    said.clear()
    assert open_or_ingest(str(source), cache) == first
    assert not said.messages
    (source / "even" / "0.jpg").unlink()
    assert open_or_ingest(str(source), cache).num_images == 6
    assert len(list(cache.iterdir())) == 2
    assert open_or_ingest(str(first.folder), cache) == first


@pytest.mark.parametrize("change", ["written", "added"])
def test_a_table_is_ingested_again_when_a_file_that_it_names_changes(
    tmp_path: Path, change: str, said: pytest.LogCaptureFixture
) -> None:
    source, cache = photos(tmp_path / "in"), tmp_path / "cache"
    table = source / "list.csv"
    table.write_text("file_name\neven/0.jpg\nodd/1.jpg\nlate.jpg\n")
    first = open_or_ingest(str(table), cache)
    ingest(table, tmp_path / "out")
    assert (open_or_ingest(str(table), cache), first.num_images) == (first, 2)
    changed = source / {"written": "odd/1.jpg", "added": "late.jpg"}[change]
    changed.write_bytes(noise(0))
    again = open_or_ingest(str(table), cache)
    assert noise(0) in again.read(np.arange(again.num_images))["image"].to_pylist()
    ingest(table, tmp_path / "out")
    assert "files of the source were added, removed or written since" in said.messages[-1]


def test_a_source_is_ingested_again_once_a_package_that_it_needs_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py")
    source, cache = str(photos(tmp_path / "in")), tmp_path / "cache"
    (tmp_path / "in" / "odd" / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "resvg_py", None)
        without.setattr(importlib.metadata, "distributions", lambda **_: ())
        first = open_or_ingest(source, cache)
        assert open_or_ingest(source, cache) == first
    assert (first.num_images, first.manifest.num_bad) == (7, 1)
    second = open_or_ingest(source, cache)
    assert (second.num_images, second.manifest.num_bad) == (8, 0)
    assert open_or_ingest(source, cache) == second


def test_the_cache_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSL_CACHE", str(tmp_path / "cache"))
    assert str(open_or_ingest("shapes:5").folder).startswith(str(tmp_path / "cache" / "shapes-5"))


@pytest.mark.slow
def test_real_cifar10(shared_data: Path, tmp_path: Path) -> None:
    data_set = ingest(f"{shared_data}/cifar10#test", tmp_path / "out", IngestConfig())
    assert data_set.num_images == 10_000
    assert data_set.manifest.classes[:2] == ("airplane", "automobile")
    assert data_set.manifest.num_bad == 0
    labels = data_set.read(np.arange(10_000), columns=("label",))["label"].to_numpy()
    assert np.bincount(labels).tolist() == [1000] * 10
    assert_sound(data_set)


def test_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    data_set = ingest(shared_data / "imagenet-sample", tmp_path / "out", IngestConfig(shard_mb=4))
    assert data_set.num_images == 100
    assert len(data_set.manifest.shards) >= 3
    assert not data_set.has_labels
