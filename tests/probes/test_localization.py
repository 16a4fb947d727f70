"""A peak is judged by the box that it lies in, and a network that knows the answer scores it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.config import Pretraining, ViewConfig
from raysl.errors import MissingValueError, UserError
from raysl.extraction import RandomBackbone
from raysl.model import DatasetInfo, Model
from raysl.probes import Subject, localization
from raysl.probes._images import cell_offset
from raysl.storage import Folder
from tests.data import make_clips, make_dataset


def subject(tmp_path: Path) -> Subject:
    train, test = make_clips(tmp_path / "train", 12), make_clips(tmp_path / "test", 8, split="test")
    encoder = RandomBackbone(BackboneConfig(), 0)
    return Subject(encoder, ("pooled",), 32, train, test, 0, Folder(str(tmp_path / "out")), "reestimated")


def test_a_peak_is_in_the_box_that_holds_it() -> None:
    maps = torch.zeros(4, 4, 4)
    for number, (y, x) in enumerate(((0, 0), (0, 3), (3, 3), (1, 2))):
        maps[number, y, x] = 1
    left, right = [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0.5]
    boxes = np.array([[left, right], [left, right], [left, [np.nan] * 4], [right, left]])
    found = localization.scores(localization.peaks(maps, 0.5), boxes)
    assert found["peak_in_box"] == 0.5
    assert found["peak_in_silent_box"] == 0.25
    assert found["chance"] == 0.25


def test_a_map_that_is_high_in_the_box_is_right(tmp_path: Path) -> None:
    one = subject(tmp_path)
    boxes = [m.boxes_b24 for m in localization.moments(one.test, 32, 3, 1.0)]
    queue = list(boxes)

    def sound_map(backbone: object, frames: torch.Tensor, sounds: torch.Tensor) -> torch.Tensor:
        assert sounds.shape[1:3] == (1, 1)
        part = queue.pop(0)
        middles = torch.from_numpy(part[:, 0, :2] + part[:, 0, 2:] / 2)
        places = torch.arange(16) / 16  # convolutions look at the corner of a cell
        y, x = ((places - middles[:, i : i + 1]) ** 2 for i in (0, 1))
        return -(y[:, :, None] + x[:, None])

    objective = SimpleNamespace(config=SimpleNamespace(form="map", window_s=1.0), sound_map=sound_map)
    model = SimpleNamespace(objective=objective, backbone=RandomBackbone(BackboneConfig(), 0).network())
    found = {row.name: row.value for row in localization.measure(model, one, localization.Config())}
    # The middle of a box that reaches out of the frame may lie in no cell.
    assert found["peak_in_box"] > 0.9 > 3 * found["chance"]


def test_an_untrained_run_has_rows_and_other_objectives_are_refused(tmp_path: Path) -> None:
    one = subject(tmp_path)

    def model(method: str) -> Model:
        config = Pretraining("-", "-", method, view=ViewConfig(image_size=32))
        return Model(config, DatasetInfo.of(one.train)).eval()

    found = localization.measure(model("audio_visual"), one, localization.Config(frames=2))
    assert {row.name for row in found} == {"peak_in_box", "peak_in_silent_box", "chance", "middle_in_box"}
    with pytest.raises(UserError, match=r"--audio-visual\.form map"):
        localization.measure(model("predict-rotation"), one, localization.Config())
    images = make_dataset(tmp_path / "images", 4)
    with pytest.raises(MissingValueError, match="which object sounds"):
        localization.Localization(localization.Config()).check_data(images, images)


@pytest.mark.parametrize(
    ("name", "offset"), [("small", 0.0), ("resnet18", 0.0), ("timm/vit_tiny_patch16_224", 0.5)]
)
def test_a_place_of_the_map_is_what_it_sees(name: str, offset: float) -> None:
    size = 224 if "224" in name else 64
    assert cell_offset(RandomBackbone(BackboneConfig(name), 0).network().eval(), size) == offset
