"""An ingest that was interrupted continues, although a field of its journal has another name now."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from raysl.ingestion.journal import JOURNAL, Journal
from raysl.ingestion.shard import Written
from raysl.storage import Folder
from raysl.storage.records import write_record


def test_results_with_the_older_spelling_are_read(tmp_path: Path) -> None:
    dest = Folder(str(tmp_path))
    written = Written(0, 0, (2,), 10, 1, "digest", (), "a/b.png", ())
    older = asdict(written)
    older["unlabelled"] = older.pop("unlabeled")
    write_record(dest, f"{JOURNAL}/done/000000.json", {"written": older})
    assert Journal(dest).written(0) == written
