"""Fields of configurations: types, bounds, and errors that name the flag."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from raysl.errors import unknown
from raysl.fields import Bounds, Checked, FieldError, Seed, check


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Bounds(above=0, hint="the paper uses 0.03")] = 0.1


@dataclass(frozen=True)
class ToyConfig(Checked):
    momentum: Annotated[float, Bounds(0, 1)] = 0.5
    dim: Annotated[int, Bounds(1, 65_536)] = 128
    size: Annotated[int | None, Bounds(low=4)] = None
    share: Annotated[float, Bounds(0, below=1)] = 0.0
    milestones: Annotated[tuple[float, ...], Bounds(0, 1)] = (0.5,)
    pair: tuple[int, str] = (1, "a")
    name: Literal["sgd", "lars"] = "sgd"
    seed: Seed = 0
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def test_values_within_the_bounds_are_accepted() -> None:
    ToyConfig(momentum=1, dim=1, size=4, share=0.99, milestones=(0, 1.0), name="lars", seed=2**63 - 1)


def test_numbers_of_numpy_and_torch_become_those_of_python() -> None:
    made = ToyConfig(
        dim=np.int64(3),  # type: ignore[arg-type]
        momentum=torch.tensor(0.25),  # type: ignore[arg-type]
        milestones=(np.float32(0.5),),  # type: ignore[arg-type]
        flag=np.bool_(True),  # type: ignore[arg-type]
    )
    values = [made.dim, made.momentum, made.milestones[0], made.flag]
    assert json.dumps(values) == "[3, 0.25, 0.5, true]"
    with pytest.raises(FieldError, match=r"--toy\.dim is 0\.5; it must be a whole number"):
        ToyConfig(dim=np.float64(0.5))  # type: ignore[arg-type]


def test_an_error_repeats_the_beginning_of_a_long_value() -> None:
    with pytest.raises(
        FieldError, match=r"--toy.name is 'x{79}\.\.\. \(402 characters\); it must be one of"
    ) as caught:
        ToyConfig(name="x" * 400)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
    assert len(str(unknown("backbone", "y" * 400, ["small"]))) < 200
    assert "Did you mean 'pirl-r50-800ep'?" in str(
        unknown("recipe", "pirl-r50", ["npid-r50", "pirl-r50-800ep"])
    )
    many = str(unknown("backbone", "vit_tinny", [f"vit_{number}" for number in range(500)]))
    assert "and 490 others" in many
    assert len(many) < 400


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentum": 1.5}, "--toy.momentum is 1.5; it must be between 0 and 1."),
        ({"momentum": float("nan")}, "--toy.momentum is nan; it must be a finite number."),
        ({"momentum": "0.5"}, "--toy.momentum is '0.5'; it must be a number."),
        ({"momentum": True}, "--toy.momentum is True; it must be a number."),
        ({"dim": 0}, "--toy.dim is 0; it must be between 1 and 65,536."),
        ({"dim": 1.0}, "--toy.dim is 1.0; it must be a whole number."),
        ({"size": 3}, "--toy.size is 3; it must be at least 4."),
        ({"size": 4.5}, "--toy.size is 4.5; it must be a whole number or none."),
        ({"share": 1}, "--toy.share is 1; it must be at least 0 and below 1."),
        ({"milestones": (0.1, 2.0)}, "--toy.milestones is (0.1, 2.0); each must be between 0 and 1."),
        ({"pair": (1,)}, "--toy.pair is (1,); it must have 2 values."),
        ({"name": "sdg"}, "--toy.name is 'sdg'; it must be one of sgd, lars (did you mean 'sgd'?)."),
        ({"seed": 2**64}, "it must be between 0 and 2**63 - 1."),
        ({"flag": 1}, "--toy.flag is 1; it must be true or false."),
        (
            {"inner": Inner(rate=0)},
            "--toy.inner.rate is 0; it must be above 0 (the paper uses 0.03).",
        ),
    ],
)
def test_other_values_are_refused_by_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as caught:
        ToyConfig(**values)
    assert message in str(caught.value)


def test_the_flag_is_named_as_it_was_typed() -> None:
    with pytest.raises(FieldError) as caught:
        check(Inner(rate=-1), "optim.")
    typed = caught.value.as_typed(["--finetune.optim.rate=-1", "--rate", "3"])
    assert str(typed).startswith("--finetune.optim.rate is -1;")
    assert str(caught.value.as_typed(["--rate"])).startswith("--optim.rate is -1;")
    assert str(pickle.loads(pickle.dumps(typed))) == str(typed)
