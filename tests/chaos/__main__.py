"""Kill, stop and starve small commands at random, run them again until they are complete, and compare the results.

    python -m tests.chaos --faults 100 --out results/chaos

A round runs one command, disturbs it, and repeats it until it is complete; its result must equal that of an
undisturbed run bit for bit, and nothing may be left: no process, no temporary file, no shared memory. The same seed
chooses the same commands and the same kinds and times of faults. Rounds are kept in a journal, and the same call
continues after the last one. Filling the disk and taking the storage away need root.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import commands, faults
from tests.chaos.commands import COMMANDS, Command

# A command that is disturbed and does not end within this time hangs.
_PATIENCE_S = 300.0
# The processes of Ray end 15 s after the loss of its GCS, later on a busy machine.
_LEAVE_WITHIN_S = 60.0
_DISK_MB = 64
# The import of torch._dynamo, which data parallelism and torchvision need, makes this empty folder, one for each user.
_CACHE = "torchinductor_"
# Secrets in the environment, which no file may hold.
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN")
_PLANTED = b"planted-7c1e40d2"
_SESSIONS, _STRIKES = 3, 5


@dataclass
class Chaos:
    """The folder of the program and everything that does not change between rounds.

    Args:
        work: images, undisturbed results, and the journal of rounds.
        seed: seed of all choices.
        chosen: the commands that are disturbed.
    """

    work: Path
    seed: int
    chosen: list[Command]

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.disk = self.work / "disk"
        self.mounted = faults.mount(self.disk, _DISK_MB)
        self.journal = self.work / "rounds.jsonl"
        self.places = {"images": self.work / "images"} | {one.name: self.work / one.name for one in COMMANDS}
        # Sockets of Ray need a short path.
        self.scratch = Path("/tmp") / f"chaos-{uuid.uuid4().hex[:6]}"
        self.scratch.mkdir(mode=0o700)
        self.mark = ""
        self.until_s = math.inf

    def is_over(self) -> bool:
        return time.monotonic() > self.until_s

    def close(self) -> None:
        faults.leftovers(self.mark, 0)
        faults.unmount(self.disk)
        shutil.rmtree(self.scratch)

    def start(self, command: Command, out: Path, log: Path) -> faults.Target:
        """Start a command in a session of its own."""
        self.mark = uuid.uuid4().hex
        planted = dict.fromkeys(_SECRETS, _PLANTED.decode())
        # The faults are those of Ray, which a small machine would do without.
        ray_and_place = {"RAY_ADDRESS": "local", "TMPDIR": str(self.scratch)}
        environment = {**os.environ, **planted, **ray_and_place, faults.MARK: self.mark}
        argv = [sys.executable, "-m", "raysl", *command.argv({**self.places, "out": out})]
        with log.open("wb") as file:
            driver = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return faults.Target(driver, self.mark, self.disk if self.mounted else None)

    def undisturbed(self) -> dict[str, tuple[float, dict[str, str]]]:
        """Return the duration and result of each command that is needed, by name. Run those without any."""
        file = self.work / "undisturbed.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if not self.places["images"].exists():
            commands.write_images(self.places["images"])
        needed = {name for one in self.chosen for name in (*one.needs(), one.name)}
        for command in COMMANDS:
            if command.name in needed and command.name not in known:
                shutil.rmtree(self.places[command.name], ignore_errors=True)
                begun = time.monotonic()
                log = self.work / f"{command.name}.log"
                target = self.start(command, self.places[command.name], log)
                if target.driver.wait() != 0:
                    raise SystemExit(f"{command.name} fails without any fault:\n{log.read_text()}")
                seconds = time.monotonic() - begun
                known[command.name] = (seconds, command.result(str(self.places[command.name])))
                file.write_text(json.dumps(known))
                print(f"{command.name} takes {seconds:.0f} s undisturbed.", flush=True)
        return known

    def session(
        self, command: Command, out: Path, rng: random.Random | None, seconds: float
    ) -> dict[str, Any]:
        """Run a command once, with faults if there is a generator, and return what was seen."""
        log = self.work / "round.log"
        shared = faults.shared_memory()
        target = self.start(command, out, log)
        struck: list[str] = []
        if rng is not None:
            # Half of the sessions are left alone until they have written something: a start takes long, and is dull.
            if rng.random() < 0.5:
                _wait_for_writing(target, out, seconds)
            pause = rng.uniform(0.02, 0.6) * seconds
            for _ in range(rng.randint(1, _STRIKES)):
                _wait(target, pause)
                if self.is_over():
                    break
                struck += filter(None, [faults.strike(target, rng)])
                pause = rng.uniform(1, 5)
        code: int | str
        try:
            code = target.driver.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            code = "hangs"
            target.driver.kill()
            target.driver.wait()
        left, waited_s = faults.leftovers(target.mark, _LEAVE_WITHIN_S)
        text = log.read_text(errors="replace")
        traceback = "Traceback (most recent call last)" in text
        if code not in (0, -9) or left or traceback:
            (self.work / f"{command.name}-{uuid.uuid4().hex[:4]}.log").write_text(
                f"{struck} {code} {left}\n{text}"
            )
        return {
            "faults": struck,
            "code": code,
            "processes": left,
            "processes_ended_after_s": round(waited_s, 1),
            "shared": sorted(faults.shared_memory() - shared),
            "traceback": traceback,
        }

    def round(self, number: int, undisturbed: dict[str, tuple[float, dict[str, str]]]) -> dict[str, Any]:
        """Disturb a command, complete it, and compare its result."""
        rng = random.Random(f"{self.seed}/{number}")
        (command,) = rng.choices(self.chosen, [one.weight for one in self.chosen])
        seconds, expected = undisturbed[command.name]
        out = self.disk / "out"
        shutil.rmtree(out, ignore_errors=True)
        sessions = []
        for _ in range(_SESSIONS):
            sessions.append(self.session(command, out, rng, seconds))
            if sessions[-1]["code"] == 0:
                break
        else:
            while sessions[-1]["code"] != 0 and len(sessions) < _SESSIONS + 3:
                sessions.append(self.session(command, out, None, seconds))
        found = command.result(str(out)) if sessions[-1]["code"] == 0 else {"": "never complete"}
        files = [path.name for path in self.scratch.iterdir() if not path.name.startswith(_CACHE)]
        files += [path.name for path in out.rglob("*.tmp")]
        written = [*out.rglob("*"), *self.scratch.rglob("*"), self.work / "round.log"]
        files += [
            f"a secret in {path}" for path in written if path.is_file() and _PLANTED in path.read_bytes()
        ]
        for path in self.scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        differs = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        return {
            "round": number,
            "command": command.name,
            "sessions": sessions,
            "differs": differs,
            "files": files,
        }

    def rounds(self, num_faults: int, minutes: float) -> list[dict[str, Any]]:
        """Run rounds until enough faults were tried or the time is over; return all, with those of earlier calls.

        A round that runs at the end of the time is completed without further faults.
        """
        self.until_s = time.monotonic() + 60 * minutes
        rows = commands.load(self.journal)
        undisturbed = self.undisturbed()
        # Faults are tried for a minute at least, however slow the machine is.
        self.until_s = max(self.until_s, time.monotonic() + 60)
        while tried(rows) < num_faults and not self.is_over():
            rows.append(self.round(len(rows), undisturbed))
            with self.journal.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{json.dumps(rows[-1])}\nSurvived {survived(rows)} of {tried(rows)} faults.", flush=True)
        return rows


def _wait(target: faults.Target, seconds: float) -> None:
    """Wait, but not longer than the command runs."""
    try:
        target.driver.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _wait_for_writing(target: faults.Target, out: Path, longest_s: float) -> None:
    """Wait until the command has written a file, but not longer than it runs."""
    begun, until_s = time.time(), time.monotonic() + longest_s
    while target.driver.poll() is None and time.monotonic() < until_s:
        with contextlib.suppress(OSError):
            if any(path.stat().st_mtime > begun for path in out.rglob("*")):
                return
        time.sleep(0.2)


def _struck(row: dict[str, Any]) -> list[str]:
    return [name for session in row["sessions"] for name in session["faults"]]


def _left(row: dict[str, Any]) -> list[str]:
    return [*row["files"], *(name for one in row["sessions"] for name in one["processes"] + one["shared"])]


def tried(rows: list[dict[str, Any]]) -> int:
    """Return the number of faults of all rounds."""
    return sum(len(_struck(row)) for row in rows)


def survived(rows: list[dict[str, Any]]) -> int:
    """Return the number of faults of rounds with the undisturbed result and without leftovers."""
    return tried([row for row in rows if not row["differs"] and not _left(row)])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as two tables in Markdown: by command, and by fault."""
    lines = [
        "| command | rounds | faults | same result | hangs | tracebacks | processes left | longest until they end, s | "
        "files left |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for command in COMMANDS:
        mine = [row for row in rows if row["command"] == command.name]
        if not mine:
            continue
        sessions = [session for row in mine for session in row["sessions"]]
        cells = [
            len(mine),
            tried(mine),
            f"{sum(not row['differs'] for row in mine)} of {len(mine)}",
            sum(session["code"] == "hangs" for session in sessions),
            sum(session["traceback"] for session in sessions),
            sum(len(session["processes"]) for session in sessions),
            f"{max(session.get('processes_ended_after_s', 0) for session in sessions):.0f}",
            sum(len(row["files"]) for row in mine) + sum(len(session["shared"]) for session in sessions),
        ]
        lines.append(f"| {command.name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", *_by_fault(rows)]) + "\n"


