"""Errors name what was given, and the nearest name that exists."""

from __future__ import annotations

import pytest

from raysl.errors import unknown


@pytest.mark.parametrize(
    ("given", "known", "nearest"),
    [
        ("pirl.temp", ["pirl.temperature", "simclr.temperature"], "pirl.temperature"),
        ("layer4.0.con", ["layer4", "layer4.0.conv1", "layer4.1.conv1"], "layer4.0.conv1"),
        ("layer4.0", ["layer4", "layer4.0.conv1"], "layer4.0.conv1"),
        ("simclr.temp", ["norm", "temperature"], "temperature"),
        ("temprature", ["norm", "temperature"], "temperature"),
        ("temperature", ["pirl.temperature", "simclr.norm"], "pirl.temperature"),
    ],
)
def test_the_nearest_name_is_proposed(given: str, known: list[str], nearest: str) -> None:
    assert f"Did you mean {nearest!r}?" in str(unknown("field", given, known))


def test_a_name_like_no_other_gets_no_proposal() -> None:
    assert "Did you mean" not in str(unknown("field", "simclr.x", ["norm", "temperature"]))
