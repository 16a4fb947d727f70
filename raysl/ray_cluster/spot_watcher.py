"""Drain this spot machine when the cloud announces that it will reclaim it, so that runs save in time.

The cloud announces this on the machine only: AWS two minutes ahead, Google half a minute. cluster.yaml starts
`python -m raysl.ray_cluster.spot_watcher` on every worker, which asks every five seconds. On machines without such a
service nothing happens.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger("raysl.ray_cluster")
_ASK_EVERY_S = 5.0
_TIMEOUT_S = 2.0
AWS = "http://169.254.169.254"
GOOGLE = "http://metadata.google.internal"


def on_aws(url: str = AWS) -> float | None:
    """Return the seconds until AWS reclaims this machine; None without a notice or outside AWS."""
    token = _ask(f"{url}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if token is None:
        return None
    answer = _ask(f"{url}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
    if answer is None or json.loads(answer)["action"] == "hibernate":
        return None
    return 110.0


def on_google(url: str = GOOGLE) -> float | None:
    """Return the seconds until Google reclaims this machine; None without a notice or outside Google Cloud."""
    answer = _ask(f"{url}/computeMetadata/v1/instance/preempted", "GET", {"Metadata-Flavor": "Google"})
    return 25.0 if answer == "TRUE" else None


def _ask(url: str, method: str, headers: dict[str, str]) -> str | None:
    """Return the text of the answer; None without one."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read().decode().strip()
            return text
    except OSError:
        return None


def drain(seconds: float) -> None:
    """Tell Ray to drain this machine: Ray starts no more work here and notifies the running work."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    message = ["--reason-message", "The cloud reclaims this machine."]
    subprocess.run([*command, *message, "--deadline-remaining-seconds", str(int(seconds))], check=True)


def watch(
    services: tuple[Callable[[], float | None], ...] = (on_aws, on_google),
    act: Callable[[float], Any] = drain,
    pause: Callable[[float], Any] = time.sleep,
) -> None:
    """Wait for a notice, act on it, and return. Log an answer that cannot be read, and repeat an action that fails."""
    while True:
        remaining_s = []
        for service in services:
            with _logged("The notices of the cloud cannot be read"):
                remaining_s.append(service())
        if found := [seconds for seconds in remaining_s if seconds is not None]:
            with _logged("Ray cannot drain this machine"):
                act(min(found))
                return
        pause(_ASK_EVERY_S)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _log.warning("%s: %s: %s", what, type(error).__name__, error)


if __name__ == "__main__":
    watch()
