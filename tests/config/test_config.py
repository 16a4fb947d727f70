"""Configurations: through JSON and back, and every value that cannot be meant."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

from raysl import config, fields, pretext
from raysl.backbone.network import BackboneConfig
from raysl.checkpoint import SaveConfig
from raysl.config import Pretraining, ViewConfig, methods
from raysl.contrastive.bank import BankConfig
from raysl.errors import UserError
from raysl.fields import FieldError
from raysl.objectives import pirl, predict
from raysl.optim import OptimConfig
from raysl.pretext import jigsaw, rotation
from raysl.stream.reader import StreamConfig


def make(**values: Any) -> Pretraining:
    return Pretraining(**{"data": "shapes", "run": "runs/a", **values})


@pytest.mark.parametrize(
    "original",
    [
        make(),
        make(method="predict-rotation", epochs=0.5, workers=1, batch_size=1),
        make(workers="1:8"),
        make(
            method="pirl-rotation+jigsaw",
            precision="bf16",
            view=ViewConfig(64, 0.08, "simclr"),
            backbone=BackboneConfig("resnet18", "small", "group"),
            optim=OptimConfig("adamw", schedule="step", milestones=(0.1, 0.2, 0.9)),
            bank=BankConfig(0.9, "sharded", "float16"),
            stream=StreamConfig("trainer"),
            save=SaveConfig(every_steps=5, keep_every=10),
            parts={"pirl": pirl.Config(lam=0.25, head="mlp"), "jigsaw": jigsaw.Config(grid=2)},
        ),
    ],
)
def test_json_and_back(original: Pretraining) -> None:
    value = json.loads(json.dumps(original.to_json()))
    again = Pretraining.from_json(value)
    assert again == original
    assert config.differences(value, json.loads(json.dumps(again.to_json()))) == []


def test_parts_are_completed_with_defaults_and_may_be_json_values() -> None:
    given = make(method="pirl-rotation+jigsaw", parts={"pirl": {"lam": 1.0}, "jigsaw": jigsaw.Config(grid=2)})
    assert given.parts == {
        "pirl": pirl.Config(lam=1.0),
        "rotation": rotation.Config(),
        "jigsaw": jigsaw.Config(grid=2),
    }
    assert make(method="predict-rotation").parts == {
        "predict": predict.Config(),
        "rotation": rotation.Config(),
    }


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ({"epoch": 3}, "'epoch'. Did you mean 'epochs'"),
        ({"optim": {"learning": 1}}, r"'optim\.learning'"),
        ({"bank": {"momentun": 0.5}}, r"'bank\.momentun'. Did you mean 'momentum'"),
        ({"parts": {"pirl": {"temprature": 1}}}, r"'pirl\.temprature'. Did you mean 'temperature'"),
        ({"parts": {"jigsw": {}}}, "part of the method 'pirl-jigsaw': 'jigsw'. Did you mean 'jigsaw'"),
        (
            {"method": "predict-rotation", "parts": {"jigsaw": {}}},
            "The method 'predict-rotation' has no part 'jigsaw'; it has 'predict' and 'rotation'",
        ),
        ({"method": "pirl-jigsow"}, "'jigsow'. Did you mean 'jigsaw'"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(value: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        Pretraining.from_json({"data": "shapes", "run": "runs/a", **value})


def test_a_value_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"--optim\.lr is 'much'; it must be a number"):
        Pretraining.from_json({"data": "d", "run": "r", "optim": {"lr": "much"}})
    with pytest.raises(UserError, match=r"'pirl' is 0\.1; it must be a Config or a mapping of its fields"):
        Pretraining("d", "r", parts={"pirl": 0.1})
    with pytest.raises(UserError, match=r"--parts is 3; it must be a mapping"):
        Pretraining("d", "r", parts=3)  # type: ignore[arg-type]


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="lacks 'run'"):
        Pretraining.from_json({"data": "shapes"})


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"workers": "8:1"}, "workers is '8:1'"),
        ({"workers": "0:2"}, "workers is '0:2'"),
        ({"workers": "many"}, "a range from the fewest"),
        ({"batch_size": 256, "workers": "5:7"}, "no 5 to 7 workers can share equally"),
        ({"batch_size": 1, "workers": 2}, "less than one image for each of 2 workers"),
        ({"batch_size": 10, "workers": 4}, "4 workers cannot share equally"),
        ({"log_every": 0}, "--log-every is 0"),
        ({"precision": "fp8"}, "--precision is 'fp8'.*fp32, bf16, fp16"),
        ({"optim": {"name": "sdg"}}, r"optim\.name is 'sdg'.*did you mean 'sgd'"),
        ({"optim": {"schedule": "linear"}}, r"optim\.schedule is 'linear'"),
        ({"bank": {"dtype": "float8"}}, r"bank\.dtype is 'float8'"),
        ({"bank": {"placement": "shard"}}, r"bank\.placement is 'shard'.*did you mean 'sharded'"),
        ({"backbone": {"norm": "layer"}}, r"backbone\.norm is 'layer'"),
        ({"stream": {"place": "gpu"}}, r"stream\.place is 'gpu'"),
        ({"view": {"image_size": 4}}, r"view\.image.size is 4"),
        ({"view": {"min_scale": 0.0}}, r"view\.min.scale is 0"),
        ({"parts": {"pirl": {"temperature": 0.0}}}, r"pirl\.temperature is 0"),
        ({"parts": {"pirl": {"lam": 1.5}}}, r"pirl\.lam is 1\.5"),
        ({"parts": {"bank": {"momentum": 0}}}, r"'bank', which is an argument of its own: bank="),
        ({"parts": {"pirl": {"dim": 0}}}, r"pirl\.dim is 0"),
        ({"parts": {"pirl": {"loss": "info_nce"}}}, r"pirl\.loss is 'info_nce'.*did you mean 'infonce'"),
        ({"parts": {"pirl": {"negatives": "mine"}}}, r"pirl\.negatives is 'mine'"),
        ({"method": "predict-jigsaw", "parts": {"predict": {"crop_width": 0}}}, r"predict\.crop.width is 0"),
        ({"parts": {"jigsaw": {"criterion": "max"}}}, r"jigsaw\.criterion is 'max'"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        Pretraining.from_json({"data": "shapes", "run": "runs/a", **values})


def test_a_range_of_workers_means_those_that_divide_the_batch() -> None:
    assert make(batch_size=256, workers="1:8").worker_counts() == (1, 2, 4, 8)
    assert make(batch_size=240, workers="2:6").worker_counts() == (2, 3, 4, 5, 6)
    assert make(batch_size=4, workers="3:16").worker_counts() == (4,)
    assert make(workers=2).worker_counts() == make(workers="2").worker_counts() == (2,)


def test_differences_name_the_fields() -> None:
    one = make(seed=1).to_json()
    two = make(optim=OptimConfig(lr=0.1), parts={"pirl": pirl.Config(lam=0.25)}).to_json()
    assert config.differences(one, two) == ["optim.lr", "parts.pirl.lam", "seed"]


def test_what_may_change_between_sessions_are_fields() -> None:
    assert set(config.MAY_CHANGE) <= {f.name for f in dataclasses.fields(Pretraining)}


def _configs() -> list[type[Any]]:
    nested: list[Any] = [
        kind for kind in fields.hints(Pretraining).values() if dataclasses.is_dataclass(kind)
    ]
    own = [methods.objective_config_type(name) for name in methods.objective_names()]
    return [*nested, *own, *(pretext.config_type(name) for name in pretext.names())]


def _numbers(kind: type[Any]) -> Iterator[tuple[str, Any, fields.Bounds | None]]:
    """Numeric fields of a configuration: name, type and bounds."""
    for name, hint in fields.hints(kind).items():
        extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        inner = typing.get_args(hint)[0] if extras else hint
        kinds = {inner, *typing.get_args(inner)}
        if kinds & {int, float} and typing.get_origin(inner) is not Literal:
            yield name, inner, next((e for e in extras if isinstance(e, fields.Bounds)), None)


@pytest.mark.parametrize("kind", _configs(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_number_has_bounds_and_refuses_what_is_outside(kind: type[Any]) -> None:
    for name, hint, bounds in _numbers(kind):
        assert bounds is not None, f"{kind.__module__}.{name} has no bounds"
        wrong: list[Any] = [float("nan"), float("inf"), float("-inf"), "3"]
        lower = bounds.low if bounds.low is not None else bounds.above
        upper = bounds.high if bounds.high is not None else bounds.below
        wrong += [int(lower) - 1] if lower is not None else []
        wrong += [2 * int(upper) + 2] if upper is not None else []
        wrong += [1.5] if hint is int else []
        for value in wrong:
            given = (value,) if typing.get_origin(hint) is tuple else value
            with pytest.raises(FieldError, match=f"{name.replace('_', '-')} is "):
                kind(**{name: given})


def test_stored_configurations_with_british_names_are_read() -> None:
    for method, part, old, new in (
        ("predict-colorization", "colorization", {"neighbours": 3}, {"neighbors": 3}),
        ("mae", "mae", {"standardise": False}, {"standardize": False}),
        ("predict-inpainting", "inpainting", {"mode": "centre"}, {"mode": "center"}),
    ):
        value = Pretraining("d", "r", method, parts={part: new}).to_json()
        stored = {**value, "parts": {**value["parts"], part: old}}
        assert Pretraining.stored(stored, "r") == Pretraining("d", "r", method, parts={part: new})
