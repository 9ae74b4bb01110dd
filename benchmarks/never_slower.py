"""Whether an engine is ever slower than PyTorch: `python -m benchmarks.never_slower [MODEL ...]`.

Every convolutional classifier of torchvision at 0, 50 and 70 % sparsity (uniform, magnitude), batch 4, 224 x 224, two
threads: the engine against the better of eager NCHW and eager channels_last, both with BatchNorm folded; median of 15
alternating runs, twice. All models take hours, so figures are kept one by one, with the commit they are of, in
benchmarks/results/never_slower, a file for every CPU; those that are there are not measured again. The table of all
machines goes to docs/never_slower.md, a summary to README.
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

import sparsekit as sk
from benchmarks import machines
from benchmarks.readme import fill
from sparsekit import bench
from sparsekit.profile import seconds_in_turns

RESULTS = machines.ROOT / "benchmarks" / "results" / "never_slower"
SPARSITIES = (0.0, 0.5, 0.7)
TRANSFORMERS = ("vit", "swin", "maxvit")
BATCH, RUNS, TIMES, LIMIT = 4, 15, 2, 1.05


def names() -> list[str]:
    """torchvision's convolutional classifiers; regnet_y_128gf, 2.6 GB, is left out."""
    every = torchvision.models.list_models(torchvision.models)
    return [name for name in every if not name.startswith(TRANSFORMERS) and name != "regnet_y_128gf"]


def build(name: str, sparsity: float, images: torch.Tensor) -> nn.Module:
    """The model with random weights, pruned, BatchNorm calibrated so that nothing overflows or vanishes."""
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    if sparsity:
        sk.pruning.magnitude_(model, sparsity=sparsity, distribution="uniform")
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        sk.pruning.recalibrate_batchnorm_(model, [images])
    return model.eval()


@torch.no_grad()
def measure(name: str, sparsity: float, runs: int = RUNS, times: int = TIMES) -> dict:
    """Milliseconds of every way, and the engine's over the better of the others, for each of ``times``."""
    size = 299 if name == "inception_v3" else 224
    images = torch.randn(BATCH, 3, size, size)
    model = build(name, sparsity, images)
    engine = sk.compile(model, images)
    folded = fuse(model)
    last, images_last = fuse(model).to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    ways = {
        "engine": lambda: engine(images),
        "eager": lambda: folded(images),
        "channels_last": lambda: last(images_last),
    }
    results = [seconds_in_turns(ways, runs=runs) for _ in range(times)]
    return {
        "milliseconds": {way: [round(1e3 * seconds[way], 2) for seconds in results] for way in ways},
        "ratios": [round(s["engine"] / min(s["eager"], s["channels_last"]), 3) for s in results],
    }


def cell(name: str, sparsity: float) -> str:
    return f"{name}, {100 * sparsity:g} %"


def summary(results: dict) -> str:
    """A sentence about a machine: how many were measured, and which of them are slower."""
    best = {key: min(one["ratios"]) for key, one in results["cells"].items()}
    slower = [f"{key} ({ratio:.2f})" for key, ratio in sorted(best.items(), key=lambda i: -i[1]) if ratio > LIMIT]
    return (
        f"{results['cpu']} ({results['isa']}), torch {results['torch']}: "
        f"{len(best)} of {len(names()) * len(SPARSITIES)} measured, "
        f"{f'{len(slower)} slower: ' + ', '.join(slower) if slower else 'none slower'}."
    )


def table(results: dict) -> str:
    """The engine's time over PyTorch's in Markdown, a row for every model; the better of the two measurements."""
    lines = [
        f"{summary(results)} Batch {BATCH}, 2 threads; the engine's time over that of the faster of NCHW eager and "
        f"channels_last eager, medians of {RUNS} alternating runs, the better of {TIMES} measurements.",
        "",
        "| model | " + " | ".join(f"{100 * sparsity:g} %" for sparsity in SPARSITIES) + " | at commit |",
        "| --- |" + " ---: |" * (len(SPARSITIES) + 1),
    ]
    for name in names():
        known = [results["cells"].get(cell(name, sparsity)) for sparsity in SPARSITIES]
        if any(known):
            ratios = [f"{min(one['ratios']):.2f}" if one else "" for one in known]
            commits = dict.fromkeys(one["commit"] for one in known if one)
            lines.append(f"| {name} | " + " | ".join([*ratios, ", ".join(commits)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=names())
    parser.add_argument("--again", action="store_true", help="measure models that are in the file already")
    args = parser.parse_args()
    torch.set_num_threads(2)
    bench.keep_freed_memory()
    path = machines.file_in(RESULTS)
    here = machines.here()
    commit = here.pop("commit")
    results = here | {"cells": machines.read(path).get("cells", {})}
    for name in args.models:
        for sparsity in SPARSITIES:
            key = cell(name, sparsity)
            if key in results["cells"] and not args.again:
                continue
            ratios = (measured := measure(name, sparsity))["ratios"]
            results["cells"][key] = {"commit": commit} | measured
            machines.write(path, results)
            slower = "  slower" if min(ratios) > LIMIT else ""
            print(f"{key}: {' '.join(f'{ratio:.2f}' for ratio in ratios)}{slower}", flush=True)
    everywhere = machines.all_in(RESULTS)
    fill("never slower", "\n\n".join(map(table, everywhere)), machines.ROOT / "docs" / "never_slower.md")
    fill("never slower", "\n".join(map(summary, everywhere)))


if __name__ == "__main__":
    main()
