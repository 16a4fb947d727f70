"""Learning what a teacher says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysl.errors import MissingValueError, UserError
from raysl.objectives import _teacher
from raysl.objectives.distill import Config, Distill, soft_targets
from tests.objectives.setups import batch, setup, teacher


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_soft_targets_are_the_divergence_of_the_softened_answers(temperature: float) -> None:
    student, taught = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    s, t = softmax(student.numpy() / temperature), softmax(taught.numpy() / temperature)
    expected = temperature**2 * (t * np.log(t / s)).sum(axis=1)
    np.testing.assert_allclose(soft_targets(student, taught, temperature).numpy(), expected, rtol=1e-10)
    assert soft_targets(taught, taught, temperature).abs().max() < 1e-12


def test_the_gradient_keeps_its_scale_when_the_answers_are_softened() -> None:
    student = torch.tensor([[0.02, -0.01, 0.0]], requires_grad=True)
    taught = torch.tensor([[-0.01, 0.03, 0.0]])
    norms = [
        torch.autograd.grad(soft_targets(student, taught, t).sum(), student)[0].norm().item()
        for t in (5.0, 50.0)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_the_loss_weighs_the_teacher_and_the_labels(tmp_path: Path) -> None:
    backbone, of_run = setup(num_classes=4)
    objective = Distill(Config(teacher(tmp_path / "t"), temperature=2.0, alpha=0.3), of_run)
    of = batch(objective, 6)
    outputs = objective(backbone, of.views)
    assert outputs["logits"].shape == outputs["teacher"].shape == (6, 1, 4)
    assert not outputs["teacher"].requires_grad
    found = objective.loss(outputs, of, None)
    student_bk, teacher_bk = outputs["logits"][:, 0], outputs["teacher"][:, 0]
    assert of.labels_b is not None
    soft = soft_targets(student_bk, teacher_bk, 2.0).mean()
    torch.testing.assert_close(found.loss, 0.3 * soft + 0.7 * F.cross_entropy(student_bk, of.labels_b))


def test_the_teacher_stays_as_it_is_and_is_not_saved(tmp_path: Path) -> None:
    backbone, of_run = setup()
    objective = Distill(Config(teacher(tmp_path / "t")), of_run)
    assert set(objective.state_dict()) == {"classify.weight", "classify.bias"}
    assert {name for name, _ in objective.named_parameters()} == set(objective.state_dict())
    of = batch(objective, 4)
    objective.train()
    first = objective(backbone, of.views)["teacher"]
    alone = objective(backbone, {"image": of.views["image"][:1]})["teacher"]
    torch.testing.assert_close(alone, first[:1], msg="its BatchNorm looks at the batch")
    assert torch.equal(objective(backbone, of.views)["teacher"], first)


def test_every_crop_is_taught(tmp_path: Path) -> None:
    backbone, of_run = setup("jigsaw")
    objective = Distill(Config(teacher(tmp_path / "t", "distill-jigsaw")), of_run)
    of = batch(objective, 3)
    outputs = objective(backbone, of.views)
    assert outputs["logits"].shape == outputs["teacher"].shape == (3, 4, 4)
    expected = soft_targets(outputs["logits"], outputs["teacher"], 4.0).mean()
    torch.testing.assert_close(objective.loss(outputs, of, None).loss, expected)


def test_which_checkpoint_teaches_is_chosen_and_recorded(tmp_path: Path) -> None:
    place = teacher(tmp_path / "t", step=3)
    teacher(tmp_path / "t", step=7)
    newest, older = Distill(Config(place), setup()[1]), Distill(Config(place, step=3), setup()[1])
    assert newest.describe()["teacher"]["step"] == 7
    assert older.describe()["teacher"]["step"] == 3
    assert newest.describe()["teacher"]["crc32"] != older.describe()["teacher"]["crc32"]
    with pytest.raises(
        UserError, match=r"no complete checkpoint of step 5\. It has checkpoints of steps: 3, 7"
    ):
        Distill(Config(place, step=5), setup()[1])


def test_a_run_without_a_classifier_of_single_views_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its method 'predict-jigsaw' has no classifier of single views"):
        _teacher.load(teacher(tmp_path / "jigsaw", "predict-jigsaw", width=9 * 192))
    # Two crops of half the backbone's width look like one of its whole width.
    pair = teacher(tmp_path / "pair", "predict-relative_position", joins_crops=True)
    with pytest.raises(UserError, match="has no classifier of single views"):
        _teacher.load(pair)


def test_what_is_no_run_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(MissingValueError, match=r"--distill\.teacher"):
        Distill(Config(), setup()[1])
    with pytest.raises(UserError, match=r"There is no run at .* to load a teacher from"):
        Distill(Config(str(tmp_path)), setup()[1])
    place = teacher(tmp_path / "t")
    (tmp_path / "t" / "metadata.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match=r"metadata .* is damaged"):
        Distill(Config(place), setup()[1])


def test_a_teacher_of_transformed_images_is_asked_about_such(tmp_path: Path) -> None:
    place = teacher(tmp_path / "t", "predict-rotation")
    with pytest.raises(UserError, match="Write the method as 'distill-rotation'"):
        Distill(Config(place), setup()[1])
    assert Distill(Config(place), setup("rotation")[1]).views["image"].num_labels == 4


def test_labels_must_be_those_that_the_teacher_knows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the teacher has 4 classes and the data set has 0"):
        Distill(Config(teacher(tmp_path / "t"), alpha=0.5), setup()[1])
