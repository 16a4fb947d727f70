"""Ray tasks of probes use the CPUs that they have."""

from __future__ import annotations

import os
import signal

import pytest

from raysl.errors import UserError
from raysl.probes._task import run_tasks
from raysl.ray_cluster import placement, this_machine


@pytest.mark.ray
def test_threads_follow_the_cpus_of_the_task(ray_session: None) -> None:
    assert placement.assigned_cpus() == this_machine.cpus()
    assert run_tasks(placement.assigned_cpus, [(), ()]) == [1, 1]


def killed() -> None:
    """Die as the largest process does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_killed_process_is_reported_with_advice(ray_session: None) -> None:
    with pytest.raises(UserError, match=r"more memory than its machine has.*--linear\.dims"):
        run_tasks(killed, [()], {"max_retries": 0})
