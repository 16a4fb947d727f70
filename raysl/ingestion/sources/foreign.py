"""Forms of data that are recognised and not read: each is refused with the way to convert it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from raysl.errors import UserError
from raysl.ingestion.found import Found, shown
from raysl.ingestion.listing import kind_of
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize
from raysl.storage import Folder

SUMMARY = ""

_AS_FOLDER = "write its images as files in class folders, or as Parquet with the columns image and label"
_PICKLED = f"a file of pickled objects, which could run code: load it where you trust it and {_AS_FOLDER}"
_TFRECORD = f"a TFRecord data set: with tensorflow_datasets or the package tfrecord {_AS_FOLDER}"
_HDF5 = f"an HDF5 file: with the package h5py {_AS_FOLDER}, or save its arrays with numpy.savez"
_UNPACK = "archive: unpack it"
_FORMS = {
    ".mds": f"an MDS data set of mosaicml-streaming: with its StreamingDataset {_AS_FOLDER}",
    ".beton": f"an FFCV data set: with ffcv's Loader {_AS_FOLDER}",
    ".tfrecord": _TFRECORD,
    ".tfrecords": _TFRECORD,
    ".tfrec": _TFRECORD,
    ".mdb": f"an LMDB database: with the package lmdb {_AS_FOLDER}",
    ".lmdb": f"an LMDB database: with the package lmdb {_AS_FOLDER}",
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".rec": f"an MXNet RecordIO file: with mxnet.recordio {_AS_FOLDER}",
    ".mat": f"a MATLAB file: with scipy.io.loadmat {_AS_FOLDER}, or save its arrays with numpy.savez",
    ".npy": "a NumPy array: save it with numpy.savez under the name images, and its labels under the name labels",
    ".lance": f"a Lance data set: with the package pylance {_AS_FOLDER}",
    ".pt": _PICKLED,
    ".pth": _PICKLED,
    ".pkl": _PICKLED,
    ".pickle": _PICKLED,
    ".bin": f"a binary file without a header, as of STL-10 or CIFAR: with torchvision.datasets {_AS_FOLDER}",
    ".7z": f"a 7z {_UNPACK}",
    ".rar": f"a RAR {_UNPACK}",
    ".lz4": f"an LZ4 {_UNPACK}",
}
# Folders that tell which of the Parquet files beside them are valid.
_LOGS = {
    "_delta_log": "a Delta table, whose log says which of its files are valid: with the package deltalake",
    "_versions": "a Lance data set: with the package pylance",
}


def recognise(place: Place) -> Confidence:
    if place.is_folder and _log_of(place):
        return Confidence.SIGNATURE
    return Confidence.COULD_BE if _form(place) else Confidence.NO


def _log_of(place: Place) -> str:
    return next((log for log in _LOGS if any(log in at.split("/") for at in place.survey[0].folders)), "")


def _form(place: Place) -> str:
    """Return what a place holds and the way to convert it; "" if it is unknown."""
    if place.is_folder:
        survey = place.survey[0]
        if log := _log_of(place):
            return f"holds {log}/, so it is {_LOGS[log]} {_AS_FOLDER}"
        path = next((path for path in survey.examples.values() if _suffix(path) in _FORMS), "")
        return f"holds {shown(path)}, {_FORMS[_suffix(path)]}" if path and not survey.images() else ""
    if _suffix(place.uri) in _FORMS and Folder(place.uri).exists():
        return f"is {_FORMS[_suffix(place.uri)]}"
    if kind_of(place.uri) == "image" and Folder(place.uri).exists():
        return "is one image: name the folder that it lies in"
    return ""


def _suffix(path: str) -> str:
    # TFRecord files may be called train.tfrecord-00000-of-00010.
    name = path.rpartition("/")[2].lower()
    return ".tfrecord" if ".tfrecord" in name else name[name.rfind(".") :] if "." in name else ""


class Source:
    """Refuses to open."""

    name: str
    encoded_here = False
    found: Found

    def __init__(self, place: Place) -> None:
        raise UserError(f"The source {place.uri!r} {_form(place)}.")

    def stamp(self) -> NoReturn:
        raise NotImplementedError

    def units(self, size: UnitSize) -> Iterator[Unit]:
        raise NotImplementedError


def read(unit: Unit) -> Iterator[Row]:
    raise NotImplementedError
