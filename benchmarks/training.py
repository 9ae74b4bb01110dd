"""Training on sparse modules against dense: `python -m benchmarks.training`. Goes on where it was stopped.

A whole step (forward, backward, SGD with momentum) of ResNet-50 at 224 x 224 with its parts; other batches,
distributions and models; what a change of all masks costs; the memory of a step, each way in a process of its own; an
epoch of linear finetuning with a frozen backbone, augmentation left out and included. Two threads, float32. Figures go to
benchmarks/results/training, a file for every CPU; the tables of all of them between the marks in README, the picture to
docs/training.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import v2

import sparsekit as sk
from benchmarks import machines
from benchmarks.readme import fill
from benchmarks.timing import interleave, keep_freed_memory, median
from sparsekit import bench
from sparsekit.pruning import first_and_last
from sparsekit.transfer.models import MobileNetV1, replace_head_
from sparsekit.transfer.report import png, pyplot

RESULTS = machines.ROOT / "benchmarks" / "results" / "training"
MAIN = "ResNet-50, batch 16"
MODELS = {
    "ResNet-50": torchvision.models.resnet50,
    "ResNet-18": torchvision.models.resnet18,
    "MobileNetV1": MobileNetV1,
}
# Model, batch, distribution, sparsities, runs, and whether torch.compile is measured too, which takes minutes.
CASES = {
    MAIN: ("ResNet-50", 16, "uniform", (0.8, 0.9, 0.95, 0.98), 7, True),
    "ResNet-50, batch 4": ("ResNet-50", 4, "uniform", (0.8, 0.9, 0.95, 0.98), 5, False),
    "ResNet-50, batch 32": ("ResNet-50", 32, "uniform", (0.9, 0.95), 3, False),
    "ResNet-50, batch 64": ("ResNet-50", 64, "uniform", (0.95,), 3, False),
    "ResNet-50, batch 16, ERK": ("ResNet-50", 16, "erk", (0.8, 0.9, 0.95, 0.98), 3, False),
    "ResNet-50, batch 16, global": ("ResNet-50", 16, "global", (0.8, 0.9, 0.95, 0.98), 3, False),
    "ResNet-18, batch 16": ("ResNet-18", 16, "uniform", (0.8, 0.9, 0.95, 0.98), 5, False),
    "MobileNetV1, batch 16": ("MobileNetV1", 16, "uniform", (0.8, 0.9, 0.95, 0.98), 5, False),
}


def pruned(name: str, sparsity: float, distribution: str = "uniform") -> nn.Module:
    """A model with random weights; its first, last and depthwise layers stay dense."""
    torch.manual_seed(0)
    model = MODELS[name]()
    exclude = [*first_and_last(model), lambda _, layer: getattr(layer, "groups", 1) > 1]
    return sk.sparsify_(sk.pruning.magnitude_(model, sparsity, distribution, exclude=exclude))


def steps(name: str, batch: int, distribution: str, sparsities: tuple[float, ...], runs: int, compiled: bool) -> dict:
    keep_freed_memory()
    models = {f"{100 * s:g} %": pruned(name, s, distribution) for s in sparsities}
    images = torch.randn(batch, 3, 224, 224)
    return bench.measure(models, images, "full", runs=runs, compiled=compiled, compile_sparse=compiled)


# glibc: what is larger than this is given back to the system when it is freed, so that what a process has at most is what
# it needed. By itself it keeps some of it, more or less by chance.
EXACT_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=262144"}


def in_own_process(function: Callable, *arguments, environment: dict[str, str] | None = None) -> Any:
    """What a function of this module returns in a fresh process, whose memory nothing else has filled."""
    code = (
        "import json, torch; from benchmarks import training; torch.set_num_threads(2); "
        f"print(json.dumps(training.{function.__name__}(*{arguments!r})))"
    )
    everything = os.environ | (environment or {})
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=everything)
    return json.loads(done.stdout.splitlines()[-1])


def autocast(sparsity: float = 0.95, batch: int = 16) -> dict:
    """Milliseconds of a step of ResNet-50 under bfloat16 autocast, and of the sparse one without."""
    sparse = pruned("ResNet-50", sparsity)
    dense = sk.densify_(copy.deepcopy(sparse)).to(memory_format=torch.channels_last)
    images, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.int64)

    def step(model: nn.Module, images: torch.Tensor, enabled: bool) -> Callable[[], None]:
        def forward(images):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return model(images).float()

        return bench.TrainingStep(forward, model.train().parameters(), images, labels)

    functions = {
        "dense, bfloat16": step(dense, images.contiguous(memory_format=torch.channels_last), True),
        "sparse, bfloat16": step(copy.deepcopy(sparse), images, True),
        "sparse, float32": step(sparse, images, False),
    }
    return {name: 1e3 * median(seconds) for name, seconds in interleave(functions, runs=3, warmup=2).items()}


def mask_updates(sparsity: float = 0.9) -> dict:
    """Milliseconds to change every mask of ResNet-50, weights and momentum included, and to rebuild its structures."""
    model = pruned("ResNet-50", sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    layers = [m for m in model.modules() if isinstance(m, sk.nn.SparseModule)]

    def change():
        for layer in layers:
            sk.set_mask_(layer, layer.weight_mask.roll(1), optimizer)

    def rebuild():
        for layer in layers:
            sk.formats.pattern_from_mask(layer.weight_mask, layer.groups)

    times = interleave({"change": change, "rebuild": rebuild}, runs=7)
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def peak_memory(way: str, sparsity: float) -> float:
    """Megabytes at most of a fresh process that makes three steps, above what it has before them."""
    model = pruned("ResNet-50", sparsity)
    if way == "compressed":
        sk.compress_(model)
    elif way == "dense":
        sk.densify_(model)
    before = _megabytes("VmRSS")
    step = bench.TrainingStep(
        model, model.parameters(), torch.randn(16, 3, 224, 224), torch.zeros(16, dtype=torch.int64)
    )
    for _ in range(3):
        step()
    return _megabytes("VmHWM") - before


def peak_memories() -> dict:
    ways = [("dense", 0.95), *((way, s) for s in (0.8, 0.95) for way in ("sparse", "compressed"))]
    return {f"{way}, {100 * s:g} %": in_own_process(peak_memory, way, s, environment=EXACT_MEMORY) for way, s in ways}


def _megabytes(field: str) -> float:
    """Of this process: VmRSS, now, or VmHWM, at most so far. What getrusage says is inherited."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def linear_epoch(sparsity: float = 0.95, batch: int = 16, batches: int = 16) -> dict:
    """Seconds of a short epoch: frozen backbone in eval mode, a new head that is trained, images of 256 x 256 cropped and
    mirrored at random."""
    photos = torch.randint(256, (batch * batches, 3, 256, 256), dtype=torch.uint8)
    labels = torch.zeros(batch, dtype=torch.int64)
    augment = v2.Compose([
        v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip

    def load():
        return [torch.stack([augment(photo) for photo in part]) for part in photos.split(batch)]

    def epoch(backbone: Callable, layout: torch.memory_format) -> Callable[[], None]:
        head = nn.Linear(2048, 100)
        optimizer = torch.optim.SGD(head.parameters(), 0.01, 0.9)

        def run():
            for images in loaded:
                with torch.no_grad():
                    features = backbone(images.contiguous(memory_format=layout))
                optimizer.zero_grad()
                F.cross_entropy(head(features), labels).backward()
                optimizer.step()

        return run

    sparse = pruned("ResNet-50", sparsity)
    replace_head_(sparse, nn.Identity())
    dense = sk.densify_(pruned("ResNet-50", sparsity))
    replace_head_(dense, nn.Identity())
    dense.eval().requires_grad_(False), sparse.eval().requires_grad_(False)
    loaded = load()
    ways = {
        "dense eager, nchw": epoch(dense, torch.contiguous_format),
        "dense eager, channels_last": epoch(
            copy.deepcopy(dense).to(memory_format=torch.channels_last), torch.channels_last
        ),
        "engine": epoch(sk.compile(sparse, loaded[0]), torch.contiguous_format),
        "loading": load,
    }
    times = interleave(ways, runs=3)
    return {"images": len(photos), "batch": batch} | {name: median(seconds) for name, seconds in times.items()}


def parts() -> dict[str, Callable]:
    """What is measured, one after another."""
    cases = {name: lambda case=case: in_own_process(steps, *case) for name, case in CASES.items()}
    return cases | {
        "autocast": autocast,
        "mask updates": mask_updates,
        "peak memory": peak_memories,
        "linear epoch": linear_epoch,
    }


def measure(results: dict, save: Callable[[], None], again: list[str]) -> None:
    """Fill ``results`` with what is missing in it and with parts ``again``; without these, start anew if nothing is
    missing, or if it is of other code."""
    here = machines.here()
    if again and results:
        results.setdefault("again", {}).update(dict.fromkeys(again, here["commit"]))
        for name in again:
            results.pop(name, None)
    elif any(results.get(key) != value for key, value in here.items()) or parts().keys() <= results.keys():
        results.clear()
        results.update(here)
    for name, part in parts().items():
        if name not in results:
            results[name] = part()
            save()
            print(name, json.dumps(results[name]), flush=True)


def table(results: dict) -> str:
    """A machine's figures in Markdown."""
    main = results[MAIN]
    dense, names = main["dense"], list(main["sparse"])
    fastest = dense["fastest"]
    by_commit: dict[str, list[str]] = {}
    for name, commit in results.get("again", {}).items():
        by_commit.setdefault(commit, []).append(name)
    lines = [
        f"A training step at 224 × 224 (forward, backward, SGD with momentum), float32, {main['threads']} threads of an "
        f"{results['cpu']} ({results['isa']}), torch {results['torch']}, at commit {results['commit']}. Speed-up over the "
        "fastest dense way, ± half the distance between the quartiles; conv1, fc and depthwise layers are dense. "
        + (
            "The models take turns, and every step that is timed follows one of the same model. "
            if main.get("lead")
            else ""
        )
        + "`python -m benchmarks.training` makes the tables and the picture.",
        "",
        "| | dense | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for case in CASES:
        measured = results[case]
        for way, title in bench.WAYS.items():
            if way not in measured or (case != MAIN and way != "compressed"):
                continue
            rows = [measured[way].get(name) for name in names]
            cells = ["" if r is None else f"{r['speedup']:.2f}× ± {100 * r['spread']:.0f} %" for r in rows]
            best = measured["dense"]
            lines.append(f"| {case}, {title} | {best[best['fastest']]:.0f} ms | " + " | ".join(cells) + " |")
    memory, masks, epoch = results["peak memory"], results["mask updates"], results["linear epoch"]
    step = main["sparse"]["90 %"]["milliseconds"]
    eager = min(seconds for name, seconds in epoch.items() if name.startswith("dense"))
    loading = epoch["loading"]
    lines += [
        "",
        f"Dense is the fastest of NCHW eager, channels_last eager and, for {MAIN}, `torch.compile`: there "
        + ", ".join(f"{way} {dense[way]:.0f} ms" for way in ("nchw", "channels_last", "compiled") if way in dense)
        + f" ({fastest} counts). Memory of a step of {MAIN} at its peak, above what there is before it: "
        + ", ".join(f"{way} {megabytes:.0f} MB" for way, megabytes in memory.items())
        + f". Changing every mask of ResNet-50 at 90 %, weights and momentum included, takes {masks['change']:.0f} ms "
        f"({masks['rebuild']:.0f} ms of it for the structures): every 100 steps, "
        f"{100 * masks['change'] / (100 * step):.2f} % of the time. An epoch of linear finetuning on {epoch['images']} "
        f"images through an engine at 95 %: {epoch['engine']:.2f} s against {eager:.2f} s of dense eager, "
        f"{eager / epoch['engine']:.1f}×; with loading and augmentation ({loading:.2f} s, torchvision, not overlapped) "
        f"{(eager + loading) / (epoch['engine'] + loading):.1f}×. Under bfloat16 autocast sparse layers compute in float32, "
        "and BatchNorm is PyTorch's; a step at 95 %: "
        + ", ".join(f"{way} {milliseconds:.0f} ms" for way, milliseconds in results["autocast"].items())
        + "."
        + "".join(f" Measured again at {at}: {'; '.join(names)}." for at, names in by_commit.items()),
    ]
    return "\n".join(lines)


def plot(everywhere: list[dict]) -> bytes:
    """A PNG: milliseconds of the parts of a step, dense and sparse, on every machine."""
    plt = pyplot()
    figure, rows = plt.subplots(len(everywhere), 1, figsize=(10, 4 * len(everywhere)), squeeze=False)
    for axes, results in zip(rows[:, 0], everywhere):
        main = results[MAIN]
        bars = {f"dense\n{main['dense']['fastest']}": main["dense"]["parts"]}
        for name in main["sparse"]:
            for way in ("sparse", "compressed", "compiled"):
                bars[f"{name}\n{way}"] = main[way][name]["parts"]
        bottom = [0.0] * len(bars)
        for part in bench.PARTS:
            heights = [parts[part] for parts in bars.values()]
            axes.bar(list(bars), heights, bottom=bottom, label=part)
            bottom = [b + h for b, h in zip(bottom, heights)]
        axes.set(
            ylabel="ms a step",
            title=f"{MAIN}, {main['threads']} threads of an {results['cpu']} ({results['isa']}), float32",
        )
        axes.tick_params(axis="x", labelsize=7)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return png(plt, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--again",
        nargs="+",
        default=[],
        choices=list(parts()),
        metavar="PART",
        help="measure these anew, keep the others",
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    path = machines.file_in(RESULTS)
    results = machines.read(path)
    measure(results, lambda: machines.write(path, results), args.again)
    everywhere = machines.all_in(RESULTS)
    fill("training", "\n\n".join(map(table, everywhere)))
    (machines.ROOT / "docs" / "training.png").write_bytes(plot(everywhere))


if __name__ == "__main__":
    main()
