"""Boxes are read in the convention of VOC, learned, and scored as pycocotools does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from raysl.backbone.network import BackboneConfig, build
from raysl.errors import MissingValueError, UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.optim import OptimConfig
from raysl.probes import Subject, _detector, _voc, detection
from raysl.probes._voc import Picture
from raysl.storage import Folder
from tests.data import make_dataset
from tests.probes.test_finetune import rates_of

Corners = tuple[float, float, float, float]
SIDE = 64
ROWS = ["AP", "AP50", "AP75", "train_loss", "dropped_boxes", "clipped_boxes"]
TINY = detection.Config(
    train_split="train",
    epochs=4,
    batch_size=4,
    sides=(SIDE,),
    width=32,
    optim=OptimConfig(name="adamw", lr=0.1, weight_decay=0.0),
)


def xml(objects: Sequence[tuple[str, Corners]], difficult: bool = False) -> str:
    """Annotations with the numbers of VOC."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = (
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, corners, strict=True))
        + "</bndbox></object>"
        for name, corners in objects
    )
    return f"<annotation>{''.join(boxes)}</annotation>"


def add(folder: Path, name: str, split: str, objects: Sequence[tuple[str, Corners]], text: str = "") -> None:
    """An image with bright discs and squares in it, into a folder of VOC's layout."""
    for part in (_voc.IMAGES, _voc.ANNOTATIONS, _voc.SPLITS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (SIDE, SIDE), (60, 60, 60))
    draw = ImageDraw.Draw(image)
    for shape, (left, top, right, bottom) in objects:
        inside = (max(left - 1, 0), max(top - 1, 0), right - 1, bottom - 1)
        if right > left and bottom > top:
            (draw.ellipse if shape == "disc" else draw.rectangle)(inside, (250, 200, 40))
    image.save(folder / _voc.IMAGES / f"{name}.png")
    (folder / _voc.ANNOTATIONS / f"{name}.xml").write_text(text or xml(objects))
    with (folder / _voc.SPLITS / f"{split}.txt").open("a") as lines:
        lines.write(f"{name}\n")


def shapes(folder: Path, train: int = 8, test: int = 4) -> Folder:
    """Each image has a disc or a square."""
    generator = np.random.default_rng(0)
    for number in range(train + test):
        size = int(generator.integers(24, 40))
        left, top = (int(corner) for corner in generator.integers(1, SIDE - size, 2))
        corners = (left, top, left + size, top + size)
        split = "train" if number < train else "test"
        add(folder, f"{number:03d}", split, [(("disc", "square")[number % 2], corners)])
    return Folder(str(folder))


def picture(*boxes: Sequence[float], classes: Sequence[str] = (), difficult: Sequence[bool] = ()) -> Picture:
    return Picture(
        "one",
        b"",
        (100, 100),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        tuple(classes) or ("disc",) * len(boxes),
        np.array(difficult or [False] * len(boxes)),
    )


def said(
    *boxes: Sequence[float], labels: Sequence[int] = (), scores: Sequence[float] = ()
) -> detection.Detections:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(list(labels) or [1] * len(boxes)),
        "scores": torch.tensor(list(scores) or [0.9] * len(boxes)),
    }


def test_boxes_are_read_from_one_based_corners_and_clipped_or_dropped(tmp_path: Path) -> None:
    objects: list[tuple[str, Corners]] = [
        ("whole", (1, 1, SIDE, SIDE)),
        ("outward", (-9, 11, 20, 500)),
        ("outside", (70, 70, 90, 90)),
        ("turned", (30, 30, 20, 20)),
        ("pixel", (5, 5, 5, 5)),
    ]
    add(tmp_path, "a", "train", objects)
    (found,) = _voc.read(Folder(str(tmp_path)), "train")
    assert found.classes == ("whole", "outward", "pixel")
    wanted = [[0, 0, SIDE, SIDE], [0, 10, 20, SIDE], [4, 4, 5, 5]]
    np.testing.assert_array_equal(found.boxes_n4, np.array(wanted, np.float32))
    assert (found.dropped, found.clipped) == (2, 1)
    assert found.size == (SIDE, SIDE)


