"""Find files of a package by name: objectives, transforms, probes, recipes and sources, from raysl or from elsewhere.

Every file of the package whose name does not begin with "_" is found by itself. A file from elsewhere is the same kind
of file, and comes by one of three ways:

- a folder added to the `__path__` of the package;
- an entry point of an installed package, in the group "raysl.objectives", "raysl.pretext" or "raysl.probes";
- its path or dotted name, in `--plugin`, `plugin=` or RAYSL_PLUGINS; see `add_and_trust`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from raysl.errors import UserError, explained, unknown

OBJECTIVES, PRETEXT, PROBES = PLUGIN_PACKAGES = ("raysl.objectives", "raysl.pretext", "raysl.probes")

# A second package with objectives.
EXPERIMENTAL = "raysl.experimental"
_SEARCHED_PACKAGES = {OBJECTIVES: (OBJECTIVES, EXPERIMENTAL)}

# Environment variable listing plugins that the user trusts: opening a run that uses one of them may execute it.
TRUSTED_VARIABLE = "RAYSL_PLUGINS"
_log = logging.getLogger("raysl.plugins")
# Name in an imported file of the hash of its source.
_SOURCE = "__raysl_source__"

# Modules that `load_module` has added: package -> name -> module.
_added: dict[str, dict[str, ModuleType]] = {package: {} for package in PLUGIN_PACKAGES}
# Names in RAYSL_PLUGINS that have been looked into, and the package and the name of what they have added.
_tried: set[str] = set()
_replaceable: set[tuple[str, str]] = set()


def names(package: str) -> list[str]:
    """Return the names of all files of a package (its dotted name), sorted."""
    if package in PLUGIN_PACKAGES:
        _add_trusted()
    inside = [name for searched in _SEARCHED_PACKAGES.get(package, (package,)) for name in _files(searched)]
    return sorted({*inside, *_entry_points(package), *_added.get(package, {})})


def is_experimental(package: str, name: str) -> bool:
    """Return True if a file of a package is one of `raysl.experimental`, whose use is not shown yet."""
    searched = () if name in _entry_points(package) else _SEARCHED_PACKAGES.get(package, ())
    return EXPERIMENTAL in searched and name in _files(EXPERIMENTAL)


def _files(package: str) -> list[str]:
    """Return the names of the public files of a package."""
    path = importlib.import_module(package).__path__
    return [info.name for info in pkgutil.iter_modules(path) if not info.name.startswith("_")]


def module(package: str, name: str, kind: str) -> ModuleType:
    """Import a file of a package.

    Args:
        package: as for `names`.
        name: name of the file without ".py".
        kind: what it is, as a user calls it, such as "probe".

    Raises:
        UserError: the package has no such file, or an installed plugin cannot be imported.
    """
    if name not in names(package):
        raise unknown(kind, name, names(package))
    if name in _added.get(package, {}):
        return _added[package][name]
    if name in _entry_points(package):
        return import_module(_entry_points(package)[name])
    parent = EXPERIMENTAL if is_experimental(package, name) else package
    return importlib.import_module(f"{parent}.{name}")


def config_type(package: str, name: str, kind: str) -> type[Any]:
    """Return the `Config` of a file. Raises `UserError` as `module` does, or when the file has none."""
    return _member(module(package, name, kind), "Config", name, kind)


def load(package: str, name: str, kind: str) -> tuple[type[Any], type[Any]]:
    """Return the `Config` of a file and the class that bears its name in CamelCase.

    Raises:
        UserError: as `module`, or the file lacks one of the two classes.
    """
    found = module(package, name, kind)
    return _member(found, "Config", name, kind), _member(found, class_name(name), name, kind)


def _member(found: ModuleType, wanted: str, name: str, kind: str) -> type[Any]:
    made: type[Any] | None = getattr(found, wanted, None)
    if made is None:
        raise UserError(
            f"The {kind} {name!r} in {found.__file__} has no class {wanted!r}. A file {name}.py defines a frozen "
            f"dataclass Config and a class {class_name(name)}."
        )
    return made


def class_name(name: str) -> str:
    """Return the class name of a file: "patch_grid" becomes "PatchGrid"."""
    return "".join(word.capitalize() for word in name.split("_"))


def add_and_trust(given: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Add a plugin or several, and trust them; return the names that a run remembers. Raises as `load_module`."""
    several = [given] if isinstance(given, str | os.PathLike) else given
    found = tuple(remembered(os.fspath(one)) for one in several)
    for one in found:
        trust(one)
        load_module(one)
    return found


def _add_trusted() -> None:
    """Add the plugins in RAYSL_PLUGINS, which may name other code too, such as backbones, and files that are gone."""
    for name in _trusted():
        if name in _tried or (name.endswith(".py") and not Path(name).is_file()):
            continue
        _tried.add(name)
        try:
            found = import_module(name)
            # The other modules of a package are not imported: the user may have named it for its backbone alone.
            if package := _package_of(found):
                _add(package, _stem(found), found, replaceable=True)
        except UserError as error:
            _log.warning("%s names it: %s", TRUSTED_VARIABLE, error)


