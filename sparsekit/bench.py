"""How much faster a sparse model is than the dense one, measured: inference, full finetuning, linear finetuning.

Dense is the fastest of NCHW eager, channels_last eager and ``torch.compile``. Sparse are the modules; where nothing but
a head is trained also :func:`sparsekit.compile`'s engine, and where all is, what :func:`sparsekit.compress_` makes of
the modules, eager and under ``torch.compile``. All variants run in turns in one process; figures are medians,
with the spread beside them.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _ops
from .convert import compress_, densify_, sparsity
from .engine import compile
from .nn import SparseModule

KINDS = ("inference", "full", "linear")
PARTS = ("forward", "backward", "optimizer")  # of a training step
WAYS = {  # of running a sparse model
    "sparse": "sparse modules",
    "compressed": "sk.compress_",
    "compiled": "sk.compress_ and torch.compile",
    "engine": "sk.compile",
}


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system, for all that runs in this process.

    Else whoever allocates after somebody's large tensor was freed pays for fresh pages: up to 20 ms for 25 MB on a
    virtual machine, more than many layers take, and at random to one side or the other.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, -1)  # never
    libc.mallopt(m_arena_max, 1)


def interleave(
    functions: dict[str, Callable[[], object]], runs: int = 7, warmup: int = 1, lead: int = 0
) -> dict[str, list[float]]:
    """Seconds of every function, ``runs`` of each, in turns so that drift hits all alike.

    The order is random in every round: what ran before decides what the caches hold. Functions that are called again and
    again in their use, as a training step is, get ``lead`` calls before the one that is timed, so that they find what
    they left themselves.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions.items()), random.Random(0).shuffle
    for run in range(warmup + runs):
        shuffle(order)
        for name, function in order:
            for _ in range(lead):
                function()
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if run >= warmup:
                times[name].append(elapsed)
    return times


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median: the noise of a figure."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / statistics.median(times)


