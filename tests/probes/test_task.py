"""Work of probes on Ray takes what it is given, and no more."""

from __future__ import annotations

import os
import signal

import pytest

from raysl.errors import UserError
from raysl.probes._task import decoders, elsewhere


@pytest.mark.ray
def test_threads_follow_the_cpus_of_the_task(ray_session: None) -> None:
    assert decoders() == 1
    assert elsewhere(decoders, [(), ()]) == [1, 1]


def killed() -> None:
    """What the kernel does to the largest process when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_killed_process_is_said_with_what_to_do(ray_session: None) -> None:
    with pytest.raises(UserError, match=r"more memory than its machine has.*--linear\.dims"):
        elsewhere(killed, [()], {"max_retries": 0})
