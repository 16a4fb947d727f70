"""Forms of data that are recognised and not read: each is refused with the way to convert it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from raysl.errors import UserError
from raysl.ingestion.found import Found
from raysl.ingestion.listing import kind_of
from raysl.ingestion.sources import Confidence, Place, Row, Unit, UnitSize
from raysl.storage import Folder

SUMMARY = ""

_AS_FOLDER = "write its images as files in class folders, or as Parquet with the columns image and label"
_FORMS = {
    ".mds": f"an MDS data set of mosaicml-streaming: with its StreamingDataset {_AS_FOLDER}",
    ".beton": f"an FFCV data set: with ffcv's Loader {_AS_FOLDER}",
    ".tfrecord": f"a TFRecord data set: with tensorflow_datasets or the package tfrecord {_AS_FOLDER}",
    ".tfrecords": f"a TFRecord data set: with tensorflow_datasets or the package tfrecord {_AS_FOLDER}",
    ".mdb": f"an LMDB database: with the package lmdb {_AS_FOLDER}",
    ".h5": f"an HDF5 file: with the package h5py {_AS_FOLDER}, or save its arrays with numpy.savez",
    ".hdf5": f"an HDF5 file: with the package h5py {_AS_FOLDER}, or save its arrays with numpy.savez",
    ".rec": f"an MXNet RecordIO file: with mxnet.recordio {_AS_FOLDER}",
    ".mat": f"a MATLAB file: with scipy.io.loadmat {_AS_FOLDER}, or save its arrays with numpy.savez",
    ".npy": "a NumPy array: save it with numpy.savez under the name images, and its labels under the name labels",
    ".7z": "a 7z archive: unpack it",
    ".rar": "a RAR archive: unpack it",
}


def recognise(place: Place) -> Confidence:
    return Confidence.COULD_BE if _form(place) else Confidence.NO


def _form(place: Place) -> str:
    """Return what a place holds and the way to convert it; "" if it is unknown."""
    if place.is_folder:
        if place.survey[0].images():
            return ""
        paths = [path for path in place.files if _FORMS.get(_suffix(path))]
        return f"holds {paths[0]}, {_FORMS[_suffix(paths[0])]}" if paths else ""
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
