"""The rules that keep the code readable, checked by a program and not by opinion."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "raysl"
FILES = sorted(LIBRARY.rglob("*.py"))

# From the bottom up: a room (a file or folder directly inside raysl/) imports only rooms that stand before it.
ROOMS = (
    *("console", "errors", "plugins", "fields", "communication", "rng", "storage", "dataset"),
    *("augment", "pretext", "stream", "contrastive", "backbone", "optim", "checkpoint"),
    *("ray_cluster", "ingestion", "objectives", "experimental", "config", "model", "run", "training"),
    *("extraction", "clustering", "probes", "evaluation"),
    *("tuning", "reporting", "model_export", "experiment", "diagnostics", "api", "cli"),
    *("__init__", "__main__"),
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
STATED = ("Command:", "Hardware:", "Time:", "Expect:")

# Put together from parts, so that this file does not break its own rule.
REGISTRIES = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "deb." + "debian", "/sim" + "ple/")
MACHINE_PATH = re.compile(r"(^|[^\w.-])/(" + "work|root" + r")/")


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def _room(file: Path) -> str:
    return file.relative_to(LIBRARY).parts[0].removesuffix(".py")


def _imports(file: Path) -> Iterator[str]:
    """Dotted names of everything that `file` imports, at its top or inside a function."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)}:{node.lineno}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_rooms(file: Path) -> set[str]:
    """Rooms that `file` imports; a name taken from the package itself counts as the room `__init__`."""
    names = {name.split(".")[1] for name in _imports(file) if name.startswith("raysl.")}
    return {name if name in ROOMS else "__init__" for name in names}


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_and_functions_fit_on_a_screen() -> None:
    long = []
    for file in FILES:
        lines = len(file.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{file.relative_to(ROOT)}: {lines} lines; split it by purpose at {MAX_FILE_LINES}")
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    place = f"{file.relative_to(ROOT)}:{node.lineno}"
                    long.append(f"{place}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    assert not long, "\n".join(long)


def test_every_room_has_its_place() -> None:
    unplaced = sorted({_room(file) for file in FILES} - set(ROOMS))
    assert not unplaced, f"place these in ROOMS, above everything that they import: {', '.join(unplaced)}"


def test_imports_point_down() -> None:
    upward = [
        f"{file.relative_to(ROOT)} imports {imported}, which stands above {_room(file)} in ROOMS"
        for file in FILES
        for imported in sorted(_imported_rooms(file) - {_room(file)})
        if _room(file) in ROOMS and imported in ROOMS[ROOMS.index(_room(file)) :]
    ]
    assert not upward, "\n".join(upward)


def test_no_room_for_leftovers() -> None:
    assert not [file for file in FILES if file.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_faiss_is_imported_in_one_file() -> None:
    importers = [file.name for file in FILES if any(name.split(".")[0] == "faiss" for name in _imports(file))]
    assert len(importers) <= 1, importers


def test_import_of_the_package_is_light() -> None:
    code = "import raysl, sys; print([name for name in ('torch', 'ray', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_readme_maps_the_library() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if re.match(r"raysl/", block)]
    assert len(trees) == 1, "README.md has one fenced block that opens with raysl/: the map"
    entries = re.findall(r"^[\s│├└─]*([\w.]+/?)", trees[0], re.MULTILINE)
    rooms = {f"{_room(f)}/" if f.parent != LIBRARY else f.name for f in FILES} - {"__init__.py"}
    missing = sorted(rooms - set(entries))
    assert not missing, f"give each of these a line in README.md's map: {', '.join(missing)}"
    there = {part for file in _tracked() for part in _path_names(file)}
    stale = sorted(set(entries) - there - rooms)
    assert not stale, f"README.md's map names what is not there: {', '.join(stale)}"


def _path_names(file: Path) -> set[str]:
    """Name of a file, and of each folder above it with a slash."""
    return {file.name, *(f"{parent.name}/" for parent in file.relative_to(ROOT).parents)}


def test_no_registry_and_no_path_of_one_machine() -> None:
    found = []
    for file in _tracked():
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), start=1):
            if any(host in line for host in REGISTRIES) or (
                file.suffix != ".svg" and MACHINE_PATH.search(line)
            ):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_every_ray_task_states_its_scheduling_strategy() -> None:
    """A task without one of a Tune trial goes into the placement group of the trial, which is too small.

    A cluster with GPUs showed it: `gpus.check` failed every trial of a sweep.
    """
    for file in sorted((ROOT / "raysl").rglob("*.py")):
        text = file.read_text()
        starts, states = text.count("ray.remote("), text.count("scheduling_strategy")
        assert states >= starts, (
            f"{file.relative_to(ROOT)}: {starts} ray.remote(), {states} scheduling strategies"
        )


def test_experiments_state_command_hardware_time_and_what_to_expect() -> None:
    for file in sorted((ROOT / "experiments").glob("*.py")):
        docstring = ast.get_docstring(_tree(file)) or ""
        missing = [word for word in STATED if word not in docstring]
        assert not missing, f"{file.relative_to(ROOT)}: its docstring lacks {', '.join(missing)}"