def measure(
    sparse_models: dict[str, nn.Module],
    images: Tensor,
    kind: str,
    *,
    runs: int = 5,
    compiled: bool = True,
    compile_sparse: bool = False,
) -> dict:
    """Time sparse models against the same model run dense.

    Args:
        sparse_models: name to a model with sparse layers; all of one architecture. They are copied.
        images: a batch, ``[n, channels, h, w]``, NCHW.
        kind: ``"inference"``: the forward pass in eval mode; ``"full"``: a step of full finetuning (forward, backward,
            SGD with momentum); ``"linear"``: a step of linear finetuning on the fly (frozen backbone in eval mode,
            forward and backward of the last linear layer, SGD with momentum).
        runs: alternating runs of each.
        compiled: whether ``torch.compile`` is one of the dense ways; it takes a minute to compile a large model.
        compile_sparse: whether it is one of the sparse ways of full finetuning.

    Returns:
        JSON types: ``dense`` (milliseconds per way, which is the fastest, and its parts), batch, threads, ISA, ``lead``
            (steps of the same model before every one that is timed: 1, or 0 of inference), and for each sparse way
            (``sparse``, the modules; ``engine`` of inference and linear finetuning; ``compressed`` and, if ``compiled``,
            ``compiled`` of full finetuning) a dict by name: milliseconds, spread, speed-up over the fastest dense way,
            sparsity; of full finetuning also ``parts``: milliseconds of forward, backward and optimizer.

    Raises:
        ValueError: ``kind`` is unknown, or there is no model.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not sparse_models:
        raise ValueError("sparse_models must hold at least one model, got none")
    labels = torch.zeros(len(images), dtype=torch.int64)
    dense = densify_(copy.deepcopy(next(iter(sparse_models.values()))))
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    functions = {
        "dense nchw": _runner(copy.deepcopy(dense), images, labels, kind),
        "dense channels_last": _runner(last, images.contiguous(memory_format=torch.channels_last), labels, kind),
    }
    if compiled:
        functions["dense compiled"] = _runner(dense, images, labels, kind, run=torch.compile)
    ways: dict[str, Callable] = {"sparse": lambda model: _runner(model, images, labels, kind)}
    if kind == "full":
        ways["compressed"] = lambda model: _runner(compress_(model), images, labels, kind)
        if compile_sparse:
            ways["compiled"] = lambda model: _runner(compress_(model), images, labels, kind, run=torch.compile)
    else:
        engine = partial(compile, example_inputs=images)
        ways["engine"] = lambda model: _runner(model, images, labels, kind, run=engine)
    for way, make in ways.items():
        for name, model in sparse_models.items():
            functions[f"{way} {name}"] = make(copy.deepcopy(model))
    # The first steps of every model find memory that nobody has touched yet; later ones, after another model's, caches
    # that hold nothing of theirs, which no step of a training loop does.
    lead = 0 if kind == "inference" else 1
    times = interleave(functions, runs, warmup=3 - lead, lead=lead)
    medians = {name: statistics.median(t) for name, t in times.items()}
    dense_ways = {name: seconds for name, seconds in medians.items() if name.startswith("dense")}
    fastest = min(dense_ways, key=dense_ways.get)

    def parts(function: str) -> dict:
        if kind != "full":
            return {}
        measured = zip(*functions[function].parts[lead - (1 + lead) * runs :: 1 + lead])
        return {"parts": {part: 1e3 * statistics.median(seconds) for part, seconds in zip(PARTS, measured)}}

    def row(way: str, name: str, model: nn.Module) -> dict:
        function = f"{way} {name}"
        return {
            "milliseconds": 1e3 * medians[function],
            "spread": spread(times[function]),
            "speedup": dense_ways[fastest] / medians[function],
            "sparsity": sparsity(model).overall,
            "sparse_layers": sum(isinstance(m, SparseModule) for m in model.modules()),
        } | parts(function)

    return {
        "kind": kind,
        "batch": len(images),
        "image": list(images.shape[1:]),
        "threads": torch.get_num_threads(),
        "isa": _ops.backend(),
        "runs": runs,
        "lead": lead,
        "dense": {name.removeprefix("dense "): 1e3 * s for name, s in dense_ways.items()}
        | {"fastest": fastest.removeprefix("dense "), "spread": spread(times[fastest])}
        | parts(fastest),
    } | {way: {name: row(way, name, model) for name, model in sparse_models.items()} for way in ways}


def best(measured: dict) -> dict:
    """Of what :func:`measure` gave, the rows of the way that we advise: engines, else compressed modules."""
    return measured.get("engine") or measured.get("compressed") or measured["sparse"]


class TrainingStep:
    """A training step that remembers how long its parts took, in seconds."""

    def __init__(self, forward: Callable[[Tensor], Tensor], parameters, images: Tensor, labels: Tensor):
        self.forward, self.images, self.labels = forward, images, labels
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
        self.parts: list[tuple[float, ...]] = []

    def __call__(self) -> None:
        times = [time.perf_counter()]
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.forward(self.images), self.labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        self.parts.append(tuple(end - begin for begin, end in itertools.pairwise(times)))


def _runner(
    model: nn.Module, images: Tensor, labels: Tensor, kind: str, run: Callable[[nn.Module], Callable] | None = None
) -> Callable[[], object]:
    """What is timed; ``run(model)``, if given, is called in the place of what is not trained, or of all of it."""
    run = run or (lambda model: model)
    if kind == "inference":
        forward = run(model.eval())

        def infer():
            with torch.inference_mode():
                return forward(images)

        return infer
    if kind == "full":
        trained, forward = model.train(), run(model)
    else:
        from .transfer.models import replace_head_

        trained = replace_head_(model, nn.Identity())
        backbone = run(model.eval().requires_grad_(False))

        def forward(images):
            return trained(backbone(images))

    return TrainingStep(forward, trained.parameters(), images, labels)
