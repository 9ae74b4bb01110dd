"""The GPU kernels against cuDNN, and against what benchmarks.gpu_model predicts: `python -m benchmarks.gpu`.

ResNet-50's sparse convolutions, op by op, NCHW in and out: every backend of sparsekit.gpu at its fastest tiling, beside
the faster of cuDNN's NCHW and channels_last, in turns in one process, with a cold L2; CUDA events, medians and spreads.
Every result is compared with cuDNN without TF32 first: what differs gets no speed-up. A part that fails is recorded with
its error, and the rest goes on. Without a GPU, or with `--predict`, it prints the model's tables alone; `--docs` fills
docs/gpu.md with them and with what has been measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import gpu_model as model
from benchmarks.readme import fill
from benchmarks.shapes import RESNET50, Layer
from sparsekit import kernels

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
DOCUMENT = ROOT / "docs" / "gpu.md"
QUICK = (
    "256-256-k3-s1-14",
    "64-256-k1-s1-56",
    "1024-256-k1-s1-14",
    "128-128-k3-s1-28",
    "512-512-k3-s1-7",
    "64-64-k3-s1-56",
    "128-128-k3-s2-56",
    "512-2048-k1-s1-7",
)
TOLERANCE = 1e-3  # of the largest element
FLUSH_BYTES = 256 << 20
# What the GPU idles before a function that is timed, so that the host has queued all of it before it begins.
HEAD_START_CYCLES = 200_000
RESTARTS = 3
PRECISIONS = {"float32": ("tf32", "fp32"), "float16": ("fp16",)}
LAYOUTS = {"nchw": "contiguous_format", "channels_last": "channels_last"}


class Lost(Exception):
    """The GPU reports an error from now on, whatever it is asked: only a new process can go on."""


class Bench:
    """A device, the results so far, and how long there is left."""

    def __init__(self, args: argparse.Namespace):
        import torch

        self.args, self.torch = args, torch
        self.device = torch.device(args.device)
        self.is_cuda = self.device.type == "cuda"
        self.results: dict = {}
        if args.resume and args.json and Path(args.json).exists():
            self.results = json.loads(Path(args.json).read_text())
        self.begin = time.monotonic() - self.results.get("seconds", 0)
        self.results |= {"machine": self.machine(), "batch": args.batch, "cells": self.results.get("cells", {})}
        self.part = self.find_part()
        self.flushed = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device) if self.is_cuda else None
        torch.backends.cudnn.benchmark = True

    def machine(self) -> dict:
        torch = self.torch
        facts = {"device": "cpu", "torch": torch.__version__}
        if not self.is_cuda:
            return facts
        facts["device"] = torch.cuda.get_device_name()
        facts["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        with contextlib.suppress(Exception):
            command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
            line = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()[0]
            facts["driver"], facts["clock"] = (text.strip() for text in line.split(","))
        with contextlib.suppress(Exception):
            import triton

            facts["triton"] = triton.__version__
        return facts

    def find_part(self) -> model.Part:
        name = self.results["machine"]["device"]
        if "A100" in name:
            return model.A100
        return model.H200 if "H200" in name else model.H100

    def save(self) -> None:
        self.results["seconds"] = time.monotonic() - self.begin
        if self.args.json:
            path = Path(self.args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(self.results, indent=1) + "\n")
            temporary.replace(path)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def synchronize(self) -> None:
        if self.is_cuda:
            self.torch.cuda.synchronize()

    def failure(self, error: Exception) -> str:
        """What to record of an error; raises Lost if the GPU is."""
        text = f"{type(error).__name__}: {error}".strip()
        text = "\n".join(text.splitlines()[:4])[:600]
        if os.environ.get("SPARSEKIT_BENCH_TRACE"):
            traceback.print_exception(error)
        try:
            self.synchronize()
        except Exception:
            raise Lost(text) from error
        if isinstance(error, self.torch.OutOfMemoryError):
            self.torch.cuda.empty_cache()
        return text

    def seconds(self, functions: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
        """Seconds of every function, `runs` of each, in turns of random order after one to warm up, from a cold L2."""
        torch = self.torch
        times: dict[str, list] = {name: [] for name in functions}
        order, shuffle = list(functions.items()), random.Random(0).shuffle
        for run in range(runs + 1):
            shuffle(order)
            for name, function in order:
                if self.is_cuda:
                    self.flushed.zero_()
                    torch.cuda._sleep(HEAD_START_CYCLES)
                    pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    pair[0].record()
                    function()
                    pair[1].record()
                else:
                    start = time.perf_counter()
                    function()
                    pair = [start, time.perf_counter()]
                if run:
                    times[name].append(pair)
        self.synchronize()
        if self.is_cuda:
            return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in times.items()}
        return {name: [b - a for a, b in pairs] for name, pairs in times.items()}


def figures(times: list[float]) -> dict:
    from benchmarks.timing import median, spread

    return {"us": 1e6 * median(times), "spread": spread(times)}


# --- layers -----------------------------------------------------------------------------------------------------------


class Case:
    """The tensors of a layer, and the three ops on them, dense and sparse."""

    def __init__(self, bench: Bench, layer: Layer, dtype: str, sparsities: list[float]):
        torch = bench.torch
        self.torch, self.layer = torch, layer
        g = torch.Generator(bench.device).manual_seed(0)
        kind = {"dtype": getattr(torch, dtype), "device": bench.device}
        out, batch = layer.size // layer.stride, bench.args.batch
        shape = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
        self.x = torch.randn(batch, layer.in_channels, layer.size, layer.size, generator=g, **kind)
        self.dy = torch.randn(batch, layer.out_channels, out, out, generator=g, **kind)
        self.weight = torch.randn(shape, generator=g, **kind) / (layer.in_channels * layer.kernel**2) ** 0.5
        self.padding = layer.kernel // 2
        self.geometry = ([layer.kernel] * 2, [layer.stride] * 2, [self.padding] * 4, [1, 1], 1)
        self.masks, self.patterns, self.values = {}, {}, {}
        for sparsity in sparsities:
            self._prune(sparsity, g)

    def _prune(self, sparsity: float, g) -> None:
        from sparsekit.formats import pattern_from_mask

        mask = self.torch.zeros(self.weight.numel(), dtype=self.torch.bool, device=self.weight.device)
        kept = self.torch.randperm(len(mask), generator=g, device=mask.device)[: model.kept(self.layer, sparsity)]
        mask[kept] = True
        self.masks[sparsity] = mask = mask.view_as(self.weight)
        self.patterns[sparsity] = pattern_from_mask(mask)
        self.values[sparsity] = self.weight[mask]

    def dense(self, op: str, x, dy, weight, tf32: bool) -> Callable[[], object]:
        torch = self.torch
        stride, padding = [self.layer.stride] * 2, [self.padding] * 2
        wanted = [op == "dx", op == "dw", False]

        def run():
            torch.backends.cudnn.allow_tf32 = tf32
            if op == "fwd":
                return torch.nn.functional.conv2d(x, weight, None, stride, padding)
            grads = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
            )
            return grads[0 if op == "dx" else 1]

        return run

    def reference(self, op: str, sparsity: float):
        """In float32, by cuDNN without TF32."""
        mask = self.masks[sparsity]
        run = self.dense(op, self.x.float(), self.dy.float(), (self.weight * mask).float(), tf32=False)
        before, self.torch.backends.cudnn.benchmark = self.torch.backends.cudnn.benchmark, False
        try:
            found = run()
        finally:
            self.torch.backends.cudnn.benchmark = before
        return found[mask] if op == "dw" else found

    def sparse(self, op: str, sparsity: float) -> Callable[[], object]:
        from sparsekit import _ops

        ops, pattern, values = self.torch.ops.sparsekit, self.patterns[sparsity], self.values[sparsity]
        if op == "fwd":
            kernel, stride, padding = self.geometry[:3]
            return lambda: _ops.conv2d(
                self.x, values, pattern, None, kernel_size=kernel, stride=stride, padding=padding
            )
        if op == "dx":
            return lambda: ops.conv2d_input_grad(self.dy, values, *pattern[2:], list(self.x.shape), *self.geometry)
        return lambda: ops.conv2d_values_grad(self.dy, self.x, *pattern[:2], *self.geometry)


def forced(bench: Bench, backend: str, function: Callable[[], object]) -> Callable[[], object]:
    """`function` on one backend of sparsekit.gpu."""
    from sparsekit import gpu

    def run():
        with gpu.use_backend(backend):
            return function()

    return run if bench.is_cuda else function


def prepare_sparse(bench: Bench, case: Case, backend: str, op: str, sparsity: float) -> tuple[Callable, dict]:
    """An op that has been tuned and compared with the reference, and what was found."""
    from sparsekit import gpu

    run, before = forced(bench, backend, case.sparse(op, sparsity)), len(gpu.measured)
    with gpu.tuning():
        run()
    tuned = next(reversed(gpu.measured.values())) if len(gpu.measured) > before else {}
    with gpu.watch() as calls:
        got = run().float()
    expected = case.reference(op, sparsity)
    error = float((got - expected).abs().max() / expected.abs().max())
    facts = {"variant": calls[-1][1] if calls else backend, "error": error, "nnz": case.patterns[sparsity].nnz}
    # With warm caches, unlike everything else here.
    return run, facts | {"variants_us": {str(variant): 1e6 * seconds for variant, seconds in tuned.items()}}


def measure(bench: Bench, case: Case, backend: str, dtype: str, op: str) -> dict:
    """One op of a layer on one backend, at every sparsity, beside cuDNN."""
    torch, layer, batch = bench.torch, case.layer, bench.args.batch
    cell: dict = {"dense": {}, "sparse": {}}
    functions = {}
    for precision in PRECISIONS[dtype]:
        seconds = model.dense_seconds(layer, bench.part, precision, batch)
        cell["dense"][precision] = {"predicted_us": 1e6 * seconds}
        for layout, name in LAYOUTS.items():
            tensors = (t.contiguous(memory_format=getattr(torch, name)) for t in (case.x, case.dy, case.weight))
            run = case.dense(op, *tensors, tf32=precision != "fp32")
            try:
                run()
            except Exception as error:
                cell["dense"][precision]["failed"] = bench.failure(error)
            else:
                functions[precision, layout] = run
    for sparsity in bench.args.sparsity:
        entry = cell["sparse"][f"{100 * sparsity:g}"] = {}
        if dtype == "float16" and op == "fwd" and backend == "triton":
            entry["condensed_predicted_us"] = 1e6 * model.condensed_seconds(layer, sparsity, bench.part, batch)
        if backend == "cuda" or not bench.is_cuda:
            seconds = model.sparse_seconds(layer, sparsity, bench.part, PRECISIONS[dtype][0], batch)
            bound = model.bound(layer, op, sparsity, bench.part, batch, case.x.element_size())
            entry |= {"predicted_us": 1e6 * seconds, "bound_us": 1e6 * bound.seconds, "bound": bound.name}
        try:
            functions[sparsity, ""], facts = prepare_sparse(bench, case, backend, op, sparsity)
            entry |= facts
        except Exception as error:
            entry["failed"] = bench.failure(error)
    times = bench.seconds(functions, bench.args.runs)
    for (which, layout), t in times.items():
        if not layout:
            cell["sparse"][f"{100 * which:g}"] |= figures(t)
            continue
        found = figures(t) | {"layout": layout}
        dense = cell["dense"][which]
        dense[f"{layout}_us"] = found["us"]
        if found["us"] < dense.get("us", float("inf")):
            dense |= found
    for entry in cell["sparse"].values():
        if "us" not in entry:
            continue
        if not entry["error"] <= TOLERANCE:
            entry["failed"] = f"differs from the reference by {entry['error']:.1e} of its largest element"
            continue
        entry["speedup"] = {p: dense["us"] / entry["us"] for p, dense in cell["dense"].items() if "us" in dense}
    return cell


def lines(key: str, cell: dict) -> list[str]:
    """A cell for a terminal: measured microseconds, predicted ones in brackets."""

    def us(entry: dict) -> str:
        predicted = f"{entry['predicted_us']:.1f}" if "predicted_us" in entry else "–"
        if "us" not in entry:
            return f"– ({predicted})"
        return f"{entry['us']:.1f} ±{100 * entry['spread']:.0f}% ({predicted})"

    if "dense" not in cell:
        return [f"{key:42s} {cell['failed']}"]
    dense = [f"{p} {us(entry)} {entry.get('layout', entry.get('failed', ''))}" for p, entry in cell["dense"].items()]
    found = [f"{key:42s} cuDNN {', '.join(dense)}"]
    for name, entry in cell["sparse"].items():
        ratios = " ".join(f"{p} {ratio:.2f}x" for p, ratio in entry.get("speedup", {}).items())
        found.append(f"{name:>8s} % {us(entry):30s} {entry.get('variant', ''):12s} {ratios} {entry.get('failed', '')}")
    return found


def kind_of(backend: str, dtype: str, layer: Layer, op: str) -> str:
    """What layers share a kernel, of which one that crashes is not tried again."""
    return f"{backend}/{dtype}/{op}/k{layer.kernel}-s{layer.stride}"


def compile_ahead(bench: Bench, backend: str, dtype: str, layers: list[Layer]) -> None:
    """Compile Triton's kernels for all layers at once; whoever fails fails again, and is recorded, in its turn."""
    from sparsekit import gpu

    def quietly(task: Callable[[], object]) -> None:
        with contextlib.suppress(Exception):
            task()

    start, sparsity = time.monotonic(), bench.args.sparsity[0]
    try:
        cases = [Case(bench, layer, dtype, [sparsity]) for layer in layers]
        tasks = [case.sparse(op, sparsity) for case in cases for op in model.OPS]
        with gpu.use_backend(backend), ThreadPoolExecutor(bench.args.jobs) as pool:
            list(pool.map(quietly, tasks))
        bench.synchronize()
    except Exception as error:
        # One after the other then, so that whoever breaks the GPU is found.
        bench.results["compiles_ahead"] = False
        print(f"compiling ahead: {bench.failure(error)}", flush=True)
    print(f"compiled {backend} {dtype} in {time.monotonic() - start:.1f} s", flush=True)


