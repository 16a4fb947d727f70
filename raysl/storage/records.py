"""Write and read JSON objects and arrays with checksums, so that damage is never used silently.

A "signed" line or table carries a CRC-32: it shows damage, not forgery.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysl.errors import UserError
from raysl.storage import Folder, StorageError

# The end of a line of JSON with a checksum.
_SIGNATURE = re.compile(rb', "checksum": "([0-9a-f]{8})"}\n?$')


def as_json(value: Any) -> Any:
    """Return a value as it comes back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(value))


def short_hash(data: bytes) -> str:
    """Return a hash of 8 bytes, as hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def write_record(folder: Folder, name: str, value: dict[str, Any]) -> None:
    """Write a JSON object with its checksum."""
    folder.write_json(name, {**value, "checksum": _checksum(value)})


def verified(value: Any) -> dict[str, Any]:
    """Return a JSON object without its checksum, if it has one. Raises ValueError if it is damaged."""
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if "checksum" in value and value.pop("checksum") != _checksum(value):
        raise ValueError("its checksum does not match")
    return value


def signed_line(row: Mapping[str, Any]) -> bytes:
    """Return a row, which has a value at least, as a line of JSON that ends with the checksum of its text."""
    text = json.dumps(row)[:-1].encode()
    return b'%s, "checksum": "%08x"}\n' % (text, zlib.crc32(text))


def signed_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as lines of JSON, each with its checksum."""
    return b"".join(map(signed_line, rows))


def verified_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines of `signed_lines` without their checksums, which files that people wrote may lack.

    Raises ValueError if a checksum does not match, or is missing in some lines only.
    """
    signed_before = None
    for line in lines:
        found = _SIGNATURE.search(line)
        if signed_before not in (None, found is not None):
            raise ValueError("some lines have no checksum")
        signed_before = found is not None
        text = line[: found.start()] if found else line
        if found and int(found[1], 16) != zlib.crc32(text):
            raise ValueError("a checksum does not match")
        yield text + b"}" if found else line


def read_record(folder: Folder, name: str, remedy: str) -> dict[str, Any]:
    """Return a JSON object that `write_record` wrote. Raises UserError, which ends with `remedy`, if it is damaged."""
    path = f"{folder}/{name}"
    try:
        value = json.loads(folder.read(name))
    except FileNotFoundError as error:
        raise UserError(f"The file {path} is missing. {remedy}") from error
    except ValueError as error:
        raise UserError(f"The file {path} is damaged: it is not JSON. {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"The file {path} is damaged: it holds no JSON object. {remedy}")
    if value.pop("checksum", None) != _checksum(value):
        raise UserError(f"The file {path} is damaged: its checksum does not match. {remedy}")
    return value


def signed(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of an assignments file with its checksum. Parquet has none for metadata, only for pages."""
    return {**metadata, "checksum": _checksum(metadata)}


def is_damaged(metadata: Mapping[str, str]) -> bool:
    """Return True if the metadata of an assignments file do not match their checksum, if they have one."""
    signed_keys = ("K", "features", "fingerprint", "kmeans", "objective", "teacher")
    own = {key: metadata[key] for key in signed_keys if key in metadata}
    return metadata.get("checksum", _checksum(own)) != _checksum(own)


def _checksum(value: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(dict(value), sort_keys=True).encode()):08x}"


def write_arrays(folder: Folder, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays as an npz file. Its zip format carries a checksum of each."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    folder.write(name, buffer.getvalue())


def read_arrays(folder: Folder, name: str, remedy: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an npz file. Raises UserError, which ends with `remedy`, if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise UserError(f"The file {folder}/{name} is missing. {remedy}") from error
    except StorageError:
        raise
    except Exception as error:  # zip, zlib, NumPy and others raise their own
        raise UserError(f"The file {folder}/{name} is damaged: {error}. {remedy}") from error
