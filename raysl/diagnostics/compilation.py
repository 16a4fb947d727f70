"""Measure whether torch.compile makes a training step faster, and name the flag to use."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import torch

from raysl.diagnostics.bench import Bench, Numbers
from raysl.diagnostics.measurement import first_batch

# Compiling takes minutes at the start of a run, and smaller differences are within the noise of a measurement.
_LEAST_GAIN = 1.02


def compiled_step(bench: Bench) -> Numbers:
    """Measure a PIRL step with and without torch.compile. On the CPU nothing is compiled."""
    on_gpu = bench.device.type == "cuda"
    found: Numbers = {}
    with torch.compiler.set_stance("default" if on_gpu else "force_eager"):
        for name in ("eager", "compiled"):
            worker = bench.worker(compile=name == "compiled")
            model, batch = worker.distributed(), first_batch(worker)
            started = time.perf_counter()
            worker.update(model, batch, 1e-3)
            bench.finish()
            found[f"{name}_first_step_s"] = time.perf_counter() - started
            found[f"{name}_ms"] = 1e3 * bench.seconds(functools.partial(worker.update, model, batch, 1e-3))
            if on_gpu:
                found[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
    faster = float(found["eager_ms"]) > _LEAST_GAIN * float(found["compiled_ms"])
    return {
        **found,
        "faster": "compiled" if faster else "eager",
        "flag": "--compile" if faster else "--no-compile",
    }


def advice(checks: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    """Return which of the two to use on this machine, as a sentence; "" if it was not measured."""
    if not (found := checks.get("compile")):
        return ""
    return (
        f"Use {found['flag']}: a step takes {found['compiled_ms']:.4g} ms compiled and {found['eager_ms']:.4g} ms "
        f"eager ({precision}), and the first compiled step {found['compiled_first_step_s']:.4g} s."
    )