def attempt(bench: Bench, case: Case, backend: str, dtype: str, op: str) -> dict:
    """:func:`measure`, or what went wrong; raises Lost."""
    try:
        return measure(bench, case, backend, dtype, op)
    except Lost:
        raise
    except Exception as error:
        return {"failed": bench.failure(error)}


def run_layers(bench: Bench, backends: list[str]) -> None:
    cells, lost = bench.results["cells"], bench.results.setdefault("lost", {})
    layers = select_layers(bench.args)
    for backend in backends:
        for dtype in bench.args.dtype:
            keys = {(x, op): f"{backend}/{dtype}/{x.name}/{op}" for x in layers for op in model.OPS}
            todo = [x for x in layers if any(keys[x, op] not in cells for op in model.OPS)]
            if backend == "triton" and todo and is_in_time(bench) and bench.results.get("compiles_ahead", True):
                compile_ahead(bench, backend, dtype, todo)
            for layer in todo:
                case = None
                for op in model.OPS:
                    key, kind = keys[layer, op], kind_of(backend, dtype, layer, op)
                    if key in cells:
                        continue
                    if kind in lost or not is_in_time(bench):
                        cells[key] = {"failed": f"left out: {lost.get(kind, 'out of time')}"}
                        continue
                    try:
                        case = case or Case(bench, layer, dtype, bench.args.sparsity)
                        cells[key] = attempt(bench, case, backend, dtype, op)
                    except Lost as error:
                        lost[kind] = str(error)
                        cells[key] = {"failed": f"the GPU was lost: {error}"}
                        raise
                    print("\n".join(lines(key, cells[key])), flush=True)
                bench.save()


