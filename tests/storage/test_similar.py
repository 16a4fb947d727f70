"""A folder that is not there, or holds others, is answered with what may have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysl.storage.similar import similar_folder


def test_what_lies_inside_or_beside_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / ("x" if name == "notes" else "metadata.json")).touch()
    assert similar_folder("runs/fisrt", "metadata.json") == "Did you mean 'runs/first'? "
    assert (
        similar_folder("runs/", "metadata.json") == "It holds 'runs/first', 'runs/second': name one of them. "
    )
    assert similar_folder("runs/notes", "metadata.json") == ""
