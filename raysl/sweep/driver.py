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
from dataclasses import asdict, dataclass, replace
from typing import Any

from raysl import cluster
from raysl.cluster import Placement
from raysl.config import FREE, Pretraining, differences
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.ingest import resolve
from raysl.probe import common_labels
from raysl.progress import duration
from raysl.storage import Folder
from raysl.stream.plan import Plan
from raysl.sweep import boards, searchers, table
from raysl.sweep.config import SweepConfig
from raysl.sweep.journal import Journal
from raysl.sweep.space import Space, Values, space
from raysl.sweep.standing import Climb, Standing
from raysl.sweep.trial import Work, perform
from raysl.train import Network
from raysl.trunk import TrunkConfig

# Between two lines about the same run.
_SAY_EVERY_S = 60.0


@dataclass(frozen=True)
class Setting:
    """What all trials share.

    Args:
        base: the configuration, but for what varies.
        config: of the sweep.
        space: of its points.
        images: that are learned from.
        train: labelled data that the probe learns from.
        test: that it is scored on.
        at_once: runs at the same time.
        placement: what the trainers of a run get.
    """

    base: Pretraining
    config: SweepConfig
    space: Space
    images: DataSet
    train: DataSet
    test: DataSet
    at_once: int
    placement: Placement

    def cost(self) -> dict[str, float]:
        """The CPUs and GPUs that a run holds."""
        cpus = self.placement.cpus_per_worker + self.placement.share.cpus
        return {"cpus": self.base.workers * cpus, "gpus": self.base.workers * self.placement.gpus_per_worker}

    def until(self, config: Pretraining, rung: int) -> int:
        """The step of a rung."""
        plan = Plan.of(self.images, config.batch_size, config.seed, config.epochs)
        return max(1, round(self.config.shares()[rung] * plan.num_steps))


