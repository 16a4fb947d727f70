"""Methods by name."""

from __future__ import annotations

import pytest

from raysl.config import methods
from raysl.config.methods import Method
from raysl.errors import UserError
from raysl.objectives import pirl, predict
from raysl.pretext import jigsaw, rotation
from raysl.reporting import combinations


def test_names_are_taken_apart() -> None:
    assert methods.parse("pirl-jigsaw") == Method("pirl", "jigsaw")
    assert methods.parse("predict-rotation") == Method("predict", "rotation")
    assert methods.parse("pirl-rotation+jigsaw").transforms == ("rotation", "jigsaw")
    assert methods.parse("pirl").transforms == ()
    several = methods.parse("multitask-rotation+jigsaw,colorization")
    assert several.tasks == ("rotation+jigsaw", "colorization")
    assert several.transforms == ("rotation", "jigsaw", "colorization")


def test_the_parts_of_a_method() -> None:
    assert methods.parse("pirl-rotation+jigsaw").config_types() == {
        "pirl": pirl.Config,
        "rotation": rotation.Config,
        "jigsaw": jigsaw.Config,
    }
    assert methods.load_objective("predict") == (predict.Config, predict.Predict)


def test_objectives_are_files() -> None:
    assert {"moco", "npid", "pirl", "predict", "simclr", "supervised"} <= set(methods.objective_names())


def test_which_objectives_take_a_transform() -> None:
    alone = {name for name in methods.objective_names() if combinations.combines(name, "") == "yes"}
    rotated = {name for name in methods.objective_names() if combinations.combines(name, "rotation") == "yes"}
    assert {"moco", "npid", "simclr", "supervised"} <= alone
    assert {"moco", "pirl", "predict", "simclr"} <= rotated
    assert not {"pirl", "predict"} & alone
    assert not {"npid", "supervised"} & rotated


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("simclrr", "method 'simclrr'. Did you mean 'simclr'"),
        ("prl-jigsaw", "method 'prl-jigsaw'. Did you mean 'pirl-jigsaw'"),
        ("pirl_jigsaw", "method 'pirl_jigsaw'. Did you mean 'pirl-jigsaw'"),
        ("jigsaw", "'jigsaw' lacks an objective. Write 'predict-jigsaw' .* or 'pirl-jigsaw'"),
        ("rotation+jigsaw", r"lacks an objective. Write 'predict-rotation\+jigsaw'"),
        ("moco-v2", "pretext transform 'v2'"),
        ("", "method ''. Known: .*pirl, predict"),
        ("pirl-jigsa", "pretext transform 'jigsa'. Did you mean 'jigsaw'"),
        ("pirl-rotation+jigsa", "pretext transform 'jigsa'. Did you mean 'jigsaw'"),
        ("pirl-rotation+", "empty transform"),
        ("pirl-+jigsaw", "empty transform"),
        ("pirl-rotation++jigsaw", "empty transform"),
        ("multitask-rotation,", "empty transform"),
        ("multitask-rotation,jigsa", "pretext transform 'jigsa'. Did you mean 'jigsaw'"),
        ("multitask-rotation,rotation", "names a task twice"),
        ("pirl-rotation,jigsaw", "names 2 tasks and 'pirl' takes one. Write 'multitask-rotation,jigsaw'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        methods.parse(name)
