"""Refuse to resume a run with another configuration, other images, or files that have changed."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from raysl.config import Pretraining, differences, format_value, may_change, value_of
from raysl.dataset import DataSet
from raysl.errors import UserError
from raysl.storage.records import as_json

_log = logging.getLogger("raysl.run")


def check_same(metadata: Mapping[str, Any], wanted: Mapping[str, Any], dataset: DataSet, uri: str) -> None:
    """Refuse another configuration and other images.

    Args:
        metadata: metadata of the run at `uri`.
        wanted: the configuration that should resume it, as JSON.
    """
    fingerprint = metadata["data"]["fingerprint"]
    if fingerprint != dataset.manifest.fingerprint:
        raise UserError(
            f"The run at {uri!r} was begun on images with fingerprint {fingerprint[:12]} and the data set "
            f"{dataset.name!r} has {dataset.manifest.fingerprint[:12]}: the images or labels differ. "
            f"{images_kept(metadata) or 'Give the data set it was begun on'}, or another folder to --run."
        )
    # Parse and write it again, so that a field that is newer than the run has its default.
    begun = json.loads(
        json.dumps(Pretraining.stored(metadata["config"], uri, metadata.get("sources")).to_json())
    )
    changed = [name for name in differences(begun, wanted) if not may_change(name)]
    if "method" in changed:  # The parts follow from it.
        changed = [name for name in changed if not name.startswith("parts.")]
    if changed:
        longer = (
            " The learning rate depends on the epochs, so those of a run cannot change. Once it is "
            f"finished, a new run starts from its weights by --backbone.weights {shlex.quote(uri)}."
        )
        each = (
            f"{n} is {format_value(value_of(begun, n))} in the run and {format_value(value_of(wanted, n))} now"
            for n in changed
        )
        raise UserError(
            f"The run at {uri!r} was begun with another configuration; these differ: {'; '.join(each)}. Give the "
            "same values to go on with it, or another folder to --run for a new run."
            f"{longer if 'epochs' in changed else ''}"
        )


def is_replaced(metadata: Mapping[str, Any], config: Pretraining, dataset: DataSet) -> bool:
    """Return True, and say so, if a run without any result begins with another configuration or other images.

    The stored configuration is compared as it is: it may name code that exists no more.
    """
    wanted = as_json(config.to_json())
    changed = [name for name in differences(metadata["config"], wanted) if not may_change(name)]
    changed += ["images"] if metadata["data"]["fingerprint"] != dataset.manifest.fingerprint else []
    if changed:
        _log.info(
            "The run at %s had failed before it wrote any result. It begins anew with other values of %s.",
            config.run,
            ", ".join(name.removeprefix("parts.") for name in changed),
        )
    return bool(changed)


def images_kept(metadata: Mapping[str, Any]) -> str:
    """Return a sentence, without its full stop, that names the images of a run where they lie as they were; "" if they
    do not.
    """
    data = metadata["data"]
    with suppress(UserError):
        if DataSet.exists_at(data["uri"]) and (
            DataSet.open(data["uri"]).manifest.fingerprint == data["fingerprint"]
        ):
            return (
                f"To go on with the images that the run was begun on, give --data {shlex.quote(data['uri'])}"
            )
    return ""


def check_facts(begun: Mapping[str, Any], now: Mapping[str, Any], uri: str) -> None:
    """Refuse files that have changed since the run began, such as cluster ids or a teacher.

    Paths may differ, and so may facts that only one version of raysl knows. An augmentation of the user is only noted,
    because its file may have changed elsewhere.

    Args:
        begun: facts in the metadata of the run at `uri`.
        now: facts of the configuration that should resume it.
    """
    found = {name: (value_of(begun, name), value_of(now, name)) for name in differences(begun, now)}
    changed = [
        f"{name} was {format_value(old)} and is {format_value(new)} now"
        for name, (old, new) in found.items()
        if old is not None
        and new is not None
        and name.partition(".")[0] not in ("starting_weights", "augmentation", "chance")
        and not name.endswith((".run", ".teacher"))
    ]
    if changed:
        # While a teacher trains, its newest checkpoint changes.
        fixed = (
            " with --distill.step, which names a checkpoint of the teacher" if "teacher.step" in found else ""
        )
        raise UserError(
            f"Files that the run at {uri!r} learns from have changed since it began: {'; '.join(changed)}. Restore "
            f"them, or give another folder to --run for a new run{fixed}."
        )
    if "augmentation.source" in found:
        _log.warning("The file of the augmentation has changed since the run at %s began.", uri)
