"""Forms of data that are recognized and not read: each is refused with the way to convert it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from raysl.dataset import MANIFEST, SHARDS
from raysl.ingestion.found import join_names, printable
from raysl.ingestion.listing import NOTES, Survey, join, kind_of, read_bytes
from raysl.storage import StorageError

_AS_FOLDER = "write its images as files in class folders, or as Parquet with the columns image and label"
_PICKLED = f"a file of pickled objects, which could run code: load it where you trust it and {_AS_FOLDER}"
_TFRECORD = f"a TFRecord data set: with tensorflow_datasets or the package tfrecord {_AS_FOLDER}"
_HDF5 = f"an HDF5 file: with the package h5py {_AS_FOLDER}, or save its arrays with numpy.savez"
_UNPACK = "archive: unpack it"
_FORMS = {
    ".mds": f"an MDS data set of mosaicml-streaming: with its StreamingDataset {_AS_FOLDER}",
    ".beton": f"an FFCV data set: with ffcv's Loader {_AS_FOLDER}",
    **dict.fromkeys((".tfrecord", ".tfrecords", ".tfrec"), _TFRECORD),
    **dict.fromkeys((".mdb", ".lmdb"), f"an LMDB database: with the package lmdb {_AS_FOLDER}"),
    **dict.fromkeys((".h5", ".hdf5"), _HDF5),
    ".rec": f"an MXNet RecordIO file: with mxnet.recordio {_AS_FOLDER}",
    ".mat": f"a MATLAB file: with scipy.io.loadmat {_AS_FOLDER}, or save its arrays with numpy.savez",
    ".npy": "a NumPy array: save it with numpy.savez under the name images, and its labels under the name labels",
    ".npz": "NumPy arrays: give the file itself as the source",
    ".lance": f"a Lance data set: with the package pylance {_AS_FOLDER}",
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle"), _PICKLED),
    ".bin": f"a binary file without a header, as of STL-10 or CIFAR: with torchvision.datasets {_AS_FOLDER}",
    ".dcm": f"a DICOM image: with the package pydicom {_AS_FOLDER}",
    ".7z": f"a 7z {_UNPACK}",
    ".rar": f"a RAR {_UNPACK}",
    ".lz4": f"an LZ4 {_UNPACK}",
}
_AS_CSV = "write its list of images beside them as CSV with the columns file_name and label, and name that"
_LISTS = {
    ".json": f"a JSON file: {_AS_CSV}",
    ".txt": f"a text file: {_AS_CSV}",
    **dict.fromkeys((".pq", ".parq"), "a Parquet file by its name: rename it to end in .parquet"),
    **dict.fromkeys((".xlsx", ".xls"), f"a spreadsheet: {_AS_CSV}"),
    **dict.fromkeys((".sqlite", ".db"), f"a database: {_AS_CSV}"),
}
# Ends of the names of single files that are recognized by more than what follows the last dot.
_ENDS = {
    r"idx\d-(ubyte|int)(\.gz)?": "one file of the MNIST family: give the folder that it lies in",
    r"\.(csv|tsv|jsonl|ndjson|json|txt)\.gz": "compressed with gzip: unpack it",
}
_MOST_JSON_BYTES = 16 << 20
# Folders that tell which of the Parquet files beside them are valid.
_LOGS = {
    "_delta_log": "a Delta table, whose log says which of its files are valid: with the package deltalake",
    "_versions": "a Lance data set: with the package pylance",
}


def refusal(uri: str, survey: Survey | None, recognized: bool) -> str:
    """Return what a source is and the way to convert it, as the end of a sentence; "" if it is of no kind known here.

    A source that is recognized is refused only if it is a folder that raysl made, or one with a log that says which of
    its files are valid.
    """
    if survey is not None:
        if NOTES in survey.folders.get("", ()) and (made := _made_by_raysl(uri)):
            return made
        if not survey.images() and (inside := _data_sets(uri, survey)):
            return (
                f"holds no images but several data sets of raysl; give one of them: {join_names(inside, 5)}"
            )
        if log := next((log for log in _LOGS if any(log in at.split("/") for at in survey.folders)), ""):
            return f"holds {log}/, so it is {_LOGS[log]} {_AS_FOLDER}"
        path = next((path for path in survey.examples.values() if _suffix(path) in _FORMS), "")
        return f"holds {printable(path)}, {_FORMS[_suffix(path)]}" if path and not recognized else ""
    if recognized:
        return ""
    ends = (what for end, what in _ENDS.items() if re.search(rf"{end}$", uri.lower()))
    if what := next(ends, (_FORMS | _LISTS).get(_suffix(uri), "")):
        return f"is {what}"
    return "is one image: name the folder that it lies in" if kind_of(uri) == "image" else ""


def _made_by_raysl(uri: str) -> str:
    """Return what a folder is that raysl made and that is no source; "" if it is none."""
    if {"config", "data", "sessions"} <= (run := _json(uri, "metadata.json")).keys():
        data = run["data"]["uri"] if isinstance(run["data"], dict) and "uri" in run["data"] else ""
        such = f", such as {data!r}, which it was trained on" if data else ""
        return f"is a run and no images: give a source of images or a data set{such}"
    if {"fingerprint", "shards"} <= _json(uri, MANIFEST).keys():
        return "is a data set of raysl already, which has no splits: use its folder as it is, without ingest or #SPLIT"
    return ""


def _data_sets(uri: str, survey: Survey) -> list[str]:
    """Return the data sets of raysl below a folder."""
    folders = [at.removesuffix(f"/{SHARDS}") for at in survey.folders if at.endswith(f"/{SHARDS}")]
    return [place for at in folders if "fingerprint" in _json(place := join(uri, at), MANIFEST)]


def _json(folder: str, name: str) -> dict[str, Any]:
    """Return a file of a folder, parsed; nothing if it is missing, large or no JSON object."""
    with suppress(OSError, StorageError, ValueError):
        value = json.loads(read_bytes(folder, name, _MOST_JSON_BYTES))
        return value if isinstance(value, dict) else {}
    return {}


def _suffix(path: str) -> str:
    # TFRecord files may be called train.tfrecord-00000-of-00010.
    name = path.rpartition("/")[2].lower()
    return ".tfrecord" if ".tfrecord" in name else name[name.rfind(".") :] if "." in name else ""
