"""Principal components of features: fitted to all rows in float64 by Ray tasks, kept beside them, applied in parts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raysl import ray_cluster
from raysl.errors import UserError
from raysl.extraction.table import FeatureForm, FeatureTable, Part, file, write
from raysl.storage import Folder

Doubles = npt.NDArray[np.float64]

FILE = "pca.npz"
# So that the tasks of a small machine can run beside what else there is.
_CPUS = 0.5


@dataclass(frozen=True)
class Projection:
    """A row x becomes (x - mean_d) @ components_dm.

    Args:
        mean_d: float64 (d,).
        components_dm: float64 (d, m), orthonormal, by falling variance; the largest number of each is positive.
        variance: share of the variance that is kept.
    """

    mean_d: Doubles
    components_dm: Doubles
    variance: float

    def save(self, folder: Folder) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer, mean_d=self.mean_d, components_dm=self.components_dm, variance=np.array(self.variance)
        )
        folder.write(FILE, buffer.getvalue())

    @staticmethod
    def load(uri: str) -> Projection:
        """The projection of a folder of features. Raises UserError when it has none."""
        try:
            with np.load(io.BytesIO(Folder(uri).read(FILE)), allow_pickle=False) as saved:
                return Projection(saved["mean_d"], saved["components_dm"], float(saved["variance"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The features at {uri!r} have no projection that can be read: {error}. Give features that were made "
                "with --pca."
            ) from error


def fit(table: FeatureTable, layer: str, dim: int) -> Projection:
    """The first `dim` principal components of a layer. Ray must run.

    Raises:
        UserError: there are fewer rows or numbers in a row than components, or a part is damaged.
    """
    import ray

    task = ray.remote(_moments).options(num_cpus=_CPUS)
    shares = _shares(table.parts)
    found = _all([task.remote(table, parts, layer) for parts in shares])
    count = sum(one[0] for one in found)
    mean_d = sum(one[1] for one in found) / count
    if dim > min(count - 1, len(mean_d)):
        raise UserError(
            f"pca is {dim}; of {count:,} rows of {len(mean_d)} numbers there are at most "
            f"{min(count - 1, len(mean_d))} components. Lower --pca."
        )
    covariance_dd = sum(one[2] for one in found) / count - np.outer(mean_d, mean_d)
    variances, vectors_dd = np.linalg.eigh(covariance_dd)
    components_dm = vectors_dd[:, ::-1][:, :dim]
    signs = np.sign(components_dm[np.abs(components_dm).argmax(axis=0), np.arange(dim)])
    return Projection(mean_d, components_dm * signs, float(variances[::-1][:dim].sum() / variances.sum()))


def project(
    table: FeatureTable, layer: str, projection: Projection, form: FeatureForm, folder: Folder
) -> None:
    """Writes the projected parts that are not in the folder yet. Ray must run.

    Raises:
        UserError: the rows have another length than the projection was fitted to.
    """
    import ray

    width = table.read(table.parts[0], layer).shape[1]
    if width != len(projection.mean_d):
        raise UserError(
            f"The projection is for rows of {len(projection.mean_d)} numbers and these have {width}. Give --pca-of the "
            "features of the same network and layer."
        )
    there = set(folder.list())
    missing = [part for part in table.parts if file(part) not in there]
    task = ray.remote(_project).options(num_cpus=_CPUS)
    reference = ray.put(projection)
    _all([task.remote(table, parts, layer, reference, form, folder) for parts in _shares(missing)])


def _all(references: list[Any]) -> list[Any]:
    """The results of tasks. Raises the UserError of a task as such."""
    import ray

    try:
        return ray.get(references)  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError as error:
        raise ray_cluster.user_error(error) or error from None


def _shares(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of each task: one task for each CPU."""
    import ray

    count = max(1, min(len(parts), int(ray.cluster_resources().get("CPU", 1))))
    return [list(parts[i::count]) for i in range(count)] if parts else []


def _moments(table: FeatureTable, parts: Sequence[Part], layer: str) -> tuple[int, Any, Any]:
    """Number of rows, their sum, and the sum of their outer products."""
    count, sum_d, gram_dd = 0, np.zeros(()), np.zeros(())
    for part in parts:
        rows_nd = table.read(part, layer).astype(np.float64)
        count += len(rows_nd)
        sum_d = sum_d + rows_nd.sum(axis=0)
        gram_dd = gram_dd + rows_nd.T @ rows_nd
    return count, sum_d, gram_dd


def _project(
    table: FeatureTable,
    parts: Sequence[Part],
    layer: str,
    projection: Projection,
    form: FeatureForm,
    folder: Folder,
) -> None:
    for part in parts:
        rows_nm = (table.read(part, layer) - projection.mean_d) @ projection.components_dm
        write(folder, part, {layer: rows_nm.astype(np.float32)}, form)
