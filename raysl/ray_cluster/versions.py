"""Compare the code and packages of every process of a run with those of the driver.

Ray runs a task with the code on its machine. After `ray up --no-restart` the head has new code and the workers have
the old code, without any message. Therefore every worker process gets the versions of the driver and compares them
with its own before it works.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from raysl.errors import UserError

PACKAGES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "pillow")
# Holds the versions of the driver as JSON, for worker processes; empty if nothing should be compared.
WANTED = "RAYSL_VERSIONS"
REMEDY = (
    "`ray up cluster.yaml` copies this code to all machines and restarts Ray there; `ray job submit --working-dir .` "
    "sends it with one job. Packages are part of the machines' image."
)


def versions() -> dict[str, Any]:
    """Return the versions that the numbers of a run depend on besides its configuration."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "code": code_hash(),
    }


def code_hash() -> str:
    """Return a hash of the source of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the differences between two machines, such as "torch 2.8.0 instead of 2.9.1"."""
    values = [
        {**machine["packages"], "python": machine["python"], "code": machine["code"]}
        for machine in (ours, theirs)
    ]
    names = sorted(values[0].keys() | values[1].keys())
    return [
        f"{name} {values[1].get(name, 'none')} instead of {values[0].get(name, 'none')}"
        for name in names
        if values[0].get(name) != values[1].get(name)
    ]


def check() -> None:
    """Compare this process with the driver. Ray calls it in every worker process before anything else.

    Raises:
        UserError: code or packages differ. The process ends, and Ray tells the driver why.
    """
    wanted = os.environ.get(WANTED)
    if not wanted:
        return
    found = differing(json.loads(wanted), versions())
    if found:
        raise UserError(
            f"{socket.gethostname()} differs from the driver: it runs {', '.join(found)}. {REMEDY}"
        )
