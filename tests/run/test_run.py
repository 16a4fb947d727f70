"""A run's folder: whose it is, and what survives in it."""

from __future__ import annotations

import errno
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from raysl import checkpoint
from raysl import run as run_module
from raysl.config import Pretraining, ViewConfig, defaults
from raysl.config.run_folder import check_free, check_free_for_sweep
from raysl.dataset import DataSet, Manifest, Shard
from raysl.errors import UserError
from raysl.optim import OptimConfig
from raysl.run import METADATA, METRICS, MetricsLog, Run
from raysl.storage import Folder
from raysl.storage.records import signed_line
from tests.data import make_dataset


def dataset(fingerprint: str = "f" * 32) -> DataSet:
    return DataSet(
        Folder("unused"), Manifest("test", (Shard("00000.parquet", (8,), 800),), (), fingerprint, 0)
    )


def config(tmp_path: Path, **values: Any) -> Pretraining:
    return Pretraining(data="unused", run=str(tmp_path / "run"), **values)


def begin(tmp_path: Path, **values: Any) -> Run:
    return Run.begin(config(tmp_path, **values), dataset(), {"permutations_digest": "abc"})


def save(run: Run) -> None:
    saver = checkpoint.Saver(run.checkpoints, checkpoint.SaveConfig(), 0, 1)
    saver.save(3, {}, None)
    saver.wait()


def test_a_metadata_file_says_what_the_numbers_depend_on(tmp_path: Path) -> None:
    run = begin(tmp_path)
    metadata = Run.open(str(tmp_path / "run")).metadata()
    assert metadata["facts"] == {"permutations_digest": "abc"}
    assert metadata["data"]["fingerprint"] == "f" * 32
    assert metadata["data"]["num_images"] == 8
    assert {"python", "packages", "code", "workers", "started"} <= set(metadata["sessions"][0])
    assert run.config() == config(tmp_path)


def test_the_same_configuration_goes_on_on_other_workers(tmp_path: Path) -> None:
    begin(tmp_path, workers=2)
    run = begin(tmp_path, workers=4, log_every=3, channels_last=False)
    assert [session["workers"] for session in run.metadata()["sessions"]] == [2, 4]
    assert run.config().workers == 2


def test_another_configuration_is_refused_and_the_fields_are_named(tmp_path: Path) -> None:
    run = begin(tmp_path)
    before = run.folder.read(METADATA)
    save(run)
    with pytest.raises(
        UserError, match=r"these differ: optim\.lr is .* now; seed is 0 in the run and 1 now\."
    ):
        begin(tmp_path, seed=1, optim=OptimConfig(lr=1.0))
    with pytest.raises(UserError, match=r"parts\.pirl\.lam"):
        begin(tmp_path, parts={"pirl": {"lam": 0.1}})
    with pytest.raises(UserError, match=r"these differ: method is pirl-jigsaw in the run and simclr now\."):
        begin(tmp_path, method="simclr")
    with pytest.raises(UserError, match=r"epochs is .*--backbone\.weights .*/run"):
        begin(tmp_path, epochs=5)
    assert run.folder.read(METADATA) == before


def test_a_run_that_has_saved_nothing_takes_another_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raysl")
    # Its code is no longer there, and must not be asked for.
    (tmp_path / "own.py").touch()
    begin(tmp_path, view=ViewConfig(recipe=f"{tmp_path}/own.py:mispelled"))
    (tmp_path / "own.py").unlink()
    assert Run.find(str(tmp_path / "run")) is None
    run = begin(tmp_path, seed=1)
    assert "before it wrote any result. It begins anew with other values of seed" in caplog.text
    assert (run.config().seed, len(run.metadata()["sessions"])) == (1, 1)
    again = Run.begin(config(tmp_path, seed=1), dataset("e" * 32), {})
    assert "with other values of images" in caplog.text
    assert again.metadata()["data"]["fingerprint"] == "e" * 32


@pytest.mark.parametrize("result", ["metrics.jsonl", "probes/rows/a.jsonl", "export/timm/model.safetensors"])
def test_a_run_with_any_result_is_not_replaced(tmp_path: Path, result: str) -> None:
    """Someone may have deleted its checkpoints."""
    run = begin(tmp_path, seed=1)
    run.folder.write(result, signed_line({"step": 10, "loss": 1.0}))
    assert Run.find(str(tmp_path / "run")) == run
    with pytest.raises(UserError, match="begun with another configuration; these differ: seed"):
        begin(tmp_path, seed=2)


