"""Images that show several classes are learned and scored class by class."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysl.backbone.network import BackboneConfig
from raysl.errors import MissingValueError, UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.probes import Labeled, Row, Subject, _voc, voc_svm
from raysl.probes._images import features
from raysl.probes.svm import Config as SvmConfig
from raysl.probes.svm import Svm
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_dataset
from tests.probes.test_detection import add, picture, xml

LEFT, RIGHT = (2.0, 2.0, 30.0, 62.0), (34.0, 2.0, 62.0, 62.0)
FEW = voc_svm.Config(train_split="train", svm=SvmConfig(costs=(1.0,), dims=0))


def several(folder: Path) -> Folder:
    """A disc at the left, a square at the right, both or none."""
    for number in range(24):
        objects = [("disc", LEFT)] * (number % 2) + [("square", RIGHT)] * (number // 2 % 2)
        add(folder, f"{number:03d}", "train" if number < 16 else "test", objects)
    add(folder, "hard", "test", [("disc", LEFT)], xml([("disc", LEFT)], difficult=True))
    return Folder(str(folder))


def test_an_image_shows_the_classes_of_its_boxes() -> None:
    box = (0, 0, 8, 8)
    sure = picture(box, box, classes=("dog", "cat"), difficult=(False, True))
    mixed = picture(box, box, classes=("cat", "cat"), difficult=(True, False))
    found = voc_svm.shown([sure, mixed, picture()], ["cat", "dog"])
    assert found.tolist() == [[-1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("size", [(200, 50), (50, 200)])
def test_the_ends_of_a_long_image_are_seen(size: tuple[int, int]) -> None:
    """The image is resized to a square; the evaluation view would cut them off."""
    files = []
    for end in (0, 250):
        image = Image.new("RGB", size, (60, 60, 60))
        image.paste((end, 60, 60), (0, 0, 40, 40))
        image.save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    encode = Pixels().load(torch.device("cpu"), ["pooled"])
    found_nd = features(encode, voc_svm._views([replace(picture(), image=one) for one in files], 16))[
        "pooled"
    ]
    pixels_nd = decode.resized_to_square(files, 16).flatten(1).float().numpy() / 255 - 0.5
    np.testing.assert_allclose(found_nd, pixels_nd, atol=1e-6)
    assert np.abs(found_nd[0] - found_nd[1]).max() > 0.9
    assert torch.equal(*decode.evaluation_views(files, 16))


def test_scores_are_those_of_svm_on_the_same_features(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    folder = several(tmp_path / "voc")
    config = replace(FEW, data=str(folder))
    data = make_dataset(tmp_path / "set", 8)
    subject = Subject(Pixels(), ("pooled",), 16, data, data, 0, Folder(str(tmp_path / "own")))
    (row,) = voc_svm.VocSvm(config).examine(subject)
    sets = []
    for split in ("train", "test"):
        pictures = _voc.read(folder, split)
        pixels_nd = (
            decode.resized_to_square([one.image for one in pictures], 16).flatten(1).float() / 255 - 0.5
        )
        sets.append(Labeled(pixels_nd.numpy(), voc_svm.shown(pictures, ["disc", "square"])))
    assert sets[1].labels_n[-1].tolist() == [-1, 0]
    (wanted,) = Svm(config.svm).run(*sets)
    assert row == Row("mAP", wanted.value, "pooled")
    assert row.value == 1.0
    backbone = replace(
        subject, encoder=RandomBackbone(BackboneConfig(), 0), layers=("res2", "pooled"), image_size=32
    )
    assert [one.layer for one in voc_svm.VocSvm(config).examine(backbone)] == ["res2", "pooled"]
    shared = replace(config, test_split="train")
    with pytest.raises(UserError, match=r"--voc-svm.train-split"):
        list(voc_svm.VocSvm(shared).examine(subject))


def test_a_folder_is_required_and_its_content_is_part_of_the_protocol(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "set", 8)
    subject = Subject(Pixels(), ("pooled",), 16, data, data, 0, Folder(str(tmp_path / "own")))
    with pytest.raises(MissingValueError, match=r"--voc-svm.data FOLDER"):
        list(voc_svm.VocSvm(voc_svm.Config()).examine(subject))
    config = replace(FEW, data=str(several(tmp_path / "voc")))
    before = config.settings()
    assert str(tmp_path) not in str(before)
    (tmp_path / "voc" / _voc.ANNOTATIONS / "000.xml").write_text(xml([("disc", LEFT)]))
    _voc.fingerprint.cache_clear()
    assert config.settings() != before
