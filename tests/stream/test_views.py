"""A view: mirror, transform and colors in the right places, the same wherever it is made."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl import pretext
from raysl.augment import RECIPES, Recipe, color_jitter, recipe
from raysl.pretext import Geometry
from raysl.rng import ImageRng
from raysl.stream.views import View


def image_rng(count: int, first: int = 0) -> ImageRng:
    return ImageRng(4, np.ones(count, dtype=np.int64), np.arange(first, first + count))


def images(count: int, side: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


def view(spec: str, recipe_name: str, image_size: int = 32) -> View:
    return View(pretext.build(spec, {}, Geometry(image_size)), recipe(recipe_name))


@pytest.mark.parametrize("recipe_name", sorted(RECIPES))
@pytest.mark.parametrize("spec", [*pretext.names(), "rotation+jigsaw"])
def test_a_view_is_a_pure_function_of_image_and_random_numbers(spec: str, recipe_name: str) -> None:
    made = view(spec, recipe_name)
    x = images(12, made.source.size)
    together = made(x, image_rng(12))
    assert together.crops_bpchw.dtype == torch.uint8
    assert together.crops_bpchw.is_contiguous()
    elsewhere = pickle.loads(pickle.dumps(made))
    for i in range(12):
        alone = elsewhere(x[i : i + 1], image_rng(1, first=i))
        assert torch.equal(alone.crops_bpchw[0], together.crops_bpchw[i])
        if together.target is not None:
            assert alone.target is not None
            assert torch.equal(alone.target[0], together.target[i])


def test_plain_images_are_only_mirrored() -> None:
    x = images(100, 32)
    crops = view("identity", "plain")(x, image_rng(100)).crops_bpchw[:, 0]
    same, mirrored = ((crops == y).flatten(1).all(1) for y in (x, x.flip(-1)))
    assert (same | mirrored).all()
    assert 30 < int(same.sum()) < 70


def test_patches_are_colored_one_by_one_or_all_alike() -> None:
    gray = Recipe(gray=0.5)
    x = images(50, 36)

    def num_gray(per_patch: bool) -> set[int]:
        config = pretext.load("jigsaw")[0](per_patch_color=per_patch)
        made = View(pretext.build("jigsaw", {"jigsaw": config}, Geometry(32)), gray)
        crops = made(x, image_rng(50)).crops_bpchw
        return set((crops[:, :, 0] == crops[:, :, 1]).flatten(2).all(2).sum(1).tolist())

    assert num_gray(per_patch=False) == {0, 9}
    assert num_gray(per_patch=True) > {3, 4, 5, 6}


def test_blur_of_a_patch_is_sized_by_its_source() -> None:
    made = View(pretext.build("jigsaw", {}, Geometry(96)), Recipe(blur=1))
    x = images(20, made.source.size)
    plain = View(made.pretext, Recipe())(x, image_rng(20)).crops_bpchw.flatten(0, 1)
    expected = color_jitter(plain, Recipe(blur=1), image_rng(20).repeated(9), side=made.source.size)
    assert torch.equal(made(x, image_rng(20)).crops_bpchw.flatten(0, 1), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("spec", [*pretext.names(), "rotation+jigsaw"])
@pytest.mark.parametrize("recipe_name", ["pirl", "pirl+"])
def test_an_accelerator_makes_the_same_view(spec: str, recipe_name: str) -> None:
    made = view(spec, recipe_name)
    x = images(64, made.source.size)
    here = made(x, image_rng(64))
    there = made(x.cuda(), image_rng(64).to(torch.device("cuda")))
    assert there.crops_bpchw.is_cuda
    assert torch.equal(there.crops_bpchw.cpu(), here.crops_bpchw)
    if here.target is not None:
        assert there.target is not None
        assert torch.equal(there.target.cpu(), here.target)
