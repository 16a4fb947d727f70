"""How far a clustering has come: enough to go on from its last iteration."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysl.clustering.update import Singles
from raysl.errors import UserError
from raysl.storage import Folder

_FILE = "state.npz"


@dataclass
class State:
    """Written whole, between two iterations.

    Args:
        restart: the start that is under way.
        centroids_kd: of the iteration that comes next; None before the first of a start.
        curves: one list for each start, with a row of facts for each iteration.
        best_kd: centroids of the best start that is finished.
    """

    restart: int = 0
    centroids_kd: Singles | None = None
    curves: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    best_kd: Singles | None = None

    def best_restart(self) -> int:
        """The start whose last objective is the lowest."""
        return int(np.argmin([curve[-1]["objective"] for curve in self.curves if curve]))

    def finish_restart(self, restarts: int) -> None:
        """Keeps the centroids when they are the best so far, and goes on to the next start."""
        if self.best_restart() == self.restart:
            self.best_kd = self.centroids_kd
        self.restart += 1
        self.centroids_kd = None
        if self.restart < restarts:
            self.curves.append([])

    def save(self, folder: Folder) -> None:
        arrays = {"centroids_kd": self.centroids_kd, "best_kd": self.best_kd}
        facts = json.dumps({"restart": self.restart, "curves": self.curves})
        buffer = io.BytesIO()
        there: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
        np.savez(buffer, facts=np.array(facts), **there)
        folder.write(_FILE, buffer.getvalue())

    @staticmethod
    def load(folder: Folder) -> State:
        """The state in a folder, or a new one. Raises UserError when it is damaged."""
        if not folder.exists(_FILE):
            return State()
        try:
            with np.load(io.BytesIO(folder.read(_FILE)), allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                arrays = {name: file[name] for name in ("centroids_kd", "best_kd") if name in file}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(
                f"The state of the clustering at {str(folder)!r} is damaged: {error}. Delete {_FILE} there; the "
                "clustering then begins again."
            ) from error
        return State(facts["restart"], arrays.get("centroids_kd"), facts["curves"], arrays.get("best_kd"))

    @staticmethod
    def delete(folder: Folder) -> None:
        folder.delete(_FILE)