def load_module(path_or_name: str) -> ModuleType:
    """Add the objective, transform or probe that a file from outside of raysl defines, or the files of a package.

    The name of the method is that of the file. Ray's workers get the classes of a file by value, so that the file
    need not lie on their path.

    Args:
        path_or_name: path of a Python file, or the dotted name of an installed module or package.

    Raises:
        UserError: it does not exist, cannot be imported, defines none of the three, or its name is taken.
    """
    _tried.add(remembered(path_or_name))
    found = import_module(path_or_name)
    if not _add_members(found):
        name = class_name(_stem(found))
        own = [key for key, one in vars(found).items() if getattr(one, "__module__", "") == found.__name__]
        raise UserError(
            f"The plugin {path_or_name!r} defines no objective, transform or probe: it needs a class Config and a "
            f"class {name} (after the file's name) with the methods of one of them, and defines "
            f"{', '.join(own) or 'nothing'}. See CONTRIBUTING.md for the contracts."
        )
    return found


def _add_members(found: ModuleType) -> bool:
    """Add a module, or the files of a package, to those of raysl. Return False if none fits one of raysl's packages."""
    members = [found]
    if hasattr(found, "__path__"):
        members = [import_module(f"{found.__name__}.{name}") for name in _files(found.__name__)]
    fitting = [(package, member) for member in members if (package := _package_of(member))]
    for package, member in fitting:
        _add(package, _stem(member), member)
    return bool(fitting)


class MissingCodeError(UserError):
    """A run uses code that is gone, or that the user does not trust."""


def trust(name: str) -> None:
    """Allow runs that name a plugin to run its code, in this process and in those that it starts.

    Raises:
        UserError: the variable cannot hold the name.
    """
    if os.pathsep in name:
        raise UserError(
            f"The path of the plugin {name!r} contains {os.pathsep!r}, which separates plugins in {TRUSTED_VARIABLE}. "
            f"Move the file to a path without {os.pathsep!r}."
        )
    trusted = _trusted()
    if name not in trusted:
        os.environ[TRUSTED_VARIABLE] = os.pathsep.join([*trusted, name])