def test_other_images_are_refused(tmp_path: Path) -> None:
    save(begin(tmp_path))
    with pytest.raises(UserError, match=r"fingerprint ffffffffffff .* has eeeeeeeeeeee"):
        Run.begin(config(tmp_path), dataset("e" * 32), {})


NO_DATA = b'{"config": {}, "data": {}, "sessions": []}'


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"config": {}}', b"\xff\xfe", NO_DATA])
def test_a_damaged_metadata_file_is_told(tmp_path: Path, damage: bytes) -> None:
    run = begin(tmp_path)
    run.folder.write(METADATA, damage)
    with pytest.raises(UserError, match=rf"metadata of the run at .*run' is damaged.*Restore {METADATA}"):
        Run.open(str(tmp_path / "run"))
    with pytest.raises(UserError, match="is damaged"):
        begin(tmp_path)
    assert run.folder.read(METADATA) == damage


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No run at .*raysl pretrain --data DATA --run"):
        Run.open(str(tmp_path))
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        begin(tmp_path).newest()
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "sweep.jsonl").touch()
    with pytest.raises(
        UserError, match=r"swept' is a sweep\. Give one of its runs: .*swept/trials/NNNN/seed-S"
    ):
        Run.open(str(tmp_path / "swept"))


def test_metrics_are_in_the_file_after_a_flush(tmp_path: Path) -> None:
    run = begin(tmp_path)
    assert run.metrics() == []
    log = MetricsLog(run, 0)
    for step in range(1, 4):
        log.add({"step": step, "loss": 1.0 / step})
    log.flush()
    assert run.metrics() == [{"step": step, "loss": 1.0 / step} for step in range(1, 4)]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_rows_after_the_restored_step_are_dropped(tmp_path: Path) -> None:
    run = begin(tmp_path)
    first = MetricsLog(run, 0)
    for step in (10, 20, 30):
        first.add({"step": step, "session": 1})
    first.flush()
    second = MetricsLog(run, 20)
    second.add({"step": 30, "session": 2})
    second.flush()
    assert [(row["step"], row["session"]) for row in run.metrics()] == [(10, 1), (20, 1), (30, 2)]


def test_a_write_that_fails_leaves_the_rows_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path)
    log = MetricsLog(run, 0)
    log.add({"step": 1})
    log.flush()
    log.add({"step": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError("killed while writing")))
        with pytest.raises(UserError):
            log.flush()
    assert run.metrics() == [{"step": 1}]
    log.flush()
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_rows_wait_for_a_file_system_that_is_away(tmp_path: Path) -> None:
    run = begin(tmp_path)
    log = MetricsLog(run, 0)
    log.add({"step": 1})
    (tmp_path / "run").rename(tmp_path / "aside")
    back = threading.Timer(0.3, lambda: (tmp_path / "aside").rename(tmp_path / "run"))
    back.start()
    log.flush()
    back.join()
    assert run.metrics() == [{"step": 1}]


@pytest.mark.parametrize("line", ["null", "3", "[]", '"x"'])
def test_a_row_that_is_no_object_is_damage(tmp_path: Path, line: str) -> None:
    run = begin(tmp_path)
    run.folder.write(METRICS, f"{line}\n".encode())
    with pytest.raises(UserError, match="is damaged: a row is no object"):
        run.metrics_columns(["loss"])


def test_an_object_store_holds_rows_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_PART_ROWS", 2)
    run = Run(Folder(f"memory://{tmp_path.name}/run"))
    log = MetricsLog(run, 0)
    for step in range(1, 6):
        log.add({"step": step})
        log.flush()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    assert len(run.metrics_parts()) == 3
    MetricsLog(run, 4)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert run.metrics_parts() == []