def sweep(base: Pretraining, config: SweepConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Runs a sweep to its end, or goes on with one that was interrupted.

    Args:
        base: the configuration of every run, but for what varies, the seed and the folder.
        config: what is tried.
        say: takes one line of progress at a time.

    Returns:
        A row for each trial, the best first; see `table.rows`.

    Raises:
        UserError: something has to be mended, and no run has begun; or the journal can no longer be written.
    """
    setting = prepare(base, config)
    journal = Journal(Folder(config.out))
    _begin(journal, setting)
    for trial in Standing(config, setting.space, journal.rows).failures if config.retry else ():
        journal.add({"event": "retry", "trial": trial})
    standing = Standing(config, setting.space, journal.rows)
    say(
        f"{standing.num_trials} trials of {len(config.seeds)} seeds, {setting.at_once} runs at a time; scored by "
        f"{config.probe} at epochs {', '.join(f'{base.epochs * share:.3g}' for share in config.shares())}."
    )
    _Loop(setting, journal, say).run()
    standing = Standing(config, setting.space, journal.rows)
    rows = table.rows(standing)
    journal.folder.write_json("table.json", rows)
    boards.write(journal.folder, standing)
    return rows


def prepare(base: Pretraining, config: SweepConfig) -> Setting:
    """Checks every trial before any of them begins, and divides the cluster.

    Raises:
        UserError: what is wrong with the space, the data, the cluster, or any trial.
    """
    if config.searcher == "optuna":
        searchers.need_optuna()
    points = space(base, config.vary, listed=config.searcher == "grid")
    fixed = [d.name for d in points.dimensions if not d.live]
    if config.scheduler == "pbt" and fixed:
        raise UserError(
            f"Population based training changes values in the middle of a run, and {', '.join(fixed)} cannot change "
            "there. Vary fields such as optim.lr or a temperature, or use --scheduler asha."
        )
    trials = _trials(base, config, points)
    cluster.start()
    runs = len(config.seeds) * (len(trials) if config.searcher == "grid" else config.samples)
    at_once, placement = _share(base.workers, config, runs)
    images, test = resolve(base.data), resolve(config.test)
    train = resolve(config.train) if config.train else images
    common_labels(train, test)
    _build(trials, images)
    return Setting(base, config, points, images, train, test, at_once, placement)


def _trials(base: Pretraining, config: SweepConfig, points: Space) -> list[tuple[Values, Pretraining]]:
    """The configuration of every trial; of the ends of the space, where what will be tried is not known yet."""
    if config.searcher == "grid":
        tried = points.grid()
    elif config.searcher == "random" and config.scheduler != "pbt":
        tried = [points.drawn(config.seed, trial) for trial in range(config.samples)]
    else:
        tried = list(points.ends())
    made = []
    for values in tried:
        try:
            made.append((values, points.configured(base, values)))
        except UserError as error:
            raise _refused(values, error) from error
    return made


def _build(trials: list[tuple[Values, Pretraining]], images: DataSet) -> None:
    """Builds what each trial would train, and its plan, which finds what the fields alone do not show."""
    trunks: set[TrunkConfig] = set()
    for values, config in trials:
        # Each trunk once; heads and transforms do not need a large one.
        known, light = config.trunk in trunks, replace(config.trunk, name="small")
        trunks.add(config.trunk)
        try:
            Plan.of(images, config.batch_size, config.seed, config.epochs)
            built = replace(config, trunk=light) if known else config
            facts = images.manifest
            Network(built, images.num_images, len(facts.classes), facts.fingerprint).views(built)
        except UserError as error:
            raise _refused(values, error) from error


def _refused(values: Values, error: UserError) -> UserError:
    return UserError(f"The trial with {table.described(values)} could not run, so none was begun. {error}")


def _share(workers: int, config: SweepConfig, runs: int) -> tuple[int, Placement]:
    """How many of the runs go on at the same time, and what the trainers of each get.

    The trainers of all of them are placed together, as if they were one large run: what fits so can never wait for
    ever.
    """

    def placed(count: int) -> Placement:
        try:
            return cluster.place(count * workers, gpus_per_worker=config.gpus_per_worker)
        except UserError as error:
            raise UserError(f"{count} runs at a time with {workers} workers each: {error}") from error

    if config.gpus_per_worker < 1 and workers > 1:
        raise UserError(
            f"Trainers of one run cannot share a GPU, and gpus_per_worker is {config.gpus_per_worker} for {workers} "
            "workers. Use --workers 1."
        )
    if config.max_concurrent:
        return config.max_concurrent, placed(config.max_concurrent)
    most = 1
    placement = placed(1)
    while most < runs:
        try:
            more = placed(most + 1)
        except UserError:
            break
        if more.cpus_per_worker < 1:
            break
        most, placement = most + 1, more
    return most, placement


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
        not in ("out", "samples", "retry", "max_concurrent", "gpus_per_worker", "train", "test", "vary")
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

    def __init__(self, setting: Setting, journal: Journal, say: Callable[[str], None]) -> None:
        self.setting = setting
        self.journal = journal
        self.say = say
        self.running: set[Climb] = set()
        self.done: queue.Queue[tuple[Climb, dict[str, Any]]] = queue.Queue()
        self.started = time.monotonic()

    def run(self) -> None:
        """Returns when every trial is finished, stopped or failed."""
        while True:
            standing = self._standing()
            self._decisions(standing)
            for climb in standing.ready():
                if len(self.running) < self.setting.at_once and climb not in self.running:
                    self._start(climb, standing)
            if not self.running:
                return
            climb, row = self.done.get()
            self.running.discard(climb)
            if climb.trial not in standing.failures:
                self.journal.add({**asdict(climb), **row, **self.setting.cost()})
                self._tell(climb, row)

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

    def _start(self, climb: Climb, standing: Standing) -> None:
        """Starts a thread. It dies with the process, and never keeps it."""
        values = standing.values(climb.trial, climb.rung)
        assert values is not None
        begun = {(row["trial"], row["rung"]) for row in self.journal.of("trial")}
        changes = climb.rung == 0 or standing.donor(climb.trial, climb.rung) is not None
        if changes and (climb.trial, climb.rung) not in begun:
            row = {"event": "trial", "trial": climb.trial, "rung": climb.rung, "values": values}
            self.journal.add(row)
        work = self._work(climb, standing, values)
        said = [0.0]

        def say(line: str) -> None:
            if time.monotonic() - said[0] > _SAY_EVERY_S and line.startswith("step"):
                said[0] = time.monotonic()
                self.say(f"trial {climb.trial} seed {climb.seed}: {line}")

        def drive() -> None:
            self.done.put((climb, perform(work, say)))

        self.running.add(climb)
        threading.Thread(target=drive, daemon=True, name=f"trial-{climb.trial}-{climb.seed}").start()

    def _work(self, climb: Climb, standing: Standing, values: Values) -> Work:
        setting = self.setting
        out = Folder(setting.config.out)
        made = setting.space.configured(setting.base, values)
        run = out / standing.folder(climb.trial, climb.seed, climb.rung)
        config = replace(made, run=str(run), seed=climb.seed, data=str(setting.images.folder))
        copied = standing.donor(climb.trial, climb.rung)
        begin = None
        if copied is not None:
            source = out / standing.folder(copied, climb.seed, climb.rung - 1)
            begin = (source, setting.until(config, climb.rung - 1))
        if setting.config.scheduler == "pbt":
            # What another trial may still have to copy is not deleted meanwhile.
            config = replace(config, save=replace(config.save, keep_last=1_000_000))
        return Work(
            config,
            setting.until(config, climb.rung),
            setting.placement,
            str(setting.train.folder),
            str(setting.test.folder),
            setting.config.probe,
            begin,
        )

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
