"""Measure how fast this machine decodes JPEG files: one CPU core as the stream does, and the training device.

The numbers say whether a run should have `--stream.decode gpu`: how many CPU cores the GPU replaces, and how much the
pixels differ.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from raysl.diagnostics.bench import Bench, Numbers
from raysl.stream.decode import decode
from raysl.stream.gpu_decode import decode_on

_HEIGHT, _WIDTH = 375, 500  # the usual size in ImageNet


def decoding(bench: Bench) -> Numbers:
    """Measure decoding of drawn photographs in images per second, and the mean difference of a pixel, 0 to 255."""
    files = [photo(number) for number in range(bench.config.batch_size)]

    def on_device() -> list[Tensor]:
        return decode_on(files, bench.device)

    def on_cpu() -> list[Tensor]:
        return [decode(file) for file in files]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu_s = bench.seconds(on_cpu, times=3)
    finally:
        torch.set_num_threads(threads)
    device_s = bench.seconds(on_device)
    ours, theirs = torch.stack(on_cpu()).float(), torch.stack(on_device()).cpu().float()
    return {
        "cpu_core_images_per_s": len(files) / cpu_s,
        "device_images_per_s": len(files) / device_s,
        "cores_replaced": cpu_s / device_s,
        "mean_difference": (ours - theirs).abs().mean().item(),
        "largest_difference": (ours - theirs).abs().max().item(),
        "resizes_bytes_on_device": _resizes_bytes(bench.device),
    }


def photo(number: int) -> bytes:
    """Return a JPEG file of 500 x 375 pixels that is as large as a photograph: smooth colors and noise."""
    random = np.random.default_rng(number)
    coarse_1chw = torch.from_numpy(random.integers(0, 256, (1, 3, 12, 16)).astype(np.float32))
    smooth_hwc = interpolate(coarse_1chw, (_HEIGHT, _WIDTH), mode="bicubic")[0].permute(1, 2, 0).numpy()
    pixels_hwc = smooth_hwc + random.normal(0, 14, smooth_hwc.shape)
    pixels_hwc = np.ascontiguousarray(pixels_hwc.clip(0, 255).astype(np.uint8))
    file: bytes = simplejpeg.encode_jpeg(pixels_hwc, quality=88)
    return file


def _resizes_bytes(device: torch.device) -> bool:
    """Return whether the device cuts and resizes uint8 images as the stream does on the CPU, antialiased."""
    image_1chw = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
    try:
        interpolate(image_1chw, (32, 32), mode="bilinear", antialias=True)
    except RuntimeError:  # also NotImplementedError
        return False
    return True
