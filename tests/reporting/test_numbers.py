"""Numbers in README.md, docs/ and results/ that come from rows agree with these rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "results/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_markdown_agrees_with_rows(generate: ModuleType) -> None:
    differ = [file.name for file in generate.FILES if generate.written(file.read_text()) != file.read_text()]
    assert not differ, "run `python results/generate.py`"


def test_a_number_that_differs_is_found(generate: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    damaged = text.replace("<!-- numbers: headline-pixels -->", "<!-- numbers: headline-pixels -->1")
    assert damaged != text
    assert generate.written(damaged) == text


def test_every_number_has_a_place(generate: ModuleType) -> None:
    texts = "".join(file.read_text() for file in generate.FILES)
    unused = [
        name for name in (*generate.TABLES, *generate.VALUES) if f"<!-- numbers: {name} -->" not in texts
    ]
    assert not unused
