"""What callers may give to the functions of `raysl.api`, and the forms that the library takes.

Modules that need torch are imported inside of functions, so that a verb prints its first line before.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeVar

from raysl import ray_cluster
from raysl.api.results_folder import check_results
from raysl.errors import UserError
from raysl.fields import hints

if TYPE_CHECKING:
    from typing import TypeAlias

    from raysl.config import Pretraining
    from raysl.dataset import DataSet
    from raysl.run import Run

    PathLike: TypeAlias = str | os.PathLike[str]
    Data: TypeAlias = PathLike | DataSet
    AnyRun: TypeAlias = PathLike | Run

T = TypeVar("T")
_log = logging.getLogger("raysl.api")
# Arguments that take one source of images.
ONE_SOURCE = ("data", "train", "validation", "test")


def dataset(data: Data) -> DataSet:
    """Open a data set; another source is ingested into the cache first. Raises UserError if none is there."""
    from raysl.dataset import DataSet

    if isinstance(data, DataSet):
        return data
    from raysl.ingestion import open_or_ingest

    return open_or_ingest(uri(data))


def check_source(*places: Data) -> None:
    """Raise UserError unless a data set or a source of images lies at each place that is not ""."""
    from raysl.dataset import DataSet
    from raysl.ingestion.cache import finished_folder
    from raysl.ingestion.found import names_checked
    from raysl.ingestion.sources import SourceLocation, open_source

    with names_checked():
        for data in places:
            path = "" if isinstance(data, DataSet) else uri(data)
            if path and not finished_folder(path):
                open_source(SourceLocation.parse(path))


def check_checkpoint(checkpoint: AnyRun) -> None:
    """Raise UserError unless a run, a checkpoint or a file lies at `checkpoint`, before torch is loaded."""
    from raysl.extraction.encoders import find_checkpoint

    find_checkpoint(uri(checkpoint))


def run_config(
    data: Data | None,
    run: PathLike | None,
    config: Pretraining | Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    workers: bool = True,
    check: Callable[[Pretraining], Sequence[str] | None] | None = None,
    out: str = "",
    local: bool | None = False,
) -> Pretraining:
    """Return the configuration of a run, checked before Ray starts.

    An object is taken as it is, with `fields` in the place of some values. Of a mapping, what it leaves open is chosen
    from the data and the machine. Names that are not fields of `Pretraining` are parts of its method, as in
    `pirl={"temperature": 0.1}`.

    Args:
        data: images, unless `config` or `fields` name them.
        run: folder of the run, likewise.
        config, fields: an object or a mapping of fields, and fields that replace some of them.
        workers: whether workers will train, so that Ray is started and asked what the cluster has.
        check: more checks of the configuration as given, before any data are opened or Ray starts. It may return the
            dotted names of fields that are not listed among the fields that were chosen.
        out: folder of the results, if it is not the run.
        local: whether one worker will train in this process, without Ray; None if it will where that starts sooner.
    """
    from raysl.config import Pretraining, defaults

    base = config if isinstance(config, Mapping) else {}
    values = named_fields({**base, **given(data=data, run=run), **fields})
    trains = check is None
    if local:
        from raysl.training import in_process

        check, workers = in_process.check, False
    if isinstance(config, Pretraining):
        made = _from_weights_file(defaults.replaced(config, values))
        _prepare(made, workers, check, out, local)
        return made
    if config is not None and not isinstance(config, Mapping):
        raise _wrong_type(config, Pretraining)
    if local and values.get("workers", 0) in (0, "0"):
        values["workers"] = 1
    _check_given(values)
    values["data"] = uri(values["data"])
    asked = defaults.validated_config(values)
    unlisted = (check and check(asked)) or ()
    _check_images(asked)
    values = _with_weights_file(values, asked.run)
    check_results(asked, out, workers)
    if trains:
        from raysl.training import preflight

        preflight.check_before_ingest(asked, values)
    if not workers or (local is None and _trains_alone(values, asked)):
        import torch

        return _resolved(values, asked.data, 1, torch.cuda.is_available(), unlisted)
    ray_cluster.start()
    return _suited(values, asked, unlisted)


def _prepare(
    made: Pretraining,
    workers: bool,
    check: Callable[[Pretraining], object] | None,
    out: str,
    local: bool | None,
) -> None:
    """Check a whole configuration, open its data, and start Ray if workers will train on it; see `run_config`."""
    if check is not None:
        check(made)
    check_results(made, out, workers)
    dataset(made.data)
    if workers and not (local is None and _trains_alone({"workers": made.workers}, made)):
        ray_cluster.start()


def _check_given(values: Mapping[str, Any]) -> None:
    for name, what in (("data", "IMAGES"), ("run", "FOLDER")):
        if name not in values:
            raise UserError(f"The configuration lacks {name!r}, which has no default. Give {name}={what}.")


def _check_images(asked: Pretraining) -> None:
    """Raise UserError if the images of a run do not exist; of a run that has begun, it says where a copy lies."""
    from raysl.run import METADATA, Run
    from raysl.run.unchanged import images_kept
    from raysl.storage import Folder

    try:
        check_source(asked.data)
    except UserError as error:
        begun = asked.run != "-" and Folder(asked.run).exists(METADATA)
        if begun and (kept := images_kept(Run.open(asked.run).metadata())):
            raise UserError(f"{error} {kept}.") from error
        raise


def _trains_alone(values: Mapping[str, Any], asked: Pretraining) -> bool:
    """Return True if a run trains in this process, so that Ray need not start.

    `values` are the fields that are given, and `asked` completes them with the defaults of the classes.
    """
    from raysl.config import defaults
    from raysl.run import Run
    from raysl.training import in_process

    if str(values.get("workers", 0)) in ("0", ""):
        begun = Run.find(asked.run)
        made = defaults.resume(begun.config(), values, 1, False) if begun else None
        asked = dataclasses.replace(asked, workers=made.workers if made else 1)
    return in_process.is_chosen(asked)


def _from_weights_file(config: Pretraining) -> Pretraining:
    from raysl.config import defaults

    network = _with_weights_file({"backbone": config.backbone}, config.run)["backbone"]
    return defaults.replaced(config, {"backbone": network} if isinstance(network, Mapping) else {})


def _with_weights_file(values: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Return the fields of a run with the file of its starting weights, and the backbone that is stated with it.

    A run that exists keeps its file, also where that is gone. Raises UserError if there are no such weights.
    """
    from raysl.extraction.inference import starting_weights, stated_backbone
    from raysl.run import Run
    from raysl.storage import Folder

    network = values.get("backbone", {})
    given = network if isinstance(network, Mapping) else dataclasses.asdict(network)
    path = given.get("weights")
    if not path:
        return dict(values)
    if begun := Run.find(run):
        kept = begun.config().backbone.weights
        try:
            is_same = starting_weights(path) == kept
        except UserError:
            is_same = kept.startswith(f"{Folder(path)}/")
        return {**values, "backbone": {**given, "weights": kept}} if is_same else dict(values)
    file = starting_weights(path)
    if "name" not in given and (stated := stated_backbone(file)):
        _log.info("The backbone is that of %s: %s.", path, stated.name)
        given = {**{name: getattr(stated, name) for name in ("name", "stem", "norm", "patch_size")}, **given}
    return {**values, "backbone": {**given, "weights": file}}