def test_an_image_without_objects_and_difficult_objects_are_read(tmp_path: Path) -> None:
    add(tmp_path, "a", "train", [])
    add(tmp_path, "b", "train", [], xml([("disc", (1, 1, 9, 9))], difficult=True))
    empty, hard = _voc.read(Folder(str(tmp_path)), "train")
    assert empty.boxes_n4.shape == (0, 4)
    assert hard.difficult_n.tolist() == [True]


def test_a_union_of_folders_adds_the_splits_that_each_has(tmp_path: Path) -> None:
    """As VOC07+12: images of both to learn from, and of the first to score."""
    for place, splits in (("one", ("trainval", "test")), ("two", ("trainval",))):
        for split in splits:
            add(tmp_path / place, f"{split}-a", split, [("disc", (1, 1, 9, 9))])
    config = detection.Config(data=f"{tmp_path / 'one'}, {tmp_path / 'two'}")
    train, test = (_voc.union(config.folders, split) for split in config.splits)
    assert [one.name.rpartition("/")[2] for one in train] == ["trainval-a", "trainval-a"]
    assert len({one.name for one in train}) == 2
    assert [one.name for one in test] == [f"{tmp_path / 'one'}/test-a"]
    _voc.check_disjoint(train, test, config.splits, "detection")
    alone = detection.Config(data=str(tmp_path / "one"))
    assert config.settings()["data"] != alone.settings()["data"]
    with pytest.raises(UserError, match="Unknown split"):
        _voc.union(config.folders, "tset")
    with pytest.raises(UserError, match="names a folder twice"):
        replace(config, data=f"{tmp_path / 'one'},{tmp_path / 'one'}/")


@pytest.mark.parametrize(
    "text",
    [
        "<annotation><object>",
        xml([("", (1, 1, 9, 9))]),
        xml([("disc", (1, 1, 9, float("nan")))]),
        xml([("disc", (1, 1, 9, 9))]).replace("<xmin>1</xmin>", ""),
        xml([("disc", (1, 1, 9, 9))]).replace("<xmin>1</xmin>", "<xmin>left</xmin>"),
    ],
)
def test_malformed_annotations_are_refused(tmp_path: Path, text: str) -> None:
    add(tmp_path, "a", "train", [], text)
    with pytest.raises(UserError, match=r"a\.xml .* malformed"):
        _voc.read(Folder(str(tmp_path)), "train")


def test_the_protocol_depends_on_the_content_of_the_folder(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "two", "other")]
    for place, right in zip(places, (9, 9, 8), strict=True):
        for split in ("train", "test"):
            add(place, f"{split}-a", split, [("disc", (1, 1, right, 9))])
    settings = [detection.Config(str(place), train_split="train").settings() for place in places]
    assert settings[0] == settings[1] != settings[2]
    assert detection.Config().settings()["data"] == ""
    with pytest.raises(UserError, match="not in the layout"):
        detection.Config(str(tmp_path)).settings()


def test_a_missing_split_or_file_is_named(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(UserError, match="layout of PASCAL VOC"):
        _voc.read(folder, "train")
    add(tmp_path, "a", "train", [])
    with pytest.raises(UserError, match=r"Did you mean 'train'\?"):
        _voc.read(folder, "trani")
    (tmp_path / _voc.IMAGES / "a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"'a' in JPEGImages .* cannot be decoded"):
        _voc.read(folder, "train")
    (tmp_path / _voc.ANNOTATIONS / "a.xml").unlink()
    with pytest.raises(UserError, match="one of its files is missing"):
        _voc.read(folder, "train")
    (tmp_path / _voc.SPLITS / "train.txt").write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        _voc.read(folder, "train")


def test_real_annotations_are_read(shared_data: Path) -> None:
    pictures = _voc.read(Folder(str(shared_data / "bccd")), "test")
    assert len(pictures) == 72
    assert set(_voc.classes_of(pictures)) == {"WBC", "RBC", "Platelets"}
    assert all((one.boxes_n4 <= (640, 480, 640, 480)).all() for one in pictures)


def test_scores_of_known_boxes() -> None:
    pytest.importorskip("pycocotools")
    box: Corners = (10, 10, 50, 50)
    perfect = detection.score([picture(box)], [said(box)], ["disc"])
    assert perfect == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})
    # An overlap of 36 of 44 columns, 0.818: right at the seven thresholds from 0.5 to 0.8, and wrong at three.
    shifted = detection.score([picture(box)], [said((14, 10, 54, 50))], ["disc"])
    assert shifted == pytest.approx({"AP": 0.7, "AP50": 1.0, "AP75": 1.0})
    # 26 of 54, 0.48.
    far = detection.score([picture(box)], [said((24, 10, 64, 50))], ["disc"])
    assert far == pytest.approx({"AP": 0.0, "AP50": 0.0, "AP75": 0.0})
    assert detection.score([picture(box)], [said()], ["disc"])["AP"] == 0


