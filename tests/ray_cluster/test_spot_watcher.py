"""The notice that a cloud gives before it takes a spot machine back."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from raysl.ray_cluster import spot_watcher

ANSWERS = {
    ("PUT", "/latest/api/token"): "a token",
    (
        "GET",
        "/latest/meta-data/spot/instance-action",
    ): '{"action": "terminate", "time": "2026-01-01T00:02:00Z"}',
    ("GET", "/computeMetadata/v1/instance/preempted"): "TRUE",
}


@pytest.fixture
def service() -> Iterator[Any]:
    """A metadata service that answers what stands in its `answers`, to those who ask as the cloud demands."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            said = server.answers.get((self.command, self.path))
            google = self.headers["Metadata-Flavor"] == "Google"
            token = self.headers["X-aws-ec2-metadata-token"] == "a token"
            if said is None or not (google or token or self.command == "PUT"):
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said.encode())

        do_GET = do_PUT = answer

        def log_message(self, *_: object) -> None: ...

    server: Any = HTTPServer(("127.0.0.1", 0), Handler)
    server.answers = {}
    server.place = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_no_notice_and_no_service_are_no_notice(service: Any) -> None:
    service.answers = {("PUT", "/latest/api/token"): "a token"}
    assert spot_watcher.on_aws(service.place) is None
    assert spot_watcher.on_google(service.place) is None
    assert spot_watcher.on_aws("http://127.0.0.1:1") is None


def test_both_clouds_are_understood(service: Any) -> None:
    service.answers = ANSWERS
    assert spot_watcher.on_aws(service.place) == 110
    assert spot_watcher.on_google(service.place) == 25


def test_an_odd_answer_and_a_failed_drain_do_not_end_it(service: Any) -> None:
    notice = "/latest/meta-data/spot/instance-action"
    texts = iter(["<html>", "{}", "[]", '{"action": "stop"}', '{"action": "stop"}'])
    drained: list[float] = []

    def on_aws() -> float | None:
        service.answers = {("PUT", "/latest/api/token"): "a token", ("GET", notice): next(texts)}
        return spot_watcher.on_aws(service.place)

    def act(seconds: float) -> None:
        drained.append(seconds)
        if len(drained) == 1:
            raise subprocess.CalledProcessError(1, "ray drain-node")

    spot_watcher.watch((on_aws,), act, lambda _: None)
    assert drained == [110, 110]


def test_it_asks_until_it_is_told_and_then_drains_once() -> None:
    answers = iter([None, None, 110.0])
    drained: list[float] = []
    pauses: list[float] = []
    spot_watcher.watch((lambda: next(answers), lambda: None), drained.append, pauses.append)
    assert drained == [110]
    assert len(pauses) == 2