def _by_fault(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of the faults survived / tried by kind and command."""
    names = [command.name for command in COMMANDS if any(row["command"] == command.name for row in rows)]
    counts, held = (
        collections.Counter((name, row["command"]) for row in some for name in _struck(row))
        for some in (rows, [row for row in rows if not row["differs"] and not _left(row)])
    )

    def cells(label: str, keys: list[tuple[str, str]]) -> str:
        by_command = [[key for key in keys if key[1] == name] for name in names]
        sums = [
            (sum(held[key] for key in some), sum(counts[key] for key in some)) for some in [*by_command, keys]
        ]
        return f"| {label} | " + " | ".join(f"{good} / {all_}" if all_ else "" for good, all_ in sums) + " |"

    lines = ["| survived / tried | " + " | ".join(names) + " | all |", "|---" * (len(names) + 2) + "|"]
    lines += [
        cells(fault, [key for key in counts if key[0] == fault])
        for fault in sorted({key[0] for key in counts})
    ]
    return [*lines, cells("all", list(counts))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100, help="faults to try")
    parser.add_argument("--minutes", type=float, default=600, help="cause no fault after this time")
    parser.add_argument("--seed", type=int, default=0)
    names = [command.name for command in COMMANDS]
    parser.add_argument("--commands", nargs="+", default=names, choices=names, help="commands to disturb")
    parser.add_argument(
        "--work", type=Path, default=Path("build/chaos"), help="folder of results and the journal"
    )
    parser.add_argument("--out", type=Path, help="folder for the table and the rounds")
    given = parser.parse_args()
    faults.alone()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chaos = Chaos(given.work.resolve(), given.seed, [one for one in COMMANDS if one.name in given.commands])
    try:
        rows = chaos.rounds(given.faults, given.minutes)
    finally:
        chaos.close()
    print(table(rows))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "table.md").write_text(table(rows))
        shutil.copy(chaos.journal, given.out / "rounds.jsonl")
    return 0 if survived(rows) == tried(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
