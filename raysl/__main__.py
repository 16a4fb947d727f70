"""Run the `raysl` command: a verb, then flags from the same dataclasses as the Python API."""

from __future__ import annotations

import atexit
import functools
import glob
import importlib
import inspect
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysl import __version__, console
from raysl.cli import lazy
from raysl.errors import exit_on_errors, name_plugin_in_errors, unknown
from raysl.fields import FieldError

VERBS = {
    "demo": "ingest, pretrain and probe in a few minutes; print scores and draw the views",
    "ingest": "make a data set from any source of images or videos",
    "pretrain": "learn a representation from images or videos without labels",
    "probe": "evaluate the features of a run against the untrained backbone and raw pixels",
    "features": "write the features of every image as Parquet",
    "cluster": "cluster features by k-means",
    "clusterfit": "cluster the features of a network and train a new network on the clusters",
    "sweep": "search hyperparameters, scored by a probe",
    "report": "write an HTML page of a sweep or of several runs: figures, tables, costs",
    "export": "write the backbone for torchvision, timm, safetensors or ONNX, with a model card",
    "reproduce": "train a run again from its metadata and list differences",
    "views": "draw the views, the augmented images that a method trains on",
    "methods": "list objectives, pretext transforms and their combinations",
    "doctor": "show versions and resources, measure each stage, and name the bottleneck",
    "cache": "list the copies of sources that were ingested without `raysl ingest`; remove superseded ones",
}


def program() -> None:
    """Run `main` on the command line, and end without the seconds that Python takes to delete torch's objects."""
    code: int | str | None = 1

    def leave() -> None:
        if "RAYSL_PLUGINS" in os.environ:
            return  # Code of others may have left files open, which Python then completes.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    # What is registered first runs last: when the threads have ended, and libraries that were loaded later have closed.
    atexit.register(leave)
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Exit with code 2 and one paragraph for a mistake of the user."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with exit_on_errors("raysl"), name_plugin_in_errors():
            _run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has ended. Without this, Python prints an error at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print("usage: raysl VERB [flags]      `raysl VERB --help` lists the flags of a verb\n")
        print("\n".join(f"  {name:<11}{what}" for name, what in VERBS.items()))
        print("\nStart with your own images:\n\n  raysl ingest photos/ data/photos")
        print("  raysl pretrain --data data/photos --run runs/first\n\n`raysl --version` prints the version.")
        return
    if given[0] in ("-V", "--version"):
        print(f"raysl {__version__}")
        return
    if given[0] not in VERBS:
        raise unknown("verb", given[0], VERBS)
    if {"-h", "--help"} & set(given):
        _run_verb(given)
    else:
        with console.verb(given[0]):
            _remove_left_behind()
            _run_verb(given)


def _remove_left_behind() -> None:
    """Remove the folders of Ray of commands that were killed, also before a verb that needs no Ray."""
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if glob.glob(f"{glob.escape(root)}/raysl-*/*"):
        local_ray = importlib.import_module("raysl.ray_cluster.local_ray")
        local_ray.remove_left_behind(Path(root))


def _run_verb(given: list[str]) -> None:
    lazy.install_import_hook()
    verbs = importlib.import_module("raysl.cli.verbs")
    verb = getattr(verbs, given[0])
    # A backbone and an optimizer may be given by their names alone, and the size of images as for a probe.
    given = [re.sub(r"^--(teacher-backbone|backbone|optim)(?==|$)", r"--\1.name", word) for word in given]
    if given[0] in ("pretrain", "sweep", "clusterfit", "views", "doctor"):
        given = [re.sub(r"^--image-size(?==|$)", "--view.image-size", word) for word in given]
    try:
        if "arguments" in inspect.signature(verb).parameters:
            verb(given[1:])
        else:
            flags = importlib.import_module("raysl.cli.flags")

            @functools.wraps(verb)
            def ready(*values: Any, **named: Any) -> Callable[[], None]:
                return functools.partial(verb, *values, **named)

            # tyro evaluates annotations, whose names `lazy` does not import.
            for name in re.findall(r"\w+", " ".join(map(str, verb.__annotations__.values()))):
                getattr(verbs, name, None)
            flags.read(ready, f"raysl {given[0]}", given[1:])()
    except FieldError as error:
        raise error.as_typed(given) from error


if __name__ == "__main__":
    program()
