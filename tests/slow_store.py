"""A stand-in for an object store: serves a folder by S3's protocol, slowly, and counts requests and bytes.

Arrow's own S3 client talks to it, so that its requests are counted and not assumed. As a program, it serves until its
input ends: `python -m tests.slow_store FOLDER LATENCY_S BYTES_PER_S`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

BUCKET = "bucket"
_COUNTS = "/counts"


@contextlib.contextmanager
def served(folder: Path, latency_s: float = 0.0, bytes_per_s: float = 0.0) -> Iterator[str]:
    """Serve a folder as s3://bucket from a process of its own; yield the address of the server.

    Args:
        folder: what is served.
        latency_s: seconds before each answer.
        bytes_per_s: speed of each connection; 0 for as fast as it goes.
    """
    command = [sys.executable, "-m", "tests.slow_store", str(folder), str(latency_s), str(bytes_per_s)]
    names = {
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = dict(os.environ)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        os.environ.update(names, AWS_ENDPOINT_URL=address, AWS_DEFAULT_REGION="us-east-1")
        try:
            yield address
        finally:
            os.environ.clear()
            os.environ.update(before)
            server.stdin.close()
            server.wait()


def counts(address: str) -> dict[str, int]:
    """Return the requests by method and the bytes sent since the last call."""
    with urllib.request.urlopen(address + _COUNTS) as answer:
        found: dict[str, int] = json.load(answer)
        return found


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    latency_s: float
    bytes_per_s: float
    counted: ClassVar[Counter[str]] = Counter()
    turn = threading.Lock()

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        if self.path == _COUNTS:
            with self.turn:
                body = json.dumps(self.counted).encode()
                self.counted.clear()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        path = self.folder / self.path.partition("?")[0].removeprefix(f"/{BUCKET}").strip("/")
        size = path.stat().st_size if path.is_file() else 0
        first, last = 0, size - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
        body = b""
        if send and path.is_file():
            with path.open("rb") as file:
                file.seek(first)
                body = file.read(last + 1 - first)
        with self.turn:
            self.counted[self.command] += 1
            self.counted["bytes"] += len(body)
        time.sleep(self.latency_s + (len(body) / self.bytes_per_s if self.bytes_per_s else 0))
        self.send_response(404 if not path.exists() else 206 if asked else 200)
        self.send_header("x-amz-bucket-region", "us-east-1")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Last-Modified", "Sat, 01 Jan 2022 00:00:00 GMT")
        self.send_header("ETag", '"0"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    _Answers.folder = Path(sys.argv[1])
    _Answers.latency_s, _Answers.bytes_per_s = float(sys.argv[2]), float(sys.argv[3])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
