"""A part of a data set: the same images and classes under new indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingestion.subset import drawn, relabeled, subset
from raysl.storage import Folder
from tests.data import make_clips, make_dataset


def pairs(dataset: DataSet) -> set[tuple[bytes, int]]:
    """Every image with its label."""
    columns = dataset.read(np.arange(dataset.num_images)).to_pydict()
    return set(zip(columns["image"], columns["label"], strict=True))


def test_a_subset_holds_some_of_the_images(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path / "whole", 50)
    part = subset(whole, 20, Folder(str(tmp_path / "part")))
    assert part.num_images == 20
    assert part.manifest.classes == whole.manifest.classes
    assert part.manifest.fingerprint != whole.manifest.fingerprint
    assert part.row_group_starts.tolist() == [0, 20]
    assert pairs(part) < pairs(whole)
    assert subset(whole, 20, Folder(str(tmp_path / "part"))) == part
    same = subset(whole, 20, Folder(str(tmp_path / "again")))
    assert same.read(np.arange(20)) == part.read(np.arange(20))


def test_another_subset_in_the_folder_is_refused(tmp_path: Path) -> None:
    subset(make_dataset(tmp_path / "one", 50), 20, Folder(str(tmp_path / "part")))
    with pytest.raises(UserError, match="Another data set lies"):
        subset(make_dataset(tmp_path / "other", 40), 20, Folder(str(tmp_path / "part")))


def test_more_images_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Ask for 1 to 10"):
        subset(make_dataset(tmp_path / "whole", 10), 11, Folder(str(tmp_path / "part")))


def test_chosen_images_get_the_labels_that_are_given(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path / "whole", 30)
    chosen_k, labels_k = np.array([7, 3, 29]), np.array([1, 0, 1])
    made = relabeled(whole, chosen_k, labels_k, ("x", "y"), Folder(str(tmp_path / "made")), "three")
    rows = made.read(np.arange(3)).to_pydict()
    assert rows["image"] == whole.read(chosen_k).to_pydict()["image"]
    assert made.labels().tolist() == [1, 0, 1]
    assert made.manifest.classes == ("x", "y")
    with pytest.raises(UserError, match="Another data set lies"):
        relabeled(whole, chosen_k, 1 - labels_k, ("x", "y"), Folder(str(tmp_path / "made")), "three")


def test_without_labels(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path / "whole", 30)
    made = relabeled(whole, np.arange(4), None, (), Folder(str(tmp_path / "made")), "four")
    assert not made.has_labels
    assert subset(made, 2, Folder(str(tmp_path / "two"))).num_images == 2
    with pytest.raises(UserError, match="no labels"):
        made.labels()


def test_a_part_of_clips_is_clips(tmp_path: Path) -> None:
    whole = make_clips(tmp_path / "whole", 6)
    made = subset(whole, 3, Folder(str(tmp_path / "made")))
    chosen_k, columns = drawn(6, 3), ("frames", "times", "sound", "keypoints")
    ours, theirs = made.read(np.arange(3), columns), whole.read(chosen_k, columns)
    assert ours.select(columns).equals(theirs.select(columns))
    assert made.manifest.clips["with_sound"] == 3
    assert made.manifest.clips["columns"] == whole.manifest.clips["columns"]
