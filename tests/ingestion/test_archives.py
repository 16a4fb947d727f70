"""Archives: tar, compressed tar, WebDataset and zip; labels, splits, keys and every kind of damage."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ingestion.reading import (
    jpeg,
    labels,
    noise,
    opened,
    put,
    refused,
    write_odd_tar,
    write_tar,
    write_zip,
)


def test_samples_by_key_with_labels_in_cls(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"x/2.cls": b"0", "x/2.txt": b"a dog", "x/2.jpg": jpeg(2)})
    members = {"1.jpg": jpeg(1), "1.cls": b"7\n", "0.png": jpeg(0), "0.txt": b"x", "0.cls": b"3"}
    write_tar(tmp_path / "a.tar", members)
    found, rows = opened(tmp_path)
    assert [(row.path, row.image, row.label) for row in rows] == [
        ("a.tar/1.jpg", jpeg(1), "7"),
        ("a.tar/0.png", jpeg(0), "3"),
        ("b.tar/x/2.jpg", jpeg(2), "0"),
    ]
    assert found.classes == {"0": 1, "3": 1, "7": 1}
    assert found.labels == "the .cls or .json of each sample, as 1"


def test_labels_in_json(tmp_path: Path) -> None:
    for name, label in (("a", 3), ("b", "cat")):
        members = {"0.jpg": jpeg(), "0.json": json.dumps({"label": label}).encode()}
        write_tar(tmp_path / f"{name}.tar", members)
        assert labels(tmp_path / f"{name}.tar") == {f"{name}.tar/0.jpg": str(label)}
    write_tar(tmp_path / "c.tar", {"0.jpg": jpeg(), "0.json": b'{"caption": "x", "breed": "pug"}'})
    found, _ = opened(tmp_path / "c.tar")
    assert "0.json has no label, its fields are caption, breed" in found.labels
    assert labels(tmp_path / "c.tar", label_column="breed") == {"c.tar/0.jpg": "pug"}


def test_a_sample_without_a_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(), "0.cls": b"0", "1.jpg": jpeg()})
    found, _ = opened(tmp_path / "a.tar")
    assert not found.classes
    assert "1.jpg has an image without one, and 1 image has one" in found.labels
    assert labels(tmp_path / "a.tar", labels="none") == {"a.tar/0.jpg": None, "a.tar/1.jpg": None}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ({"cls": b"1.0"}, "1"),
        ({"cls": b"007"}, "7"),
        ({"json": b'{"label": true}'}, "true"),
        ({"json": b'{"label": 2.0}'}, "2"),
        ({"json": b'{"target": ["a"]}'}, "a"),
        ({"json": b'{"label": 1180591620717411303424}'}, "1180591620717411303424"),
    ],
)
def test_labels_of_every_type(tmp_path: Path, label: dict[str, bytes], name: str) -> None:
    members = {"0.jpg": jpeg(), **{f"0.{suffix}": data for suffix, data in label.items()}}
    assert labels(write_tar(tmp_path / "a.tar", members)) == {"a.tar/0.jpg": name}


def test_names_in_cls_only_where_they_are_asked_for(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(), "0.cls": b"cat\n"})
    assert "The member '0.cls' of 'a.tar' holds 'cat'" in refused(tmp_path)
    assert labels(path, label_column="cls") == {"a.tar/0.jpg": "cat"}
    assert labels(path, labels="none") == {"a.tar/0.jpg": None}


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ({"cls": b"-1"}, "all images lie in one folder"),
        ({"cls": b"\xff"}, "0.cls is damaged"),
        ({"json": b'{"label": ["a", "b"]}'}, "0.json holds several values for each image"),
        ({"json": b'{"label": 0.5}'}, "0.json holds fractions, such as 0.5"),
        ({"json": b'{"label": '}, "0.json is damaged"),
        ({"json": b"[" * 100_000}, "0.json is damaged"),
        ({"json": b'{"label": ["a", 1]}'}, "0.json holds a label that is neither a name nor a number"),
        ({"json": b"5"}, "0.json holds no JSON object"),
    ],
)
def test_why_a_label_is_not_taken(tmp_path: Path, label: dict[str, bytes], why: str) -> None:
    members = {"0.jpg": jpeg(), **{f"0.{suffix}": data for suffix, data in label.items()}, "1.jpg": jpeg()}
    found, rows = opened(write_tar(tmp_path / "a.tar", members))
    assert (found.classes, len(rows)) == ({}, 2)
    assert why in found.labels


def test_labels_in_fields_with_names_of_their_own(tmp_path: Path) -> None:
    members = {"0.jpg": jpeg(), "0.target.CLS": b"5", "1.JPG": jpeg(), "1.target.cls": b"6"}
    assert labels(write_tar(tmp_path / "a.tar", members)) == {"a.tar/0.jpg": "5", "a.tar/1.JPG": "6"}
    members |= {"1.other.cls": b"7"}
    assert "1 has several labels" in opened(write_tar(tmp_path / "a.tar", members))[0].labels


def test_an_empty_zip(tmp_path: Path) -> None:
    assert "Cannot read the archive" in refused(write_zip(tmp_path / "a.zip", {}))


def test_names_in_archives(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for seed in (1, 2):
            info = tarfile.TarInfo("a.png")
            info.size = len(noise(seed))
            archive.addfile(info, io.BytesIO(noise(seed)))
    (tmp_path / "twice.tar.gz").write_bytes(gzip.compress((tmp_path / "twice.tar").read_bytes()))
    write_zip(tmp_path / "windows.zip", {"cat\\0.png": noise(1), "dog\\1.png": noise(2)})
    for name in ("twice.tar", "twice.tar.gz"):
        found, rows = opened(tmp_path / name)
        assert [row.image for row in rows] == [noise(2)]
        assert found.left_out.kinds["members replaced by later ones of the same name"] == (1, "a.png")
    assert list(labels(tmp_path / "windows.zip").values()) == ["cat", "dog"]


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    members = {"photo": noise(1), "README": b"x"}
    for path in (write_tar(tmp_path / "tar.zip", members), write_zip(tmp_path / "zip.tar", members)):
        found, rows = opened(path)
        assert [row.image for row in rows] == [noise(1)]
        assert found.left_out.kinds == {"files of unknown kind": (1, "README")}


def test_a_table_of_labels_in_an_archive(tmp_path: Path) -> None:
    table = b"file_name,label\ntrain/0.png,a\ntrain/1.png,b\n"
    write_tar(tmp_path / "a.tar", {"train/0.png": noise(1), "train/1.png": noise(2), "metadata.csv": table})
    assert labels(f"{tmp_path}/a.tar#train") == {"a.tar/train/0.png": "a", "a.tar/train/1.png": "b"}


def test_folders_inside_are_classes_and_splits(tmp_path: Path) -> None:
    names = "train/cat/1.jpg train/dog/1.jpg test/cat/2.jpg __MACOSX/train/cat/._1.jpg train/notes.txt"
    write_tar(tmp_path / "a.tar", dict.fromkeys(names.split(), jpeg()))
    assert "test, train" in refused(tmp_path / "a.tar")
    assert labels(f"{tmp_path}/a.tar#train") == {
        "a.tar/train/cat/1.jpg": "cat",
        "a.tar/train/dog/1.jpg": "dog",
    }


def test_keys_with_dots(tmp_path: Path) -> None:
    names = ("2023.01.05.jpg", "2023.01.06.jpg", "2023.02.01.jpg")
    write_tar(tmp_path / "a.tar", {name: noise(i) for i, name in enumerate(names)})
    assert [row.path for row in opened(tmp_path / "a.tar")[1]] == [f"a.tar/{name}" for name in names]
    write_tar(tmp_path / "b.tar", {"2023.01.05.jpg": jpeg(), "2023.01.05.cls": b"4"})
    assert labels(tmp_path / "b.tar") == {"b.tar/2023.01.05.jpg": "4"}


def test_several_images_in_a_sample(tmp_path: Path) -> None:
    members = {f"{i}.{kind}": jpeg(i) for i in range(3) for kind in ("seg.png", "jpg", "cls")}
    write_tar(tmp_path / "a.tar", members | {f"{i}.cls": b"1" for i in range(3)})
    found, rows = opened(tmp_path / "a.tar")
    assert [row.path for row in rows] == ["a.tar/0.jpg", "a.tar/1.jpg", "a.tar/2.jpg"]
    what = "other images of the samples (.jpg is taken; --image-column names another)"
    assert found.left_out.kinds[what] == (3, "0.seg.png")
    assert labels(tmp_path / "a.tar", image_column="seg.png") == {f"a.tar/{i}.seg.png": "1" for i in range(3)}
    assert "The suffixes are jpg, seg.png" in refused(tmp_path / "a.tar", image_column="webp")


def test_splits_by_the_names_of_archives(tmp_path: Path) -> None:
    write_tar(tmp_path / "imagenet-train-000.tar", {"1.jpg": jpeg(1)})
    write_tar(tmp_path / "imagenet-val-000.tar", {"2.jpg": jpeg(2)})
    assert "train, val" in refused(tmp_path)
    assert opened(f"{tmp_path}#val")[1][0].image == jpeg(2)


def test_img2dataset(tmp_path: Path) -> None:
    sample = {"jpg": jpeg(), "json": b'{"caption": "x"}', "txt": b"x"}
    members = {f"{i:09d}.{kind}": data for i in range(3) for kind, data in sample.items()}
    write_tar(tmp_path / "00000.tar", members)
    pq.write_table(pa.table({"url": ["u"] * 3, "caption": ["x"] * 3}), tmp_path / "00000.parquet")
    put(tmp_path, "00000_stats.json", data=b"{}")
    found, rows = opened(tmp_path)
    assert len(rows) == 3
    assert "its fields are caption" in found.labels


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.tar.gz": gzip.compress,
    "a.tgz": gzip.compress,
    "a.tar": gzip.compress,
    "a.tar.bz2": bz2.compress,
    "a.tar.xz": lzma.compress,
    "a.tar.zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_by_content(tmp_path: Path, name: str) -> None:
    members = {f"{name}/{i}.png": noise(i) for name in ("cat", "dog") for i in range(4)}
    plain = write_tar(tmp_path / "in" / "x", members)
    (tmp_path / name).write_bytes(PACKED[name](plain.read_bytes()))
    found, rows = opened(tmp_path / name)
    assert "compressed" in found.layout
    assert [row.image for row in rows] == 2 * [noise(i) for i in range(4)]
    assert found.classes == {"cat": 4, "dog": 4}
    (tmp_path / name).write_bytes(PACKED[name](plain.read_bytes())[:-600])
    assert "is damaged" in refused(tmp_path / name)


def damage_header(data: bytearray, at: int) -> bytes:
    return bytes(data[:at] + b"\xaa" * 200 + data[at + 200 :])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_header, "the header of the next member is damaged"),
        (lambda data, at: data[:at], "without its end mark"),
        (lambda data, at: data[: at + 100], "header"),
        (lambda data, at: data[: at + 612], "unexpected end of data"),
        (lambda data, at: data + data, "several archives were joined"),
    ],
    ids=["header", "between members", "in a header", "in a member", "joined"],
)
def test_damaged_archives_are_never_shorter_data_sets(
    tmp_path: Path, damage: Callable[[bytearray, int], bytes], says: str
) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": noise(i) for i in range(6)})
    with tarfile.open(path) as archive:
        at = archive.getmembers()[3].offset
    path.write_bytes(damage(bytearray(path.read_bytes()), at))
    message = refused(path)
    assert says in message
    last = [f"after {count} members, the last of which is '{count - 1}.png'" for count in (3, 4, 6)]
    assert any(one in message for one in last)


def test_members_that_are_no_files_of_the_archive(tmp_path: Path) -> None:
    found, rows = opened(write_odd_tar(tmp_path / "a.tar", "../up.jpg", "/etc/abs.jpg", "ok.jpg"))
    assert [row.path for row in rows] == ["a.tar/ok.jpg"]
    assert found.left_out.kinds == {
        "members with absolute paths or ..": (2, "../up.jpg"),
        "links and devices in archives": (3, "link.jpg"),
    }


def test_archives_without_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{i:06d}.ten": b"x" for i in range(3)})
    assert "hold no images. They hold 3 members called .ten (000000.ten)" in refused(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", {"n01.tar": b"x"})
    assert "They hold 1 archive (n01.tar)" in refused(tmp_path / "b.tar")
    put(tmp_path, "c.tar", data=b"no archive at all, but words" * 50)
    assert "is damaged at its beginning" in refused(tmp_path / "c.tar")


def test_zip(tmp_path: Path) -> None:
    names = "birds/cat/1.jpg birds/dog/2.jpg __MACOSX/birds/._x.jpg birds/readme.txt ../up.jpg"
    write_zip(tmp_path / "a.zip", dict.fromkeys(names.split(), jpeg()))
    found, rows = opened(tmp_path / "a.zip")
    assert [(row.path, row.image, row.label) for row in rows] == [
        ("a.zip/birds/cat/1.jpg", jpeg(), "cat"),
        ("a.zip/birds/dog/2.jpg", jpeg(), "dog"),
    ]
    assert found.left_out.kinds["members with absolute paths or .."] == (1, "../up.jpg")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data[: len(data) // 2])
    assert "Cannot read the archive" in refused(tmp_path / "a.zip")


def test_a_damaged_member_of_a_zip_is_a_row_with_a_reason(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"1.png": noise(1), "2.png": noise(2)}, zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    _, rows = opened(tmp_path / "a.zip")
    assert [row.image for row in rows] == [None, noise(2)]
    assert "damaged inside of the archive" in rows[0].reason


def test_damage_to_a_member_that_no_image_needs_is_counted(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"1.png": noise(1), "README": b"about the images"}, zipfile.ZIP_STORED)
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"about the", b"about its"))
    found, rows = opened(tmp_path / "a.zip")
    assert [row.image for row in rows] == [noise(1)]
    assert found.left_out.kinds == {"damaged members": (1, "README")}


def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ok.jpg", jpeg())
        with archive.open("bomb.jpg", "w") as member:
            for _ in range(1025):
                member.write(bytes(1 << 20))
    found, rows = opened(tmp_path / "a.zip")
    assert [row.path for row in rows] == ["a.zip/ok.jpg"]
    assert found.left_out.kinds == {"members larger than 1024 MB": (1, "bomb.jpg")}


def test_unpacked_images_are_read_and_not_the_archive_beside_them(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "dog/1.jpg")
    write_tar(tmp_path / "images.tar", {"cat/1.jpg": jpeg(), "dog/1.jpg": jpeg()})
    found, rows = opened(tmp_path)
    assert [row.label for row in rows] == ["cat", "dog"]
    assert found.left_out.kinds == {"archives": (1, "images.tar")}


def test_each_archive_has_a_table_of_its_own(tmp_path: Path) -> None:
    for name, label in (("a", "cat"), ("b", "dog")):
        table = f"file_name,label\n1.jpg,{label}\n{name}.jpg,{label}\n".encode()
        write_tar(tmp_path / f"{name}.tar", {"1.jpg": jpeg(), f"{name}.jpg": jpeg(), "metadata.csv": table})
    assert labels(tmp_path) == {
        "a.tar/1.jpg": "cat",
        "a.tar/a.jpg": "cat",
        "b.tar/1.jpg": "dog",
        "b.tar/b.jpg": "dog",
    }
    write_tar(tmp_path / "c.tar", {"1.jpg": jpeg()})
    found, _ = opened(tmp_path)
    assert "c.tar/1.jpg has an image without one" in found.labels


def test_a_table_in_an_archive_of_its_own_labels_the_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg()})
    write_tar(tmp_path / "b.tar", {"2.jpg": jpeg()})
    write_tar(tmp_path / "labels.tar", {"metadata.csv": b"file_name,label\n1.jpg,cat\n2.jpg,dog\n"})
    assert labels(tmp_path) == {"a.tar/1.jpg": "cat", "b.tar/2.jpg": "dog"}


@pytest.mark.parametrize("note", [b'{"caption": "x"}', b'{"label": 0.5}', b'{"label": "x"}', b"5", b"{"])
@pytest.mark.parametrize("cls", ["cls", "target.cls"])
@pytest.mark.parametrize("cls_first", [True, False])
def test_cls_wins_over_json(tmp_path: Path, note: bytes, cls: str, cls_first: bool) -> None:
    both = [(f"0.{cls}", b"7"), ("0.json", note)]
    members = {"0.jpg": jpeg(), **dict(both if cls_first else reversed(both))}
    assert labels(write_tar(tmp_path / "a.tar", members)) == {"a.tar/0.jpg": "7"}


@pytest.mark.parametrize("name", ["1.cls", "1.json", "metadata.csv", "README"])
def test_a_tar_that_is_cut_inside_a_file_of_labels_is_damaged(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": noise(0), name: bytes(5000)})
    with tarfile.open(path) as archive:
        cut = path.read_bytes()[: archive.getmembers()[1].offset_data + 100]
    path.write_bytes(cut)
    assert "is damaged after 1 member," in refused(path)
    packed = gzip.compress(cut)
    (tmp_path / "a.tar").write_bytes(packed[: len(packed) - 20])
    assert "is damaged" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_zip_that_is_damaged_inside_a_file_of_labels_is_refused(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("0.png", noise(0), zipfile.ZIP_STORED)
        archive.writestr("0.cls", bytes(range(256)) * 9)
        start = archive.getinfo("0.cls").header_offset
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[start + 40 : start + 80] = b"\xff" * 40
    (tmp_path / "a.zip").write_bytes(data)
    assert "Cannot read the archive" in refused(tmp_path / "a.zip")


def test_a_table_in_an_archive_that_gives_no_labels_is_named(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"images/1.jpg": jpeg(), "labels.csv": b"file,label\n1.jpg,cat\n"})
    found, _ = opened(tmp_path / "a.zip")
    assert "If labels.csv holds labels, unpack the archive" in found.labels
    assert "has no splits, and 'train' is named. Leave it out." in refused(f"{tmp_path / 'a.zip'}#train")
