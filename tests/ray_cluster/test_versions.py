"""Stale code on a machine is found before it does any work."""

from __future__ import annotations

import json

import pytest

from raysl.errors import UserError
from raysl.ray_cluster import versions


def test_a_process_with_other_code_or_packages_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    here = versions.versions()
    monkeypatch.setenv(versions.WANTED, json.dumps(here))
    versions.check()
    driver = {**here, "code": "0" * 16, "packages": {**here["packages"], "torch": "1.0"}}
    monkeypatch.setenv(versions.WANTED, json.dumps(driver))
    with pytest.raises(
        UserError, match=rf"code {here['code']} instead of 0+, torch .* instead of 1\.0.*ray up"
    ):
        versions.check()


def test_a_process_that_nobody_compares_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(versions.WANTED, raising=False)
    monkeypatch.setattr(versions, "versions", lambda: pytest.fail("looked"))
    versions.check()
