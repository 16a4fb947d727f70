"""Distances and read-outs of transforms with known effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.extraction import Encode, Trained
from raysl.pretext import Geometry, build
from raysl.probes import Subject, invariance
from raysl.probes.linear import Config as Linear
from raysl.rng import ImageRng
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_dataset
from tests.extraction.test_feature_tasks import make_run, saved


@dataclass(frozen=True)
class Stub:
    """ "color" is the mean of each channel, which no turn changes; "corner" is one pixel, which betrays the turn where
    the top left corner has been made white; "chroma" is how far red is from green, which is nothing in gray."""

    name: str = "stub"
    layers: tuple[str, ...] = ("color", "corner", "chroma")

    def identity(self) -> dict[str, Any]:
        return {"encoder": "stub"}

    def load(self, device: torch.device, layers: Sequence[str], by_batch: bool = False) -> Encode:
        return self.encode

    def encode(self, images_bchw: torch.Tensor) -> dict[str, torch.Tensor]:
        corners = images_bchw.float()[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
        chroma_b = (images_bchw[:, 0].float() - images_bchw[:, 1].float()).abs().mean((1, 2))
        return {
            "color": images_bchw.double().mean((2, 3)),
            "corner": corners - 60,
            "chroma": chroma_b[:, None],
        }


def measured(
    folder: Path, config: invariance.Config, *layers: str
) -> tuple[dict[tuple[str, str], float], dict[str, Any]]:
    dataset = make_dataset(folder / "set", 80)
    subject = Subject(Stub(), layers, 16, dataset, dataset, 0, Folder(str(folder / "out")))
    rows = invariance.Invariance(config).rows(subject)
    counts = subject.folder.read_json(invariance.HISTOGRAM)["counts"]
    return {(row.layer, row.name): row.value for row in rows}, counts


def test_an_invariant_layer_has_distance_zero_and_no_readout(tmp_path: Path) -> None:
    found, counts = measured(tmp_path, invariance.Config(("rotation",)), "color", "corner")
    assert found["color", "distance/rotation"] == pytest.approx(0, abs=1e-6)
    assert found["color", "closer"] == found["color", "closer/rotation"] == 1
    assert found["color", "readout/rotation"] < 0.5
    assert found["color", "chance/rotation"] == 0.25
    assert found["color", "distance/others"] > 0
    assert found["corner", "closer"] < 0.8
    # A quarter is turned by nothing.
    turned = sum(counts["color"]["rotation"])
    assert 40 < turned < 80
    assert counts["color"]["rotation"] == [turned] + [0] * 39
    assert sum(counts["corner"]["others"]) == 80 * 64


def test_several_crops_are_compared_by_their_mean_features(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, invariance.Config(("jigsaw",), readout=Linear("fast", dims=0)), "color")
    # Nine patches show the colors of the image.
    assert found["color", "closer/jigsaw"] > 0.7
    assert ("color", "readout/jigsaw") in found


def test_unchanged_images_do_not_count(tmp_path: Path) -> None:
    found, counts = measured(tmp_path, invariance.Config(("rotation",)), "corner")
    dataset = DataSet.open(str(tmp_path / "set"))
    encoded = dataset.read(np.arange(80), ("image",)).column("image").to_pylist()
    image_bchw = decode.evaluation_views(encoded, 16)
    view = build("rotation", {}, Geometry(16, predicted=True)).transform(
        image_bchw, ImageRng(0, np.zeros(80, np.int64), np.arange(80), "invariance")
    )
    assert view.target is not None
    turned_n = (view.target != 0).numpy()
    plain_nd, moved_nd = (
        torch.nn.functional.normalize(Stub().encode(views)["corner"], dim=1).double().numpy()
        for views in (image_bchw, view.crops_bpchw[:, 0])
    )
    distance_n = np.linalg.norm(plain_nd - moved_nd, axis=1)[turned_n]
    assert found["corner", "distance/rotation"] == pytest.approx(distance_n.mean(), abs=1e-5)
    assert sum(counts["corner"]["rotation"]) == turned_n.sum() < 80
    # If a transform changes no image, all count.
    nothing, _ = measured(tmp_path / "identity", invariance.Config(("identity",)), "corner")
    assert nothing["corner", "distance/identity"] == pytest.approx(0, abs=1e-6)


def test_distances_are_between_directions() -> None:
    one, other = torch.tensor([[2.0, 0], [1, 0], [3, 0]]), torch.tensor([[5.0, 0], [0, 7], [-1, 0]])
    assert invariance.distances(one, other).tolist() == pytest.approx([0, np.sqrt(2), 2])


def test_closer_compares_distances_image_by_image() -> None:
    assert invariance.closer(np.array([0.1, 1.0]), np.array([[0.2], [1.1]])) == 1
    assert invariance.closer(np.array([0.5, 0.5]), np.array([[0.5, 0.5 + 1e-9], [0.6, 0.4]])) == 0.5


def test_others_are_all_other_images_once() -> None:
    angles = torch.tensor([0.0, 1.0, 2.5])
    found = invariance.to_others(torch.stack([angles.cos(), angles.sin()], 1), 9)
    by_hand = [[2 * np.sin(abs(a - b) / 2) for b in angles.tolist() if b != a] for a in angles.tolist()]
    np.testing.assert_allclose(np.sort(found), np.sort(by_hand), atol=1e-6)


def test_a_collapsed_network_is_neither_closer_nor_farther() -> None:
    plain_nd = torch.full((20, 6), 0.1)
    moved_npd = torch.full((20, 9, 6), 0.1)
    transforms = {"jigsaw": build("jigsaw", {}, Geometry(16, predicted=True))}
    rows, _ = invariance._layer(
        plain_nd, {"jigsaw": (moved_npd, None, np.ones(20, bool))}, transforms, invariance.Config()
    )
    assert {row.name: row.value for row in rows}["closer"] == 0.5


def test_a_transform_without_labels_is_read_out_as_transformed_or_not(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, invariance.Config(("colorization", "identity")), "chroma")
    assert found["chroma", "readout_whether/colorization"] > 0.9
    assert found["chroma", "readout_whether/identity"] == 0.5
    assert found["chroma", "chance_whether/colorization"] == 0.5


def test_hyperparameters_of_transforms_are_part_of_the_protocol() -> None:
    settings = invariance.Config(("rotation+jigsaw",)).settings()
    assert set(settings["dials"]) == {"jigsaw", "rotation"}
    assert settings["dials"]["jigsaw"]["min_scale"] == 0.6
    other = invariance.Config(("rotation+jigsaw",), grid=2).settings()
    assert other["dials"]["jigsaw"].pop("grid") == 2 != settings["dials"]["jigsaw"].pop("grid")
    assert other == settings


def test_the_jigsaw_has_the_given_grid(tmp_path: Path) -> None:
    config = invariance.Config(("jigsaw",), grid=2, readout=Linear("fast", dims=0))
    found, _ = measured(tmp_path, config, "color")
    assert found["color", "chance/jigsaw"] == pytest.approx(1 / 24)


def test_heads_are_compared_by_the_transform_that_they_were_trained_with(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, network = make_run(dataset, tmp_path / "run")
    encoder = Trained(run, run.newest())
    subject = Subject(encoder, ("pooled",), 16, dataset, dataset, 3, Folder(str(tmp_path / "out")))
    rows = invariance.Invariance(invariance.Config(("rotation",))).rows(subject)
    counts = subject.folder.read_json(invariance.HISTOGRAM)["counts"]
    found = {row.name: row.value for row in rows if row.layer == "heads"}
    assert set(found) == {"distance/others", "distance/jigsaw", "distance_std/jigsaw", "closer/jigsaw"}
    assert sum(counts["heads"]["jigsaw"]) == 40
    # By hand, in another order of the images.
    image, patches = (network.objective.views[name] for name in ("image", "transformed"))
    encoded = dataset.read(np.arange(40), ("image",)).column("image").to_pylist()
    image_rng = ImageRng(3, np.zeros(40, np.int64), np.arange(40), "invariance")
    views = {
        "image": decode.evaluation_views(encoded, image.source.size)[:, None],
        "transformed": patches.transform(
            decode.evaluation_views(encoded, patches.source.size), image_rng
        ).crops_bpchw,
    }
    with torch.inference_mode():  # in one batch, as in training
        made = {name: unit_bd.double().numpy() for name, unit_bd in network.train()(views).items()}
    by_hand_n = np.linalg.norm(made["image"] - made["transformed"], axis=1)
    assert found["distance/jigsaw"] == pytest.approx(by_hand_n.mean(), abs=1e-5)
    assert found["distance_std/jigsaw"] == pytest.approx(by_hand_n.std(ddof=0), abs=1e-5)
    apart = np.linalg.norm(made["image"][:, None] - made["image"][None], axis=2)
    others = [[apart[i, j] for j in range(40) if j != i] for i in range(40)]
    assert found["closer/jigsaw"] == pytest.approx(np.mean(by_hand_n[:, None] < np.array(others)), abs=1e-3)


@pytest.mark.parametrize(("statistics", "same"), [("batch", True), ("kept", False)])
def test_running_statistics_are_used_only_if_requested(tmp_path: Path, statistics: Any, same: bool) -> None:
    dataset = make_dataset(tmp_path / "set", 40)
    run, network = make_run(dataset, tmp_path / "run")
    subject = Subject(
        Trained(run, run.newest()), ("pooled",), 16, dataset, dataset, 0, Folder(str(tmp_path / "out"))
    )
    config = invariance.Config(("rotation",), statistics=statistics, readout=Linear("fast", dims=0))
    probe = invariance.Invariance(config)
    before = probe.rows(subject)
    with torch.no_grad():
        for name, kept in network.named_buffers():
            kept.mul_(3) if name.endswith(("running_mean", "running_var")) else None
    saved(run, network)
    after = probe.rows(replace(subject, encoder=Trained(run, run.newest())))
    assert ([row.value for row in before] == [row.value for row in after]) is same


def test_an_unknown_transform_and_too_few_images_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", 3)
    subject = Subject(Stub(), ("color",), 16, dataset, dataset, 0, Folder(str(tmp_path)))
    with pytest.raises(UserError, match="'rotation'"):
        list(invariance.Invariance(invariance.Config(("rotatoin",))).examine(subject))
    with pytest.raises(UserError, match="at least 4"):
        list(invariance.Invariance(invariance.Config()).examine(subject))
    with pytest.raises(UserError, match="others"):
        invariance.Config(others=0)
    with pytest.raises(UserError, match="at least one value"):
        invariance.Config(())
    with pytest.raises(UserError, match="kept"):
        invariance.Config(statistics="keep")  # type: ignore[arg-type]