def is_in_time(bench: Bench) -> bool:
    return bench.args.limit is None or bench.elapsed() < bench.args.limit


def select_layers(args: argparse.Namespace) -> list[Layer]:
    layers = [layer for layer in RESNET50 if not args.layers or args.layers in layer.name]
    if args.quick and not args.layers:
        layers = sorted((x for x in layers if x.name in QUICK), key=lambda x: QUICK.index(x.name))
    if args.device == "cpu":
        # Only to try the code.
        layers = [x._replace(size=4 * x.stride, in_channels=x.in_channels // 4) for x in layers]
    return layers


def run_optimizers(bench: Bench) -> None:
    """Fused updates of ResNet-50's sparse convolutions: all their weights, and kept values alone."""
    torch = bench.torch
    makers = {
        "SGD with momentum": (1, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True)),
        "AdamW": (2, lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    }
    functions, found = {}, bench.results.setdefault("optimizers", {})
    for sparsity in (0.0, *bench.args.sparsity):
        for name, (buffers, make) in makers.items():
            sizes = [model.kept(x, sparsity) for x in RESNET50 for _ in range(x.count)]
            parameters = [torch.zeros(size, device=bench.device, requires_grad=True) for size in sizes]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            functions[name, sparsity] = make(parameters).step
            predicted = model.optimizer_seconds(sum(sizes), bench.part, buffers)
            found[f"{name}, {100 * sparsity:g} %"] = {"predicted_us": 1e6 * predicted}
    for (name, sparsity), times in bench.seconds(functions, bench.args.runs).items():
        entry = found[f"{name}, {100 * sparsity:g} %"]
        entry |= figures(times)
        print(f"{name}, {100 * sparsity:g} %: {entry['us']:.1f} ({entry['predicted_us']:.1f})", flush=True)
    bench.save()


# --- the whole network ------------------------------------------------------------------------------------------------


def pruned_resnet50(bench: Bench, sparsity: float):
    """torchvision's, with random masks in every convolution but the first, as sparse modules."""
    import torchvision

    import sparsekit as sk

    torch = bench.torch
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "conv1":
            module.weight.data[torch.rand(module.weight.shape) < sparsity] = 0
    return sk.sparsify_(network).to(bench.device)


class Runner:
    """One way to run a network: a forward pass, or a training step."""

    def __init__(self, bench: Bench, network, images, *, tf32=True, half=False, backend=None):
        from sparsekit.nn import SparseModule

        self.bench, self.network, self.images = bench, network, images
        self.tf32, self.half, self.backend = tf32, half, backend
        self.layers = [m for m in network.modules() if isinstance(m, SparseModule)]
        self.labels = bench.torch.zeros(len(images), dtype=bench.torch.int64, device=bench.device)
        self.optimizer = bench.torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)

    def set(self) -> None:
        self.bench.torch.backends.cudnn.allow_tf32 = self.tf32
        for layer in self.layers:
            layer.backend = self.backend

    def forward(self):
        torch = self.bench.torch
        # Without the cache, so that a CUDA graph holds the casts.
        dtype = torch.float16 if self.bench.is_cuda else torch.bfloat16
        with torch.autocast(self.bench.device.type, dtype, enabled=self.half, cache_enabled=False):
            return self.network(self.images)

    def infer(self):
        self.set()
        self.network.eval()
        with self.bench.torch.no_grad():
            return self.forward()

    def step(self):
        self.set()
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.bench.torch.nn.functional.cross_entropy(self.forward().float(), self.labels)
        loss.backward()
        self.optimizer.step()


def captured(bench: Bench, function: Callable[[], object]) -> Callable[[], object]:
    """`function` as a CUDA graph."""
    torch = bench.torch
    if not bench.is_cuda:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay(kept=kept):
        graph.replay()

    return replay


def whole_runners(bench: Bench, images, record: dict) -> dict[str, Runner]:
    """Every way that can be prepared in time: dense, and sparse at every sparsity, chosen by autotune_ and forced."""
    import sparsekit as sk

    torch = bench.torch
    runners: dict[str, Runner] = {}
    dense = sk.densify_(copy.deepcopy(pruned_resnet50(bench, 0.9)))
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    runners["dense TF32"] = Runner(bench, last, images_last)
    runners["dense float16"] = Runner(bench, copy.deepcopy(last), images_last, half=True)
    runners["dense float32"] = Runner(bench, dense, images, tf32=False)
    for sparsity in bench.args.sparsity:
        name = f"{100 * sparsity:g} %"
        if not is_in_time(bench):
            record["failed"][name] = "out of time"
            continue
        try:
            network = pruned_resnet50(bench, sparsity)
            torch.backends.cudnn.allow_tf32 = True
            for train in (False, True):
                sk.autotune_(network, images, train=train)
            forced_runner = Runner(bench, network, images, backend="sparse")
            check_whole(bench, network, images, record, name)
            runners[f"auto {name}"] = Runner(bench, network, images, backend="auto")
            runners[f"sparse {name}"] = forced_runner
            for kind, train in (("inference", False), ("training", True)):
                explained = count_sparse(bench, network, images, train)
                record.setdefault("sparse_layers", {}).setdefault(kind, {})[name] = explained
        except Exception as error:
            record["failed"][name] = bench.failure(error)
            print(f"{name}: {record['failed'][name]}", flush=True)
    return runners


def check_whole(bench: Bench, network, images, record: dict, name: str) -> None:
    """Raise if the sparse kernels' output differs from that of the same network run dense without TF32."""
    expected = Runner(bench, network, images, tf32=False, backend="dense").infer()
    got = Runner(bench, network, images, tf32=False, backend="sparse").infer()
    error = float((got - expected).abs().max() / expected.abs().max())
    record["error"][name] = error
    if not error <= TOLERANCE:
        raise RuntimeError(f"the network's output differs from the reference by {error:.1e} of its largest element")


def count_sparse(bench: Bench, network, images, train: bool) -> int:
    """How many layers autotune_ gave to the sparse kernels."""
    from sparsekit import dispatch
    from sparsekit.nn import SparseModule

    sparse = 0

    def look(module, args):
        nonlocal sparse
        with bench.torch.set_grad_enabled(train):
            sparse += dispatch.decide(module, args[0]).backend == "sparse"

    runner = Runner(bench, network, images, backend="auto")
    hooks = [m.register_forward_pre_hook(look) for m in network.modules() if isinstance(m, SparseModule)]
    try:
        runner.infer()
    finally:
        for hook in hooks:
            hook.remove()
    return sparse


def run_whole(bench: Bench, backend: str) -> None:
    """Inference under CUDA graphs, and a training step with and without one, of ResNet-50."""
    from sparsekit import gpu

    record = bench.results["whole"] = {"backend": backend, "error": {}, "failed": {}, "times": {}}
    size = 224 if bench.is_cuda else 32
    with gpu.use_backend(backend) if bench.is_cuda else contextlib.nullcontext():
        images = bench.torch.randn(bench.args.batch, 3, size, size, device=bench.device)
        runners = whole_runners(bench, images, record)
        bench.save()
        kinds = {
            "inference, CUDA graph": (lambda r: captured(bench, r.infer), 10),
            "training step": (lambda r: r.step, 5),
            "training step, CUDA graph": (lambda r: captured(bench, r.step), 5),
        }
        for kind, (prepare, runs) in kinds.items():
            if not is_in_time(bench):
                record["failed"][kind] = "out of time"
                continue
            try:
                time_whole(bench, record, kind, runners, prepare, runs)
            except Exception as error:
                record["failed"][kind] = bench.failure(error)
                print(f"{kind}: {record['failed'][kind]}", flush=True)
            bench.save()


def time_whole(bench: Bench, record: dict, kind: str, runners: dict[str, Runner], prepare, runs: int) -> None:
    functions = {}
    for name, runner in runners.items():
        try:
            function = prepare(runner)
            function()
            bench.synchronize()
            functions[name] = function
        except Exception as error:
            record["failed"][f"{kind}, {name}"] = bench.failure(error)
            print(f"{kind}, {name}: {record['failed'][f'{kind}, {name}']}", flush=True)
    found = {name: figures(t) for name, t in bench.seconds(functions, runs).items()}
    dense = {name: row["us"] for name, row in found.items() if name.startswith("dense")}
    for name, row in found.items():
        row["speedup"] = {other: us / row["us"] for other, us in dense.items()}
        ratios = "  ".join(f"{ratio:.2f}x {other}" for other, ratio in row["speedup"].items())
        print(f"{kind}: {name:16s} {row['us'] / 1e3:8.2f} ms ±{100 * row['spread']:.0f}%  {ratios}", flush=True)
    record["times"][kind] = found


# --- documents and the command line -----------------------------------------------------------------------------------


def measured_tables(results: dict | None) -> str:
    """The measured part of docs/gpu.md."""
    if not results:
        return "Nothing yet. On a machine with a GPU: `make bench-gpu`."
    machine = results["machine"]
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
    found = [
        f"{machine['device']}, batch {results['batch']} ({facts}). Median ± half the distance between the quartiles."
    ]
    cells: dict[tuple, list] = {}
    for key, cell in results["cells"].items():
        backend, dtype, layer, op = key.split("/")
        cells.setdefault((backend, dtype), []).append((layer, op, cell))
    for (backend, dtype), rows in cells.items():
        found += [f"### {backend}, {dtype}, µs: measured (predicted)", layers_table(dtype, rows)]
    if results.get("optimizers"):
        rows = [
            [name, f"{row['us']:.1f} ± {100 * row['spread']:.0f} % ({row['predicted_us']:.1f})"]
            for name, row in results["optimizers"].items()
        ]
        found += ["### Fused optimizer updates, µs: measured (predicted)", model.table(["", "µs"], rows)]
    whole = results.get("whole")
    if whole:
        found += [f"### ResNet-50, whole, backend {whole['backend']}", whole_table(whole)]
    return "\n\n".join(found)


def layers_table(dtype: str, rows: list[tuple[str, str, dict]]) -> str:
    names = list(dict.fromkeys(name for *_, cell in rows for name in cell.get("sparse", {})))
    precisions = PRECISIONS[dtype]
    titles = [f"dense {model.PRECISIONS[p].name}" for p in precisions]
    head = ["layer", "op", *titles, *(f"{name} %" for name in names)]

    def us(entry: dict) -> str:
        predicted = f" ({entry['predicted_us']:.0f})" if "predicted_us" in entry else ""
        if "condensed_predicted_us" in entry and "panels" in entry.get("variant", ""):
            predicted = f" (panels {entry['condensed_predicted_us']:.0f})"
        return f"{entry['us']:.1f} ± {100 * entry['spread']:.0f} %{predicted}" if "us" in entry else "–"

    def sparse(entry: dict) -> str:
        if "speedup" not in entry:
            return f"failed: {_one_line(entry.get('failed', ''))}"
        return us(entry) + ", " + " / ".join(f"{entry['speedup'][p]:.2f}×" for p in precisions if p in entry["speedup"])

    body = []
    for layer, op, cell in rows:
        if "dense" not in cell:
            body.append([layer, op, _one_line(cell["failed"]), *[""] * (len(head) - 3)])
            continue
        entries = [cell["sparse"].get(name, {}) for name in names]
        body.append([layer, op, *(us(cell["dense"].get(p, {})) for p in precisions), *map(sparse, entries)])
    return model.table(head, body)


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:120]


