"""Angles are those of plain NumPy, and a network that shows the normals reads them out."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from raysl.backbone.network import BackboneConfig
from raysl.errors import MissingValueError, UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.probes import Subject, normals
from raysl.storage import Folder
from tests.data import make_clips, make_dataset

SIDE = 32


def sphere(seed: int) -> NDArray[np.float64]:
    """Normals (h, w, 3) of a ball on nothing: zeros around it."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    radius, center = random.uniform(9, 14), random.uniform(13, 19, 2)
    across, down = (x - center[0]) / radius, (y - center[1]) / radius
    inside = across**2 + down**2 < 0.9
    toward = np.sqrt(np.clip(1 - across**2 - down**2, 0, None))
    found: NDArray[np.float64] = np.stack([across, down, toward], -1) * inside[..., None]
    return found


def png(values: NDArray[np.float64]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.round((values + 1) * 127.5).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def folder(place: Path, train: int = 12, test: int = 4, encoded: bool = False) -> Folder:
    """Images that show their normals as colors."""
    made = Folder(str(place))
    for split, numbers in (("train", range(train)), ("test", range(100, 100 + test))):
        for number in numbers:
            truth = sphere(number)
            made.write(f"{split}/images/{number}.png", png(truth))
            if encoded:
                made.write(f"{split}/normals/{number}.png", png(truth))
            else:
                np.save(stream := io.BytesIO(), truth.astype(np.float32))
                made.write(f"{split}/normals/{number}.npy", stream.getvalue())
    return made


def subject(tmp_path: Path, pixels: bool = True) -> Subject:
    data = make_dataset(tmp_path / "set", 4)
    encoder = Pixels() if pixels else RandomBackbone(BackboneConfig(), 0)
    layers = ("pooled",) if pixels else ("res2", "pooled")
    return Subject(encoder, layers, SIDE, data, data, 0, Folder(str(tmp_path / "out")))


def test_statistics_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    said, true = random.normal(size=(2, 3, 40, 50))
    true = true / np.linalg.norm(true, axis=0)
    true[:, :5] = 0
    cosine = (said * true).sum(0) / np.linalg.norm(said, axis=0)
    degrees = np.degrees(np.arccos(cosine[5:])).ravel()
    found = normals.angles(torch.from_numpy(said)[None], torch.from_numpy(true)[None])
    np.testing.assert_allclose(np.sort(found), np.sort(degrees), atol=1e-9)
    measured = normals.statistics(normals.histogram(found))
    for limit in (11.25, 22.5, 30):
        assert measured[f"within/{limit:g}"] == pytest.approx((degrees < limit).mean(), abs=1e-3)
    assert measured["mean_angle"] == pytest.approx(degrees.mean(), abs=0.01)
    assert measured["median_angle"] == pytest.approx(np.median(degrees), abs=0.1)


@pytest.mark.parametrize("encoded", [True, False])
def test_pixels_that_show_the_normals_are_read_out(tmp_path: Path, encoded: bool) -> None:
    place = folder(tmp_path / "pairs", encoded=encoded)
    found = {
        row.name: row.value for row in normals.Normals(normals.Config(str(place))).rows(subject(tmp_path))
    }
    assert found["within/11.25"] > 0.95
    assert found["mean_angle"] < 5 < 20 < found["mean_angle_without_image"]


def test_maps_of_each_layer_of_a_network_are_read_out(tmp_path: Path) -> None:
    place = folder(tmp_path / "pairs")
    found = normals.Normals(normals.Config(str(place))).rows(subject(tmp_path, pixels=False))
    angle = {row.layer: row.value for row in found if row.name == "mean_angle"}
    blind = next(row.value for row in found if row.name == "mean_angle_without_image")
    assert set(angle) == {"res2", "pooled"}
    assert all(value < blind for value in angle.values())


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    place, one = folder(tmp_path / "pairs"), subject(tmp_path)
    with pytest.raises(MissingValueError, match=r"--normals\.data FOLDER"):
        list(normals.Normals(normals.Config()).examine(one))
    with pytest.raises(UserError, match="no images in"):
        normals.Normals(normals.Config(str(place / "train"))).rows(one)
    place.write("test/normals/100.npy", b"no array")
    with pytest.raises(UserError, match=r"normals/100\.npy' cannot be read"):
        normals.Normals(normals.Config(str(place))).rows(one)
    np.save(stream := io.BytesIO(), np.zeros((4, 4)))
    place.write("test/normals/100.npy", stream.getvalue())
    with pytest.raises(UserError, match=r"shape \(4, 4\)"):
        normals.Normals(normals.Config(str(place))).rows(one)
    place.delete("test/normals/100.npy")
    with pytest.raises(UserError, match=r"1 images .* have no file of their name"):
        normals.Normals(normals.Config(str(place))).rows(one)


def test_normals_of_16_bits_keep_their_precision() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    found = normals._png(imagecodecs.png_encode(values))
    np.testing.assert_allclose(found, values / 32767.5 - 1, atol=1e-4)


def test_clips_bring_their_normals(tmp_path: Path) -> None:
    train, test = make_clips(tmp_path / "train", 40), make_clips(tmp_path / "test", 10, split="test")
    one = replace(subject(tmp_path, pixels=False), train=train, test=test)
    found = normals.Normals(normals.Config()).rows(one)
    angle = {row.layer: row.value for row in found if row.name == "mean_angle"}
    assert angle["res2"] < next(row.value for row in found if row.name == "mean_angle_without_image")
    with pytest.raises(UserError, match="is scored on others"):
        normals.Normals(normals.Config()).check_data(train, train)