def _suited(values: Mapping[str, Any], asked: Pretraining, unlisted: Sequence[str]) -> Pretraining:
    """Return the configuration of a run that suits its data and the cluster. Ray must have been started."""
    from raysl.ray_cluster import placement

    if str(values.get("workers", 0)) not in ("0", ""):
        # Before a source is ingested, which takes its time.
        placement.make_placement(asked.worker_counts()[0])
    machines = placement.machines()
    return _resolved(values, asked.data, placement.default_workers(machines), machines.has_gpus, unlisted)


def _resolved(
    values: Mapping[str, Any], data: str, default_workers: int, has_gpus: bool, unlisted: Sequence[str]
) -> Pretraining:
    """Return the configuration of a run; one that exists keeps what it was begun with."""
    from raysl.config import defaults
    from raysl.run import Run

    images = dataset(data)
    begun = Run.find(str(values["run"])) if values.get("run") not in (None, "-") else None
    if begun is not None:
        made = defaults.resume(begun.config(), values, default_workers, has_gpus)
        defaults.log_taken(made, values)
        return made
    return defaults.choose_defaults(values, images, default_workers, has_gpus, unlisted)


def unseen(asked: Pretraining) -> list[str]:
    """Return the fields that are chosen for a run and do not change its views: `raysl views` does not list them."""
    from raysl import pretext
    from raysl.config import defaults

    seen = {"view", *pretext.names()}
    return [name for name in defaults.CHOSEN if name.partition(".")[0] not in seen]


