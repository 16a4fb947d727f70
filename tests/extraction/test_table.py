"""What is written is what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raysl.clustering.feature_rows import Rows
from raysl.extraction import FeatureForm, FeatureTable
from raysl.extraction.table import file, write
from raysl.storage import Folder


def test_numbers_beyond_half_precision_are_kept(tmp_path: Path) -> None:
    """As those of an untrained ResNet-101, whose res4 reaches 204,653 at 224 pixels."""
    folder, parts = Folder(str(tmp_path)), ((0, 2), (2, 4))
    small_nd, large_nd = np.full((2, 3), 65504, np.float32), np.full((2, 3), -204653, np.float32)
    for part, values_nd in zip(parts, (small_nd, large_nd), strict=True):
        write(folder, part, {"res4:3": values_nd}, FeatureForm("float16"))
    stored = [pq.read_schema(f"{tmp_path}/{file(part)}").field("res4:3").type.value_type for part in parts]
    assert [str(kind) for kind in stored] == ["halffloat", "float"]
    expected = np.concatenate([small_nd, large_nd])
    np.testing.assert_array_equal(FeatureTable(folder, parts, ("res4:3",)).load("res4:3"), expected)
    assert Rows.open(str(folder)).itemsize == 4
