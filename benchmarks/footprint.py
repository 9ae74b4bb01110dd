"""What an engine costs besides running: `python -m benchmarks.footprint`. ResNet-50, 224 x 224, two threads.

Seconds to compile without tuning, with tuning, and with what tuning kept on disk, seconds to load a saved engine, and
memory. Weights: what a compiled engine takes, and a loaded one, with what of its file is in memory; against 1.3 x (8 bytes
a non-zero of the pruned layers + 4 bytes a weight of the others). An image on its way: against two times its largest
pair of tensors that live at once. Figures go to benchmarks/results/footprint, a file for every CPU, a sentence to README.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
import time
from pathlib import Path

import torch

import sparsekit as sk
from benchmarks import machines
from benchmarks.readme import fill
from sparsekit import _ops
from sparsekit.engine.plan import last_uses
from sparsekit.job import resnet50

RESULTS = machines.ROOT / "benchmarks" / "results" / "footprint"
BATCH = 16


def resident() -> float:
    """Megabytes of this process, mapped files included, once it has given back what it can spare."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024e-6


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


def limit(model: torch.nn.Module) -> float:
    """Megabytes that weights may take."""
    weights = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    return 1.3e-6 * sum(8 * int((w != 0).sum()) if (w == 0).any() else 4 * w.numel() for w in weights)


def measure(level: float, folder: Path) -> dict:
    os.environ["SPARSEKIT_CACHE"] = str(folder)
    images = torch.randn(BATCH, 3, 224, 224)
    before = resident()
    model = sk.densify_(resnet50(level)).eval()
    untuned, engine = seconds(lambda: sk.compile(model, images, autotune=False))
    wanted, model = limit(model), None
    compiled, engine = resident() - before, None
    model = sk.densify_(resnet50(level)).eval()
    tuned, _ = seconds(lambda: sk.compile(model, images))
    cached, engine = seconds(lambda: sk.compile(model, images))
    engine.save(folder / "engine.sk")
    schedule = engine._schedule_for((images,))
    cell = {
        "compile_untuned_s": untuned, "compile_tuned_s": tuned, "compile_cached_s": cached,
        "weights_limit_mb": wanted,
        "compiled_mb": compiled,
        "chain_mb_an_image": sum(4e-6 * _ops.program_floats(chain.number) for chain in schedule.chains),
        "pair_limit_mb": 2 * largest_pair(schedule),
        "file_mb": (folder / "engine.sk").stat().st_size / 1e6,
    }  # fmt: skip
    model = engine = schedule = None
    before = resident()
    load, engine = seconds(lambda: sk.load(folder / "engine.sk"))
    loaded = resident() - before
    del engine  # it has to be there until here
    return cell | {"load_s": load, "loaded_mb": loaded}


def summary(results: dict) -> str:
    """A sentence about a machine."""

    def span(key: str, digits: int) -> str:
        values = [cell[key] for cell in results["cells"].values()]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    weights = ", ".join(
        f"{cell['compiled_mb']:.0f} MB at {level} (allowed {cell['weights_limit_mb']:.0f}; {cell['loaded_mb']:.0f} when "
        "loaded)"
        for level, cell in results["cells"].items()
    )
    return (
        f"On {results['cpu']} ({results['isa']}), torch {results['torch']}, at commit {results['commit']}, ResNet-50 "
        f"compiles in {span('compile_untuned_s', 1)} s without tuning, {span('compile_tuned_s', 1)} s with it, "
        f"{span('compile_cached_s', 1)} s once its measurements are on disk, and loads from a file in "
        f"{span('load_s', 2)} s. Its weights take {weights}; an image takes "
        f"{max(cell['chain_mb_an_image'] for cell in results['cells'].values()):.1f} MB on its way."
    )


def main() -> None:
    torch.set_num_threads(2)
    results = machines.here() | {"batch": BATCH, "cells": {}}
    with tempfile.TemporaryDirectory() as folder:
        measure(0.9, Path(folder))  # what the first call of everything costs
    for level in (0.8, 0.9, 0.95, 0.98):
        with tempfile.TemporaryDirectory() as folder:
            cell = {key: round(value, 3) for key, value in measure(level, Path(folder)).items()}
        results["cells"][f"{100 * level:g} %"] = cell
        print(f"{100 * level:g} %:", ", ".join(f"{key} {value:g}" for key, value in cell.items()), flush=True)
    machines.write(machines.file_in(RESULTS), results)
    fill("footprint", "\n".join(map(summary, machines.all_in(RESULTS))))


if __name__ == "__main__":
    main()
