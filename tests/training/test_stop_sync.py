"""Workers agree at regular exchanges whether to stop."""

from __future__ import annotations

import pytest
import torch

from raysl.training.stop_sync import StopSync

CPU = torch.device("cpu")


def test_a_request_is_noticed_at_the_next_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    now, requested = [0.0], [False]
    monkeypatch.setattr("raysl.training.stop_sync.time.perf_counter", lambda: now[0])
    stop_sync = StopSync(10, lambda: requested[0], CPU)
    exchanged = []
    for step in range(11, 40):
        now[0] += 0.5
        requested[0] = step >= 20
        exchanged.append((step, *stop_sync.exchange(step, since_save_s=now[0])))
    # After 1, 2 and 4 steps, and then every 2 s.
    assert [step for step, _, since_s in exchanged if since_s] == [11, 13, 17, 21, 25, 29, 33, 37]
    assert [step for step, stops, _ in exchanged if stops] == [21, 25, 29, 33, 37]


def test_slow_steps_have_an_exchange_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("raysl.training.stop_sync.time.perf_counter", lambda: now[0])
    stop_sync = StopSync(0, lambda: True, CPU)
    for step in range(1, 5):
        now[0] += 30.0
        assert stop_sync.exchange(step, 1.0) == (True, 1.0)
