"""Data by name: a finished data set is opened wherever its name finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysl.api.arguments import check_source
from raysl.errors import UserError
from raysl.ingestion import open_or_ingest, splits
from tests.data import make_dataset


def test_a_finished_data_set_is_found_in_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_dataset(tmp_path / "photos", 8)
    monkeypatch.setenv("RAYSL_DATA", str(tmp_path))
    assert open_or_ingest("photos").manifest == made.manifest
    assert splits("photos") == ("photos", "photos")
    check_source("photos")
    with pytest.raises(UserError, match="is a data set of raysl already, which has no splits"):
        open_or_ingest("photos#train")