def test_damaged_metrics_are_told_and_a_torn_last_row_is_none(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.folder.write(METRICS, b'{"step": 1}\n{"st')
    assert run.metrics() == [{"step": 1}]
    run.folder.write(METRICS, b'{"step": 1}\n{"st\n')
    with pytest.raises(UserError, match=rf"{METRICS} .* is damaged"):
        MetricsLog(run, 0)


@pytest.mark.parametrize("name", ["passport.json", METADATA])
def test_a_run_of_the_old_format_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    old = {"config": {"trunk": {"name": "small"}}, "data": {}, "sessions": []}
    Folder(str(tmp_path / "run")).write_json(name, old)
    with pytest.raises(UserError, match=r"made by raysl 0\.1.*Train it again"):
        Run.open(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"made by raysl 0\.1"):
        begin(tmp_path)


def test_a_full_disk_is_told_and_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(begin(tmp_path), 0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with pytest.raises(UserError, match=r"No space left to write .*tensorboard"):
        log.add({"step": 1, "loss": 1.0})


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    log = MetricsLog(begin(tmp_path), 0)
    log.add({"step": 3, "loss": 0.25, "eta_s": 1.0})
    log.flush()
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    found = set(re.findall(rb"brain\.Event:2|loss|optim\.lr|_hparams_|eta_s", events.read_bytes()))
    assert found == {b"loss", b"brain.Event:2", b"optim.lr", b"_hparams_"}


def test_rows_are_lines_of_json() -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 0.5}, {"step": 2}]
    assert [json.loads(line) for line in run_module.jsonl(rows).splitlines()] == rows
    assert run_module.jsonl([]) == b""


def test_a_data_set_is_no_run(tmp_path: Path) -> None:
    images = make_dataset(tmp_path / "set", 10)
    with pytest.raises(UserError, match="is a data set and no run"):
        Run.open(str(images.folder))
    with pytest.raises(UserError, match=r"which is a data set\. Give another folder to --run"):
        check_free(str(images.folder))


@pytest.mark.parametrize(
    "names",
    [
        (),
        (".DS_Store", "driver.json", f"driver.json.{'0' * 32}"),
        (
            "checkpoints",
            "features",
            "features-4",
            "probes",
            "round-1",
            "metadata.json.0123abcd.tmp",
            "train.log",
        ),
        ("1.jpg", METADATA),
    ],
)
def test_a_folder_with_what_raysl_writes_is_free(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    check_free(str(tmp_path))


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    check_free(str(tmp_path / "new"))
    (tmp_path / "features").mkdir()
    (tmp_path / "1.jpg").touch()
    said = r"--run is .*, a folder that is not empty and holds no run: '1\.jpg' is in it\. Give --run a new folder"
    with pytest.raises(UserError, match=said):
        check_free(str(tmp_path))
    with pytest.raises(UserError, match=said):  # before the data are looked for
        defaults.validated_config({"data": "missing", "run": str(tmp_path)})


def test_a_sweep_is_not_written_among_other_things(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    check_free_for_sweep(str(tmp_path))
    (tmp_path / "1.jpg").touch()
    with pytest.raises(UserError, match=r"holds no sweep: '1\.jpg' is in it"):
        check_free_for_sweep(str(tmp_path))
    (tmp_path / "sweep.jsonl").touch()
    check_free_for_sweep(str(tmp_path))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / METADATA).touch()
    with pytest.raises(UserError, match="which is the folder of a run"):
        check_free_for_sweep(str(tmp_path / "run"))


def test_files_that_a_run_learns_from_may_not_change_after_its_first_checkpoint(tmp_path: Path) -> None:
    def facts(digest: str, step: int = 4) -> dict[str, Any]:
        return {"labels_digest": digest, "teacher": {"run": f"{digest}/run", "step": step}, "chance": step}

    Run.begin(config(tmp_path), dataset(), facts("a"))
    run = Run.begin(config(tmp_path), dataset(), facts("b"))
    assert run.metadata()["facts"] == facts("b")
    save(run)
    with pytest.raises(
        UserError, match=r"labels_digest was b and is c now; teacher\.step was 4 and is 9 now\."
    ):
        Run.begin(config(tmp_path), dataset(), facts("c", 9))
    moved = {**facts("b"), "teacher": {"run": "moved", "step": 4}, "of_a_later_version": 1}
    assert Run.begin(config(tmp_path), dataset(), moved).metadata()["facts"] == facts("b")
