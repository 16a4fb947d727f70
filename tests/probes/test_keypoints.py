"""Annotations of each format give the same figures, PCK is that of plain NumPy, and both heads find a point."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from raysl.backbone.network import BackboneConfig
from raysl.errors import MissingValueError, UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.probes import Subject, _poses, keypoints
from raysl.probes._images import spaced
from raysl.storage import Folder
from tests.data import make_clips, make_dataset

SIDE = 64
NAMES = ("nose", "tail")


def coco(place: Path, count: int = 60) -> str:
    """Images of a red and a green disc, the key points, on gray; the second is missing in every fifth image."""
    random, images, annotations = np.random.default_rng(0), [], []
    (place / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        red, green = random.uniform(8, 56, (2, 2))
        image = Image.new("RGB", (SIDE, SIDE), (60, 60, 60))
        draw = ImageDraw.Draw(image)
        shown = number % 5 > 0
        for (x, y), color in ((red, (250, 40, 40)), (green, (40, 250, 40)))[: 1 + shown]:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), color)
        image.save(place / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        points = [*red.tolist(), 2, *(green.tolist() if shown else (0, 0)), 2 * shown]
        box = {"bbox": [6, 6, 52, 52], "category_id": 1, "image_id": number, "iscrowd": 0}
        annotations.append({**box, "keypoints": points})
    held = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "keypoints": list(NAMES)}],
    }
    (place / "points.json").write_text(json.dumps(held))
    return str(place / "points.json")


def subject(tmp_path: Path, pixels: bool = True) -> Subject:
    data = make_dataset(tmp_path / "set", 4)
    encoder = Pixels() if pixels else RandomBackbone(BackboneConfig(), 0)
    layers = ("pooled",) if pixels else ("res2", "pooled")
    return Subject(encoder, layers, 32, data, data, 0, Folder(str(tmp_path / "out")))


def values(found: list[Any], layer: str = "pooled") -> dict[str, float]:
    return {row.name: row.value for row in found if row.layer == layer}


def test_scores_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    said, true = random.uniform(size=(2, 50, 3, 2))
    true[random.random((50, 3)) < 0.3] = np.nan
    lengths = random.uniform(0.5, 1, 50)
    distance = np.linalg.norm(said - true, axis=2) / lengths[:, None]
    tensors = torch.from_numpy(said), torch.from_numpy(true), torch.from_numpy(lengths)
    found = keypoints.scores(*tensors, names=("a", "b", "c"), thresholds=(0.4, 0.2))
    there = np.isfinite(true).all(2)
    assert found["PCK@0.4"] == pytest.approx((distance[there] < 0.4).mean())
    assert found["PCK@0.2"] == pytest.approx((distance[there] < 0.2).mean())
    assert found["PCK@0.4/b"] == pytest.approx((distance[:, 1][there[:, 1]] < 0.4).mean())
    assert found["mean_distance"] == pytest.approx(distance[there].mean())


def test_the_peak_of_a_heat_map_is_found_between_cells() -> None:
    points = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 0.9, (40, 3, 2)))
    found = keypoints.peaks(keypoints.gaussians(points, 16, 0.06))
    # A parabola through three samples of a Gaussian is off by less than a tenth of a cell.
    assert float((found - points).abs().max()) < 0.1 / 16


@pytest.mark.parametrize("head", ["regression", "heatmap"])
def test_pixels_that_show_the_points_are_read_out(tmp_path: Path, head: Any) -> None:
    config = keypoints.Config(
        train=coco(tmp_path, 300), images="images", head=head, thresholds=(0.2, 0.5), dims=768
    )
    found = values(keypoints.Keypoints(config).rows(subject(tmp_path)))
    # A linear map of a heat map of 16 by 16 cells cannot do better than its cells; the blind mean pose is far below.
    assert found["PCK@0.2"] > 0.8 > 0.4 > found["PCK_without_image@0.2"]
    assert {"PCK@0.5", "PCK@0.2/nose", "PCK@0.2/tail", "mean_distance"} <= set(found)


def test_each_layer_of_a_network_has_its_rows_and_they_repeat(tmp_path: Path) -> None:
    config = keypoints.Config(train=coco(tmp_path, 120), images="images", thresholds=(0.2,), dims=256)
    found = keypoints.Keypoints(config).rows(subject(tmp_path, pixels=False))
    assert {row.layer for row in found} == {"res2", "pooled"}
    for layer in ("res2", "pooled"):
        assert values(found, layer)["PCK@0.2"] > values(found, layer)["PCK_without_image@0.2"]
    assert found == keypoints.Keypoints(config).rows(subject_again(tmp_path))


def subject_again(tmp_path: Path) -> Subject:
    (tmp_path / "again").mkdir()
    return subject(tmp_path / "again", pixels=False)


def test_the_view_keeps_the_place_of_a_point(tmp_path: Path) -> None:
    """The square reaches out of the image; what is outside is black."""
    coco(tmp_path, 1)
    figure = _poses.Figure("0.png", (-32.0, 0.0, 128.0), np.array([[0, 0], [np.nan, 1]], np.float32), 64.0)
    images, points, lengths = _poses.views([figure], Folder(str(tmp_path / "images")), 32)
    assert images[0, :, 16, :7].sum() == 0
    assert images[0, 0, 4, 12] > 0
    np.testing.assert_allclose(points[0, 0], [32.5 / 128, 0.5 / 128])
    assert lengths.tolist() == [0.5]


def test_mpii_and_deeplabcut_are_read(tmp_path: Path) -> None:
    io_module = pytest.importorskip("scipy.io")
    folder = Folder(str(tmp_path))
    joints = [[float(k + 1), 2.0 * k + 1] for k in range(16)]
    one = {"image": "a.jpg", "joints": joints, "joints_vis": [1] * 15 + [0], "center": [11, 21], "scale": 0.5}
    folder.write("mpii.json", json.dumps([one]).encode())
    points = [{"id": k, "x": float(k + 1), "y": 2.0 * k + 1} for k in range(15)]
    person = {"x1": 1, "y1": 1, "x2": 4, "y2": 5, "scale": 0.5, "objpos": {"x": 11, "y": 21}}
    release = {
        "annolist": [
            {"image": {"name": "a.jpg"}, "annorect": {**person, "annopoints": {"point": points}}},
            {"image": {"name": "b.jpg"}, "annorect": []},
        ],
        "img_train": [1, 0],
    }
    io_module.savemat(stream := io.BytesIO(), {"RELEASE": release})
    folder.write("mpii.mat", stream.getvalue())
    lines = [
        "scorer,me,me,me,me",
        "bodyparts,nose,nose,tail,tail",
        "coords,x,y,x,y",
        "v/a.png,1.5,2,4.5,6",
        "v/b.png,,,1,1",
    ]
    folder.write("points.csv", "\n".join(lines).encode())
    from_json, from_mat = (_poses.read(folder, name, "box").figures[0] for name in ("mpii.json", "mpii.mat"))
    assert from_json.square == from_mat.square == (-52.5, -42.5, 125.0)
    assert from_json.length == from_mat.length == 100
    np.testing.assert_array_equal(from_json.points_k2, from_mat.points_k2)
    np.testing.assert_array_equal(from_mat.points_k2[3], [3, 6])
    assert np.isnan(from_mat.points_k2[15]).all()
    assert _poses.read(folder, "mpii.mat", "head").figures[0].length == pytest.approx(0.6 * 5)
    found = _poses.read(folder, "points.csv", "box")
    assert found.names == ("nose", "tail")
    (mouse,) = found.figures  # One point has no length, so the second image is left out.
    assert (mouse.image, mouse.square, mouse.length) == ("v/a.png", None, 4)


def test_bad_annotations_are_refused(tmp_path: Path) -> None:
    folder, one = Folder(str(tmp_path)), subject(tmp_path)
    with pytest.raises(MissingValueError, match=r"--keypoints\.train FILE"):
        keypoints.Keypoints(keypoints.Config()).check_data(one.train, one.test)
    with pytest.raises(UserError, match="do not exist"):
        _poses.read(folder, "none.json", "box")
    for name, text, message in (
        ("a.json", "{", "malformed"),
        ("b.json", "{}", "'categories' is missing"),
        ("c.json", "[]", "no figure"),
        ("d.txt", "", "no known format"),
        ("e.csv", "scorer,a\n", "'coords' is missing"),
    ):
        folder.write(name, text.encode())
        with pytest.raises(UserError, match=message):
            _poses.read(folder, name, "box")
    config = keypoints.Config(train=coco(tmp_path))
    with pytest.raises(UserError, match=r"name the image '\d+\.png', .* --keypoints\.images"):
        keypoints.Keypoints(config).rows(one)
    with pytest.raises(UserError, match=r"no box of the head; use --keypoints\.reference box"):
        keypoints.Keypoints(replace(config, reference="head")).rows(one)
    with pytest.raises(UserError, match=r"share 60 images, the first being '0\.png'"):
        keypoints.Keypoints(replace(config, test=config.train)).rows(one)
    first = config.settings()
    coco(tmp_path / "other", 61)
    assert keypoints.Config(train=str(tmp_path / "other" / "points.json")).settings() != first


def test_clips_bring_their_key_points(tmp_path: Path) -> None:
    train, test = make_clips(tmp_path / "train", 24), make_clips(tmp_path / "test", 8, split="test")
    one = replace(subject(tmp_path, pixels=False), train=train, test=test)
    found = values(keypoints.Keypoints(keypoints.Config(dims=256)).rows(one), "res2")
    assert {"PCK@0.1", "PCK@0.1/head", "PCK@0.1/left_foot", "mean_distance"} <= set(found)
    with pytest.raises(UserError, match="is scored on others"):
        keypoints.Keypoints(keypoints.Config()).check_data(train, train)
    figures = _poses.of_clips(train, 3)
    assert figures is not None
    assert len(figures.figures) == 72
    assert spaced(12, 3) == [2, 6, 10]
