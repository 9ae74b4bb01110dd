"""How the layer benchmarks take times: see sparsekit.bench."""

from statistics import median

from sparsekit.bench import interleave, keep_freed_memory, spread

__all__ = ["interleave", "keep_freed_memory", "median", "spread"]
