"""The progress of a clustering: enough to resume after its last iteration."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysl.errors import explained
from raysl.storage import Folder
from raysl.storage.records import read_arrays, write_arrays

STATE = "state.npz"
_REMEDY = f"Delete {STATE}; the clustering then starts again."


@dataclass
class State:
    """The progress after an iteration, written atomically."""

    restart: int = 0  # number of the current start
    # Centroids of the next iteration; None before the first of a start.
    centroids_kd: NDArray[np.float32] | None = None
    # One list for each start, with an entry for each iteration.
    curves: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    best_kd: NDArray[np.float32] | None = None  # centroids of the best finished start

    def best_restart(self) -> int:
        """Return the number of the start with the lowest final objective."""
        return int(np.argmin([curve[-1]["objective"] for curve in self.curves if curve]))

    def finish_restart(self, restarts: int) -> None:
        """Keep the centroids if they are the best so far, and go on to the next start."""
        if self.best_restart() == self.restart:
            self.best_kd = self.centroids_kd
        self.restart += 1
        self.centroids_kd = None
        if self.restart < restarts:
            self.curves.append([])

    def save(self, folder: Folder) -> None:
        """Write the state."""
        arrays = {"centroids_kd": self.centroids_kd, "best_kd": self.best_kd}
        progress = json.dumps({"restart": self.restart, "curves": self.curves})
        present = {name: array for name, array in arrays.items() if array is not None}
        write_arrays(folder, STATE, {"progress": np.array(progress), **present})

    @staticmethod
    def load(folder: Folder) -> State:
        """Return the state in a folder, or a new one. Raises UserError if it is damaged."""
        if not folder.exists(STATE):
            return State()
        arrays = read_arrays(folder, STATE, _REMEDY)
        with explained(f"The file {folder}/{STATE} is damaged", _REMEDY, ValueError, KeyError, TypeError):
            progress = json.loads(str(arrays["progress"]))
            centroids_kd, best_kd = arrays.get("centroids_kd"), arrays.get("best_kd")
            return State(int(progress["restart"]), centroids_kd, progress["curves"], best_kd)
