"""A clip has the mean of the features of its frames, and the classifier is the linear probe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.backbone.network import BackboneConfig
from raysl.dataset.clips import Clips
from raysl.errors import MissingValueError
from raysl.extraction import RandomBackbone
from raysl.probes import Labeled, Subject, video
from raysl.probes.linear import Config as LinearConfig
from raysl.probes.linear import Linear
from raysl.storage import Folder
from raysl.stream import decode
from tests.data import make_clips, make_dataset

FEW = video.Config(frames=3, linear=LinearConfig(dims=0))


def test_rows_are_those_of_the_linear_probe_on_mean_features(tmp_path: Path) -> None:
    train, test = make_clips(tmp_path / "train", 20), make_clips(tmp_path / "test", 10, split="test")
    encoder = RandomBackbone(BackboneConfig(), 0)
    subject = Subject(encoder, ("res3", "pooled"), 32, train, test, 0, Folder(str(tmp_path / "out")))
    encode = encoder.load(torch.device("cpu"), ["res3", "pooled"])
    sets = []
    for data in (train, test):
        clips = Clips(data.read(np.arange(data.num_images), ("frames", "times")))
        means = []
        for row in range(len(clips)):
            with torch.inference_mode():
                frames = decode.evaluation_views([clips.frame(row, n) for n in (2, 6, 10)], 32)
                means.append(encode(frames)["res3"].mean(0).numpy())
        sets.append(Labeled(np.stack(means), data.labels()))
    wanted = {row.name: row.value for row in Linear(FEW.linear).run(*sets)}
    found = video.Video(FEW).rows(subject)
    assert {row.name: row.value for row in found if row.layer == "res3"} == wanted
    assert {row.layer for row in found} == {"res3", "pooled"}
    again = video.Video(FEW).rows(replace(subject, bn_statistics="reestimated"))
    assert {row.layer for row in again} == {"res3", "pooled"}
    images = make_dataset(tmp_path / "images", 4)
    with pytest.raises(MissingValueError, match=r"needs clips, and .* has images"):
        video.Video(FEW).check_data(train, images)