def whole_table(whole: dict) -> str:
    rows = []
    for kind, times in whole["times"].items():
        for name, row in times.items():
            ratios = [f"{row['speedup'][d]:.2f}×" if d in row["speedup"] else "–" for d in WHOLE_DENSE]
            rows.append([kind, name, f"{row['us'] / 1e3:.2f} ± {100 * row['spread']:.0f} %", *ratios])
    rows += [[name, "failed", _one_line(text), "", "", ""] for name, text in whole["failed"].items()]
    return model.table(["", "", "ms", *(f"over {name}" for name in WHOLE_DENSE)], rows)


WHOLE_DENSE = ("dense TF32", "dense float16", "dense float32")


def write_document() -> None:
    fill("predicted", model.report(), DOCUMENT)
    fill("measured", measured_tables(json.loads(RESULTS.read_text()) if RESULTS.exists() else None), DOCUMENT)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="print the model's tables; no GPU needed")
    parser.add_argument("--docs", action="store_true", help="fill docs/gpu.md from the model and the stored results")
    parser.add_argument("--batch", type=int, default=model.BATCH)
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--sparsity", type=float, nargs="+", help="fractions of zeros")
    parser.add_argument("--layers", help="only layers whose name contains this")
    parser.add_argument("--backends", nargs="+", help="of sparsekit.gpu.backends(); all but the reference if not given")
    parser.add_argument("--runs", type=int, default=10, help="of every function")
    parser.add_argument("--jobs", type=int, default=8, help="threads that compile Triton's kernels")
    parser.add_argument("--quick", action="store_true", help="eight layers at 90, 95 and 98 %%")
    parser.add_argument("--whole", action="store_true", help="ResNet-50 as a whole; the layers too if --quick is given")
    parser.add_argument("--limit", type=float, help="seconds after which nothing new begins")
    parser.add_argument("--json", help="write the figures to this file, after every layer")
    parser.add_argument("--resume", action="store_true", help="go on with what the file of --json lacks")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.sparsity is None:
        args.sparsity = [0.9, 0.95, 0.98] if args.quick or args.whole else list(model.SPARSITIES)
    if args.limit is None and (args.quick or args.whole):
        args.limit = 70 * args.quick + 55 * args.whole
    return args


