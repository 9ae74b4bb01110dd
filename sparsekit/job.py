"""The main job: prune an upstream ResNet, transfer it, time it, and write a report. A thin composition of the parts.

Every step leaves a JSON file in ``runs/<name>``, so that a job which is killed and started again goes on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from . import _ops, bench, pruning
from ._version import __version__
from .convert import sparsify_, sparsity
from .engine.tuning import cpu_name
from .io import load_checkpoint, save_checkpoint, write_atomically
from .transfer import full_finetune, linear_finetune, models, tasks, train

logger = logging.getLogger("sparsekit")

# Sized for 15 minutes on two slow cores: about 10 M multiply-adds an image forward, 21 to 44 s an epoch of Fashion-MNIST.
WIDTHS, BLOCKS = (32, 64, 128), (1, 1, 1)
UPSTREAM = {"epochs": 2, "lr": 0.1, "batch_size": 128, "schedule": "cosine", "seed": 0}
GRADUAL = {"epochs": 2, "lr": 0.05, "batch_size": 128, "schedule": "cosine", "seed": 1}
SPARSITY = 0.9
DOWNSTREAM = ("mnist-5k", "digits")
LINEAR_EPOCHS, FULL_EPOCHS = 150, 10
# The protocol's 0.001 is for 150 epochs from ImageNet; a fifteenth as many on fewer images get ten times the rate.
FULL_LR = 0.01
RESNET50_SPARSITIES = (0.8, 0.9, 0.95, 0.98)
RESNET50_RUNS = {"inference": (16, 5), "full": (8, 3)}  # batch, alternating runs


def model() -> torch.nn.Module:
    """The upstream architecture, with random weights."""
    torch.manual_seed(0)
    return models.SmallResNet(WIDTHS, BLOCKS)


def run(folder: Path, quick: bool = False) -> dict:
    """Run the job, or what is left of it.

    Args:
        folder: where results go.
        quick: a fraction of the images and epochs, and no ResNet-50: for tests.

    Returns:
        What ``results.json`` holds.
    """
    from .transfer.report import write_report

    console = Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    bench.keep_freed_memory()
    job = _Job(folder, console)
    upstream = tasks.load("fashion-mnist")
    upstream_settings, gradual = dict(UPSTREAM), dict(GRADUAL)
    linear_epochs, full_epochs = LINEAR_EPOCHS, FULL_EPOCHS
    if quick:
        upstream = upstream.first(1024)
        upstream_settings["epochs"] = gradual["epochs"] = 2
        linear_epochs = full_epochs = 1

    dense, sparse = model(), model()
    job.step("dense", lambda: _train_dense(folder, dense, upstream, upstream_settings))
    job.step("sparse", lambda: _train_sparse(folder, sparse, upstream, gradual))
    load_checkpoint(folder / "dense.safetensors", dense)
    load_checkpoint(folder / "sparse.safetensors", sparse)
    for name in DOWNSTREAM:
        task = tasks.load(name)
        if quick:
            task = task.first(256)
        for label, network in (("dense", dense), ("sparse", sparse)):
            job.step(
                f"linear-{name}-{label}",
                lambda network=network, task=task: _outcome(linear_finetune(network, task, epochs=linear_epochs)),
            )
            job.step(
                f"full-{name}-{label}",
                lambda network=network, task=task: _outcome(
                    full_finetune(network, task, epochs=full_epochs, lr=FULL_LR)
                ),
            )
    images = torch.randn(64, 1, 28, 28)
    for kind in bench.KINDS:
        job.step(
            f"speed-small-{kind}",
            lambda kind=kind: bench.measure(
                {"90 %": sparse}, images, kind, runs=3 if quick else 15, compiled=not quick
            ),
        )
    if not quick:
        for kind, how in RESNET50_RUNS.items():
            job.step(f"speed-resnet50-{kind}", lambda kind=kind, how=how: _time_resnet50(kind, *how))
    results = {
        "sparsekit": __version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": _ops.backend(),
        "upstream": {"widths": WIDTHS, "blocks": BLOCKS, "images": len(upstream.train_labels), "task": upstream.name},
        "settings": {
            "dense": upstream_settings,
            "sparse": {**gradual, "from": "the dense model", "method": "GMP, global", "sparsity": SPARSITY},
            "linear": {"epochs": linear_epochs, "lr": 0.01},
            "full": {"epochs": full_epochs, "lr": FULL_LR},
        },
        "layers": dict(sparsity(sparse)),
        "steps": job.results,
    }
    write_atomically(folder / "results.json", lambda name: Path(name).write_text(json.dumps(results, indent=1)))
    write_report(folder, results)
    console.print(f"report: {folder / 'report.html'}")
    return results


class _Job:
    """Steps whose results are kept: each runs once, whatever happens in between."""

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console, self.results = folder, console, {}

    def step(self, name: str, work: Callable[[], dict]) -> dict:
        path = self.folder / f"{name}.json"
        if path.exists():
            self.results[name] = json.loads(path.read_text())
            return self.results[name]
        start = time.perf_counter()
        with self.console.status(name):
            result = work()
        result["step_seconds"] = time.perf_counter() - start
        write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(result)))
        self.console.print(f"{name}: {_summary(result)} ({result['step_seconds']:.0f} s)")
        self.results[name] = result
        return result


def _summary(result: dict) -> str:
    if "accuracy" in result:
        return f"accuracy {100 * result['accuracy']:.2f} %"
    return ", ".join(f"{name}: {row['speedup']:.2f}x" for name, row in bench.best(result).items())


def _outcome(result) -> dict:
    return {"accuracy": result.accuracy, "seconds": result.seconds, "history": result.history}


def _train_dense(folder: Path, network, task, settings: dict) -> dict:
    result = train(network, task, checkpoint=folder / "dense.partial", description="dense", **settings)
    save_checkpoint(folder / "dense.safetensors", network, extra={"accuracy": result.accuracy})
    return _outcome(result)


def _train_sparse(folder: Path, network, task, settings: dict) -> dict:
    load_checkpoint(folder / "dense.safetensors", network)

    def pruner(network, optimizer, steps):
        total = settings["epochs"] * steps
        return pruning.GMP(
            network, optimizer, SPARSITY, begin=0, end=total // 2, interval=max(steps // 5, 1), initial_sparsity=0.05,
            distribution="global",
        )  # fmt: skip

    result = train(
        network, task, pruner=pruner, checkpoint=folder / "sparse.partial", description="GMP to 90 %", **settings
    )
    save_checkpoint(folder / "sparse.safetensors", network, extra={"accuracy": result.accuracy})
    return {**_outcome(result), "sparsity": sparsity(network).overall}


def resnet50(level: float) -> torch.nn.Module:
    """torchvision's ResNet-50, random weights, pruned uniformly by magnitude; conv1 and fc stay dense."""
    from torchvision.models import resnet50 as architecture

    torch.manual_seed(0)
    network = architecture()
    pruning.magnitude_(network, level, "uniform", exclude=pruning.first_and_last(network))
    return sparsify_(network)


def _time_resnet50(kind: str, batch: int, runs: int) -> dict:
    networks = {f"{100 * level:g} %": resnet50(level) for level in RESNET50_SPARSITIES}
    torch.manual_seed(0)
    return bench.measure(networks, torch.randn(batch, 3, 224, 224), kind, runs=runs)
