"""Where an engine's time per image jumps: `python -m benchmarks.cliffs`. ResNet-50, uniform 95 %, conv1 and fc dense.

For every image size and number of threads, batches 1 to 33, in turns: milliseconds an image, and the largest rise from
one batch size to the next from 4 on. Figures go to benchmarks/results/cliffs.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import sparsekit as sk
from benchmarks.timing import median
from sparsekit import bench
from sparsekit.engine.tuning import cpu_name
from sparsekit.job import resnet50
from sparsekit.profile import seconds_in_turns

RESULTS = Path(__file__).parent / "results" / "cliffs.json"
SIZES = {"32x32": (32, 32), "96x96": (96, 96), "224x224": (224, 224), "225x225": (225, 225), "320x256": (320, 256)}
BATCHES = range(1, 34)


def measure(model: torch.nn.Module, size: tuple[int, int], runs: int) -> list[float]:
    """Milliseconds an image for every batch size."""
    engine = sk.compile(model, torch.randn(4, 3, *size), autotune=False)
    images = torch.randn(max(BATCHES), 3, *size)
    calls = {str(batch): lambda batch=batch: engine(images[:batch]) for batch in BATCHES}
    seconds = seconds_in_turns(calls, runs=runs)
    return [1e3 * seconds[str(batch)] / batch for batch in BATCHES]


def worst_rise(milliseconds: list[float]) -> tuple[float, int]:
    """The largest ratio of neighbouring batch sizes from 4 on, and the smaller of the two."""
    return max((milliseconds[b] / milliseconds[b - 1], b) for b in range(4, len(milliseconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    bench.keep_freed_memory()
    model = sk.densify_(resnet50(0.95)).eval()
    results = {"cpu": cpu_name(), "torch": torch.__version__, "sparsity": 0.95, "cells": {}}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, size in SIZES.items():
            milliseconds = measure(model, size, args.runs if threads == 2 else max(3, args.runs // 2))
            rise, batch = worst_rise(milliseconds)
            results["cells"][f"{name}, {threads} threads"] = {
                "milliseconds": [round(m, 4) for m in milliseconds],
                "worst_rise": round(rise, 3),
                "at_batch": batch,
            }
            print(
                f"{name}, {threads} threads: {milliseconds[0]:.2f} ms at batch 1, {median(milliseconds):.2f} in the "
                f"middle, worst rise {rise:.2f} from batch {batch} to {batch + 1}",
                flush=True,
            )
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
