"""Measures programs without knowing what they compute: compile phases, HLO, memory, interleaved times."""

import datetime
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

# `jax.named_scope` of a layer, to find its instructions in the HLO.
SCOPE = "benchmarked_layer"

_LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_lowering_seconds: list[float] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _lowering_seconds.append(seconds) if event == _LOWERING else None
)


def machine() -> dict[str, Any]:
    """Where and when something is measured, as results say it."""
    platform = jax.devices()[0].platform
    return {
        "date": datetime.date.today().isoformat(),
        "platform": platform,
        "simulated": platform == "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
    }


def compile_and_describe(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Compiles a jitted function for `arguments` (arrays or ShapeDtypeStruct) and says what that took and gave.

    Seconds: `trace` is Python to jaxpr, planning included; `lower` is jaxpr to StableHLO; `xla` is the rest, to machine
    code. Bytes: temporary memory of one device. Lines: instructions of the optimized HLO, which has one on each line;
    those that stem from a layer's forward (recomputation included) and backward are counted apart.
    """
    _lowering_seconds.clear()
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    lower = max(_lowering_seconds, default=0.0)  # those of nested functions are inside that of the outermost
    # Only lines within a computation are indented: no headers, no closing braces.
    lines = [line for line in compiled.as_text().splitlines() if line.startswith("  ")]
    names = [match[1] for line in lines if (match := re.search(r'op_name="([^"]*)"', line)) and SCOPE in match[1]]
    backward = [name for name in names if "transpose(" in name and "rematted_computation" not in name]
    return {
        "trace_seconds": middle - start - lower,
        "lower_seconds": lower,
        "xla_seconds": end - middle,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "hlo_lines": len(lines),
        "layer_forward_lines": len(names) - len(backward),
        "layer_backward_lines": len(backward),
        "permutes": sum(bool(re.search(r" collective-permute(-start)?\(", line)) for line in lines),
    }


def interleave(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds per run and round: A B C, then C B A, and so on, so that a drift of the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        for index in range(len(runs))[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(runs[index]())
            seconds[index].append(time.perf_counter() - start)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios of each round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def check_equal(found: Any, wanted: Any, what: str) -> None:
    """Stops the benchmark if two contestants do not compute the same: their times would mean nothing.

    The tolerance leaves room for the reduced precision of matrix products on accelerators, not for a missing term.
    """
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error < 1e-2:
            raise SystemExit(f"{what} does not compute what the plain loop computes: relative error {error:.1e}.")
