"""The loop of a sweep: asks where it stands, keeps as many runs going as fit, and writes down what comes of them.

The runs are driven by threads of this process, which hold no CPU of the cluster: each starts trainers, data tasks and
probe actors of its own. All get the share that fits beside the others by construction, so they never wait for each
other in a circle. If the process is killed, all of it stops, and the same command goes on from the journal.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from raysl import checkpoint
from raysl.config import FREE, Pretraining, differences
from raysl.errors import UserError
from raysl.ray_cluster.lock import DriverLock
from raysl.run import Run
from raysl.storage import Folder
from raysl.training.progress_actor import duration
from raysl.tuning import boards, table
from raysl.tuning.config import SweepConfig
from raysl.tuning.journal import Journal
from raysl.tuning.setting import Setting, prepare
from raysl.tuning.standing import Climb, Standing
from raysl.tuning.together import Together
from raysl.tuning.trial import Work, perform

# Between two lines about the same run.
_SAY_EVERY_S = 60.0


def sweep(base: Pretraining, config: SweepConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Runs a sweep to its end, or goes on with one that was interrupted.

    Args:
        base: the configuration of every run, but for what varies, the seed and the folder.
        config: what is tried.
        say: takes one line of progress at a time.

    Returns:
        A row for each trial, the best first; see `table.rows`.

    Raises:
        UserError: something has to be mended, and no run has begun; or the journal can no longer be written, or
            another driver works on the sweep.
    """
    setting = prepare(base, config)
    with DriverLock(Folder(config.out)) as lock:
        return _sweep(setting, Journal(Folder(config.out), lock.check), say)


def _sweep(setting: Setting, journal: Journal, say: Callable[[str], None]) -> list[dict[str, Any]]:
    config = setting.config
    _begin(journal, setting)
    for trial in Standing(config, setting.space, journal.rows).failures if config.retry else ():
        journal.add({"event": "retry", "trial": trial})
    standing = Standing(config, setting.space, journal.rows)
    say(
        f"{standing.num_trials} trials of {len(config.seeds)} seeds, {setting.at_once} runs at a time; scored by "
        f"{config.probe} at epochs {', '.join(f'{setting.base.epochs * share:.3g}' for share in config.shares())}."
    )
    together = Together(setting)
    if setting.at_once > 1:
        why = together.apart()
        say(
            f"Each run has a stream of its own: {why}."
            if why
            else "Runs that read the same images at the same time share one stream."
        )
    _Loop(setting, journal, together, say).run()
    standing = Standing(config, setting.space, journal.rows)
    rows = table.rows(standing)
    journal.folder.write_json("table.json", rows)
    boards.write(journal.folder, standing)
    return rows


def _begin(journal: Journal, setting: Setting) -> None:
    """Writes the first row, or compares it with the one that is there.

    Raises:
        UserError: another sweep lies there.
    """
    config, base = setting.config, setting.base
    settings = {
        name: value
        for name, value in asdict(config).items()
        # Who copies whom in population based training depends on how many trials there are.
        if (name == "samples" and config.scheduler == "pbt")
        or name
        not in (
            *("out", "samples", "retry", "max_concurrent", "gpus_per_worker", "share_stream"),
            *("train", "test", "vary"),
        )
    }
    data = {name: getattr(setting, name).manifest.fingerprint for name in ("images", "train", "test")}
    header = {
        "event": "sweep",
        "config": settings,
        "space": [asdict(dimension) for dimension in setting.space.dimensions],
        "base": {name: value for name, value in base.to_json().items() if name != "run"},
        "data": data,
        "uris": {"train": str(setting.train.folder), "test": str(setting.test.folder)},
    }
    header = json.loads(json.dumps(header))
    if not journal.rows:
        journal.add(header)
        return
    free = {f"base.{name}" for name in FREE} | {"uris"}
    changed = [
        name
        for name in differences(journal.header, header)
        if not any(name == one or name.startswith(f"{one}.") for one in free)
    ]
    if changed:
        raise UserError(
            f"The sweep at {config.out!r} was begun differently; these differ: {', '.join(changed)}. Give the same "
            "values to go on with it, or another folder to --out for a new sweep."
        )


