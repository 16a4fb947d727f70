"""Principal components of features: fitted to all rows in float64 by Ray tasks, and applied part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl import ray_cluster
from raysl.errors import UserError, explained
from raysl.ray_cluster import this_machine
from raysl.storage import Folder
from raysl.storage.feature_files import FeatureForm, part_file, write_part
from raysl.storage.feature_store import FeatureStore, Piece
from raysl.storage.records import read_arrays, short_hash, write_arrays

FILE = "_pca.npz"
# CPUs of a task: less than one, so that the tasks of a small machine can run beside other work.
_CPUS = 0.5


@dataclass(frozen=True)
class Projection:
    """Projects a row x to (x - mean_d) @ components_dm."""

    mean_d: NDArray[np.float64]  # float64 (d,)
    # float64 (d, m), orthonormal, by falling variance; the largest number of each is positive.
    components_dm: NDArray[np.float64]
    variance: float  # share of the variance that is kept

    def save(self, folder: Folder) -> None:
        """Write the projection beside the features."""
        arrays = {"mean_d": self.mean_d, "components_dm": self.components_dm}
        write_arrays(folder, FILE, {**arrays, "variance": np.array(self.variance)})

    def digest(self) -> str:
        """Return a hash that equal projections share."""
        numbers = self.mean_d.tobytes() + self.components_dm.tobytes()
        return short_hash(numbers)

    @staticmethod
    def load(uri: str) -> Projection:
        """Return the projection of a folder of features. Raises UserError if it is missing or damaged."""
        remedy = "Give features that were made with --pca; if they are damaged, delete the folder and make them again."
        arrays = read_arrays(Folder(uri), FILE, remedy)
        with explained(f"The file {uri}/{FILE} is damaged", remedy, KeyError, TypeError, ValueError):
            return Projection(arrays["mean_d"], arrays["components_dm"], float(arrays["variance"]))


def fit(store: FeatureStore, dim: int) -> Projection:
    """Return the first `dim` principal components.

    Raises UserError if there are fewer rows or numbers in a row, a row is not finite, or a file is damaged.
    """
    found = _run(_moments, store, store.shards(1)[0])
    count = sum(each[0] for each in found)
    mean_d = sum(each[1] for each in found) / count
    most = min(count - 1, len(mean_d))
    if dim > most:
        raise UserError(
            f"--pca is {dim}, but {count:,} rows of {len(mean_d)} numbers have at most {most} components. Lower --pca."
        )
    covariance_dd = sum(each[2] for each in found) / count - np.outer(mean_d, mean_d)
    variances, vectors_dd = np.linalg.eigh(covariance_dd)
    components_dm = vectors_dd[:, ::-1][:, :dim]
    signs = np.sign(components_dm[np.abs(components_dm).argmax(axis=0), np.arange(dim)])
    return Projection(mean_d, components_dm * signs, float(variances[::-1][:dim].sum() / variances.sum()))


def project(store: FeatureStore, projection: Projection, form: FeatureForm, folder: Folder) -> None:
    """Write the projected parts that are missing. Raises UserError if the projection is for rows of another length."""
    if store.dim != len(projection.mean_d):
        raise UserError(
            f"The projection is for rows of {len(projection.mean_d)} numbers and these have {store.dim}. Give --pca-of "
            "the features of the same network and layer."
        )
    there = set(folder.list())
    missing = [piece for piece in store.shards(1)[0] if part_file(_part(piece)) not in there]
    _run(_project, store, missing, projection, form, folder)


def _run(work: Any, store: FeatureStore, pieces: Sequence[Piece], *arguments: Any) -> list[Any]:
    """Return the results of a Ray task for each CPU, each on some pieces. Raises the UserError of a task.

    On a machine that needs no Ray, this process does all.
    """
    if not this_machine.needs_ray():
        return [work(store, pieces, *arguments)] if pieces else []
    import ray

    ray_cluster.start()
    count = max(1, min(len(pieces), int(ray.cluster_resources().get("CPU", 1))))
    task = ray.remote(work).options(num_cpus=_CPUS, scheduling_strategy="DEFAULT")
    shared = [ray.put(argument) for argument in arguments]
    try:
        return ray.get(  # type: ignore[no-any-return]
            [task.remote(store, pieces[i::count], *shared) for i in range(count) if pieces]
        )
    except ray.exceptions.RayTaskError as error:
        raise ray_cluster.user_error(error) or error from None


def _part(piece: Piece) -> tuple[int, int]:
    """Return the images of a piece. raysl writes a part as one row group, and in the order of indices."""
    return piece.start, piece.start + piece.num_rows


def _moments(store: FeatureStore, pieces: Sequence[Piece]) -> tuple[int, Any, Any]:
    """Return the number of rows, their sum, and the sum of their outer products."""
    count, sum_d, gram_dd = 0, np.zeros(()), np.zeros(())
    for piece in pieces:
        for indices_b, rows_bd in store.batches(piece, 32 << 20):
            store.check(piece, indices_b, rows_bd)
            rows_bd = rows_bd.astype(np.float64)
            count += len(rows_bd)
            sum_d = sum_d + rows_bd.sum(axis=0)
            gram_dd = gram_dd + rows_bd.T @ rows_bd
    return count, sum_d, gram_dd


def _project(
    store: FeatureStore, pieces: Sequence[Piece], projection: Projection, form: FeatureForm, folder: Folder
) -> None:
    for piece in pieces:
        batches = (rows_bd for _, rows_bd in store.batches(piece, 32 << 20))
        made = [(rows_bd - projection.mean_d) @ projection.components_dm for rows_bd in batches]
        rows_nm = np.concatenate(made).astype(np.float32)
        write_part(folder, _part(piece), store.layer, rows_nm, form, store.paths([piece]))
