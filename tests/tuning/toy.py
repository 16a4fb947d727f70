"""A trial of milliseconds for the tests of schedulers and searchers. Imports little, so that its actors start fast."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ray import tune

TIMES = (1, 3, 9)


class Toy(tune.Trainable):  # type: ignore[misc]
    """A trial whose score depends on its value "x" and its rung. Trial 3 fails at its second rung."""

    known: dict[tuple[int, int], float]
    slow: str
    log: str
    at_once: int

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
            time.sleep({"none": 0.0, "odd": 0.15 * (number % 2), "first": 0.1 * (number < 2)}[self.slow])
            if (number, self.rung) == (3, 2):
                raise RuntimeError("it failed")
            score = (1 - (self.x - 0.4) ** 2) * (1 - 0.5**self.rung) + noise / 50
            with open(self.log, "a") as file:
                file.write(f"{number} {self.rung}\n")
        return {"score": score, "rung": self.rung, "t": TIMES[self.rung - 1], "done": self.rung == 3}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "rung.json").write_text(json.dumps(self.rung))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        self.rung = json.loads((Path(checkpoint_dir) / "rung.json").read_text())

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.9 / cls.at_once}])
