"""Run every command with all files in an object store that fails, is slow, or goes away for a while.

    python -m tests.chaos.store --out results/chaos

The store is an S3 server (moto) in this process. Results must equal those on a local disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.commands import COMMANDS, Command, write_images

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
    return command.result(out)


def table(conditions: Iterable[str] = CONDITIONS) -> Iterator[tuple[str, str, str, bool]]:
    """Yield each command, each condition, and a cell: seconds, requests, and if the result is the same.

    Args:
        conditions: some of `CONDITIONS`.
    """
    from raysl import ray_cluster

    store = Store()
    store.open_bucket()
    ray_cluster.start()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        images = {"images": f"{folder}/images"}
        local = images | {command.name: f"{folder}/{command.name}" for command in COMMANDS}
        for number, command in enumerate(COMMANDS):
            expected = _run(command, local, local[command.name])
            for condition in conditions:
                root = f"s3://{BUCKET}/{CONDITIONS.index(condition)}"
                places = images | {earlier.name: f"{root}/{earlier.name}" for earlier in COMMANDS[:number]}
                begun = time.monotonic()
                with store.under(condition):
                    found = _run(command, places, f"{root}/{command.name}")
                    cell = f"{time.monotonic() - begun:.0f} s, {store.requests} requests"
                cell += f", {store.failed} failed" if store.failed else ""
                same = found == expected
                yield command.name, condition, f"{'same' if same else f'differs: {found}'} ({cell})", same


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.store", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for the table")
    given = parser.parse_args()
    cells: dict[str, dict[str, str]] = {}
    good = True
    for name, condition, cell, same in table():
        print(f"{name}, {condition}: {cell}", flush=True)
        cells.setdefault(name, {})[condition] = cell
        good &= same
    lines = ["| command | " + " | ".join(CONDITIONS) + " |", "|---" * (1 + len(CONDITIONS)) + "|"]
    lines += [
        f"| {name} | " + " | ".join(row[one] for one in CONDITIONS) + " |" for name, row in cells.items()
    ]
    print("\n".join(lines))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "store.md").write_text("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
