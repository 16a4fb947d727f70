"""What a user leaves open is chosen from the images and the machine; what is given stays."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysl.cli.flags import parse
from raysl.config import Pretraining, defaults, differences
from raysl.config.command import command
from raysl.dataset import DataSet
from raysl.optim import OptimConfig
from tests.data import make_dataset

DATA, RUN = ["--data", "d", "--run", "r"], {"data": "d", "run": "-"}


@pytest.fixture
def small(tmp_path: Path) -> DataSet:
    return make_dataset(tmp_path / "small", 100)


@pytest.fixture
def photos(small: DataSet, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    monkeypatch.setattr(defaults, "short_side", lambda _: 375)
    return small


def test_small_images_get_the_recipe_of_the_results(small: DataSet) -> None:
    made = defaults.choose_defaults(RUN, small, 2, False)
    pirl = made.parts["pirl"]
    assert (made.method, made.backbone.name, made.view.image_size) == ("pirl-jigsaw", "small", 32)
    assert (pirl.head, pirl.temperature, pirl.num_negatives) == ("bn", 0.2, 99)
    assert (made.bank.momentum, made.parts["jigsaw"].grid) == (0.0, 2)
    assert (made.optim.lr, made.optim.warmup) == (0.12, 0.05)
    assert made.batch_size <= 25
    assert made.batch_size % made.worker_counts()[0] == 0
    made.plan(small)


def test_photos_get_a_resnet_that_the_machine_can_train(photos: DataSet) -> None:
    on_cpus, on_gpus = (defaults.choose_defaults(RUN, photos, 1, gpus) for gpus in (False, True))
    assert (on_cpus.backbone.name, on_cpus.view.image_size) == ("resnet18", 96)
    assert (on_gpus.backbone.name, on_gpus.view.image_size) == ("resnet50", 224)
    assert (on_cpus.bank.momentum, on_cpus.parts["jigsaw"].grid) == (0.5, 3)


def test_networks_of_timm_get_images_of_the_size_that_they_are_made_for(
    photos: DataSet, small: DataSet
) -> None:
    for images in (photos, small):
        made = defaults.choose_defaults({**RUN, "backbone": {"name": "timm/convnext_atto"}}, images, 1, False)
        assert (made.backbone.name, made.view.image_size) == ("timm/convnext_atto", 224)


@pytest.mark.parametrize("given", [{"workers": 3}, {"workers": "1:4"}, {"workers": 0}, {"method": "simclr"}])
def test_the_rest_fits_what_is_given(given: dict[str, Any], small: DataSet) -> None:
    made = defaults.choose_defaults({**RUN, **given}, small, 2, False)
    assert made.workers == (given.get("workers") or 2)
    assert made.method == given.get("method", "pirl-jigsaw")


def test_a_batch_is_trained_by_as_many_workers_as_share_it_equally(small: DataSet) -> None:
    given = {**RUN, "batch_size": 33}
    assert defaults.validated_config(given).batch_size == 33
    assert [defaults.choose_defaults(given, small, usual, False).workers for usual in (2, 3, 8)] == [1, 3, 3]


def test_flags_that_repeat_the_values_of_the_classes_stay(photos: DataSet) -> None:
    """Losses depend on the configuration alone, so equal configurations give equal losses, to the last bit."""
    flags = (
        "--method pirl-jigsaw --batch-size 64 --workers 2 --precision fp32 --view.image-size 32 "
        "--backbone.name small --optim.lr 0.03 --optim.warmup 0 --pirl.head linear --pirl.temperature=0.07 "
        "--pirl.num-negatives 50 --pirl.lam 0.5"
    )
    parsed = parse([*DATA, *flags.split()], "raysl pretrain")
    assert parsed.given["pirl"] == {"head": "linear", "temperature": 0.07, "num_negatives": 50, "lam": 0.5}
    expected = Pretraining("d", "r", batch_size=64, parts={"pirl": {"num_negatives": 50}})
    assert defaults.choose_defaults({**parsed.given, "run": "-"}, photos, 4, True).to_json() == (
        expected.to_json() | {"run": "-"}
    )


def test_switches_and_recipes_count_as_given() -> None:
    assert parse([*DATA, "--no-channels-last"], "raysl").given["channels_last"] is False
    flags = parse([*DATA, "--recipe", "pirl-r50-800ep", "--optim.lr", "0.1"], "raysl")
    assert {"backbone", "optim", "view", "pirl", "batch_size"} <= set(flags.given)
    assert (flags.config.backbone.name, flags.config.optim.lr) == ("resnet50", 0.1)


def test_an_unfinished_run_keeps_what_it_was_begun_with(small: DataSet, tmp_path: Path) -> None:
    given = {"data": str(small.folder), "run": str(tmp_path / "run"), "pirl": {"temperature": 0.5}}
    first = defaults.choose_defaults(given, small, 2, False)
    names = {name: given[name] for name in ("data", "run")}
    # Two workers without GPUs go on as two, to be exact. With GPUs, there may be only one now.
    assert differences(first.to_json(), defaults.resume(first, names, 1, False).to_json()) == []
    assert differences(first.to_json(), defaults.resume(first, names, 1, True).to_json()) == ["workers"]


def test_a_resumed_run_says_what_is_taken_from_it(
    small: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"data": str(small.folder), "run": str(tmp_path / "run")}
    plain = Pretraining(names["data"], names["run"])
    first = replace(plain, method="simclr", parts={}, epochs=40.0, seed=1, optim=OptimConfig(lr=0.12))
    given = {**names, "epochs": 40}
    with caplog.at_level("INFO", "raysl"):
        defaults.log_taken(defaults.resume(first, given, 1, False), given)
        defaults.log_taken(defaults.resume(plain, names, 1, False), names)
    assert caplog.messages == ["Taken from the run: method simclr, seed 1, optim.lr 0.12."]


def test_the_side_of_images_is_measured(small: DataSet) -> None:
    file = small.read(np.arange(1), ("image",)).column("image")[0].as_py()
    assert defaults.short_side(small) == min(Image.open(io.BytesIO(file)).size)


@pytest.mark.parametrize("method", ["pirl-jigsaw", "npid", "simclr", "predict-rotation"])
def test_the_command_of_a_run_repeats_it(method: str, small: DataSet, photos: DataSet) -> None:
    """Values that equal those of the classes are named too, or others would be chosen for them."""
    plain = Pretraining(str(small.folder), "run", method, batch_size=16)
    words = shlex.split(command(plain))[2:]
    given = parse(words, "raysl pretrain").given
    for images in (small, photos):
        assert defaults.choose_defaults(given, images, 1, True).to_json() == plain.to_json()


def test_another_method_gets_the_default_values_of_its_parts() -> None:
    pirl = Pretraining("data", "run", "pirl-jigsaw", batch_size=16)
    changed = defaults.replaced(pirl, {"method": "simclr", "simclr": {"temperature": 0.4}})
    expected = {"method": "simclr", "batch_size": 16, "simclr": {"temperature": 0.4}}
    assert changed == defaults.from_fields({"data": "data", "run": "run", **expected})
    assert defaults.replaced(pirl, {"pirl": {"lam": 0.25}}).to_json()["parts"]["pirl"]["lam"] == 0.25


@pytest.mark.parametrize("method", ["pirl-jigsaw", "npid", "simclr", "cpc-patch_grid", "predict-rotation"])
def test_every_choice_is_listed(method: str) -> None:
    for are_photos in (False, True):
        for gpus in (False, True):
            images = defaults._Images(40, are_photos)
            names = {choice.name for choice in defaults._choices({"method": method}, images, 1, gpus)}
            assert names - {"method"} <= defaults.CHOSEN


def test_help_says_which_defaults_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(*flags: str) -> int:
        with pytest.raises(SystemExit):
            parse([*flags, "--help"], "raysl pretrain")
        return re.sub(r"[\s│]+", " ", capsys.readouterr().out).count("(default: chosen by raysl")

    of_other_methods = ("npid.", "simclr.")
    assert chosen() == len([name for name in defaults.CHOSEN if not name.startswith(of_other_methods)])
    assert chosen("--recipe", "simclr-r50") == 0


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.12), ("adamw", 0.003), ("lars", 3.0)])
def test_each_optimizer_gets_a_learning_rate_that_suits_it(name: str, lr: float, small: DataSet) -> None:
    made = defaults.choose_defaults({**RUN, "optim": {"name": name}}, small, 1, False)
    assert (made.optim.name, made.optim.lr, made.optim.weight_decay) == (name, lr, 1e-4)
    assert (
        defaults.choose_defaults({**RUN, "optim": {"name": name, "lr": 0.2}}, small, 1, False).optim.lr == 0.2
    )


def test_an_optimizer_that_is_given_whole_stays(small: DataSet) -> None:
    given = OptimConfig("adamw", lr=0.002)
    assert defaults.choose_defaults({**RUN, "optim": given}, small, 1, False).optim == given


def test_transformers_are_trained_with_adamw(small: DataSet) -> None:
    vit = {"name": "timm/vit_tiny_patch16_224"}
    made = defaults.choose_defaults({**RUN, "backbone": vit}, small, 1, False).optim
    assert (made.name, made.lr, made.weight_decay, made.warmup) == ("adamw", 0.0005, 0.05, 0.05)
    for given, expected in (({"name": "sgd"}, ("sgd", 0.12, 1e-4)), ({"lr": 0.03}, ("sgd", 0.03, 1e-4))):
        own = defaults.choose_defaults({**RUN, "backbone": vit, "optim": given}, small, 1, False).optim
        assert (own.name, own.lr, own.weight_decay) == expected


def test_each_of_several_methods_gets_what_suits_the_images(
    small: DataSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {**RUN, "pirl": {"head": "mlp"}}
    base = defaults.choose_defaults(given, small, 1, False, varied=["method"])
    # Other methods have other values, so those of the first are not in the base.
    assert (base.parts["pirl"].num_negatives, base.bank.momentum, base.backbone.norm) == (99, 0.5, "batch")
    names = ("pirl-jigsaw", "predict-jigsaw", "cpc-patch_grid", "simclr")
    with caplog.at_level("INFO"):
        found = defaults.choose_for_methods(given, small, base, names)
    assert found == {
        "pirl-jigsaw": {"pirl.temperature": 0.2, "bank.momentum": 0.0, "jigsaw.grid": 2},
        "predict-jigsaw": {},
        "cpc-patch_grid": {"backbone.norm": "group"},
        "simclr": {"simclr.norm": "batch", "simclr.temperature": 0.2},
    }
    assert "simclr: --simclr.norm batch --simclr.temperature 0.2" in caplog.messages[-1]
    first = defaults.choose_defaults({**RUN, "method": "simclr"}, small, 1, False, varied=["method"])
    # What trials vary is not chosen, nor a grid that may have too few permutations.
    varied = ["method", "jigsaw.num_permutations", "pirl.temperature"]
    assert defaults.choose_for_methods(RUN, small, base, ["pirl-jigsaw"], varied) == {
        "pirl-jigsaw": {"pirl.head": "bn", "bank.momentum": 0.0}
    }
    monkeypatch.setattr(defaults, "short_side", lambda _: 375)
    assert defaults.choose_for_methods(RUN, small, first, ["npid"])["npid"].keys() == {
        "npid.head",
        "npid.temperature",
        "npid.num_negatives",
    }


def test_a_number_of_permutations_leaves_the_grid_alone(small: DataSet) -> None:
    made = defaults.choose_defaults({**RUN, "jigsaw": {"num_permutations": 100}}, small, 1, False)
    assert (made.parts["jigsaw"].grid, made.bank.momentum) == (3, 0.0)


def test_fields_inside_parts_are_given_too(small: DataSet) -> None:
    made = defaults.choose_defaults({**RUN, "parts": {"pirl": {"head": "mlp"}}}, small, 1, False)
    assert (made.parts["pirl"].head, made.parts["pirl"].temperature) == ("mlp", 0.2)