def named_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with mappings for backbone, optimizer and view, and names in the place of the user's functions."""
    values, view = dict(fields), fields.get("view")
    if "image_size" in values and (view is None or isinstance(view, Mapping)):
        values["view"] = view = {**(view or {}), "image_size": values.pop("image_size")}
    for part in ("backbone", "optim"):
        if isinstance(values.get(part), str):
            values[part] = {"name": values[part]}
    if isinstance(plugin := values.get("plugin"), str | os.PathLike):
        values["plugin"] = (os.fspath(plugin),)
    if callable(values.get("backbone")):
        from raysl.backbone.network import config_of

        values["backbone"] = config_of(values["backbone"])
    if isinstance(view, Mapping) and callable(view.get("recipe")):
        from raysl.augment.own_augmentation import name_of

        values["view"] = {**view, "recipe": name_of(view["recipe"])}
    return values


def configure(kind: type[T], config: Any, fields: Mapping[str, Any]) -> T:
    """Return a configuration from an object or a mapping, in which `fields` replace values.

    Raises UserError if `config` is of another kind, a field does not exist or lacks a value, or a value is not allowed.
    """
    from raysl.config import from_dict

    config, fields = (None, {**config, **fields}) if isinstance(config, Mapping) else (config, fields)
    fields = _nested(kind, fields)
    places = {k: uri(v) for k, v in fields.items() if isinstance(v, os.PathLike) or hasattr(v, "folder")}
    fields = {**fields, **places}
    if config is not None and not isinstance(config, kind):
        raise _wrong_type(config, kind)
    if config is None:
        return from_dict(kind, fields, "")  # type: ignore[no-any-return]
    if not fields:
        return config
    whole = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name, value in fields.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(whole.get(name)):
            value = {**dataclasses.asdict(whole[name]), **value}
        whole[name] = value
    return from_dict(kind, whole, "")  # type: ignore[no-any-return]


def _nested(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a configuration, in which those of its merged parts, see `IngestConfig`, are in these parts."""
    values = dict(fields)
    for part in getattr(kind, "MERGED", ()):
        names = {field.name for field in dataclasses.fields(hints(kind)[part])} & values.keys()
        own, given = {name: values.pop(name) for name in names}, values.get(part, {})
        if own:
            whole = getattr(given, "__dict__", given)
            values[part] = {**whole, **own} if isinstance(whole, Mapping) else given
    return values


def _wrong_type(config: Any, kind: type[Any]) -> UserError:
    return UserError(
        f"The configuration is of type {type(config).__name__}; it must be a {kind.__name__} or a mapping of its "
        "fields."
    )


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None; paths, data sets and runs as text."""
    there = {name: value for name, value in values.items() if value is not None}
    return {
        name: value if isinstance(value, Number | Sequence) and name not in ONE_SOURCE else uri(value)
        for name, value in there.items()
    }


def uri(value: Any) -> str:
    """Return the path or URI of a path, a data set, a run or a table of features."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    folder = getattr(value, "folder", None)
    if type(value).__name__ == "Pretraining":
        raise UserError(
            "A Pretraining is given where a path, a data set or a run is expected. Name the argument, "
            "as in raysl.pretrain(config=...)."
        )
    if folder is None:
        raise UserError(
            f"A value of type {type(value).__name__} is given where one path, data set or run is expected. Of images "
            "or files, make a data set by raysl.ingest(IMAGES, DEST), and give that."
        )
    return str(folder)
