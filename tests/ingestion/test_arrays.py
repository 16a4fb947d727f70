"""Arrays of pixels: IDX files of the MNIST family, CIFAR and NumPy; and forms that are named and refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysl.ingestion.sources import arrays
from raysl.stream.decode import decode
from tests.ingestion.reading import labels, opened, put, refused, write_zip


def write_idx(folder: Path, prefix: str, count: int, packed: bool = False) -> None:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None] + np.zeros((1, 5, 4), np.uint8)
    files = {
        f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x803, count, 5, 4) + pixels.tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x801, count) + bytes(i % 3 for i in range(count)),
    }
    for name, data in files.items():
        put(folder, f"{name}.gz" if packed else name, data=gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["", "raw", "MNIST/raw"])
def test_mnist(tmp_path: Path, packed: bool, inside: str) -> None:
    write_idx(tmp_path / inside, "train", 7, packed)
    write_idx(tmp_path / inside, "t10k", 2, packed)
    assert "test, train" in refused(tmp_path)
    found, rows = opened(f"{tmp_path}#train")
    assert found.classes == {"0": 3, "1": 2, "2": 2}
    assert [row.label for row in rows] == ["0", "1", "2", "0", "1", "2", "0"]
    for i, row in enumerate(rows):
        assert row.image is not None
        image = decode(row.image)
        assert image.shape == (3, 5, 4)
        assert (image == i).all()
    assert len(opened(f"{tmp_path}#test")[1]) == 2


def test_qmnist_and_emnist(tmp_path: Path) -> None:
    put(tmp_path / "q", "qmnist-train-images-idx3-ubyte", data=struct.pack(">4I", 0x803, 2, 3, 3) + bytes(18))
    values = np.array([[7, 1, 2, 3, 4, 5, 6, 7], [2, 9, 9, 9, 9, 9, 9, 9]], ">i4")
    data = struct.pack(">3I", 0xC02, 2, 8) + values.tobytes()
    put(tmp_path / "q", "qmnist-train-labels-idx2-int", data=data)
    assert list(labels(tmp_path / "q").values()) == ["7", "2"]
    write_idx(tmp_path / "e", "emnist-letters-train", 3)
    write_idx(tmp_path / "e", "emnist-digits-train", 3)
    assert "digits-train, letters-train" in refused(tmp_path / "e")
    assert len(opened(f"{tmp_path}/e#letters-train")[1]) == 3


@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw", "fashion/mnist", "old-fashioned"])
def test_fashion_mnist_by_the_name_of_its_folder(tmp_path: Path, folder: str) -> None:
    write_idx(tmp_path / folder, "train", 4)
    first = "T-shirt/top" if folder in ("fashion-mnist", "FashionMNIST/raw") else "0"
    assert next(iter(opened(tmp_path / folder)[0].classes)) == first


def test_fashion_mnist_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "FASHION_MNIST", tmp_path / "fashion-mnist")
    assert "apt-get install dataset-fashion-mnist" in refused("fashion-mnist#train")
    write_idx(tmp_path / "fashion-mnist", "train", 4, True)
    assert list(opened("fashion-mnist#train")[0].classes)[9] == "Ankle boot"


def test_images_without_labels_and_damaged_files(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 7)
    (tmp_path / "train-labels-idx1-ubyte").rename(tmp_path / "aside")
    assert "there is no file or array of labels" in opened(tmp_path)[0].labels
    (tmp_path / "aside").rename(tmp_path / "train-labels-idx1-ubyte")
    os.truncate(tmp_path / "train-images-idx3-ubyte", 100)
    assert "ends too early" in refused(f"{tmp_path}#train")
    put(tmp_path, "train-images-idx3-ubyte", data=b"no")
    assert "not an IDX file" in refused(f"{tmp_path}#train")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("shape", "answer"),
    [
        ((2**31 - 1, 60_000, 60_000), "ends too early for the shape"),
        ((2**32 - 1, 2**32 - 1, 2**32 - 1), "ends too early for the shape"),
        ((4, 0, 0), "at least one pixel"),
    ],
)
def test_a_head_of_idx_that_lies_is_refused_before_memory_is_taken(
    tmp_path: Path, packed: bool, shape: tuple[int, int, int], answer: str
) -> None:
    data = struct.pack(">4I", 0x803, *shape) + bytes(100)
    name = "train-images-idx3-ubyte"
    put(tmp_path, name + ".gz" * packed, data=gzip.compress(data) if packed else data)
    assert answer in refused(f"{tmp_path}#train")


@pytest.mark.parametrize("keys", [str, str.encode], ids=["str", "bytes"])
def test_cifar(tmp_path: Path, keys: type[str]) -> None:
    pixels = np.zeros((4, 3072), np.uint8)
    pixels[:, :1024] = 200
    batch = {keys("data"): pixels, keys("labels"): [3] * 4}
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        put(tmp_path, f"cifar-10-batches-py/{name}", data=pickle.dumps(batch))
    put(tmp_path, "cifar-10-python.tar.gz", data=b"x")
    found, rows = opened(f"{tmp_path}#test")
    assert found.classes["cat"] == 4
    assert rows[2].image is not None
    assert decode(rows[2].image)[:, 31, 31].tolist() == [200, 0, 0]
    assert len(opened(f"{tmp_path}#train")[1]) == 20
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    assert "lacks data_batch_4" in refused(f"{tmp_path}#train")


def test_cifar_100(tmp_path: Path) -> None:
    batch = {b"data": np.zeros((3, 3072), np.uint8), b"fine_labels": [1, 0, 1], b"coarse_labels": [0, 0, 0]}
    meta = {b"fine_label_names": ["apple", "fish"], b"coarse_label_names": ["things"]}
    for name, value in (("train", batch), ("test", batch), ("meta", meta)):
        put(tmp_path, f"cifar-100-python/{name}", data=pickle.dumps(value))
    assert list(labels(f"{tmp_path}#train").values()) == ["fish", "apple", "fish"]


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    put(tmp_path, "test_batch", data=pickle.dumps(os.getcwd))
    assert "no part of CIFAR" in refused(tmp_path)


def test_numpy(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 5, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([[2], [0], [2], [0]]))
    _, rows = opened(tmp_path / "a.npz")
    assert [row.label for row in rows] == ["2", "0", "2", "0"]
    assert rows[0].image is not None
    assert decode(rows[0].image).shape == (3, 6, 5)
    first = pixels.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "b.npz", x_train=pixels[..., 0], y_train=np.arange(4), x_test=first)
    assert "test, train" in refused(tmp_path / "b.npz")
    assert len(opened(f"{tmp_path}/b.npz#train")[0].classes) == 4
    assert not opened(f"{tmp_path}/b.npz#test")[0].classes
    np.savez(tmp_path / "c.npz", images=pixels / 255)
    assert "Images must be uint8" in refused(tmp_path / "c.npz")
    np.savez(tmp_path / "one.npz", image=np.zeros((9, 9, 3), np.uint8))
    assert "is that of one image" in refused(tmp_path / "one.npz")
    np.savez(tmp_path / "d.npz", a=pixels, b=pixels)
    assert "are called a, b" in refused(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", images=np.array([{}], dtype=object))
    assert "Cannot read the arrays" in refused(tmp_path / "e.npz")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["index.json", "shard.00000.mds"], "StreamingDataset"),
        (["train.beton"], "FFCV"),
        (["train-00000-of-00001.tfrecord"], "TFRecord"),
        (["train.tfrecord-00000-of-00001"], "TFRecord"),
        (["data.mdb", "lock.mdb"], "LMDB"),
        (["d.h5"], "h5py"),
        (["train.idx", "train.rec"], "RecordIO"),
        (["d.dcm"], "pydicom"),
        (["d.mat"], "loadmat"),
        (["d.npy"], "numpy.savez"),
        (["d.7z"], "unpack it"),
        (["a.tar.lz4"], "unpack it"),
        (["bedroom_lmdb/lock.mdb", "bedroom_lmdb/data.mdb"], "LMDB"),
        (["tf/train/x.tfrec"], "TFRecord"),
        (["training.pt"], "pickled objects"),
        (["stl10_binary/train_X.bin"], "torchvision.datasets"),
    ],
)
def test_forms_that_are_named_and_refused(tmp_path: Path, names: list[str], says: str) -> None:
    put(tmp_path, *names, data=bytes(64))
    assert says in refused(tmp_path)
    assert says in refused(tmp_path / names[-1].replace("lock", "data"))


@pytest.mark.parametrize("log", ["_delta_log/0.json", "_versions/1.manifest"])
def test_tables_whose_log_says_which_files_are_valid_are_refused(tmp_path: Path, log: str) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "part-0.parquet")
    put(tmp_path, log, data=b"{}")
    assert f"holds {log.partition('/')[0]}/, so it is a" in refused(tmp_path)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.eye(3, dtype=np.int64), "holds several values for each image"),
        (np.array([0.5, 1, 2]), "holds fractions, such as 0.5"),
        (np.zeros((3, 4, 4), np.int64), "holds several values for each image"),
        (np.ones(3, np.complex64), "is of type complex64"),
        (np.zeros(3, [("a", int)]), "is of type [('a', '<i8')]"),
        (np.array([b"a", b"b", b"a"]), ""),
        (np.array([[0], [1], [0]]), ""),
        (np.array([0, 1, 0], ">i4"), ""),
        (np.array([0, np.nan, 1]), "a.npz has an image without one, and 2 images have one"),
    ],
)
def test_labels_of_numpy(tmp_path: Path, values: Any, why: str) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), labels=values)
    found, _ = opened(tmp_path / "a.npz")
    assert bool(found.classes) == (not why)
    assert why in found.labels


def test_a_single_label_of_several_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.array(5))
    assert "3 images but 1 label" in refused(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("head", "says"),
    [(b"\0\0\x08\0\1", "is not an IDX file of integers"), (struct.pack(">3I", 0x802, 4, 0), "(4, 0)")],
)
def test_labels_of_idx_without_an_axis_or_a_value_are_refused(tmp_path: Path, head: bytes, says: str) -> None:
    write_idx(tmp_path, "train", 4)
    put(tmp_path, "train-labels-idx1-ubyte", data=head)
    assert says in refused(f"{tmp_path}#train")


def test_one_image_and_unknown_files(tmp_path: Path) -> None:
    put(tmp_path, "photo.jpg")
    assert "is one image: name the folder" in refused(tmp_path / "photo.jpg")
    put(
        tmp_path,
        "list.csv.gz",
        "a.pq",
        "arrays/a.npz",
        "volume.nii.gz",
        "train-images-idx3-ubyte.gz",
        data=bytes(64),
    )
    for name, says in (
        ("list.csv.gz", "unpack it"),
        ("train-images-idx3-ubyte.gz", "give the folder that it lies in"),
        ("volume.nii.gz", "is of no known kind"),
        ("a.pq", "end in .parquet"),
        ("arrays", "give the file itself"),
    ):
        assert says in refused(tmp_path / name)
    put(tmp_path, "thesis.tex", data=b"x")
    message = refused(tmp_path / "thesis.tex")
    assert "is of no known kind" in message
    assert "WebDataset" in message


@pytest.mark.parametrize("shape", [(2**31, 60_000, 60_000, 3), (10**9, 28, 28), (5, 0, 0)])
def test_an_array_that_claims_too_much_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    head = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, header)
    write_zip(tmp_path / "a.npz", {"images.npy": head.getvalue() + bytes(300)})
    assert "a.npz" in refused(tmp_path / "a.npz") or "'images'" in refused(tmp_path / "a.npz")
