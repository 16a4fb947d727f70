"""Ingest: any source of images becomes an indexed data set.

`ingest` makes a data set in a folder that the user chooses, `open_or_ingest` opens a data set or makes it in the cache,
and `splits` names the splits to learn from and to be scored on. Each file of `sources/` reads one kind of source.
"""

from raysl.ingestion.cache import on_local_disk, open_or_ingest, splits
from raysl.ingestion.pipeline import IngestConfig, ingest

__all__ = ["IngestConfig", "ingest", "on_local_disk", "open_or_ingest", "splits"]
