"""Names from data, rows and folders never become paths, markup or formulas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysl.config import Pretraining
from raysl.errors import UserError
from raysl.evaluation.results import KEY, MODEL
from raysl.reporting import ReportConfig, report
from raysl.run import METRICS, Run, jsonl
from raysl.storage import Folder
from raysl.storage.escaping import code_block, code_span, file_name, markdown
from tests.data import make_dataset, write_rows

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NASTY = [
    "/../../x",
    "../../../etc/passwd",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    r"$\frac$",
    "$x",
    "[red]bold[/red]",
    "[/old]",
    "# heading | cell `code",
    "line\nbreak",
    "{{ 7 * 7 }}",
    "\u202egnp.exe",
]


@given(st.text(min_size=1))
def test_a_file_name_is_one_ascii_name_inside_its_folder(name: str) -> None:
    safe = file_name(name)
    assert safe not in ("", ".", "..")
    assert safe.isascii()
    assert os.path.basename(safe) == safe
    assert len(safe) <= 120


@given(st.text(), st.text())
def test_two_names_never_share_a_file(one: str, other: str) -> None:
    assert (file_name(one) == file_name(other)) == (one == other)


def test_a_plain_name_stays_as_it_is() -> None:
    assert file_name("layers-linear-0123abcd") == "layers-linear-0123abcd"


def test_markdown_shows_text_as_it_is() -> None:
    assert markdown("<b>") == "&lt;b&gt;"
    assert markdown("# a\n# b") == r"\# a \# b"
    assert markdown("a|b [c](d)") == r"a\|b \[c\]\(d\)"
    assert code_span("a`b|c\n") == "`a?b?c`"
    assert code_block("a```b").startswith("````\n")


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """One run whose rows, layers and measures have all the names, and one model with such a name."""
    dataset = make_dataset(tmp_path / "set", 8)
    folder = tmp_path / "run"
    config = Pretraining(str(dataset.folder), str(folder), "pirl-jigsaw", batch_size=4)
    run = Run.begin(config, dataset, {})
    base = {**dict.fromkeys(KEY, "x"), "step": 5, "seed": 0, "encoder": "trained", "value": 0.5}
    rows = [{**base, "layer": layer, "name": name, "primary": True} for layer in NASTY for name in ("top1",)]
    rows += [{**base, "name": name, "primary": False} for name in NASTY]
    write_rows(run.folder, rows)
    run.folder.write(METRICS, jsonl([{"step": 1, "epoch": 1.0, "loss": 2.0}]))
    run.folder.write_json("probes/invariance/trained-x-..-../histogram.json", {})
    model = Folder(str(tmp_path / "model"))
    model.write_json(MODEL, {"name": NASTY[2], "identity": {NASTY[4]: NASTY[5]}})
    write_rows(model, rows)
    return [str(folder), str(model)]


def test_a_report_writes_in_its_folder_only_and_escapes_names(tmp_path: Path, runs: list[str]) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    page = report(runs, ReportConfig(str(out), images=0)).read("index.html").decode()
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert new
    assert all(path.parent == out for path in new)
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "49" not in page.partition("{{ 7")[0][-20:]
    assert "{{ 7 * 7 }}" in page


def test_a_probe_whose_name_is_a_path_is_refused(tmp_path: Path, runs: list[str]) -> None:
    row: dict[str, Any] = {**dict.fromkeys(KEY, "x"), "step": 5, "seed": 0, "value": 0.5, "primary": True}
    write_rows(Folder(runs[1]), [{**row, "probe": "/../../x"}])
    with pytest.raises(UserError, match="not a word"):
        report(runs, ReportConfig(str(tmp_path / "out"), images=0))


def test_a_figure_with_a_formula_in_its_name_is_drawn(tmp_path: Path) -> None:
    from raysl.reporting.figure import panels_png

    png = panels_png({name: lambda axes: axes.plot([0, 1], [0, 1], label=r"$\frac$") for name in NASTY})
    assert png.startswith(b"\x89PNG")
