"""Timing several functions fairly on a machine whose speed wanders."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def interleaved_medians_s(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of one call of each function, results waited for.

    The functions take turns, so that a slow spell of the machine falls on all of them; two calls of each
    before the first turn compile and warm up.
    """
    for call in functions.values():
        for _ in range(2):
            jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, call in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}