class _Loop:
    """Starts work while there is room for it, and takes in what is done."""

    def __init__(
        self, setting: Setting, journal: Journal, together: Together, say: Callable[[str], None]
    ) -> None:
        self.setting = setting
        self.journal = journal
        self.together = together
        self.say = say
        self.running: set[Climb] = set()
        self.done: queue.Queue[tuple[Climb, dict[str, Any]]] = queue.Queue()
        self.started = time.monotonic()

    def run(self) -> None:
        """Returns when every trial is finished, stopped or failed."""
        while True:
            standing = self._standing()
            self._decisions(standing)
            waiting = [climb for climb in self._ordered(standing.ready()) if climb not in self.running]
            while waiting and len(self.running) < self.setting.at_once:
                self._start(waiting.pop(0), standing, waiting[: self.setting.at_once - 1])
            if not self.running:
                return
            climb, row = self.done.get()
            self.running.discard(climb)
            self.together.leave(_name(climb))
            if climb.trial not in standing.failures:
                self.journal.add({**asdict(climb), **row, **self.setting.cost()})
                self._tell(climb, row)

    def _ordered(self, ready: list[Climb]) -> list[Climb]:
        """What has come farthest first. Trials that can run at the same time do so with the same seed: with another
        they would read other images, and could not share a stream."""
        seeds, at_once = self.setting.config.seeds, self.setting.at_once
        return sorted(ready, key=lambda c: (-c.rung, c.trial // at_once, seeds.index(c.seed), c.trial))

    def _standing(self) -> Standing:
        return Standing(self.setting.config, self.setting.space, self.journal.rows)

    def _decisions(self, standing: Standing) -> None:
        """Writes down what has been decided, for people."""
        written = {(row["trial"], row["rung"]) for row in self.journal.of("decision")}
        for trial in range(standing.num_trials):
            for rung in range(standing.num_rungs - 1):
                goes_on = standing.decision(trial, rung)
                if goes_on is None:
                    break
                if (trial, rung) not in written and standing.config.scheduler != "none":
                    row = {"event": "decision", "trial": trial, "rung": rung, "goes_on": goes_on}
                    self.journal.add({**row, "copies": standing.donor(trial, rung + 1)})

    def _start(self, climb: Climb, standing: Standing, soon: list[Climb]) -> None:
        """Starts a thread. It dies with the process, and never keeps it. `soon`: what is started next."""
        values = standing.values(climb.trial, climb.rung)
        assert values is not None
        begun = {(row["trial"], row["rung"]) for row in self.journal.of("trial")}
        changes = climb.rung == 0 or standing.donor(climb.trial, climb.rung) is not None
        if changes and (climb.trial, climb.rung) not in begun:
            row = {"event": "trial", "trial": climb.trial, "rung": climb.rung, "values": values}
            self.journal.add(row)
        work = self._seated(self._work(climb, standing), climb, standing, soon)
        said = [0.0]

        def say(line: str) -> None:
            if time.monotonic() - said[0] > _SAY_EVERY_S and line.startswith("step"):
                said[0] = time.monotonic()
                self.say(f"trial {climb.trial} seed {climb.seed}: {line}")

        def drive() -> None:
            self.done.put((climb, perform(work, say)))

        self.running.add(climb)
        threading.Thread(target=drive, daemon=True, name=f"trial-{climb.trial}-{climb.seed}").start()

    def _config(self, climb: Climb, standing: Standing) -> Pretraining:
        values = standing.values(climb.trial, climb.rung)
        assert values is not None
        made = self.setting.space.configured(self.setting.base, values)
        run = Folder(self.setting.config.out) / standing.folder(climb.trial, climb.seed, climb.rung)
        return replace(made, run=str(run), seed=climb.seed, data=str(self.setting.images.folder))

    def _work(self, climb: Climb, standing: Standing) -> Work:
        setting, out = self.setting, Folder(self.setting.config.out)
        config = self._config(climb, standing)
        begun = setting.until(config, climb.rung - 1) if climb.rung else 0
        donor = standing.donor(climb.trial, climb.rung)
        receivers = [n for n in range(standing.num_trials) if standing.donor(n, climb.rung) == climb.trial]
        return Work(
            config,
            setting.until(config, climb.rung),
            setting.placement,
            str(setting.train.folder),
            str(setting.test.folder),
            setting.config.probe,
            begun,
            None if donor is None else out / standing.folder(donor, climb.seed, climb.rung - 1),
            tuple(out / standing.folder(receiver, climb.seed, climb.rung) for receiver in receivers),
        )

    def _seated(self, work: Work, climb: Climb, standing: Standing, soon: list[Climb]) -> Work:
        """The work with a seat at a stream that it shares with others, if there are such."""
        found = checkpoint.newest(Run(Folder(work.config.run)).checkpoints)
        near = [self._config(other, standing) for other in soon if other.rung == climb.rung]
        start = found.step if found else work.begun
        subscriber = self.together.subscriber(_name(climb), work.config, work.until, start, near)
        return replace(work, subscriber=subscriber)

    def _tell(self, climb: Climb, row: dict[str, Any]) -> None:
        """One line: what came, what is best, how much is left."""
        standing = self._standing()
        epoch = self.setting.base.epochs * self.setting.config.shares()[climb.rung]
        what = (
            f"{self.setting.config.probe} {row['score']:.4f} at epoch {epoch:.3g}"
            if row["event"] == "score"
            else f"failed: {row['reason']}"
        )
        states = [standing.state(trial) for trial in range(standing.num_trials)]
        over = sum(state in ("finished", "stopped", "failed") for state in states)
        best = standing.best()
        top = (
            f"best {standing.scores_of(best)[-1]:.4f} (trial {best})" if best is not None else "none finished"
        )
        self.say(
            f"trial {climb.trial} seed {climb.seed}: {what} | {top} | {over} of {len(states)} trials over, "
            f"{len(self.running)} runs going | ETA {self._eta(standing)}"
        )

    def _eta(self, standing: Standing) -> str:
        """Time left if every trial that can go on goes on to the end."""
        shares = (0.0, *self.setting.config.shares())
        rows = self.journal.of("score")
        done = sum(shares[row["rung"] + 1] - shares[row["rung"]] for row in rows)
        left = 0.0
        for trial in range(standing.num_trials):
            if standing.state(trial) in ("running", "waiting"):
                for seed in self.setting.config.seeds:
                    rungs = [r for r in range(standing.num_rungs) if Climb(trial, seed, r) in standing.scores]
                    left += 1.0 - (shares[max(rungs) + 1] if rungs else 0.0)
        seconds = sum(row["seconds"] for row in rows)
        return "at most " + duration(left * seconds / done / self.setting.at_once) if done else "?"


def _name(climb: Climb) -> str:
    return f"trial {climb.trial} seed {climb.seed}"
