"""JSON objects and arrays on disk with checksums, so that damage is never used silently."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from raysl.errors import UserError
from raysl.storage import Folder, StorageError


def write_record(folder: Folder, name: str, value: dict[str, Any]) -> None:
    """Write a JSON object with its checksum."""
    folder.write_json(name, {**value, "checksum": _checksum(value)})


def verified(value: Any) -> dict[str, Any]:
    """Return a JSON object without its checksum, which files that people wrote may lack.

    Raises:
        ValueError: it is no object, or its checksum does not match.
    """
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if "checksum" in value and value.pop("checksum") != _checksum(value):
        raise ValueError("its checksum does not match")
    return value


def signed_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as lines of JSON, each with its checksum."""
    return "".join(json.dumps({**row, "checksum": _checksum(row)}) + "\n" for row in rows).encode()


def read_record(folder: Folder, name: str, remedy: str) -> dict[str, Any]:
    """Return a JSON object that `write_record` wrote.

    Args:
        folder: its folder.
        name: its file.
        remedy: what a user does about damage, as a sentence.

    Raises:
        UserError: the file is damaged.
    """
    place = f"{folder}/{name}"
    try:
        value = json.loads(folder.read(name))
    except FileNotFoundError as error:
        raise UserError(f"The file {place} is missing. {remedy}") from error
    except ValueError as error:
        raise UserError(f"The file {place} is damaged: it is not JSON. {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"The file {place} is damaged: it holds no JSON object. {remedy}")
    if value.pop("checksum", None) != _checksum(value):
        raise UserError(f"The file {place} is damaged: its checksum does not match. {remedy}")
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
    """Return the arrays of an npz file.

    Args:
        folder: its folder.
        name: its file.
        remedy: what a user does about damage, as a sentence.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise UserError(f"The file {folder}/{name} is missing. {remedy}") from error
    except StorageError:
        raise
    except Exception as error:  # Of zip, zlib, NumPy and others.
        raise UserError(f"The file {folder}/{name} is damaged: {error}. {remedy}") from error
