"""How times are taken: alternating runs in one process, warmed up, median and spread."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system, for all that runs in this process.

    Else whoever allocates after somebody's large tensor was freed pays for fresh pages: up to 20 ms for 25 MB on a
    virtual machine, more than many layers take, and at random to one side or the other.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)
    libc.mallopt(m_arena_max, 1)


def interleave(functions: dict[str, Callable[[], object]], runs: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every function, `runs` of each, taken in turns so that drift hits all alike.
"""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(warmup + runs):
        for name, function in functions.items():
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
