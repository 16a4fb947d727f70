"""The `raysl` command: a verb, then typed flags made from the same dataclasses as the Python API."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from raysl import __version__, lazy
from raysl.errors import answered, unknown
from raysl.fields import FieldError

VERBS = {
    "demo": "the whole story in a few minutes: ingest, pretrain, probe, a table and a picture",
    "ingest": "turn any source of images into an indexed data set",
    "pretrain": "learn a representation from images without labels",
    "probe": "measure what a run has learned, beside the untrained network and raw pixels",
    "features": "the features of every image by any checkpoint, as Parquet",
    "cluster": "k-means of features over Ray actors",
    "clusterfit": "features, clusters, and a new network that predicts them",
    "sweep": "try values of fields and seeds, judged by a probe; stops, goes on, and says which is best",
    "report": "a page of a sweep, or of runs side by side: figures, tables, costs",
    "export": "the backbone of a run for torchvision, timm, safetensors or ONNX, with a model card",
    "reproduce": "run a run again from its metadata, and name what differs",
    "views": "a picture of what a method sees",
    "methods": "list objectives, pretext transforms and what combines with what",
    "doctor": "versions, resources, the time of each stage, and what limits the speed",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Exits with code 2 and one paragraph when the user has something to correct."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with answered("raysl"):
            _run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has had enough. Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print("usage: raysl VERB [flags]      `raysl VERB --help` lists the flags of a verb\n")
        print("\n".join(f"  {name:<11}{what}" for name, what in VERBS.items()))
        return
    if given[0] in ("-V", "--version"):
        print(f"raysl {__version__}")
        return
    if given[0] not in VERBS:
        raise unknown("verb", given[0], VERBS)
    lazy.install()
    verb = getattr(importlib.import_module("raysl.cli.verbs"), given[0])
    try:
        verb(given[1:])
    except FieldError as error:
        raise error.as_typed(given) from error


if __name__ == "__main__":
    main()