def check_trusted(
    names_: Iterable[str], run: str, sources: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Return where the code of each plugin of a run lies now, by the name that the run has for it.

    Opening a run executes no code that the user has not named. A file that has moved is found among the files that the
    user trusts, by its content, or by its name where the content is not known.

    Args:
        names_: plugins, and modules of backbones.
        run: folder of the run or sweep, for the error.
        sources: hashes of their sources, where the run knows them; see `source_hash`.

    Raises:
        MissingCodeError: a plugin is gone, or nobody trusts it.
    """
    return {name: _trusted_place(name, run, sources.get(name, "")) for name in names_}


def _trusted_place(name: str, run: str, source: str) -> str:
    if name.endswith(".py") and not Path(name).exists():
        # If the file changed while it was in use, the last version counts.
        content, file = source.rpartition("-")[2], Path(name).name
        known = [Path(one) for one in _trusted() if one.endswith(".py") and Path(one).is_file()]
        found = [one for one in known if _hash(one.read_bytes()) == content] if content else []
        named = [one for one in known if one.name == file]
        if not content and len(named) == 1:
            found = named
            _log.warning("%r uses the code in %r, which is gone: %s stands for it.", run, name, named[0])
        if found:
            return str(found[0])
        other = f" {str(named[0])!r} has other content." if named and content else ""
        raise MissingCodeError(
            f"{run!r} uses the code in {name!r}, and there is no such file.{other} If you have moved it and trust it, "
            f"set {TRUSTED_VARIABLE}=PLACE/{file} in the environment, or put the file back."
        )
    if name not in _trusted():
        raise MissingCodeError(
            f"{run!r} uses the code in {name!r}, which would be run now. If you trust it, set {TRUSTED_VARIABLE}="
            f"{name} in the environment. For a file with an objective, a transform or a probe, --plugin does the same."
        )
    return name


def with_current_path(name: str, places: Mapping[str, str]) -> str:
    """Return "MODULE:NAME" of a run with the place of its module now, of `check_trusted`; any other name as it is."""
    module, colon, attribute = name.rpartition(":")
    return f"{places.get(module, module)}{colon}{attribute}"


def _trusted() -> list[str]:
    """Return the trusted plugins. Processes that start now, perhaps in another folder, find their whole paths."""
    found = [remembered(one) for one in os.environ.get(TRUSTED_VARIABLE, "").split(os.pathsep) if one]
    if found:
        os.environ[TRUSTED_VARIABLE] = os.pathsep.join(found)
    return found


def remembered(path_or_name: str) -> str:
    """Return the name under which a run remembers a plugin: a file by its whole path."""
    return str(_file(path_or_name).resolve()) if _is_file(path_or_name) else path_or_name


def _add(package: str, name: str, member: ModuleType, replaceable: bool = False) -> None:
    """Add a file to its package. One that RAYSL_PLUGINS names gives way to one that a command or a run names."""
    there, known = names(package), _added[package].get(name)
    is_other = known is not None and known.__file__ != member.__file__
    stays = replaceable or (package, name) not in _replaceable
    if (known is None and name in there) or (is_other and stays):
        raise UserError(
            f"The plugin {member.__file__} has the name {name!r}, which {known.__file__ if known else package} has "
            "already. Rename the file and its class."
        )
    _added[package][name] = member
    if replaceable and known is None:
        _replaceable.add((package, name))
    elif not replaceable:
        _replaceable.discard((package, name))


def _package_of(member: ModuleType) -> str:
    """Return the package of raysl that a file belongs to by the methods of its class; an empty string for none."""
    made = getattr(member, class_name(_stem(member)), None)
    if made is None or not hasattr(member, "Config"):
        return ""
    if hasattr(made, "transform"):
        return PRETEXT
    if hasattr(made, "forward") and hasattr(made, "loss"):
        return OBJECTIVES
    return PROBES if any(hasattr(made, name) for name in ("run", "measure", "examine")) else ""


def _stem(member: ModuleType) -> str:
    if member.__name__.startswith("raysl_plugin_"):
        return Path(member.__file__ or "").stem
    return member.__name__.rpartition(".")[2]


def import_module(path_or_name: str) -> ModuleType:
    """Import a Python file or an installed module. Raise UserError when it cannot be imported."""
    try:
        if _is_file(path_or_name):
            return _import_file(_file(path_or_name).resolve())
        return importlib.import_module(path_or_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The plugin {path_or_name!r} cannot be imported: {type(error).__name__}: {error}. Give the path of a "
            "Python file, or the name of an installed module."
        ) from error


def source_hash(path_or_name: str) -> str:
    """Return a hash of the source of a Python file or an installed module; "" if it has none.

    It does not run the file; the packages that a dotted name stands in are imported.

    Files that it imports are not part of the hash. A file that has changed since this process imported it has a hash
    of both versions: processes that start now run another one than this.

    Raises:
        UserError: it does not exist.
    """
    advice = "Give the path of a Python file, or the name of an installed module."
    what = f"The source of {path_or_name!r} cannot be read"
    with explained(what, advice, ImportError, OSError, ValueError):
        if _is_file(path_or_name):
            file = _file(path_or_name).resolve()
            now = _hash(file.read_bytes())
            then = getattr(sys.modules.get(_module_name(file)), _SOURCE, now)
            return now if then == now else f"{then}-{now}"
        spec = importlib.util.find_spec(path_or_name)
        if spec is None:
            raise ImportError("there is no such module")
        return _hash(Path(spec.origin).read_bytes()) if spec.origin and spec.has_location else ""


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def importable_name(made: Any) -> str:
    """Return "MODULE:NAME" of a function or class; "" for an object, or one of a script, notebook or function."""
    module, name = getattr(made, "__module__", ""), getattr(made, "__qualname__", "")
    return "" if module == "__main__" or not name.isidentifier() else f"{module}:{name}"


def function(name: str, kind: str, instance: bool = False) -> Any:
    """Import the function or class "MODULE:NAME" or "FILE.py:NAME". Raise UserError if there is none.

    Args:
        kind: what it is, for the error.
        instance: return an instance of a class, made without arguments.
    """
    module, _, attribute = name.rpartition(":")
    found = getattr(import_module(module), attribute, None)
    found = found() if instance and isinstance(found, type) else found
    if not callable(found):
        raise UserError(f"The {kind} {name!r} does not exist: {module!r} has no function {attribute!r}.")
    return found


def _file(path_or_name: str) -> Path:
    return Path(os.path.expanduser(path_or_name))


def _is_file(path_or_name: str) -> bool:
    return path_or_name.endswith(".py") or os.path.isfile(_file(path_or_name))


def _module_name(file: Path) -> str:
    """Return the name that a file is imported by. It depends on the path: files of one name do not hide each other."""
    digest = hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()
    return f"raysl_plugin_{file.stem}_{digest}"


def _import_file(file: Path) -> ModuleType:
    from ray import cloudpickle

    name = _module_name(file)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no Python file {file}")
    made = importlib.util.module_from_spec(spec)
    setattr(made, _SOURCE, _hash(file.read_bytes()))
    sys.modules[name] = made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[name]
        raise
    # Ray sends its classes with their code: tasks cannot import them by name.
    cloudpickle.register_pickle_by_value(made)
    return made


@functools.cache
def _entry_points(package: str) -> dict[str, str]:
    """Return the module of each entry point for a package by its name."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=package)}
