"""Joining a cluster: its machines must run what the driver runs, and processes that come later too.

In a process of its own, whose Ray was not started by raysl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from raysl.ray_cluster.versions import versions

OTHER = {**versions(), "code": "0" * 16}


@pytest.mark.slow
@pytest.mark.ray
def test_stale_code_is_refused_at_the_door_and_in_every_process() -> None:
    command = [sys.executable, "-m", "tests.ray_cluster.test_join"]
    said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    found = json.loads(said.splitlines()[-1])
    code = versions()["code"]
    assert f"code {code} instead of {OTHER['code']}" in found["joining"]
    assert "`ray up cluster.yaml`" in found["joining"]
    assert f"code {code} instead of {OTHER['code']}, which the driver runs" in found["working"]
    # Settings that are not Ray's own reach processes that raysl has not started.
    assert found["told"] == "0"


def scene() -> dict[str, Any]:
    """Joins as a driver of other code, and then all the same."""
    import ray
    from ray.cluster_utils import Cluster

    from raysl import ray_cluster
    from raysl.errors import UserError
    from raysl.ray_cluster import versions as room

    machines = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000}
    )
    os.environ["RAY_ADDRESS"] = machines.address
    os.environ.pop("RAY_DATA_USE_DATASOURCE_V2", None)
    ours, room.code_hash = room.code_hash, lambda: OTHER["code"]
    found = {}
    try:
        ray_cluster.start()
    except UserError as error:
        found["joining"] = str(error)
    ray_cluster.start(compare=False)
    actor = ray.remote(type("Actor", (), {"work": lambda self: 0})).remote()
    try:
        ray.get(actor.work.remote())
    except ray.exceptions.RayError as error:
        found["working"] = str(ray_cluster.user_error(error))
    ray.shutdown()
    room.code_hash = ours
    ray_cluster.start()
    name = "RAY_DATA_USE_DATASOURCE_V2"
    found["told"] = ray.get(ray.remote(lambda: os.environ.get(name)).remote())
    ray.shutdown()
    machines.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(scene()))
