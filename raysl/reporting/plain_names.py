"""Make names that come from data or folders safe as file names."""

from __future__ import annotations

import hashlib
import re

_LONGEST = 100


def file_name(name: str) -> str:
    """Return a name that is one file name in every file system, and stays as it is if it already is one.

    Only ASCII letters, digits, ".", "_" and "-" are kept, without leading dots and up to 100 characters. A name that
    changes gets a hash of the original, so that two names never share a file.
    """
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:_LONGEST]
    if kept == name and kept:
        return kept
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{kept}-{digest}" if kept else digest
