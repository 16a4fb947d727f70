"""Which runs of a sweep share a stream, and that it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysl.config import Pretraining, ViewConfig
from raysl.objectives.pirl import Config as Pirl
from raysl.storage import Folder
from raysl.tuning.config import SweepConfig
from raysl.tuning.driver import _Loop, sweep
from raysl.tuning.journal import Journal
from raysl.tuning.setting import Setting, prepare
from raysl.tuning.standing import Standing
from raysl.tuning.together import Together
from tests.data import make_dataset

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    train, test = make_dataset(folder / "train", 96), make_dataset(folder / "test", 48, seed=1)
    return str(train.folder), str(test.folder)


def base(data: tuple[str, str]) -> Pretraining:
    parts = {"pirl": Pirl(num_negatives=32, dim=16)}
    view = ViewConfig(image_size=16, recipe="plain")
    return Pretraining(data[0], "-", epochs=2, batch_size=16, workers=1, view=view, parts=parts)


def config(data: tuple[str, str], out: Path, *vary: str, **changes: Any) -> SweepConfig:
    settings: dict[str, Any] = {"seeds": (0,), "max_concurrent": 2, **changes}
    return SweepConfig(out=str(out), test=data[1], vary=vary, **settings)


@pytest.mark.parametrize(
    ("vary", "changes", "why"),
    [
        ("temperature=0.1,0.2", {}, ""),
        ("num_permutations=100,200", {}, ""),
        ("batch_size=16,32", {}, "trials differ in batch_size"),
        ("temperature=0.1,0.2", {"max_concurrent": 1}, "one at a time"),
        ("temperature=0.1,0.2", {"share_stream": False}, "as asked"),
    ],
)
def test_why_runs_do_not_share_a_stream(
    ray_session: None, data: tuple[str, str], tmp_path: Path, vary: str, changes: dict[str, Any], why: str
) -> None:
    found = Together(prepare(base(data), config(data, tmp_path, vary, **changes))).apart()
    assert why in found
    assert bool(why) == bool(found)


def trial(setting: Setting, seed: int = 0, **values: Any) -> Pretraining:
    names = {"temperature": "pirl.temperature", "permutations": "jigsaw.num_permutations"}
    point = {names[name]: value for name, value in values.items()}
    return replace(setting.space.configured(setting.base, point), seed=seed)


def test_runs_sit_at_one_stream_while_it_is_where_they_begin(
    ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    vary = ("temperature=0.1,0.2", "num_permutations=100,200")
    setting = prepare(base(data), config(data, tmp_path, *vary))
    together = Together(setting)
    one, two, three = (
        trial(setting, temperature=t, permutations=p) for t, p in ((0.1, 100), (0.2, 100), (0.2, 200))
    )
    first = together.subscriber("one", one, 12, 0, [two, three, replace(two, seed=1)])
    assert first is not None
    second, third = together.subscriber("two", two, 12, 0, []), together.subscriber("three", three, 12, 0, [])
    assert second is not None
    assert third is not None
    assert first.feeds == second.feeds == third.feeds
    # Equal views are one, and views of another permutation set are others.
    assert first.slots == second.slots
    assert {name for name in first.slots if first.slots[name] != third.slots[name]} == {"transformed"}
    assert together.subscriber("seed", replace(two, seed=1), 12, 0, []) is None
    assert together.subscriber("resumed", two, 12, 7, []) is None
    assert together.subscriber("rung", two, 6, 0, []) is None
    for run in ("one", "two", "three"):
        together.leave(run)
    assert together.subscriber("late", two, 12, 0, []) is None


def test_trials_at_the_same_time_have_the_same_seed(
    ray_session: None, data: tuple[str, str], tmp_path: Path
) -> None:
    setting = prepare(base(data), config(data, tmp_path, "temperature=0.1,0.2,0.3", seeds=(5, 2)))
    loop = _Loop(setting, Journal(Folder(str(tmp_path))), Together(setting), print)
    order = loop._ordered(Standing(setting.config, setting.space, []).ready())
    assert [(c.trial, c.seed) for c in order] == [(0, 5), (1, 5), (0, 2), (1, 2), (2, 5), (2, 2)]


@pytest.mark.slow
def test_a_shared_stream_changes_nothing(ray_session: None, data: tuple[str, str], tmp_path: Path) -> None:
    vary = ("temperature=0.1,0.5",)
    said: list[str] = []
    shared = sweep(base(data), config(data, tmp_path / "shared", *vary), said.append)
    own = sweep(base(data), config(data, tmp_path / "own", *vary, share_stream=False), said.append)
    assert shared == own
    assert [line for line in said if "stream" in line] == [
        "Runs that read the same images at the same time share one stream.",
        "Each run has a stream of its own: as asked.",
    ]
    losses = [
        {row["trial"]: row["loss"] for row in Journal(Folder(str(tmp_path / name))).of("score")}
        for name in ("shared", "own")
    ]
    assert losses[0] == losses[1]
