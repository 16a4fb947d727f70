"""Work of probes on Ray takes what it is given, and no more."""

from __future__ import annotations

import pytest

from raysl.probes._task import decoders, elsewhere


@pytest.mark.ray
def test_threads_follow_the_cpus_of_the_task(ray_session: None) -> None:
    assert decoders() == 1
    assert elsewhere(decoders, [(), ()]) == [1, 1]
