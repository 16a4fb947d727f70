"""Ingest: any source of images becomes an indexed data set.

`ingest` makes one at a place of the user's choice, `resolve` opens one or makes it in the cache, `splits` names what to
learn from and what to be judged on. The kinds of source are the files of `sources/`.
"""

from raysl.ingestion.cache import find, resolve, splits
from raysl.ingestion.pipeline import IngestConfig, ingest

__all__ = ["IngestConfig", "find", "ingest", "resolve", "splits"]
