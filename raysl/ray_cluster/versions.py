"""Which code and packages run, and whether every process of a run has the same.

Ray starts a task with whatever lies on its machine. After `ray up --no-restart` the head has new code and the workers
the old one; nothing says so, and the numbers belong to neither. So the driver's versions travel with every worker
process, which compares them with its own before it does any work.
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
# Tells worker processes what the driver runs, as JSON. Empty where nothing is to be compared.
WANTED = "RAYSL_VERSIONS"
MEND = (
    "`ray up cluster.yaml` brings the code that is here to all machines and restarts Ray on them; `ray job submit "
    "--working-dir .` sends it along with one job. Packages come with the machines' image."
)


def versions() -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "code": code_hash(),
    }


def code_hash() -> str:
    """A hash of the source of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two machines, such as "torch 2.8.0 instead of 2.9.1"."""
    flat = [{**one["packages"], "python": one["python"], "code": one["code"]} for one in (ours, theirs)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return [
        f"{name} {flat[1].get(name, 'none')} instead of {flat[0].get(name, 'none')}"
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def check() -> None:
    """Compares this process with the driver. Ray calls it in every worker process before anything else.

    Raises:
        UserError: code or packages differ. The process ends, and Ray tells the driver why.
    """
    wanted = os.environ.get(WANTED)
    if not wanted:
        return
    found = differing(json.loads(wanted), versions())
    if found:
        raise UserError(f"{socket.gethostname()} runs {', '.join(found)}, which the driver runs. {MEND}")
