"""What an engine costs besides running: `python -m benchmarks.footprint`. ResNet-50, 224 x 224, two threads.

Seconds to compile without tuning, with tuning, and with what tuning kept on disk, seconds to load a saved engine, and
memory: weights after loading against 1.3 x (8 bytes a non-zero + 4 bytes a dense weight), and what an image takes on its
way against two times its largest pair of tensors that live at once. Figures go to benchmarks/results/footprint.json.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import torch

import sparsekit as sk
from sparsekit import _ops
from sparsekit.engine.plan import last_uses
from sparsekit.engine.tuning import cpu_name
from sparsekit.job import resnet50

RESULTS = Path(__file__).parent / "results" / "footprint.json"
BATCH = 16


def resident(trim: bool = True) -> float:
    """Megabytes of this process, once it has given back what it can spare."""
    if trim:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def seconds(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def largest_pair(schedule) -> float:
    """Megabytes of the two largest tensors that live at the same time, for one image."""
    steps = range(len(schedule.plan.steps))
    uses = [schedule.plan.uses(number) for number in steps]
    unused = last_uses(uses, schedule.plan.outputs)
    size = {slot: torch.Size(dims).numel() for slot, dims in schedule.sizes.items()}
    live, most = set(range(len(schedule.plan.inputs))), 0
    for (_, writes), dead in zip(uses, unused):
        live |= set(writes)
        most = max(most, sum(sorted(size.get(slot, 0) for slot in live)[-2:]))
        live -= set(dead)
    return 4e-6 * most


def compiled(level: float, images: torch.Tensor, folder: Path) -> dict:
    """What compiling takes; leaves an engine in ``folder``, and nothing in memory."""
    model = sk.densify_(resnet50(level)).eval()
    os.environ["SPARSEKIT_CACHE"] = str(folder)
    untuned, _ = seconds(lambda: sk.compile(model, images, autotune=False))
    tuned, _ = seconds(lambda: sk.compile(model, images))
    cached, engine = seconds(lambda: sk.compile(model, images))
    engine.save(folder / "engine.sk")
    weights = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    nnz, dense = sum(int((w != 0).sum()) for w in weights), sum(w.numel() for w in weights)
    schedule = engine._schedule_for((images,))
    return {
        "compile_untuned_s": untuned, "compile_tuned_s": tuned, "compile_cached_s": cached,
        "weights_limit_mb": 1.3e-6 * (8 * nnz + 4 * dense),
        "chain_mb_an_image": sum(4e-6 * _ops.program_floats(chain.number) for chain in schedule.chains),
        "pair_limit_mb": 2 * largest_pair(schedule),
    }  # fmt: skip


def measure(level: float, folder: Path) -> dict:
    cell = compiled(level, torch.randn(BATCH, 3, 224, 224), folder)
    before = resident()
    load, engine = seconds(lambda: sk.load(folder / "engine.sk"))
    weights = resident() - before
    del engine  # it has to be there until here
    return {**cell, "load_s": load, "weights_mb": weights, "file_mb": (folder / "engine.sk").stat().st_size / 1e6}


def main() -> None:
    torch.set_num_threads(2)
    results = {"cpu": cpu_name(), "torch": torch.__version__, "batch": BATCH, "cells": {}}
    with tempfile.TemporaryDirectory() as folder:
        measure(0.9, Path(folder))  # what the first call of everything costs
    for level in (0.8, 0.9, 0.95, 0.98):
        with tempfile.TemporaryDirectory() as folder:
            cell = {key: round(value, 3) for key, value in measure(level, Path(folder)).items()}
        results["cells"][f"{100 * level:g} %"] = cell
        print(f"{100 * level:g} %:", ", ".join(f"{key} {value:g}" for key, value in cell.items()), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
