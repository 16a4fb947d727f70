"""What a person sees while a verb works."""

from __future__ import annotations

import logging
import time

import pytest

from raysl import console


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moments: list[str]) -> str:
    """Return the output of messages in a file; each of the `moments` is a message, or "" for none, and lasts 2 s."""
    handler, now_s = console._Handler(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(handler, "_thread", object())
    handler.depth = 1
    for message in moments:
        if message:
            handler.emit(logging.LogRecord("raysl", logging.INFO, "", 0, message, None, None))
        now_s += 2
        handler._show(now_s - handler._since_s)
    return capsys.readouterr().out


def test_work_that_takes_long_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(monkeypatch, capsys, ["Reading ...", "", "", "done", "", "", "", ""]).splitlines()
    assert lines == ["Reading ...", "Reading ... 4 s", "done", "Still working ... 6 s"]


def test_nothing_stands_between_messages_that_come_regularly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["step 1", "", "", "step 10", "", "", "", "step 20", "", "", "step 30"]
    lines = shown(monkeypatch, capsys, [*steps, *[""] * 6]).splitlines()
    expected = ["step 1", "Still working ... 6 s", "step 10", "step 20", "step 30", "Still working ... 12 s"]
    assert lines == expected
