"""The page of the probes is the one that the code makes."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysl import probes
from raysl.reporting import method_pages, protocols
from raysl.storage import Folder
from tests.data import make_clips, make_dataset
from tests.reporting.test_method_pages import AGAIN, FOLDER

ONE_FILE = '''
"""Width: how many numbers a feature has."""
from dataclasses import dataclass
from typing import ClassVar
from raysl.probes import Row


@dataclass(frozen=True)
class Config:
    """Protocol of the width.

    Args:
        times: what it is multiplied by.
    """

    version: ClassVar[int] = 1
    times: float = 1.5


class Width:
    primary_metric, dims = "width", 0

    def __init__(self, config):
        self.config = config

    def measure(self, features_nd):
        yield Row("width", features_nd.shape[1] * self.config.times)
'''


def fields(config: Any) -> Iterator[tuple[str, str | None]]:
    """Names as flags have them, and defaults; None for a Config, whose flags another section describes."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield f"{name}.*", None
        else:
            yield name, str(value) or "''"


def test_the_committed_page_is_up_to_date() -> None:
    """A probe that is new need not be in it yet."""
    head, *sections = (FOLDER / f"{method_pages.PROBES}.md").read_text().rstrip("\n").split("\n\n## ")
    new_head, *new = protocols.page().rstrip("\n").split("\n\n## ")
    assert set(head.splitlines()) <= set(new_head.splitlines()), AGAIN
    assert set(sections) <= set(new), AGAIN


@pytest.mark.parametrize("name", probes.names())
def test_every_probe_has_a_section_with_every_field(name: str) -> None:
    after = protocols.page().partition(f"\n## {name}\n")[2]
    section = after.partition("\n## ")[0]
    config_type, probe_type = probes.load(name)
    docstring = sys.modules[config_type.__module__].__doc__
    assert (docstring or "?").strip() in section
    metric = probe_type(config_type()).primary_metric
    better = (
        "more is better"
        if probes.is_score(name)
        else "it is not a score: a higher value is not always better"
    )
    assert f"- Primary metric: `{metric}`; {better}." in section
    prefix = name.replace("_", "-")
    for field, default in fields(config_type()):
        (row,) = (line for line in section.splitlines() if line.startswith(f"| `--{prefix}.{field}` |"))
        _, said_default, said = row.removesuffix(" |").split(" | ", 2)
        assert said
        assert default is None or said_default == f"`{default}`"
        assert default is not None or re.search(r"\[(\w+)\]\(#\1\)", said)
    assert all(f"{flag} VALUE" in section for flag in probes.required(name))


def test_the_kinds_of_probes_are_told_apart() -> None:
    assert "- Needs: labeled features of each requested layer.\n" in protocols.section("knn")
    assert "requested layer. It learns from the train images" in protocols.section("linear")
    assert "- Needs: features of each requested layer, without labels.\n" in protocols.section("collapse")
    assert "- Needs: images and the network itself.\n" in protocols.section("invariance")


def test_flags_of_several_probes_are_described_once() -> None:
    page = protocols.page()
    assert page.count('"sgd" with momentum') == 1
    assert page.count("maximum number of iterations of L-BFGS") == 1
    section = protocols.section("semisup")
    assert (
        "| `--semisup.optim.*` | `lr 0.01`, `weight-decay 0`, `schedule step`, `milestones 0.4286` | "
        in section
    )
    assert "\n| `--PROBE.optim.momentum` | `0.9` | " in page


def test_a_probe_with_images_of_its_own_says_that_it_uses_no_others() -> None:
    assert "but this probe does not use them" in protocols.section("detection")
    assert "does not use them" not in protocols.section("linear")


def test_a_new_file_has_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "width.py").write_text(ONE_FILE)
    monkeypatch.setattr(probes, "__path__", [*probes.__path__, str(tmp_path)])
    try:
        page = protocols.page()
    finally:
        sys.modules.pop("raysl.probes.width", None)
        vars(probes).pop("width", None)
    section = page.partition("\n## width\n")[2]
    assert section.startswith("\nWidth: how many numbers a feature has.\n")
    assert (
        "- Primary metric: `width`; more is better.\n- Version of the protocol: 1.\n- Needs: features "
        in section
    )
    assert "| `--width.times` | `1.5` | what it is multiplied by. |\n" in section


def test_it_is_written_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_pages, "names", list)
    method_pages.write(tmp_path, make_dataset(tmp_path / "set", 2), make_clips(tmp_path / "clips", 3))
    assert Folder(str(tmp_path)).read(f"{method_pages.PROBES}.md").decode() == protocols.page()
    assert (tmp_path / "README.md").exists()