def test_a_wrong_class_a_lost_object_and_a_difficult_one() -> None:
    pytest.importorskip("pycocotools")
    one: Corners = (10, 10, 50, 50)
    other: Corners = (60, 60, 90, 90)
    wrong = detection.score([picture(one)], [said(one, labels=[2])], ["disc", "square"])
    assert wrong["AP"] == 0
    # Precision is 1 up to a recall of a half: 51 of 101 points.
    half = detection.score([picture(one, other)], [said(one)], ["disc"])
    assert half["AP50"] == pytest.approx(51 / 101)
    # A class that is never found counts as 0 beside one that always is.
    both = picture(one, other, classes=["disc", "square"])
    assert detection.score([both], [said(one)], ["disc", "square"])["AP50"] == pytest.approx(0.5)
    hard = picture(one, other, difficult=[False, True])
    for found in (said(one), said(one, other, scores=[0.5, 0.9])):
        assert detection.score([hard], [found], ["disc"])["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (BackboneConfig(), [48, 96, 192]),
        (BackboneConfig("resnet18"), [64, 128, 256, 512]),
        (BackboneConfig("resnet18", "small"), [256, 512]),
        (BackboneConfig("mobilenet_v3_small"), [16, 24, 48, 576]),
    ],
)
def test_the_last_map_of_each_size_is_used(config: BackboneConfig, channels: list[int]) -> None:
    assert list(_detector.stages(build(config)).values()) == channels


def test_a_backbone_without_maps_is_refused() -> None:
    with pytest.raises(UserError, match="convolutional backbone"):
        _detector.stages(build(BackboneConfig("vit_b_32")))


