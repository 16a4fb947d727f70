"""What is refused before images are read, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from raysl.config import defaults, methods
from raysl.errors import UserError
from raysl.experiment.comparison import METHODS, OF_CLIPS
from raysl.training.preflight import check_before_ingest

RUN = {"data": "not-read-yet", "run": "nowhere"}


def check(**given: Any) -> None:
    check_before_ingest(defaults.validated_config({**RUN, **given}), {**RUN, **given})


VIT = {"name": "timm/vit_tiny_patch16_224", "patch_size": 8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "pirl"}, "needs a pretext transform"),
        ({"backbone": {"name": "resnet19"}}, "Did you mean 'resnet18'"),
        ({"view": {"recipe": "simclr-blurr"}}, "Did you mean 'blur'"),
        ({"method": "mae"}, "needs a vision transformer"),
        ({"backbone": {"weights": __file__}}, "it is a text file"),
        ({"backbone": {"name": "alexnet"}, "view": {"image_size": 32}}, "alexnet"),
        (
            {"backbone": VIT, "view": {"image_size": 50}, "method": "simclr"},
            r"not take images of 50 pixels .* Give --view\.image-size 48 or 224,",
        ),
        (
            {"backbone": VIT, "view": {"image_size": 64}, "method": "dino-multi_crop"},
            r"not take images of 27 pixels .* Give --multi-crop\.size 24 or 224,",
        ),
    ],
)
def test_what_no_images_would_mend_is_refused_before_they_are_read(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(**given)


# Objectives of a transform need one, and a teacher must be there.
LEFT_OUT = {"cpc", "mae", "multitask", "pirl", "predict", "triplet", "distill"}


@pytest.mark.parametrize("method", sorted({*METHODS, *OF_CLIPS, *methods.objective_names()} - LEFT_OUT))
def test_every_method_may_be_begun(method: str) -> None:
    check(method=method)


def test_networks_that_take_one_size_may_be_begun() -> None:
    check(backbone={"name": "timm/vit_tiny_patch16_224"}, method="mae")
    check(backbone={"name": "resnet50"}, pirl={"num_negatives": 1_000_000})
    check(
        backbone={"name": "vit_b_16"}, method="simclr"
    )  # With GPUs, photos get the 224 pixels that it takes.
