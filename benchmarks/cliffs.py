"""Where an engine's time per image jumps: `python -m benchmarks.cliffs`. ResNet-50, uniform 95 %, conv1 and fc dense.

For every image size and number of threads, batches 1 to 33, in turns: milliseconds an image, and the largest rise from
one batch size to the next from 4 on. Of 29 ratios of noisy times the largest is mostly noise: batch sizes between which
time seems to rise by more than 10 % are taken again, the two of them in turns, and that ratio counts. Figures go to
benchmarks/results/cliffs, a file for every CPU, a sentence to README.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import sparsekit as sk
from benchmarks import machines
from benchmarks.readme import fill
from benchmarks.timing import interleave, keep_freed_memory, median
from sparsekit.job import resnet50
from sparsekit.profile import seconds_in_turns

RESULTS = machines.ROOT / "benchmarks" / "results" / "cliffs"
SIZES = {"32x32": (32, 32), "96x96": (96, 96), "224x224": (224, 224), "225x225": (225, 225), "320x256": (320, 256)}
BATCHES = range(1, 34)
FIRST = 4  # batch from which on a rise counts
DOUBTFUL, RUNS_AGAIN = 1.1, 15


def runs_of(model: torch.nn.Module, size: tuple[int, int]) -> dict[int, Callable]:
    """For every batch size, what runs an engine on so many images."""
    engine = sk.compile(model, torch.randn(4, 3, *size), autotune=False)
    images = torch.randn(max(BATCHES), 3, *size)
    return {batch: lambda batch=batch: engine(images[:batch]) for batch in BATCHES}


def rises(runs: dict[int, Callable], milliseconds: list[float]) -> dict[int, float]:
    """By batch size, the time an image takes in the next larger one over that in it."""
    found = {b: milliseconds[b] / milliseconds[b - 1] for b in BATCHES if FIRST <= b < max(BATCHES)}
    for batch, rise in found.items():
        if rise > DOUBTFUL:
            times = interleave({"one": runs[batch], "more": runs[batch + 1]}, RUNS_AGAIN)
            found[batch] = median(times["more"]) / (batch + 1) / (median(times["one"]) / batch)
    return found


def summary(results: dict) -> str:
    """A sentence about a machine."""
    worst = max(results["cells"], key=lambda name: results["cells"][name]["worst_rise"])
    cell = results["cells"][worst]
    return (
        f"On {results['cpu']} ({results['isa']}), torch {results['torch']}, at commit {results['commit']}: by "
        f"{100 * (cell['worst_rise'] - 1):.0f} % at most, from batch {cell['at_batch']} to {cell['at_batch'] + 1} of "
        f"{worst.replace('x', ' × ')}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    model = sk.densify_(resnet50(0.95)).eval()
    results = machines.here() | {"sparsity": 0.95, "cells": {}}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, size in SIZES.items():
            runs = runs_of(model, size)
            seconds = seconds_in_turns({str(batch): run for batch, run in runs.items()}, runs=args.runs)
            milliseconds = [1e3 * seconds[str(batch)] / batch for batch in BATCHES]
            found = rises(runs, milliseconds)
            batch = max(found, key=found.get)
            results["cells"][f"{name}, {threads} thread{'s' * (threads > 1)}"] = {
                "milliseconds": [round(m, 4) for m in milliseconds],
                "worst_rise": round(found[batch], 3),
                "at_batch": batch,
            }
            print(
                f"{name}, {threads} threads: {milliseconds[0]:.2f} ms at batch 1, {median(milliseconds):.2f} in the "
                f"middle, worst rise {found[batch]:.2f} from batch {batch} to {batch + 1}",
                flush=True,
            )
            machines.write(machines.file_in(RESULTS), results)
    fill("cliffs", "\n".join(map(summary, machines.all_in(RESULTS))))


if __name__ == "__main__":
    main()
