"""Lets trainers run where a machine has GPUs for Ray alone: raysl finds them usable, trainers get the CPU and gloo.

Every Python process of a pretended machine imports this at its start. It does nothing until torch's distributed
package, or Ray's choice of a device, is loaded.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TORCH, _RAY = "torch.distributed.distributed_c10d", "ray.air._internal.device_manager"
_RAYSL = "raysl.ray_cluster.gpus"


class _Patched(Loader):
    """Loads a module as it is, and changes one name in it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        {_TORCH: _on_gloo, _RAY: _on_cpus, _RAYSL: _usable}[module.__name__](module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in (_TORCH, _RAY, _RAYSL):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patched(spec.loader)
        return spec


def _on_gloo(module: Any) -> None:
    begin = module.init_process_group

    def init_process_group(backend: str | None = None, **others: Any) -> None:
        begin("gloo" if backend == "nccl" else backend, **others)

    module.init_process_group = init_process_group


def _on_cpus(module: Any) -> None:
    module.SUPPORTED_ACCELERATOR_TORCH_DEVICE_MANAGER["GPU"] = module.CPUTorchDeviceManager


def _usable(module: Any) -> None:
    module.problem = module.without_bf16 = lambda: ""


sys.meta_path.insert(0, _Finder())
