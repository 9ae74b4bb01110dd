"""Whether an engine is ever slower than PyTorch: `python -m benchmarks.never_slower [MODEL ...]`.

Every convolutional classifier of torchvision at 0, 50 and 70 % sparsity (uniform, magnitude), batch 4, 224 x 224, two
threads: the engine against the better of eager NCHW and eager channels_last, both with BatchNorm folded; median of 15
alternating runs, twice. Figures go to benchmarks/results/never_slower.json; models that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

import sparsekit as sk
from sparsekit import bench
from sparsekit.engine.tuning import cpu_name
from sparsekit.profile import seconds_in_turns

RESULTS = Path(__file__).parent / "results" / "never_slower.json"
SPARSITIES = (0.0, 0.5, 0.7)
TRANSFORMERS = ("vit", "swin", "maxvit")
BATCH, RUNS, TIMES = 4, 15, 2


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=names())
    parser.add_argument("--again", action="store_true", help="measure models that are in the file already")
    args = parser.parse_args()
    torch.set_num_threads(2)
    bench.keep_freed_memory()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cpu": cpu_name(), "models": {}}
    for name in args.models:
        for sparsity in SPARSITIES:
            cell = f"{name}, {100 * sparsity:g} %"
            if cell not in results["models"] or args.again:
                results["models"][cell] = measure(name, sparsity)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            ratios = results["models"][cell]["ratios"]
            print(
                f"{cell}: {' '.join(f'{r:.2f}' for r in ratios)}{'  slower' if min(ratios) > 1.05 else ''}", flush=True
            )
    worst = max(results["models"].items(), key=lambda item: min(item[1]["ratios"]))
    print(f"worst, the better of two: {worst[0]} {min(worst[1]['ratios']):.2f}")


if __name__ == "__main__":
    main()
