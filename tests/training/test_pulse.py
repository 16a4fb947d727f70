"""Workers hear together that they shall leave off."""

from __future__ import annotations

import pytest
import torch

from raysl.training.stop_sync import StopSync

CPU = torch.device("cpu")


def test_the_order_is_heard_at_the_next_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], [False]
    monkeypatch.setattr("raysl.training.stop_sync.time.perf_counter", lambda: now[0])
    beats = StopSync(10, lambda: told[0], CPU)
    settled = []
    for step in range(11, 40):
        now[0] += 0.5
        told[0] = step >= 20
        settled.append((step, *beats.settle(step, since_save_s=now[0])))
    # After 1, 2 and 4 steps, and then every 2 s.
    assert [step for step, _, since_s in settled if since_s] == [11, 13, 17, 21, 25, 29, 33, 37]
    assert [step for step, leave, _ in settled if leave] == [21, 25, 29, 33, 37]


def test_slow_steps_are_pulses_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("raysl.training.stop_sync.time.perf_counter", lambda: now[0])
    beats = StopSync(0, lambda: True, CPU)
    for step in range(1, 5):
        now[0] += 30.0
        assert beats.settle(step, 1.0) == (True, 1.0)
