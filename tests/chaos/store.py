"""Run every command with all files in an object store that fails, is slow, or goes away for a while.

    python -m tests.chaos.store --out results/chaos

The store is an S3 server (moto) in this process. Results must equal those on a local disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.commands import COMMANDS, Command, load, write_images

CONDITIONS = ("10 % of requests fail", "30 ms slower", "away for 20 s")
BUCKET = "chaos"
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
# The request after which the store goes away.
_AWAY_AFTER, _AWAY_S = 12, 20.0


class Store:
    """An S3 server on loopback.

    Attributes:
        condition: one of `CONDITIONS`, or "" for none.
        requests: number of requests so far.
        failed: number of requests that were refused.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        from tests.ray_cluster.rig.cloud import as_aws_does

        as_aws_does()
        self._application = DomainDispatcherApplication(create_backend_app)
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self.condition, self.requests, self.failed = "", 0, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._open()

    def _open(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: object) -> None: ...

        self._server = make_server("127.0.0.1", self.port, self, threaded=True, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self.requests += 1
            fails = self.condition == CONDITIONS[0] and self._random.random() < 0.1
            self.failed += fails
            leaves = self.condition == CONDITIONS[2] and self.requests == _AWAY_AFTER
        if leaves:
            threading.Thread(target=self._go_away, daemon=True).start()
        if self.condition == CONDITIONS[1]:
            time.sleep(0.03)
        if fails:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Length", str(len(_BUSY))), ("Connection", "close")])
            return [_BUSY]
        return self._application(environ, start)  # type: ignore[no-any-return]

    def _go_away(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        time.sleep(_AWAY_S)
        self._open()

    @contextlib.contextmanager
    def under(self, condition: str) -> Iterator[None]:
        """Set the condition during the block and count its requests."""
        self.condition, self.requests, self.failed = condition, 0, 0
        try:
            yield
        finally:
            self.condition = ""

    def open_bucket(self) -> None:
        """Create the bucket, and point this process and its children to the store."""
        import boto3

        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
        boto3.client("s3").create_bucket(Bucket=BUCKET)


def _run(command: Command, places: dict[str, str], out: str) -> dict[str, str]:
    from raysl.__main__ import main

    with contextlib.redirect_stdout(sys.stderr):
        try:
            main(command.argv({**places, "out": out}))
        except SystemExit as end:
            return {"exit": str(end.code)}
    found = command.result(out)
    # The page of a run on the store shows other times and speeds than that of a run on the disk.
    found.pop("page", None)
    return found


def cells(store: Store, work: Path, chosen: Sequence[Command], condition: str) -> Iterator[tuple[str, str]]:
    """Run commands under a condition, and yield the name of each and its cell: if the result is the same, and the cost.

    Args:
        store: an open store.
        work: results on the local disk, kept for later calls.
        chosen: commands, after those that they need.
        condition: one of `CONDITIONS`.
    """
    images = {"images": str(work / "images")}
    if not (work / "images").exists():
        write_images(work / "images")
    expected = json.loads((work / "expected.json").read_text()) if (work / "expected.json").exists() else {}
    local = images | {command.name: str(work / command.name) for command in COMMANDS}
    root = f"s3://{BUCKET}/{CONDITIONS.index(condition)}"
    remote = images | {command.name: f"{root}/{command.name}" for command in COMMANDS}
    for command in chosen:
        if command.name not in expected:
            expected[command.name] = _run(command, local, local[command.name])
            if "exit" in expected[command.name]:
                raise SystemExit(f"{command.name} fails on the local disk too.")
            (work / "expected.json").write_text(json.dumps(expected))
        begun = time.monotonic()
        with store.under(condition):
            found = _run(command, remote, remote[command.name])
            cost = f"{time.monotonic() - begun:.0f} s, {store.requests} requests"
        cost += f", {store.failed} failed" if store.failed else ""
        yield command.name, f"{'same' if found == expected[command.name] else f'differs: {found}'} ({cost})"


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Return rows of command, condition and cell as a table in Markdown; a later row replaces an earlier one."""
    found = {(row["command"], row["condition"]): row["cell"] for row in rows}
    lines = ["| command | " + " | ".join(CONDITIONS) + " |", "|---" * (1 + len(CONDITIONS)) + "|"]
    for command in COMMANDS:
        row = [found.get((command.name, condition), "not run") for condition in CONDITIONS]
        lines.append(f"| {command.name} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.store", description=(__doc__ or "").partition("\n")[0]
    )
    names = [command.name for command in COMMANDS]
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, choices=CONDITIONS)
    parser.add_argument(
        "--commands",
        nargs="+",
        default=names,
        choices=names,
        help="commands, with those whose results they need",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/chaos-store"), help="folder of local results"
    )
    parser.add_argument("--out", type=Path, help="folder for the table")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    store = Store()
    store.open_bucket()
    asked = [command for command in COMMANDS if command.name in given.commands]
    needed = {name for command in asked for name in (*command.needs(), command.name)}
    chosen = [command for command in COMMANDS if command.name in needed]
    for condition in given.conditions:
        for name, cell in cells(store, work, chosen, condition):
            print(f"{name}, {condition}: {cell}", flush=True)
            rows.append({"command": name, "condition": condition, "cell": cell})
            with (work / "cells.jsonl").open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    every = load(work / "cells.jsonl")
    print(table(every))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "store.md").write_text(table(every))
    return 0 if all(row["cell"].startswith("same") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
