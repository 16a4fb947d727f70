"""Make names that come from data, rows or folders safe as file names and as Markdown."""

from __future__ import annotations

import hashlib
import html
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


def markdown(text: object) -> str:
    """Return text as one line of Markdown that shows it literally, without headings, links, HTML or cells."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line)


def code_span(text: object) -> str:
    """Return text as a code span of Markdown that may stand in a table."""
    return f"`{re.sub(r'[`|<>]', '?', ' '.join(str(text).split())) or '?'}`"


def code_block(text: str) -> str:
    """Return text as a fenced block; the fence is longer than any row of backticks in the text."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
