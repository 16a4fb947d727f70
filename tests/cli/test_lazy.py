"""Modules of raysl that are imported name by name hold what they hold after an ordinary import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODULE = '''"""A module."""
from __future__ import annotations
import heavy
from heavy import thing as other
LIMIT = 3
TWICE = 2 * LIMIT
class Light:
    value: int = TWICE
    def use(self, given: heavy.Thing) -> int:
        return LIMIT
class Heavy(heavy.Base):
    pass
effects = []
effects.append(LIMIT)
'''


def test_a_name_runs_only_what_it_needs(tmp_path: Path) -> None:
    package = tmp_path / "raysl_like"
    package.mkdir()
    (package / "module.py").write_text(MODULE)
    (package / "heavy.py").write_text("class Base: pass\nthing = 1\n")
    program = f"""
import sys, raysl
from raysl.cli import lazy
lazy.install_import_hook()
raysl.__path__.append({str(package)!r})
sys.path.append({str(package)!r})
from raysl import module
assert module.effects == [3]
assert module.Light().use(None) == 3 and module.Light.value == 6
assert "heavy" not in sys.modules
assert "Heavy" in dir(module) and not hasattr(module, "absent")
assert module.Heavy.__mro__[1].__module__ == "heavy" and module.other == 1
import pickle
assert pickle.loads(pickle.dumps(module.Light)) is module.Light
from ray import cloudpickle
assert pickle.loads(cloudpickle.dumps(lambda: module))() is module
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_every_module_of_the_library_can_be_completed() -> None:
    program = """
import importlib, pkgutil, raysl
from raysl.cli import lazy
lazy.install_import_hook()
for found in pkgutil.walk_packages(raysl.__path__, "raysl."):
    if found.name == "raysl.__main__":
        continue
    module = importlib.import_module(found.name)
    for name in dir(module):
        getattr(module, name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
