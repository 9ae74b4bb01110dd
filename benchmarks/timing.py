"""How times are taken: alternating runs in one process, warmed up, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleave(functions: dict[str, Callable[[], object]], runs: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every function, `runs` of each, taken in turns so that drift hits all alike.

    Every timed call follows an untimed one of the same function: else the first to run after one that freed large
    tensors would pay for the page faults of memory that its predecessor gave back.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(warmup + runs):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if run >= warmup:
                times[name].append(elapsed)
    return times


def median(times: list[float]) -> float:
    """The middle time."""
    return statistics.median(times)


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median: the noise of a figure."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / statistics.median(times)
