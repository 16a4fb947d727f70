"""What every pretext transform keeps to, those of one file in a folder of the user's included."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl import pretext
from raysl.errors import UserError
from raysl.pretext import Geometry, Pretext
from raysl.rng import ImageRng

# Transforms of clips have their own contract, in tests/pretext/test_clips.py.
NAMES = [n for n in pretext.names() if not pretext.of_clips(pretext.build(n, {}, Geometry()))]
SPECS = [*NAMES, "rotation+jigsaw", "identity+rotation", "rotation+colorization"]
GEOMETRIES = [Geometry(32), Geometry(32, predicted=True), Geometry(64, predicted=True, seed=3)]


def image_rng(indices: list[int] | range, epoch: int = 0, seed: int = 0) -> ImageRng:
    return ImageRng(seed, np.full(len(indices), epoch, dtype=np.int64), np.array(indices, dtype=np.int64))


def images(count: int, side: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(
    params=list(itertools.product(SPECS, GEOMETRIES)),
    ids=lambda p: f"{p[0]}-{p[1].image_size}-{p[1].predicted}",
)
def made(request: pytest.FixtureRequest) -> Pretext:
    spec, geometry = request.param
    return pretext.build(spec, {}, geometry)


def test_shapes_types_and_labels(made: Pretext) -> None:
    x = images(64, made.source.size)
    before = x.clone()
    result = made.transform(x, image_rng(range(64)))
    assert torch.equal(x, before), "the images are written to"
    crops = result.crops_bpchw
    assert crops.dtype == torch.uint8
    assert crops.shape[:3] == (64, made.num_crops, 3)
    assert made.color in ("crops", "source", "none")
    if made.num_labels == 0:
        assert (result.target is None) == (pretext.dense(made) is None)
    else:
        assert pretext.dense(made) is None
        assert result.target is not None
        assert result.target.dtype == torch.int64
        assert result.target.shape == (64,)
        assert int(result.target.min()) >= 0
        assert int(result.target.max()) < made.num_labels


def test_a_target_that_is_no_label_has_a_head_and_a_loss(made: Pretext) -> None:
    dense = pretext.dense(made)
    if dense is None:
        pytest.skip("classes, or nothing")
    target = made.transform(images(6, made.source.size), image_rng(range(6))).target
    assert target is not None
    assert target.nbytes <= 6 * 4096, "it travels with the crops"
    torch.manual_seed(0)
    head = dense.head(16)
    output = head(torch.randn(6, 16))
    loss = dense.loss(output, target)
    assert loss.shape == ()
    each = torch.stack([dense.loss(output[i : i + 1], target[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(loss, each.mean(), msg="not a mean over images")
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_an_image_never_depends_on_its_batch_mates(made: Pretext) -> None:
    x = images(16, made.source.size)
    together = made.transform(x, image_rng(range(16)))
    order = [5, 0, 15, 3]
    some = made.transform(x[order], image_rng(order))
    assert torch.equal(some.crops_bpchw, together.crops_bpchw[order])
    one = made.transform(x[7:8], image_rng([7]))
    assert torch.equal(one.crops_bpchw[0], together.crops_bpchw[7])
    if together.target is not None:
        assert some.target is not None
        assert torch.equal(some.target, together.target[order])


def test_choices_change_with_seed_and_epoch(made: Pretext) -> None:
    if made.num_labels < 2:
        pytest.skip("nothing to choose")
    x = images(64, made.source.size)
    labels = [
        made.transform(x, d).target
        for d in (image_rng(range(64)), image_rng(range(64), 1), image_rng(range(64), 0, 1))
    ]
    assert not torch.equal(labels[0], labels[1])  # type: ignore[arg-type]
    assert not torch.equal(labels[0], labels[2])  # type: ignore[arg-type]


def test_a_pickled_transform_makes_the_same(made: Pretext) -> None:
    data = pickle.dumps(made)
    assert len(data) < 100_000
    x = images(8, made.source.size)
    back = pickle.loads(data)
    assert torch.equal(
        back.transform(x, image_rng(range(8))).crops_bpchw, made.transform(x, image_rng(range(8))).crops_bpchw
    )
    assert back.describe() == made.describe()


def test_description_is_json(made: Pretext) -> None:
    assert json.loads(json.dumps(made.describe())) == made.describe()


def test_labels_are_balanced(made: Pretext) -> None:
    if not 2 <= made.num_labels <= 500:
        pytest.skip("no labels, or too many to count")
    per_label = 60
    b = per_label * made.num_labels
    counts = np.zeros(made.num_labels)
    for start in range(0, b, 4096):
        rows = range(start, min(b, start + 4096))
        label_b = made.transform(
            images(1, made.source.size).expand(len(rows), -1, -1, -1), image_rng(rows)
        ).target
        assert label_b is not None
        counts += np.bincount(label_b.numpy(), minlength=made.num_labels)
    chi2 = float(((counts - per_label) ** 2 / per_label).sum())
    freedom = made.num_labels - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("name", pretext.names())
def test_the_hyperparameters_are_documented_and_have_defaults(name: str) -> None:
    config_type, transform_type = pretext.load(name)
    config: Any = config_type()
    assert dataclasses.is_dataclass(config)
    assert hash(config) == hash(config_type()), "not frozen"
    for field in dataclasses.fields(config):
        assert f"{field.name}: " in (config_type.__doc__ or ""), f"{name}: {field.name} is not documented"
    assert importlib.import_module(transform_type.__module__).__doc__


@pytest.mark.parametrize("name", pretext.names())
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_an_image_that_is_too_small_works_or_is_refused_clearly(name: str, side: int) -> None:
    refused: UserError | None = None
    try:
        made = pretext.build(name, {}, Geometry(side))
        made.transform(images(2, made.source.size), image_rng(range(2)))
    except UserError as error:
        refused = error
    assert refused is None or "--view.image-size" in str(refused)


class TestNames:
    def test_unknown_names_answer_with_the_nearest(self) -> None:
        with pytest.raises(UserError, match="Did you mean 'jigsaw'"):
            pretext.build("rotation+jigsw", {}, Geometry())
        with pytest.raises(UserError, match="Unknown pretext transform ''"):
            pretext.build("rotation+", {}, Geometry())


class TestComposition:
    def test_it_applies_from_left_to_right_and_counts_all_combinations(self) -> None:
        configs: dict[str, Any] = {"jigsaw": pretext.load("jigsaw")[0](grid=2, num_permutations=5)}
        both = pretext.build("rotation+jigsaw", configs, Geometry(32))
        assert both.num_labels == 20
        x = images(200, both.source.size)
        result = both.transform(x, image_rng(range(200)))
        assert result.target is not None
        rotated = pretext.build("rotation", {}, Geometry(32)).transform(x, image_rng(range(200)).named("0"))
        cut = pretext.build("jigsaw", configs, Geometry(32)).transform(
            rotated.crops_bpchw[:, 0], image_rng(range(200)).named("1")
        )
        assert rotated.target is not None
        assert cut.target is not None
        assert torch.equal(result.crops_bpchw, cut.crops_bpchw)
        assert torch.equal(result.target, rotated.target * 5 + cut.target)
        assert len(set(result.target.tolist())) == 20

    def test_source_and_color_are_those_of_the_last(self) -> None:
        both, last = (pretext.build(spec, {}, Geometry(64)) for spec in ("rotation+jigsaw", "jigsaw"))
        assert (both.source, both.num_crops, both.color) == (last.source, last.num_crops, last.color)

    def test_only_the_last_may_cut(self) -> None:
        with pytest.raises(UserError, match="Put it last"):
            pretext.build("jigsaw+rotation", {}, Geometry(32))