def run(argv: list[str]) -> Bench:
    args = parse(argv)
    bench = Bench(args)
    from sparsekit import gpu

    names = args.backends or ([b for b in gpu.backends() if b != "reference"] if bench.is_cuda else ["native"])
    bench.results["backends"] = names
    bench.results["argv"] = [a for a in argv if a != "--resume"]
    print(" ".join(f"{key} {value};" for key, value in bench.results["machine"].items()), f"backends {names}")
    print("µs, measured ± spread (predicted); a speed-up below 1 is a loss", flush=True)
    try:
        if not args.whole and not args.quick and "optimizers" not in bench.results:
            run_optimizers(bench)
        # Triton last: it compiles while it runs.
        if args.quick or not args.whole:
            run_layers(bench, [name for name in names if name != "triton"])
        if args.whole and "times" not in bench.results.get("whole", {}) and names:
            run_whole(bench, names[0])
        if args.quick or not args.whole:
            run_layers(bench, [name for name in names if name == "triton"])
    except Lost as error:
        restarts = bench.results["restarts"] = bench.results.get("restarts", 0) + 1
        if "whole" in bench.results:
            bench.results["whole"]["failed"].setdefault("lost", str(error))
        bench.save()
        print(f"the GPU was lost: {error}", flush=True)
        if args.json and restarts <= RESTARTS:
            rest = [a for a in argv if a != "--resume"]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *rest, "--resume"])
    bench.save()
    print(f"{bench.elapsed():.0f} s", flush=True)
    return bench


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.docs:
        write_document()
        return
    reason = "" if args.predict or args.device == "cpu" else kernels.no_gpu()
    if reason:
        print(f"nothing to measure: {reason}. What the model predicts:\n", file=sys.stderr, flush=True)
    if args.predict or reason:
        layers = [layer for layer in RESNET50 if not args.layers or args.layers in layer.name]
        print(model.report(args.batch, layers))
        return
    run(argv)


if __name__ == "__main__":
    main()
