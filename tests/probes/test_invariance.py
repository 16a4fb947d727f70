"""Distances of what is known to move, and what is known to be readable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.errors import UserError
from raysl.features import Encode
from raysl.pretext import Geometry, build
from raysl.probes import Subject, invariance
from raysl.storage import Folder
from tests.data import make_dataset


@dataclass(frozen=True)
class Stub:
    """ "colour" is the mean of each channel, which no turn changes; "corner" is one pixel, which betrays the turn where
    the top left corner has been made white."""

    name: str = "stub"
    layers: tuple[str, ...] = ("colour", "corner")

    def identity(self) -> dict[str, Any]:
        return {"encoder": "stub"}

    def load(self, device: torch.device, layers: Sequence[str]) -> Encode:
        return self.encode

    def encode(self, images_bchw: torch.Tensor) -> dict[str, torch.Tensor]:
        corners = images_bchw.float()[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
        return {"colour": images_bchw.double().mean((2, 3)), "corner": corners - 60}


def look(folder: Path, config: invariance.Config) -> tuple[dict[tuple[str, str], float], dict[str, Any]]:
    dataset = make_dataset(folder / "set", 80)
    subject = Subject(Stub(), Stub().layers, 16, dataset, dataset, 0, Folder(str(folder / "out")))
    geometry = Geometry(16, predicted=True)
    transforms = {name: build(name, {}, geometry) for name in config.transforms}
    rows, counts = invariance._look(subject, config, transforms)
    return {(row.layer, row.name): row.value for row in rows}, counts


def test_what_does_not_move_has_distance_zero_and_cannot_be_read(tmp_path: Path) -> None:
    found, counts = look(tmp_path, invariance.Config(("rotation",)))
    assert found["colour", "distance/rotation"] == pytest.approx(0, abs=1e-6)
    assert found["colour", "closer"] == found["colour", "closer/rotation"] == 1
    assert found["colour", "readout/rotation"] < 0.5
    assert found["colour", "chance/rotation"] == 0.25
    assert found["colour", "distance/others"] > 0
    assert found["corner", "closer"] < 0.8
    assert counts["colour"]["rotation"] == [80] + [0] * 39
    assert sum(counts["corner"]["others"]) == 80


def test_a_transform_of_several_crops_is_compared_by_the_mean_of_its_features(tmp_path: Path) -> None:
    found, _ = look(tmp_path, invariance.Config(("jigsaw",)))
    # Nine patches show the colours of the image.
    assert found["colour", "closer/jigsaw"] > 0.7
    assert ("colour", "readout/jigsaw") in found


def test_distances_are_between_directions() -> None:
    one, other = torch.tensor([[2.0, 0], [1, 0], [3, 0]]), torch.tensor([[5.0, 0], [0, 7], [-1, 0]])
    assert invariance.distances(one, other).tolist() == pytest.approx([0, np.sqrt(2), 2])


def test_closer_is_a_probability_over_pairs() -> None:
    random = np.random.default_rng(0)
    few, many = random.integers(0, 5, 11).astype(float), random.integers(0, 5, 17).astype(float)
    pairs = np.mean([(a < b) + (a == b) / 2 for a in few for b in many])
    assert invariance.closer(few, many) == pytest.approx(pairs)


def test_an_unknown_transform_and_too_few_images_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 3)
    subject = Subject(Stub(), ("colour",), 16, dataset, dataset, 0, Folder(str(tmp_path)))
    with pytest.raises(UserError, match="'rotation'"):
        list(invariance.Invariance(invariance.Config(("rotatoin",))).examine(subject))
    with pytest.raises(UserError, match="at least 4"):
        list(invariance.Invariance(invariance.Config()).examine(subject))
    with pytest.raises(UserError, match="empty"):
        invariance.Config(())
