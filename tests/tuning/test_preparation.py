"""Test what is refused before any trial of a sweep begins, and what its runs get of the cluster. Without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysl import ray_cluster
from raysl.backbone.network import BackboneConfig
from raysl.errors import UserError
from raysl.objectives.pirl import Config as Pirl
from raysl.ray_cluster import placement
from raysl.ray_cluster.placement import Machines
from raysl.storage import Folder
from raysl.tuning.journal import FORMAT, NAME, Journal
from raysl.tuning.preparation import hold_out, prepare
from raysl.tuning.sweep import sweep
from raysl.tuning.trainable import tune_trainable
from tests.data import make_dataset
from tests.tuning.small import base, config


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "start", lambda: None)
    monkeypatch.setattr(placement, "machines", lambda: Machines(({"CPU": 2.0},)))


def test_a_sweep_of_raysl_0_1_is_not_continued(data: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"event": "sweep", "config": {}}\n')
    with pytest.raises(UserError, match=r"raysl 0\.1"):
        sweep(base(data[0]), config(data, tmp_path, vary=("temperature=0.1,0.2",)))


@pytest.mark.parametrize(
    ("vary", "answer"),
    [
        (
            "num_negatives=32,96",
            "num_negatives=96 could not run.*num-negatives is 96 and the data set has 96",
        ),
        ("jigsaw.grid=2,3", "jigsaw.grid=2 could not run.*with 4 tiles there are 24 permutations"),
        ("lam=0.5,1.5", "lam=1.5 could not run"),
        ("batch_size=16,128", "batch_size=128 could not run"),
    ],
)
def test_a_value_that_fails_for_some_trials_is_found_before_any_begins(
    data: tuple[str, str], tmp_path: Path, vary: str, answer: str
) -> None:
    parts = {"pirl": Pirl(num_negatives=32, dim=16), "jigsaw": {"num_permutations": 100}}
    with pytest.raises(UserError, match=answer):
        sweep(base(data[0], parts=parts), config(data, tmp_path / "sweep", vary=(vary,)))
    assert not (tmp_path / "sweep").exists()


def test_a_value_that_was_chosen_for_each_method_cannot_be_given_later(
    data: tuple[str, str], tmp_path: Path
) -> None:
    header = {"event": "sweep", "format": FORMAT, "method_values": {"pirl-jigsaw": {"jigsaw.grid": 2}}}
    Journal(Folder(str(tmp_path / "sweep"))).add(header)
    settings = config(data, tmp_path / "sweep", vary=("method=pirl-jigsaw,predict-jigsaw",))
    with pytest.raises(UserError, match=r"begun differently; these differ: jigsaw\.grid"):
        sweep(base(data[0]), settings, {"jigsaw": {"grid": 3}})


def test_a_sweep_on_images_without_labels_asks_for_labeled_ones(
    data: tuple[str, str], tmp_path: Path
) -> None:
    images = str(make_dataset(tmp_path / "unlabeled", 96).folder)
    manifest = Folder(images).read_json("manifest.json")
    Folder(images).write_json("manifest.json", {**manifest, "classes": []})
    with pytest.raises(UserError, match=r"have no labels.*--train"):
        sweep(base(images), config(data, tmp_path / "sweep", vary=("temperature=0.1,0.2",)))


def test_each_method_of_a_sweep_has_what_suits_the_images(data: tuple[str, str], tmp_path: Path) -> None:
    parts = {"pirl": Pirl(num_negatives=32, dim=16)}
    settings = config(
        data, tmp_path / "sweep", vary=("method=pirl-jigsaw,predict-jigsaw", "bank.momentum=0,0.9")
    )
    context = prepare(base(data[0], parts=parts), settings, {"pirl": {"dim": 16}}).context
    assert "bank.momentum" not in context.method_values["pirl-jigsaw"]  # It is varied.
    own = context.config_of({"method": "pirl-jigsaw", "bank.momentum": 0.9})
    assert (own.parts["jigsaw"].grid, own.parts["pirl"].head, own.parts["pirl"].dim) == (2, "bn", 16)
    assert (own.parts["pirl"].num_negatives, own.bank.momentum) == (32, 0.9)  # given, and varied
    assert context.config_of({"method": "predict-jigsaw"}).parts["jigsaw"].grid == 3
    # A sweep that exists keeps its values, and a whole configuration those of the classes.
    for known in (
        prepare(base(data[0], parts=parts), settings, {}, {}),
        prepare(base(data[0], parts=parts), settings),
    ):
        assert known.context.config_of({"method": "pirl-jigsaw"}).parts["jigsaw"].grid == 3


def test_a_method_that_needs_its_backbone_is_swept(data: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    vit = BackboneConfig("timm/vit_tiny_patch16_224", patch_size=4)
    masked = base(data[0], method="mae", parts={}, backbone=vit)
    settings = config(data, tmp_path, vary=("optim.lr=0.1,0.2",))
    assert prepare(masked, settings).num_trials == 2
    with pytest.raises(UserError, match=r"view\.image_size=18 could not run.* 18 pixels"):
        prepare(
            replace(masked, method="simclr", parts={}), replace(settings, vary=("view.image_size=16,18",))
        )


def test_every_drawn_point_is_tried_out_before_any_begins(data: tuple[str, str], tmp_path: Path) -> None:
    wide = config(data, tmp_path, searcher="random", samples=64, vary=("num_negatives=8..500",))
    with pytest.raises(UserError, match="the data set has 96 images"):
        prepare(base(data[0]), wide)


def test_the_images_that_choose_are_not_those_that_judge_the_choice(
    data: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"hold the same images.*Leave out one"):
        prepare(base(data[0]), config(data, tmp_path, test=data[1]))


def test_more_than_fits_is_refused_with_the_sum(data: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"9 runs at a time with 1 worker each: 9 workers .* 2 CPUs"):
        prepare(base(data[0]), config(data, tmp_path, max_concurrent=9))


@pytest.mark.parametrize(
    ("machines", "vary", "seeds", "expected"),
    [
        (Machines(({"CPU": 2.0},)), ("temperature",), (0,), (1, 1, 1)),
        # On 16 CPUs, eight runs can have two each; two runs have eight.
        (Machines(({"CPU": 16.0},)), ("temperature", "lam"), (0,), (8, 1, 1)),
        (Machines(({"CPU": 16.0},)), ("temperature=0.1,0.2",), (0,), (2, 1, 6)),
        # Seeds of a trial run at a time where there are fewer trials than places.
        (Machines(({"CPU": 16.0},)), ("temperature=0.1,0.2",), (0, 1), (2, 2, 3)),
        # The head takes no work, and three machines of four CPUs can be started.
        (
            Machines(({"CPU": 0.0},), ({"CPU": 4.0},) * 3, 3),
            ("temperature", "lam"),
            (0,),
            (6, 1, 1),
        ),
    ],
)
def test_runs_at_a_time_follow_from_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
    data: tuple[str, str],
    tmp_path: Path,
    machines: Machines,
    vary: tuple[str, ...],
    seeds: tuple[int, ...],
    expected: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(placement, "machines", lambda: machines)
    found = prepare(base(data[0]), config(data, tmp_path, max_concurrent=0, vary=vary, seeds=seeds))
    context = found.context
    assert (context.trials_at_once, context.seeds_at_once, context.placement.cpus_per_worker) == expected


def test_pbt_changes_only_what_can_change_in_the_middle(data: tuple[str, str], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"searcher": "random", "scheduler": "pbt", "vary": ("num_negatives=8,16",)}
    with pytest.raises(UserError, match=r"pirl\.num_negatives cannot change"):
        prepare(base(data[0]), config(data, tmp_path, **changes))


def test_a_tenth_of_the_labeled_images_is_held_out(tmp_path: Path) -> None:
    labeled = make_dataset(tmp_path / "all", 60)
    learn, held = hold_out(labeled, Folder(str(tmp_path / "sweep")))
    assert (learn.num_images, held.num_images) == (54, 6)
    again = hold_out(labeled, Folder(str(tmp_path / "other")))
    assert [part.manifest.fingerprint for part in again] == [
        part.manifest.fingerprint for part in (learn, held)
    ]


def test_what_the_trials_of_a_plain_tuner_share(data: tuple[str, str], tmp_path: Path) -> None:
    context = tune_trainable(
        base(data[0]), str(tmp_path), validation=data[1], seeds=(0, 1), rungs=(0.5, 1)
    ).context
    assert (context.trials_at_once, context.seeds_at_once, context.keep_rungs) == (1, 1, True)
    assert [context.until(context.base, rung) for rung in range(2)] == [6, 12]
    with pytest.raises(UserError, match="9 runs at a time"):
        tune_trainable(base(data[0]), str(tmp_path), validation=data[1], max_concurrent=9)