def test_patch_tokens_of_a_transformer_are_a_pyramid(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    train = _voc.read(shapes(tmp_path, 4, 1), "train")
    config = replace(TINY, epochs=3, optim=OptimConfig(name="adamw", lr=0.02, weight_decay=0.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = RandomBackbone(BackboneConfig("timm/vit_tiny_patch16_224"), 0).network()
        detector = _detector.build(backbone, 2, TINY.sides, TINY.width)
        levels = detector.backbone(torch.zeros(1, 3, 64, 96))
        losses = detection.learn(detector, train, ["disc", "square"], config, 0)
    sides = [tuple(level.shape[2:]) for level in levels.values()]
    assert sides == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert losses[-1] < losses[0]


def test_batch_norm_is_frozen_and_the_rest_learns(tmp_path: Path) -> None:
    train = _voc.read(shapes(tmp_path), "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = RandomBackbone(BackboneConfig(), 0).network()
        before = {name: value.clone() for name, value in backbone.body.state_dict().items()}
        detector = _detector.build(backbone, 2, TINY.sides, TINY.width)
        losses = detection.learn(detector, train, ["disc", "square"], TINY, 0)
    assert losses[-1] < 0.8 * losses[0]
    after = backbone.body.state_dict()
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {name for name in after if re.search(r"bn\d|downsample\.1", name)}


def test_boxes_are_mirrored_with_their_image(tmp_path: Path) -> None:
    add(tmp_path, "a", "train", [("square", (5, 9, 20, 40)), ("square", (41, 50, 60, 60))])
    (one,) = _voc.read(Folder(str(tmp_path)), "train")
    for mirrored, wanted in (
        (False, [[4, 8, 20, 40], [40, 49, 60, 60]]),
        (True, [[44, 8, 60, 40], [4, 49, 24, 60]]),
    ):
        image_chw, target = detection._example(one, ["disc", "square"], mirrored)
        assert target["boxes"].tolist() == wanted
        assert target["labels"].tolist() == [2, 2]
        # Squares are bright, and nothing else is.
        inside_hw = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        for left, top, right, bottom in wanted:
            inside_hw[top:bottom, left:right] = True
        assert torch.equal(image_chw[0] > 0.5, inside_hw)


class Recorder(nn.Module):
    """A detector that keeps its training examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.taught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, images: list[torch.Tensor], targets: list[detection.Detections]
    ) -> dict[str, torch.Tensor]:
        self.taught += [(image, target["boxes"]) for image, target in zip(images, targets, strict=True)]
        return {"loss": self.weight.square()}


def test_learning_rate_follows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = _voc.read(shapes(tmp_path, 6, 1), "train")
    rates, detector = rates_of(detection, monkeypatch), Recorder()
    optim = OptimConfig(lr=0.048, schedule="step", milestones=(0.76,), warmup=0.3, warmup_start=1 / 3)
    detection.learn(detector, train, ["disc", "square"], replace(TINY, epochs=4, optim=optim), 0)
    # Six images in batches of four, the last one of two.
    assert rates == [[optim.lr_at(step, 8, 4)] for step in range(8)]
    assert len({rate for (rate,) in rates}) > 3


def test_about_half_of_the_images_are_mirrored_in_every_epoch(tmp_path: Path) -> None:
    train, detector = _voc.read(shapes(tmp_path, 8, 1), "train"), Recorder()
    detection.learn(detector, train, ["disc", "square"], TINY, 0)
    plain = [torch.from_numpy(one.boxes_n4) for one in train]
    kept = [any(torch.equal(boxes_n4, one) for one in plain) for _, boxes_n4 in detector.taught]
    assert len(kept) == 4 * 8
    assert 8 < sum(kept) < 24


def untrained(folder: Path) -> Subject:
    one = make_dataset(folder / "one", 4)
    encoder = RandomBackbone(BackboneConfig(), 0)
    return Subject(encoder, ("pooled",), 16, one, one, 0, Folder(str(folder / "out")))


def test_rows_are_deterministic(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    folder = shapes(tmp_path)
    config, here = replace(TINY, data=str(folder), epochs=2), untrained(tmp_path)
    found = detection.Detection(config).rows(here)
    assert [row.name for row in found] == ROWS
    assert all(np.isfinite(row.value) for row in found)
    assert found == detection.Detection(config).rows(here)


def test_unsuitable_splits_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    folder, here = shapes(tmp_path, 2, 1), untrained(tmp_path)
    add(tmp_path, "none", "nothing", [])
    for splits, message in (
        (("train", "train"), "share 2 images"),
        (("nothing", "test"), "no boxes to learn from"),
        (("train", "nothing"), "no boxes to score"),
    ):
        config = replace(TINY, data=str(folder), train_split=splits[0], test_split=splits[1])
        with pytest.raises(UserError, match=message):
            detection.Detection(config).rows(here)


def test_a_folder_is_required_and_pixels_give_no_rows(tmp_path: Path) -> None:
    here = untrained(tmp_path)
    with pytest.raises(MissingValueError, match=r"--detection\.data"):
        list(detection.Detection(detection.Config()).examine(here))
    given = detection.Detection(detection.Config(data=str(tmp_path)))
    assert not list(given.examine(replace(here, encoder=Pixels())))


@pytest.mark.ray
def test_a_ray_task_returns_rows_and_errors(ray_session: None, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    folder, here = shapes(tmp_path / "voc", 2, 1), untrained(tmp_path)
    config = replace(TINY, data=str(folder), epochs=1)
    found = list(detection.Detection(config).examine(here))
    assert [row.name for row in found] == ROWS
    with pytest.raises(UserError, match="Unknown split"):
        list(detection.Detection(replace(config, test_split="tset")).examine(here))


def test_an_impossible_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"--detection\.width is 40"):
        detection.Config(width=40)
