"""Labeled images for the sweeps of tests."""

from __future__ import annotations

import pytest

from tests.data import make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of training and of test images."""
    folder = tmp_path_factory.mktemp("data")
    train, test = make_dataset(folder / "train", 96), make_dataset(folder / "test", 48, seed=1)
    return str(train.folder), str(test.folder)
