"""Name and write the files of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysl.storage import Folder

# First image of a file, and the image after its last.
Part = tuple[int, int]

# Readers of Parquet folders, such as pandas, skip names that begin with an underscore.
FINISHED, STARTED = "_features.json", "_source.json"
# VISSL adds this to a norm before it divides, so that a row of zeros stays a row of zeros.
_EPSILON = 1e-5
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class FeatureForm:
    """Format of features on disk."""

    # Type of the stored numbers. A file with numbers outside of the range of float16 is float32 in either case.
    dtype: Literal["float32", "float16"] = "float32"
    l2: bool = False  # divide every row by its norm plus 1e-5, before rounding


def part_file(part: Part) -> str:
    return f"features-{part[0]:010d}-{part[1]:010d}.parquet"


def write_part(
    folder: Folder,
    part: Part,
    layer: str,
    rows_nd: NDArray[np.float32],
    form: FeatureForm,
    paths: pa.Array | pa.ChunkedArray | None = None,
) -> None:
    """Write a part atomically."""
    columns: dict[str, Any] = {"index": np.arange(*part, dtype=np.int64)}
    if paths is not None:
        columns["path"] = paths
    if form.l2:
        rows_nd = rows_nd / (np.linalg.norm(rows_nd, axis=1, keepdims=True) + _EPSILON)
    # Feature maps of deep untrained networks exceed half precision, where they would become infinite.
    dtype = "float32" if np.abs(rows_nd).max() > _LARGEST_HALF else form.dtype
    values = pa.array(rows_nd.astype(dtype).ravel())
    columns[layer] = pa.FixedSizeListArray.from_arrays(values, rows_nd.shape[1])
    with folder.writing(part_file(part)) as stream:
        # Compression and dictionaries cost time and save no space on such numbers.
        settings = {"compression": "none", "use_dictionary": ["path"], "write_page_checksum": True}
        pq.write_table(pa.table(columns), stream, **settings)
