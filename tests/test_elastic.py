"""A run takes the workers that there is room for; the rest of it does not notice."""

from __future__ import annotations

import pytest

from raysl import elastic
from raysl.elastic import Growth, Team
from raysl.errors import UserError

CPUS = [{"CPU": 0.0}, {"CPU": 2.0}, {"CPU": 1.5}]
GPUS = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"), [(CPUS, False, 2), (GPUS, True, 2), (GPUS, False, 8), (CPUS, True, 0)]
)
def test_as_many_as_fit_and_divide_the_batch(
    nodes: list[dict[str, float]], gpus: bool, expected: int
) -> None:
    """Three would fit the first two, and do not divide a batch of 8."""
    assert elastic.size((1, 2, 4, 8), nodes, gpus) == expected


def test_a_team_is_placed_on_what_there_is() -> None:
    team = elastic.gather((1, 2, 4), GPUS)
    assert (team.workers, team.gpus) == (2, True)
    assert elastic.gather((1, 2, 3), CPUS).workers == 3


def test_the_fewest_may_share_a_cpu() -> None:
    assert elastic.gather((4, 8), CPUS).workers == 4


def test_what_began_on_gpus_waits_for_gpus() -> None:
    with pytest.raises(UserError, match="GPUs"):
        elastic.gather((1, 2), CPUS, gpus=True)


def test_a_run_grows_once_the_room_has_lasted() -> None:
    now = [0.0]
    team = Team(2, elastic.gather((2,), CPUS).placement)
    growth = Growth((1, 2, 4), team, clock=lambda: now[0])
    assert not growth.due([{"CPU": 3.0}])
    assert not growth.due([{"CPU": 4.0}])
    now[0] = 20
    assert not growth.due([{"CPU": 3.0}])
    assert not growth.due([{"CPU": 4.0}])
    now[0] = 20 + elastic.GROW_AFTER_S
    assert growth.due([{"CPU": 4.0}])
