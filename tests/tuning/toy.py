"""A sweep of trials that last milliseconds, for the tests of schedulers and searchers.

The actors of trials import this module too, so it imports little.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from ray import tune

from raysl.errors import UserError
from raysl.storage import Folder

TRIALS, TIMES = 8, (1, 3, 9)


class Killed(Exception):
    """The driver of a sweep is killed."""


class Toy(tune.Trainable):  # type: ignore[misc]
    """A trial whose score depends on its value "x" and its rung.

    At their second rungs, trial 3 fails, and the process of trial 1 is killed the first time.
    """

    known: dict[tuple[int, int], float]
    slow: str
    log: str

    def setup(self, config: dict[str, Any]) -> None:
        self.x, self.rung = config["x"], 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        number = int(self.trial_name)
        self.rung += 1
        score = self.known.get((number, self.rung))
        if score is None:
            noise = hashlib.md5(f"{self.x:.6f} {self.rung}".encode()).digest()[0] / 256
            time.sleep(
                0.1 + {"none": 0.0, "odd": 0.15 * (number % 2), "first": 0.1 * (number < 2)}[self.slow]
            )
            if (number, self.rung) == (3, 2):
                raise UserError("it failed")
            if (number, self.rung) == (1, 2) and not Path(f"{self.log}-died").exists():
                Path(f"{self.log}-died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            score = (1 - (self.x - 0.4) ** 2) * (1 - 0.5**self.rung) + noise / 50
            with open(self.log, "a") as file:
                file.write(f"{number} {self.rung}\n")
        result = {"score": score, "rung": self.rung, "t": TIMES[self.rung - 1], "done": self.rung == 3}
        return {**result, "runs": json.dumps([{"score": score}])}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "rung.json").write_text(json.dumps(self.rung))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        self.rung = json.loads((Path(checkpoint_dir) / "rung.json").read_text())

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        # Ray may keep the share of a placement group that was made in the moment when its driver was killed.
        return tune.PlacementGroupFactory([{"CPU": 0.001}])


class Notes:
    """The rows of a sweep of toys, as a journal keeps them.

    Args:
        file: file of all rows, from which a later process continues; none by default.
        kill_after: number of scores after which the sweep ends by `error`.
    """

    def __init__(
        self, file: Path | None = None, kill_after: int = 0, error: type[BaseException] = Killed
    ) -> None:
        self.rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        self.kill_after = kill_after
        self.error = error
        for line in file.read_text().splitlines() if file is not None and file.exists() else ():
            self._add(json.loads(line))
        self._file = file

    def __call__(self, row: dict[str, Any]) -> None:
        before = len(self.of("score"))
        self._add(row)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if before < len(self.of("score")) == self.kill_after:
            raise self.error

    def of(self, event: str) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the rows of one kind by trial and rung, counted from 0. A later row replaces an earlier one."""
        return {key[1:]: row for key, row in self.rows.items() if key[0] == event}

    def _add(self, row: dict[str, Any]) -> None:
        self.rows[row["event"], row["trial"], row.get("rung", 0)] = row


def play(folder: Path, scheduler: Any, searcher: Any, at_once: int, slow: str, notes: Notes) -> Notes:
    """Run the sweep of toys, with what is known from before."""
    from raysl.tuning import algorithms
    from raysl.tuning.config import SweepConfig
    from raysl.tuning.ordered_scheduler import OrderedScheduler
    from raysl.tuning.ordered_searcher import OrderedSearcher
    from raysl.tuning.space import Dimension, Space
    from raysl.tuning.sweep import fit

    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    listed = tuple(i / TRIALS for i in range(TRIALS)) if searcher == "grid" else ()
    space = Space((Dimension("x", listed, 0.0, 1.0, mutable=True),))
    config = SweepConfig("out", ("x",), scheduler=scheduler, searcher=searcher, rungs=3)
    known = {(trial, rung + 1): row["score"] for (trial, rung), row in notes.of("score").items()}
    names = {"known": known, "slow": slow, "log": str(folder / "steps")}
    bound = type("Bound", (Toy,), names)
    ordered = OrderedScheduler(algorithms.scheduler(config, space, TIMES), TRIALS, notes, at_once)
    fixed = {"random": lambda n: space.sample(0, n), "grid": lambda n: space.grid()[n]}
    source = fixed.get(searcher) or algorithms.searcher(config)
    begun = {trial: row["values"] for (trial, rung), row in notes.of("trial").items() if rung == 0}
    fit(
        bound,
        space,
        ordered,
        OrderedSearcher(source, ordered, 4, 0, begun),
        Folder(str(folder)),
        f"tune-{len(known)}",
    )
    return notes


def drive(address: str, folder: Path, scheduler: str, searcher: str, at_once: int, slow: str) -> None:
    """Run the sweep of toys on a Ray that is there, and continue what an earlier process left in the folder."""
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    play(folder, scheduler, searcher, at_once, slow, Notes(folder / "notes.jsonl"))
