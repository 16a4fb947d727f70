"""Features as they lie on disk, and how an image becomes them.

features.json                              written last: whose features these are
features-0000000000-0000004096.parquet     index (int64), and a list of numbers for each layer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raysl.errors import UserError, unknown
from raysl.storage import Folder

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Part = tuple[int, int]

DONE = "features.json"
# VISSL adds this to a length before it divides, so that a row of zeros stays one.
_NO_LENGTH = 1e-5
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class FeatureProtocol:
    """How an image becomes features.

    Args:
        image_size: side in pixels of the evaluation view; see `raysl.stream.decode.centre`.
        layers: names of what is taken out of the encoder; see `raysl.extraction.encoders`.
        version: raised when the same settings come to mean something else.
    """

    image_size: int = 32
    layers: tuple[str, ...] = ("pooled",)
    version: int = 1


@dataclass(frozen=True)
class FeatureForm:
    """How features are kept.

    Args:
        dtype: of the numbers on disk. A part with numbers beyond the range of float16 is float32 in either case.
        l2: every row divided by its length plus 1e-5, before it is rounded.
    """

    dtype: Literal["float32", "float16"] = "float32"
    l2: bool = False


@dataclass(frozen=True)
class FeatureTable:
    """The features of every image of a data set, lying in parts in a folder. Holds none of them itself.

    Args:
        folder: where the parts are.
        parts: first index and index after the last, of each part, in order.
        layers: their names.
    """

    folder: Folder
    parts: tuple[Part, ...]
    layers: tuple[str, ...]

    def load(self, layer: str = "pooled") -> Floats:
        """float32 (n, dim): the features of a layer in index order, in memory.

        Raises:
            UserError: there is no such layer, or a part is damaged.
        """
        if layer not in self.layers:
            raise unknown("layer", layer, self.layers)
        features_nd: Floats | None = None
        for part in self.parts:
            values = self.read(part, layer)
            if features_nd is None:
                features_nd = np.empty((self.parts[-1][1], values.shape[1]), np.float32)
            features_nd[part[0] : part[1]] = values
        assert features_nd is not None
        return features_nd

    def numbers(self, layer: str) -> int:
        """How many numbers `load` gives, images times dim. Raises UserError when the first part is damaged."""
        with self._opened(self.parts[0]) as stream:
            return self.parts[-1][1] * int(pq.read_schema(stream).field(layer).type.list_size)

    def read(self, part: Part, layer: str) -> Floats:
        """float32 (part, dim): one part. Raises UserError when it is damaged."""
        with self._opened(part) as stream:
            column = pq.read_table(stream, columns=[layer]).column(layer).combine_chunks()
            return (  # type: ignore[no-any-return]
                column.flatten()
                .to_numpy(zero_copy_only=False)
                .reshape(part[1] - part[0], -1)
                .astype(np.float32)
            )

    @contextmanager
    def _opened(self, part: Part) -> Iterator[BinaryIO]:
        """The file of a part; what goes wrong with it is said by name."""
        name = file(part)
        try:
            with self.folder.open(name) as stream:
                yield stream
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"The features {name!r} in {str(self.folder)!r} are damaged: {error}. Delete that folder; they are "
                "then computed again."
            ) from error


def file(part: Part) -> str:
    """Name of the file of a part."""
    return f"features-{part[0]:010d}-{part[1]:010d}.parquet"


def write(folder: Folder, part: Part, layers: Mapping[str, Floats], form: FeatureForm) -> None:
    """Writes a part, whole or not at all.

    Args:
        layers: float32 (part, dim) each.
    """
    columns: dict[str, Any] = {"index": np.arange(*part, dtype=np.int64)}
    for name, values in layers.items():
        numbers = values / (np.linalg.norm(values, axis=1, keepdims=True) + _NO_LENGTH) if form.l2 else values
        # Maps of deep networks that have learned nothing reach beyond half precision, where they would be infinite.
        dtype = "float32" if np.abs(numbers).max() > _LARGEST_HALF else form.dtype
        flat = pa.array(numbers.astype(dtype).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    with folder.writing(file(part)) as stream:
        # Compression and dictionaries only cost time on numbers like these.
        pq.write_table(pa.table(columns), stream, compression="none", use_dictionary=False)
