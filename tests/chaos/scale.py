"""Measure large inputs without Ray: rows of metrics, shards, classes, trials, and processes that write at once.

    python -m tests.chaos.scale --out results/chaos

Each case runs in a process of its own, whose largest memory is shown. "Memory" includes 0.7 GB for torch and others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raysl.config import Pretraining
from raysl.dataset import SHARDS, DataSet, Manifest, Shard, parquet_writer
from raysl.evaluation.results import KEY, add_rows, rows_of
from raysl.run import Run
from raysl.storage import Folder
from tests.data import make_dataset

_METRICS, _SHARDS, _CLASSES, _TRIALS, _WRITERS, _ROWS = 1_000_000, 2_000, 20_000, 300, 4, 50
Case = Callable[[Path], str]


def _run(folder: Path) -> Run:
    dataset = make_dataset(folder / "set", 40)
    config = Pretraining(str(folder / "set"), str(folder / "run"), batch_size=4, method="predict-rotation")
    return Run.begin(config, dataset, {})


def metrics(folder: Path) -> str:
    """Write rows of metrics, read them as a resumed run does, and make a report."""
    from raysl.reporting import ReportConfig, report

    run = _run(folder)

    def rows() -> Iterator[dict[str, Any]]:
        for step in range(1, _METRICS + 1):
            row = {"step": step, "epoch": step / 10, "loss": 3 / step, "lr": 0.03, "images_per_s": 123.4}
            yield {**row, "over_steps": 1, "workers": 1, "wait_share": 0.01, "eta_s": 12.3}

    begun = time.perf_counter()
    run.write_metrics(rows())
    written = time.perf_counter()
    assert sum(1 for _ in run.metrics_rows()) == _METRICS
    read = time.perf_counter()
    report([str(run.folder)], ReportConfig(str(folder / "report"), images=0))
    shown = time.perf_counter()
    return f"write {written - begun:.0f} s, read {read - written:.0f} s, report {shown - read:.0f} s"


def shards(folder: Path) -> str:
    """Open a data set of many shards, and read all images and some at random."""
    import pyarrow as pa

    (folder / SHARDS).mkdir(parents=True)
    found = []
    for number in range(_SHARDS):
        index = np.arange(4 * number, 4 * number + 4)
        table = pa.table({"index": index, "image": [bytes(100)] * 4, "label": index % 3})
        with parquet_writer(folder / SHARDS / f"{number:05d}.parquet", table.schema) as writer:
            writer.write_table(table)
        found.append(
            Shard(f"{number:05d}.parquet", (4,), (folder / SHARDS / f"{number:05d}.parquet").stat().st_size)
        )
    manifest = Manifest("x", tuple(found), ("a", "b", "c"), "f" * 32, 0)
    DataSet.create(Folder(str(folder)), manifest, [np.arange(4 * _SHARDS) % 3])
    begun = time.perf_counter()
    dataset = DataSet.open(str(folder))
    opened = time.perf_counter()
    table = dataset.read(np.arange(dataset.num_images), ("image", "label"))
    assert table["index"].to_pylist() == list(range(4 * _SHARDS))
    read = time.perf_counter()
    dataset.read(np.random.default_rng(0).integers(0, dataset.num_images, 256))
    drawn = time.perf_counter()
    return f"open {opened - begun:.2f} s, read all {read - opened:.1f} s, 256 at random {drawn - read:.1f} s"


def classes(folder: Path) -> str:
    """Open labels of many classes, and run the probe knn on features of which each class has two."""
    from raysl.probes import Labeled
    from raysl.probes.knn import Config, Knn

    labels_n = np.arange(2 * _CLASSES) % _CLASSES
    names = tuple(f"class {number}" for number in range(_CLASSES))
    made = Manifest("x", (Shard("0.parquet", (2 * _CLASSES,), 1),), names, "f" * 32, 0)
    (folder / "set" / SHARDS).mkdir(parents=True)
    (folder / "set" / SHARDS / "0.parquet").write_bytes(b"x")
    begun = time.perf_counter()
    dataset = DataSet.create(Folder(str(folder / "set")), made, [labels_n])
    assert (dataset.labels() == labels_n).all()
    assert len(dataset.manifest.classes) == _CLASSES
    opened = time.perf_counter()
    features_nd = np.random.default_rng(0).normal(size=(2 * _CLASSES, 64)).astype(np.float32)
    train, test = Labeled(features_nd, labels_n), Labeled(features_nd[:1000], labels_n[:1000])
    values = {row.name: row.value for row in Knn(Config(ks=(1, 5))).run(train, test)}
    assert values["top1/k=1,T=0.07"] == 1
    return (
        f"create and open {opened - begun:.1f} s, probe of 1,000 images {time.perf_counter() - opened:.1f} s"
    )


def trials(folder: Path) -> str:
    """Write the journal of a sweep of many trials and two seeds, read it, and make a report."""
    from raysl.reporting import ReportConfig, report
    from raysl.tuning.results import SweepResults
    from tests.reporting.test_sweep_page import written

    weights = ",".join(f"{number / 15:.3f}" for number in range(15))
    temperatures = ",".join(f"{0.05 * number:.2f}" for number in range(1, 1 + _TRIALS // 15))
    begun = time.perf_counter()
    sweep = written(folder, f"lam={weights}", f"temperature={temperatures}", seeds=(0, 1))
    journal = time.perf_counter()
    rows = SweepResults.open(sweep).rows()
    assert sorted(row["trial"] for row in rows) == list(range(_TRIALS))
    read = time.perf_counter()
    report([sweep], ReportConfig())
    shown = time.perf_counter()
    return f"journal {journal - begun:.1f} s, table {read - journal:.1f} s, report {shown - read:.0f} s"


def _write_rows(uri: str, writer: int) -> None:
    for number in range(_ROWS):
        row = {**dict.fromkeys(KEY, "x"), "name": f"{writer}/{number}", "step": 1, "seed": 0}
        add_rows(Run(Folder(uri)), [{**row, "value": 0.5, "primary": True}])


def writers(folder: Path) -> str:
    """Let several processes add rows of probes to one run at once."""
    run = _run(folder)
    begun = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_rows, args=(str(run.folder), one)) for one in range(_WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = rows_of(run)
    assert len(rows) == _WRITERS * _ROWS
    return f"{len(rows)} of {_WRITERS * _ROWS} rows kept, {time.perf_counter() - begun:.0f} s"


CASES: dict[str, Case] = {
    f"{_METRICS:,} rows of metrics": metrics,
    f"{_SHARDS:,} shards": shards,
    f"{_CLASSES:,} classes": classes,
    f"{_TRIALS} trials": trials,
    f"{_WRITERS} writers of rows": writers,
}


def _measure(name: str, folder: str, answers: Any) -> None:
    said = CASES[name](Path(folder))
    answers.put((said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def measured(name: str) -> str:
    """Run a case in a process of its own and return a row of the table."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_measure, args=(name, folder, answers))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{name} failed.")
        said, memory_gb = answers.get()
    return f"| {name} | {said} | {memory_gb:.2f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.scale", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the table")
    given = parser.parse_args()
    lines = ["| input | times | memory |", "|---|---|---|"]
    for name in CASES:
        lines.append(measured(name))
        print(lines[-1], flush=True)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "scale.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
