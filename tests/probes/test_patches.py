"""Pieces are cut where they are said to be, and neighbors are those of plain NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.errors import MissingValueError, UserError
from raysl.extraction import Pixels, RandomBackbone
from raysl.probes import Subject, patches
from raysl.probes._images import features
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_clips, make_dataset


def subject(tmp_path: Path) -> Subject:
    train, test = make_dataset(tmp_path / "train", 40), make_dataset(tmp_path / "test", 20, seed=1)
    return Subject(Pixels(), ("pooled",), 16, train, test, 0, Folder(str(tmp_path / "out")))


def test_a_patch_is_the_part_of_the_view_at_its_place(tmp_path: Path) -> None:
    data = subject(tmp_path).train
    found = patches.pieces(data, 16, patches.Config(share=0.5, per_image=3))
    assert found.views_nchw.shape == (120, 3, 16, 16)
    views = decode.evaluation_views(data.read(np.arange(40)).column("image").to_pylist(), 16)
    for n in (0, 50, 119):
        top, left = (found.places_n2[n] * 16 - 4).round().astype(int)
        part = views[found.sources_n[n]][None, :, top : top + 8, left : left + 8]
        wanted = torch.nn.functional.interpolate(part, (16, 16), mode="bilinear")[0]
        assert torch.equal(found.views_nchw[n], wanted)


def test_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    one, config = subject(tmp_path), patches.Config(per_image=2, ks=(3,))
    labels = (one.train.labels(), one.test.labels())
    found = {row.name: row.value for row in patches.Patches(config).rows(one)}
    gallery, queries = (patches.pieces(data, 16, config) for data in (one.train, one.test))
    unit = []
    for pieces in (queries, gallery):
        flat = pieces.views_nchw.flatten(1).numpy() / 255 - 0.5
        unit.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1)[:, :3]
    right = labels[0][gallery.sources_n[order]] == labels[1][queries.sources_n][:, None]
    assert found["precision/k=3"] == pytest.approx(right.mean())
    assert found["precision/k=3"] > found["chance"]
    near = np.linalg.norm(gallery.places_n2[order[:, 0]] - queries.places_n2, axis=1).mean()
    assert found["place_distance"] == pytest.approx(near / 0.26, rel=0.2)


def test_a_patch_does_not_find_its_own_image_in_one_set_for_both(tmp_path: Path) -> None:
    one = subject(tmp_path)
    both = replace(one, test=one.train)
    pieces = patches.pieces(one.train, 16, patches.Config())
    values = features(Pixels().load(torch.device("cpu"), ("pooled",)), [pieces.views_nchw])["pooled"]
    index = patches.neighbors(values, values, 5, pieces, pieces, same=True)
    assert index.shape == (80, 5)
    assert (pieces.sources_n[index] != pieces.sources_n[:, None]).all()
    assert patches.Patches(patches.Config()).rows(both)


def test_frames_of_the_same_pose(tmp_path: Path) -> None:
    train, test = make_clips(tmp_path / "clips", 20), make_clips(tmp_path / "others", 10, split="test")
    encoder = RandomBackbone(BackboneConfig(), 0)
    config = patches.Config(of="frames", per_image=3)
    one = replace(subject(tmp_path), encoder=encoder, layers=("res2", "pooled"), train=train, test=test)
    found = patches.Patches(config).rows(one)
    assert {row.layer for row in found} == {"res2", "pooled"}
    names = {row.name for row in found}
    assert names == {"precision/k=5", "precision/k=1", "chance", "pose_distance"}
    pieces = patches.pieces(test, 32, config)
    assert pieces.points_nk2 is not None
    itself = patches._distances(pieces, pieces, np.arange(len(pieces.sources_n)))
    assert itself["pose_distance"] == 0
    images = subject(tmp_path / "more")
    with pytest.raises(MissingValueError, match=r"--patches\.of frames needs clips"):
        list(patches.Patches(config).examine(images))
    single = make_dataset(tmp_path / "single", 1)
    with pytest.raises(UserError, match="has only one"):
        list(patches.Patches(patches.Config()).examine(replace(images, train=single, test=single)))
