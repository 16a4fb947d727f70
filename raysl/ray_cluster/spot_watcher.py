"""Tells Ray when the cloud is about to take this spot machine back, so that runs save at the step where they are.

The cloud says so on the machine itself and nowhere else: AWS two minutes ahead, Google half a minute. cluster.yaml
starts `python -m raysl.ray_cluster.spot_watcher` on every worker. It asks every five seconds, and on a notice has Ray drain the
machine; nothing happens on machines without such a service.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from typing import Any

_ASK_EVERY_S = 5.0
_TIMEOUT_S = 2.0
AWS = "http://169.254.169.254"
GOOGLE = "http://metadata.google.internal"


def on_aws(place: str = AWS) -> float | None:
    """Seconds until AWS takes this machine; None while it has not said so, or this is no machine of AWS."""
    token = _ask(f"{place}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if token is None:
        return None
    answer = _ask(
        f"{place}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token}
    )
    if answer is None or json.loads(answer)["action"] == "hibernate":
        return None
    return 110.0


def on_google(place: str = GOOGLE) -> float | None:
    """Seconds until Google takes this machine; None while it has not said so, or this is no machine of Google's."""
    answer = _ask(f"{place}/computeMetadata/v1/instance/preempted", "GET", {"Metadata-Flavor": "Google"})
    return 25.0 if answer == "TRUE" else None


def _ask(url: str, method: str, headers: dict[str, str]) -> str | None:
    """The answer; None where there is none."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read().decode().strip()
            return text
    except OSError:
        return None


def drain(seconds: float) -> None:
    """Has Ray drain this machine: it starts nothing here any more, and tells those that work here."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    said = ["--reason-message", "The cloud takes this machine back."]
    subprocess.run([*command, *said, "--deadline-remaining-seconds", str(int(seconds))], check=True)


def watch(
    services: tuple[Callable[[], float | None], ...] = (on_aws, on_google),
    act: Callable[[float], Any] = drain,
    pause: Callable[[float], Any] = time.sleep,
) -> None:
    """Waits for a notice, acts on it, and returns.

    Args:
        services: each gives the seconds that are left, or None.
        act: is given them.
        pause: waits for some seconds.
    """
    while True:
        left = [seconds for service in services if (seconds := service()) is not None]
        if left:
            act(min(left))
            return
        pause(_ASK_EVERY_S)


if __name__ == "__main__":
    watch()
