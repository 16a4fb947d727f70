"""Copy from the host to a device without making the host wait.

A copy from ordinary memory stops the host until the device has finished all work before it. A copy from pinned memory
does not, so the host prepares the next step while the device computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: Tensor | npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor on the device, copied in the order of the device's other work.

    Args:
        values: a tensor, or a writable array, which may be shared with the result on the CPU.
        device: where to copy it.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_on_side_stream(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device, copied while the device computes; later work on the device waits for the copy.

    Args:
        values: a tensor on the CPU.
        device: where to copy it.
    """
    if device.type != "cuda":
        return values.to(device)
    return made_beside(lambda: [values.pin_memory().to(device, non_blocking=True)], device)[0]


def made_beside(make: Callable[[], list[Tensor]], device: torch.device) -> list[Tensor]:
    """Return tensors that `make` puts on a GPU while it computes; later work on the GPU waits for them."""
    side, compute = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        made = make()
    compute.wait_stream(side)
    # The memory belongs to the side stream and may be used again only when the computation has finished.
    for tensor in made:
        tensor.record_stream(compute)
    return made


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
