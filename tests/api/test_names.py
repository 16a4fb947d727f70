"""Names of arguments, and of the weights that are probed."""

from __future__ import annotations

import pytest

from raysl.api.names import title_of


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("n/exp/", "exp"),
        ("n/weights.pth", "weights.pth"),
        ("export/model.safetensors", "model.safetensors"),
        ("random", "random"),
        ("/runs/one/export/safetensors", "one/export/safetensors"),
        ("two/export/timm/", "two/export/timm"),
        ("s3://bucket/timm", "bucket/timm"),
        ("my-timm", "my-timm"),
    ],
)
def test_weights_are_called_by_the_end_of_their_place(name: str, title: str) -> None:
    assert title_of(name) == title
