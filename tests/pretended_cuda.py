"""Tensors that say they are on cuda:0 and are computed on the CPU, to count what makes the host wait for a GPU.

Mixing devices raises, as on a GPU. Every copy of ordinary memory to the device, every copy back, and every operation
whose result the host must know is counted with the line of raysl that asked for it.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")

# The host needs the result, or its size.
_WAITS = frozenset(
    "item tolist __bool__ __float__ __int__ __index__ __contains__ nonzero argwhere masked_select unique "
    "unique_consecutive _unique2 bincount equal allclose is_nonzero".split()
)
# About a tensor and not about its values.
_ABOUT = frozenset(
    "__get__ __set__ size dim stride numel element_size type is_floating_point is_complex __len__ is_contiguous "
    "storage_offset data_ptr requires_grad_ register_hook retain_grad backward untyped_storage __hash__ __repr__ "
    "__deepcopy__ _has_compatible_shallow_copy_type record_stream".split()
)


class OnDevice(Tensor):
    """A tensor that says it is on cuda:0."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def record_stream(self, _: Any) -> None: ...

    def __deepcopy__(self, memo: Any) -> OnDevice:
        with torch._C.DisableTorchFunctionSubclass():
            copy = Tensor.detach(self).clone().as_subclass(OnDevice)
            copy.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        return copy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Counts:
    """Lines that copied ordinary memory to the device, and lines that made the host wait, with how often."""

    def __init__(self) -> None:
        self.copies: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def clear(self) -> None:
        self.copies.clear()
        self.waits.clear()


_counts = Counts()


@contextlib.contextmanager
def pretended() -> Iterator[Counts]:
    """Pretend that there is a GPU. Yield the counts, from zero."""
    _counts.clear()
    convert = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    autocast, scaler = torch.autocast, torch.amp.GradScaler
    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype
    patches = {
        "autocast": lambda _, *args, **kwargs: autocast("cpu", *args, **kwargs),
        "amp.GradScaler": lambda _, **kwargs: scaler("cpu", **kwargs),
        # In C++ all tensors are on the CPU.
        "optim.Optimizer._group_tensors_by_device_and_dtype": lambda *args, **kwargs: {
            (CUDA, dtype): group for (_, dtype), group in grouped(*args, **kwargs).items()
        },
        "cuda.Stream": mock.MagicMock(),
        "cuda.current_stream": mock.MagicMock(),
        "cuda.stream": lambda _: contextlib.nullcontext(),
        "cuda.Event": mock.MagicMock(),
        "cuda.mem_get_info": lambda _: (1 << 30, 1 << 30),
    }
    try:
        with contextlib.ExitStack() as stack:
            for name, stand_in in patches.items():
                stack.enter_context(mock.patch(f"torch.{name}", stand_in))
            stack.enter_context(_Mode())
            yield _counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(convert)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    with torch._C.DisableTorchFunctionSubclass():
        if name in ("to", "cpu", "cuda", "type_as", "pin_memory") and isinstance(args[0], Tensor):
            return _moved(name, args, dict(kwargs))
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        on_device = any(isinstance(tensor, OnDevice) for tensor in tensors)
        if isinstance(kwargs.get("device"), torch.device | str):
            on_device |= torch.device(kwargs["device"]).type == "cuda"
            kwargs = {**kwargs, "device": CPU}
        if not on_device:
            return func(*args, **kwargs)
        _check(name, args, tensors)
        made = func(*args, **kwargs)
        if isinstance(args[0] if args else None, Tensor) and made is args[0]:
            return made
        return tree_map(lambda value: _wrapped(value) if isinstance(value, Tensor) else value, made)


def _check(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Count what the operation waits for; raise if it mixes devices."""
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim > 0]
    if name in ("__getitem__", "__setitem__"):
        index = tree_flatten(args[1])[0]
        masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool and i.ndim]
        if masks:
            _counts.waits[f"{_line()} [index by mask]"] += len(masks)
        if others:
            _counts.copies[f"{_line()} [index on the CPU]"] += len(others)
        if others and not isinstance(args[0], OnDevice):
            raise RuntimeError(f"A tensor on the CPU is indexed by one on cuda:0: {_line()}")
    elif name == "copy_" and others:
        (_counts.copies if isinstance(args[0], OnDevice) else _counts.waits)[_line()] += len(others)
    elif others and name not in _ABOUT:
        raise RuntimeError(f"{name} gets tensors on cuda:0 and on the CPU: {_line()}")
    if name in _WAITS:
        _counts.waits[f"{_line()} [{name}]"] += 1


def _moved(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the result of Tensor.to and its relatives."""
    source, *rest = args
    plain: Any = source.as_subclass(Tensor) if isinstance(source, OnDevice) else source
    if name == "pin_memory":
        pinned: Any = plain.clone()
        pinned.is_pinned_here = True
        return pinned
    target = {"cpu": CPU, "cuda": CUDA}.get(name, kwargs.pop("device", None))
    for position, value in enumerate(rest):
        if isinstance(value, torch.device | str):
            target, rest[position] = torch.device(value), CPU
        elif isinstance(value, Tensor):
            target = value.device
            rest[position] = value.as_subclass(Tensor) if isinstance(value, OnDevice) else value
    made = plain.to(*rest, **kwargs) if name in ("to", "type_as") else plain
    target = source.device if target is None else torch.device(target)
    if target.type != "cuda":
        if isinstance(source, OnDevice):
            _counts.waits[f"{_line()} [copy to the host]"] += 1
        return made.clone() if made is plain and isinstance(source, OnDevice) else made
    if not isinstance(source, OnDevice):
        if not (kwargs.get("non_blocking") and getattr(source, "is_pinned_here", False)):
            _counts.copies[_line()] += 1
        made = made.clone() if made is plain else made
    return source if made is plain else _wrapped(made)


def _wrapped(tensor: Tensor) -> Tensor:
    if isinstance(tensor, OnDevice):
        return tensor
    if tensor.is_leaf and tensor.requires_grad:
        # A new parameter, which stays a leaf.
        return tensor.detach().as_subclass(OnDevice).requires_grad_()
    return tensor.as_subclass(OnDevice)


def _line() -> str:
    """Return the innermost line of raysl on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/raysl/" in frame.filename and "/tests/" not in frame.filename:
            return f"{frame.filename.rsplit('/raysl/', 1)[1]}:{frame.lineno} {(frame.line or '')[:90]}"
    return "outside of raysl"
