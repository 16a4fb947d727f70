"""Audio-visual correspondence: balance of the two kinds of pairs, and the map of the sound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from raysl import pretext
from raysl.backbone.network import BackboneConfig, build
from raysl.dataset import Rows
from raysl.errors import UserError
from raysl.objectives import Setup
from raysl.objectives.audio_visual import AudioVisual, Config
from raysl.pretext import Geometry
from raysl.stream.reader import Batch

FORMS = ("fused", "distance", "map")
NEGATIVES = ("clips", "times", "both")


def make(**config: Any) -> tuple[Any, AudioVisual]:
    torch.manual_seed(0)
    backbone = build(BackboneConfig(norm="group"))
    identity = pretext.build("identity", {}, Geometry(32))
    setup = Setup(None, identity, backbone.width, 100, 0, 0)
    return backbone, AudioVisual(Config(sound_width=8, dim=16, **config), setup)


def batch(objective: AudioVisual, b: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    moments = objective.views["sound"].num_crops
    views = {
        "frame": torch.randint(0, 256, (b, 1, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "sound": torch.randint(0, 256, (b, moments, 1, 64, 100), dtype=torch.uint8, generator=generator),
    }
    return Batch(0, Rows(np.arange(b), np.zeros(b, np.int64)), None, views, {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("loss", ["binary", "infonce"])
def test_every_parameter_learns_in_every_form(form: str, negatives: str, loss: str) -> None:
    backbone, objective = make(form=form, negatives=negatives, loss=loss)
    of = batch(objective)
    found = objective.loss(objective.forward(backbone, of.views), of, None)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert 0 <= float(found.metrics["accuracy"]) <= 1


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_positives_and_negatives_weigh_the_same(negatives: str) -> None:
    """A classifier that always answers with the same probability has a loss of at least log 2."""
    _, objective = make(form="fused", negatives=negatives)
    last = objective.classify[2]  # type: ignore[index]
    of = batch(objective, 6)
    outputs = {"frame": torch.randn(6, 16), "sound": torch.randn(6, objective.views["sound"].num_crops, 16)}
    for answer in (0.0, 1.5, -1.5):
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(answer)
        expected = (math.log1p(math.exp(-answer)) + math.log1p(math.exp(answer))) / 2
        found = objective.loss(outputs, of, None)
        assert found.loss.item() == pytest.approx(expected, abs=1e-5)
        assert float(found.metrics["accuracy"]) in (0.0, 0.5)


@pytest.mark.parametrize("form", ["distance", "map"])
def test_the_right_sounds_win(form: str) -> None:
    _, objective = make(form=form)
    of = batch(objective, 6)
    sound_bd = torch.nn.functional.one_hot(torch.arange(6), 16).float()
    seen = sound_bd.clone()
    if form == "map":
        seen = torch.zeros(6, 16, 2, 2)
        seen[:, 15] = 1  # nothing, but in one place
        seen[:, :, 1, 0] = sound_bd
    found = objective.loss({"frame": seen, "sound": sound_bd[:, None]}, of, None)
    assert float(found.metrics["accuracy"]) == 1
    mixed = objective.loss({"frame": seen, "sound": sound_bd.roll(1, 0)[:, None]}, of, None)
    assert mixed.loss > found.loss + 0.5


def test_info_nce_of_frames_and_sounds_equals_its_equation() -> None:
    """In plain NumPy: the softmax over the sounds of the batch and the other moments of the own clip."""
    _, objective = make(form="distance", loss="infonce", negatives="both")
    of, generator = batch(objective, 5), np.random.default_rng(0)
    seen, sounds = generator.normal(size=(5, 16)), generator.normal(size=(5, 2, 16))
    outputs = {"frame": torch.from_numpy(seen), "sound": torch.from_numpy(sounds)}
    found = objective.loss(outputs, of, None)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    sounds /= np.linalg.norm(sounds, axis=2, keepdims=True)
    first = -4 * np.linalg.norm(seen[:, None] - sounds[None, :, 0], axis=2) + 4
    later = -4 * np.linalg.norm(seen - sounds[:, 1], axis=1) + 4
    logits = np.concatenate([first, later[:, None]], axis=1)
    own = first.diagonal()
    assert found.loss.item() == pytest.approx(np.mean(np.log(np.exp(logits).sum(1)) - own), rel=1e-5)
    assert found.metrics["accuracy"].item() == pytest.approx(np.mean(own == logits.max(1)))


def test_the_loss_is_computed_in_float32() -> None:
    backbone, objective = make(form="map")
    of = batch(objective)
    outputs = objective.forward(backbone, of.views)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective.loss(outputs, of, None).loss
    assert mixed.dtype == torch.float32
    assert mixed.item() == objective.loss(outputs, of, None).loss.item()


def test_a_width_that_groups_do_not_divide_is_refused() -> None:
    backbone, _ = make()
    setup = Setup(None, pretext.build("identity", {}, Geometry(32)), backbone.width, 100, 0, 0)
    with pytest.raises(UserError, match="sound-width is 6; it must be a multiple of 4"):
        AudioVisual(Config(sound_width=6), setup)


def test_the_map_is_a_cosine_for_each_place() -> None:
    backbone, objective = make(form="map")
    backbone.eval()
    of = batch(objective)
    found = objective.sound_map(backbone, of.views["frame"], of.views["sound"])
    assert found.shape == (4, 2, 2)
    assert float(found.detach().abs().max()) <= 1 + 1e-5
    outputs = objective.forward(backbone, of.views)
    logits_bk = objective._logits(outputs["frame"], outputs["sound"])
    torch.testing.assert_close(objective.classify(found.flatten(1).amax(1, keepdim=True)), logits_bk)
