"""Every kind of file that raysl writes, damaged in five ways: the reader refuses it or has a defined result.

`python tests/test_corruption.py` prints the table.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysl import rng
from raysl.backbone.external_weights import parse, read_file
from raysl.backbone.network import BackboneConfig, build
from raysl.checkpoint import SaveConfig, Saver
from raysl.clustering.lloyd import Clustering
from raysl.clustering.state import State
from raysl.config import Pretraining
from raysl.contrastive.bank import BankConfig, MemoryBank
from raysl.dataset import BAD_IMAGES, SHARDS, DataSet, Manifest, Shard, parquet_writer
from raysl.errors import UserError
from raysl.evaluation.results import KEY, MODEL, ROWS, add_rows, rows_of
from raysl.extraction import SETTINGS, load
from raysl.extraction.pca import Projection
from raysl.ingestion.journal import Header, Journal
from raysl.model_export import ExportConfig, export
from raysl.objectives.clusterfit import Assignments
from raysl.reporting.report_runs import groups
from raysl.run import METRICS, Run
from raysl.storage import Folder
from raysl.storage.feature_files import FINISHED, FeatureForm, part_file, write_part
from raysl.storage.feature_store import FeatureStore
from raysl.storage.lock import NAME, DriverLock
from raysl.storage.parquet_parts import footer
from raysl.storage.records import signed, signed_lines, write_record
from raysl.tuning.journal import Journal as SweepJournal

DAMAGES = ("truncated", "flipped bit", "empty", "absent", "a folder")
FLIPS = 12
NUM_IMAGES = 12

Result = bytes


def digest(*values: Any) -> Result:
    return hashlib.blake2b(repr(values).encode()).digest()


def arrays(*values: Any) -> Result:
    return digest(*(np.asarray(value).tobytes() for value in values))


class Kind(NamedTuple):
    """A kind of file: its path, the verb that reads it, and a function that reads it like the verb."""

    name: str
    verb: str
    path: str
    read: Callable[[str], Result]
    # Damages whose result is defined and not a refusal.
    defined: Mapping[str, str] = MappingProxyType({})


def dataset(place: Path) -> None:
    folder = Folder(str(place))
    labels_n = np.arange(NUM_IMAGES) % 3
    images = []
    for i in range(NUM_IMAGES):
        stream = io.BytesIO()
        pixels = rng.generator("corruption", i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG")
        images.append(stream.getvalue())
    names = [f"{i}.jpg" for i in range(NUM_IMAGES)]
    table = pa.table({"index": np.arange(NUM_IMAGES), "image": images, "path": names, "label": labels_n})
    buffer = io.BytesIO()
    with parquet_writer(buffer, table.schema) as writer:
        writer.write_table(table)
    (folder / SHARDS).write("00000.parquet", buffer.getvalue())
    shard = Shard("00000.parquet", (NUM_IMAGES,), len(buffer.getvalue()), zlib.crc32(footer(buffer)))
    DataSet.create(folder, Manifest("x", (shard,), ("a", "b", "c"), "f" * 32, 0), [labels_n])


def make(root: Path) -> None:
    """Write one file of every kind."""
    dataset(root / "set")
    config = Pretraining(str(root / "set"), str(root / "run"), batch_size=4)
    run = Run.begin(config, DataSet.open(str(root / "set")), {})
    run.write_metrics([{"step": step, "epoch": 1.0, "loss": 1 / step} for step in range(1, 9)])
    row = {**dict.fromkeys(KEY, "x"), "step": 1, "seed": 0, "value": 0.5, "primary": True}
    add_rows(run, [{**row, "name": f"n{i}"} for i in range(4)])
    (written,) = (run.folder / ROWS).list()
    shutil.move(f"{run.folder}/{ROWS}/{written}", f"{run.folder}/{ROWS}/w.jsonl")
    saver = Saver(run.checkpoints, SaveConfig(), 0, 1)
    state = {f"backbone.{k}": v for k, v in build(BackboneConfig()).state_dict().items()}
    saver.save(1, {"network": state}, MemoryBank(4, 4, BankConfig(), 0).state())
    saver.wait()
    noise = rng.generator("features")
    rows_nd = noise.random((NUM_IMAGES, 8), np.float32)
    features = Folder(str(root / "features"))
    write_part(features, (0, NUM_IMAGES), "pooled", rows_nd, FeatureForm())
    write_record(features, FINISHED, {"parts": [[0, NUM_IMAGES]], "encoder": "e"})
    Projection(rows_nd[0].astype(np.float64), np.eye(8), 0.5).save(features)
    clusters = Folder(str(root / "clusters"))
    stream = io.BytesIO()
    np.save(stream, rows_nd[:3])
    clusters.write("centroids.npy", stream.getvalue())
    write_record(clusters, "summary.json", {"centroids_crc32": zlib.crc32(stream.getvalue()), "k": 3})
    columns = {"index": np.arange(NUM_IMAGES), "cluster": np.arange(NUM_IMAGES) % 3}
    table = pa.table(columns).replace_schema_metadata(signed({"K": "3"}))
    stream = io.BytesIO()
    pq.write_table(table, stream, write_page_checksum=True)
    clusters.write("assignments.parquet", stream.getvalue())
    State(0, rows_nd[:3], [[{"objective": 1.0}]]).save(clusters)
    journal = SweepJournal(Folder(str(root / "sweep")))
    journal.add({"event": "sweep", "space": []})
    journal.add({"event": "score", "trial": 0, "score": 0.5})
    Journal(Folder(str(root / "ingest"))).start(Header("source", "stamp", (1, 2), {}))
    (root / "set" / "bad_images.jsonl").write_bytes(
        signed_lines([{"path": "x.jpg", "reason": "cut short"}] * 3)
    )
    write_record(
        Folder(str(root / "probed")), MODEL, {"name": "weights", "identity": {"file": "weights.pth"}}
    )
    export(run, ExportConfig("safetensors", str(root / "exported")))
    with DriverLock(run.folder, "run"):
        record = (run.folder / "").read(NAME)
    run.folder.write(NAME, record.replace(b'"scope": "', b'"scope": "other '))
    torch.save({"fc.weight": torch.ones(8, 8)}, root / "weights.pth")


def checkpoint(root: str) -> Result:
    state, banks = Run.open(f"{root}/run").newest().load()
    return digest([(k, v.numpy().tobytes()) for k, v in state["network"].items()], [str(b) for b in banks])


def shard(root: str) -> Result:
    table = DataSet.open(f"{root}/set").read(np.arange(NUM_IMAGES), ("image", "label", "path"))
    return digest(table.to_pylist())


def state(root: str) -> Result:
    found = State.load(Folder(f"{root}/clusters"))
    return digest(
        found.restart, found.curves, None if found.centroids_kd is None else found.centroids_kd.tolist()
    )


def projection(root: str) -> Result:
    found = Projection.load(f"{root}/features")
    return arrays(found.mean_d, found.components_dm)


def weights(root: str) -> Result:
    found = parse(read_file(f"{root}/weights.pth"), "weights.pth")
    return digest([(k, v.numpy().tobytes()) for k, v in found.items()])


def lock(root: str) -> Result:
    path = Path(root) / "run" / NAME
    before = path.read_bytes() if path.is_file() else None
    with DriverLock(Folder(f"{root}/run"), "run", beat_s=0.01):
        pass
    if before is not None:
        path.write_bytes(before)
    return digest("held")


def exported(root: str) -> Result:
    found = load(f"{root}/exported")
    return arrays(found(np.full((20, 20, 3), 99, np.uint8)))


CHECKPOINT = "run/checkpoints/step-000000001"
KINDS = [
    Kind("manifest", "all", "set/manifest.json", lambda r: digest(DataSet.open(f"{r}/set").manifest)),
    Kind("labels", "probe", "set/labels.parquet", lambda r: arrays(DataSet.open(f"{r}/set").labels())),
    Kind("shard", "pretrain", "set/shards/00000.parquet", shard),
    Kind("run metadata", "all", "run/metadata.json", lambda r: digest(Run.open(f"{r}/run").metadata())),
    Kind("metrics", "report", f"run/{METRICS}", lambda r: digest(Run.open(f"{r}/run").metrics()),
         {"absent": "no rows", "empty": "no rows", "truncated": "rows before the cut"}),
    Kind("rows", "report", f"run/{ROWS}/w.jsonl", lambda r: digest(rows_of(Run.open(f"{r}/run"))),
         {"absent": "no rows"}),
    Kind("checkpoint state", "pretrain", f"{CHECKPOINT}/state.pt", checkpoint),
    Kind("checkpoint bank", "pretrain", f"{CHECKPOINT}/bank-0000-of-0001.rows", checkpoint),
    Kind("checkpoint manifest", "pretrain", f"{CHECKPOINT}/manifest-0000-of-0001.json", checkpoint),
    Kind("features", "cluster", f"features/{part_file((0, NUM_IMAGES))}",
         lambda r: arrays(FeatureStore.open(f"{r}/features", "pooled").load())),
    Kind("features record", "cluster", f"features/{FINISHED}",
         lambda r: digest(FeatureStore.open(f"{r}/features", "pooled").metadata),
         {"absent": "read as of another program"}),
    Kind("projection", "features", "", projection),
    Kind("centroids", "cluster", "clusters/centroids.npy",
         lambda r: arrays(Clustering.open(f"{r}/clusters").centroids())),
    Kind("clusters record", "cluster", "clusters/summary.json",
         lambda r: digest(Clustering.open(f"{r}/clusters").summary())),
    Kind("assignments", "clusterfit", "clusters/assignments.parquet",
         lambda r: arrays(Assignments.read(f"{r}/clusters/assignments.parquet", NUM_IMAGES).clusters_n)),
    Kind("k-means state", "cluster", "clusters/state.npz", state, {"absent": "starts again"}),
    Kind("sweep journal", "sweep", "sweep/sweep.jsonl",
         lambda r: digest(SweepJournal(Folder(f"{r}/sweep")).rows), {"absent": "a new sweep"}),
    Kind("ingest journal", "ingest", "ingest/_journal/source.json",
         lambda r: digest(Journal(Folder(f"{r}/ingest")).header()), {"absent": "starts again"}),
    Kind("bad images", "ingest", f"set/{BAD_IMAGES}", lambda r: digest(DataSet.open(f"{r}/set").bad_images()),
         {"absent": "none", "empty": "none"}),
    Kind("probed model", "report", f"probed/{MODEL}", lambda r: digest(groups([f"{r}/probed"]))),
    Kind("driver lock", "pretrain", f"run/{NAME}", lock,
         dict.fromkeys(("truncated", "flipped bit", "empty", "absent"), "taken as no lock")),
    Kind("exported settings", "load", f"exported/{SETTINGS}", exported, {"absent": "read from the weights"}),
    Kind("weights", "export", "weights.pth", weights),
]  # fmt: skip


def damaged(path: Path, damage: str) -> Iterator[str]:
    """Damage a file, once or several times; the file is as before in the end."""
    data = path.read_bytes()
    versions: list[bytes | None] = [None]
    if damage == "flipped bit":
        generator = rng.generator("flips", path.name)
        places = generator.integers(0, len(data), FLIPS)
        versions = [
            data[:place] + bytes([data[place] ^ (1 << int(generator.integers(8)))]) + data[place + 1 :]
            for place in places
        ]
    elif damage in ("truncated", "empty"):
        versions = [data[: len(data) // 2 if damage == "truncated" else 0]]
    for version in versions:
        path.unlink()
        if version is not None:
            path.write_bytes(version)
        elif damage == "a folder":
            path.mkdir()
        yield damage
        if path.is_dir():
            path.rmdir()
        path.write_bytes(data)


def outcome(kind: Kind, root: Path, damage: str) -> str:
    """Return what reading the file gives: "refused", "same", "silent", or the type of an error that is no sentence."""
    path = root / kind.path
    good, found = kind.read(str(root)), set()
    for _ in damaged(path, damage):
        try:
            found.add("same" if kind.read(str(root)) == good else "silent")
        except UserError as error:
            found.add("refused" if path.name in str(error) or str(root) in str(error) else f"vague: {error}")
        except Exception as error:
            found.add(f"{type(error).__name__}: {error}"[:120])
    return ", ".join(sorted(found))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("corruption")
    make(place)
    return place


def with_path(kind: Kind, root: Path) -> Kind:
    """Fill in the path of the projection, whose name its module keeps to itself."""
    if kind.path:
        return kind
    (name,) = [path.name for path in (root / "features").iterdir() if path.suffix == ".npz"]
    return kind._replace(path=f"features/{name}")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
def test_a_damaged_file_is_refused_in_a_sentence_or_has_a_defined_result(
    root: Path, kind: Kind, damage: str
) -> None:
    allowed = {"refused"} | ({"silent", "same"} if damage in kind.defined else set())
    # A flipped bit in bytes that no reader looks at changes nothing.
    allowed |= {"same", "refused, same"} if damage == "flipped bit" else set()
    assert outcome(with_path(kind, root), root, damage) in allowed


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        print("| file | verb |", " | ".join(DAMAGES), "|\n|" + "---|" * (2 + len(DAMAGES)))
        for one in KINDS:
            cells = [
                one.defined.get(d) or outcome(with_path(one, Path(made)), Path(made), d) for d in DAMAGES
            ]
            print(f"| {one.name} | {one.verb} |", " | ".join(cells), "|")
