"""README's speed table and picture: `make figures`. What was stopped half-way goes on, on the same CPU and torch.

ResNet-50 at 224 x 224, uniform sparsity, conv1 and fc dense: the whole model in its three uses (sparsekit.bench), and its
sparse convolutions alone (benchmarks.layers). Figures go to benchmarks/results, the table between the marks in README.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import layers
from benchmarks.readme import fill
from sparsekit import bench
from sparsekit.engine.tuning import cpu_name
from sparsekit.job import resnet50
from sparsekit.transfer.report import speed_plot

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "resnet50.json"
SPARSITIES = [0.5, 0.8, 0.9, 0.95, 0.98]
RUNS = {"inference": 7, "linear": 7, "full": 5}
# Title: what was measured, and which way.
ROWS = {
    "inference, `sk.compile`": ("inference", "engine"),
    "inference, sparse modules": ("inference", "sparse"),
    "linear finetuning step (frozen backbone), `sk.compile`": ("linear", "engine"),
    "linear finetuning step, sparse modules": ("linear", "sparse"),
    "full finetuning step, `sk.compress_`": ("full", "compressed"),
    "full finetuning step, sparse modules": ("full", "sparse"),
}
LAYER_ROWS = {
    "sparse convolutions alone, forward": "forward",
    "… input gradient and masked weight gradient": "backward",
}


def measure(results: dict, batch: int, save) -> None:
    """Fill ``results`` with what is missing in it; start anew if nothing is, or if it is another machine's."""
    here = {"cpu": cpu_name(), "torch": torch.__version__}
    is_other = any(results.get(key) != value for key, value in here.items())
    if is_other or {"layers", *RUNS} <= results.keys():
        results.clear()
        results.update(here)
    torch.set_num_threads(2)
    bench.keep_freed_memory()
    if "layers" not in results:
        record = layers.main(["--batch", str(batch), "--sparsity", *map(str, SPARSITIES), "--runs", "11"])
        results["layers"] = {key: record[key] for key in ("batch", "threads", "isa", "summary", "spread")}
        save()
    for kind, runs in RUNS.items():
        if kind not in results:
            models = {f"{100 * level:g} %": resnet50(level) for level in SPARSITIES}
            results[kind] = bench.measure(models, torch.randn(batch, 3, 224, 224), kind, runs=runs)
            save()


def table(results: dict) -> str:
    """The figures in Markdown."""
    names = [f"{100 * level:g} %" for level in SPARSITIES]
    lines = [
        f"ResNet-50 at 224 × 224, batch {results['layers']['batch']}, float32, {results['layers']['threads']} threads of an "
        f"{results['cpu']} ({results['layers']['isa']}), torch {results['torch']}; uniform sparsity, conv1 and fc dense. "
        "Speed-up over dense PyTorch: the fastest of NCHW eager, channels_last eager and `torch.compile`; for the "
        "convolutions alone the faster of the two eager ones. Alternating runs, medians ± half the distance between the "
        f"quartiles (of a layer's noisiest function: {100 * results['layers']['spread']:.0f} %), layout conversion included. "
        "**Below 1, sparse loses.** `make figures` makes this table.",
        "",
        "| | dense | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for title, (kind, way) in ROWS.items():
        dense = results[kind]["dense"]
        rows = [results[kind][way][name] for name in names]
        cells = [f"{row['speedup']:.2f}× ± {100 * row['spread']:.0f} %" for row in rows]
        lines.append(f"| {title} | {dense[dense['fastest']]:.0f} ms | " + " | ".join(cells) + " |")
    for title, key in LAYER_ROWS.items():
        cells = [f"{results['layers']['summary'][name[:-2]][key]:.2f}×" for name in names]
        lines.append(f"| {title} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measure(results, args.batch, lambda: RESULTS.write_text(json.dumps(results, indent=1) + "\n"))
    fill("figures", table(results))
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "speedup.png").write_bytes(speed_plot({kind: results[kind] for kind in RUNS}))


if __name__ == "__main__":
    main()
