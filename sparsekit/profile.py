"""What runs where, and how long it takes: explain and autotune_."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _ops, dispatch, gpu
from .nn import DepthwiseConv2d
from .nn.sparse import SparseModule

RUNS = 5


class LayerReport(NamedTuple):
    """One layer of :func:`explain`; times are seconds, NaN where unknown.

    Attributes:
        name: qualified name.
        shape: the weight's shape and the input's, for people.
        sparsity: fraction of zeros in the weight.
        backend: what runs: ``"sparse"`` or ``"dense"``.
        reason: why.
        expected_sparse, expected_dense: what dispatch compared.
        measured_sparse, measured_dense: medians of alternating runs just now; dense is PyTorch's own layer on the same
            input, in the memory format that the model feeds it.
        weights: number of weights, zeros included.
        macs: multiply-adds of the dense layer on this input.
        kernel: the variant of the forward that runs: an ISA of the CPU, a backend of :mod:`sparsekit.gpu` and its tiling,
            or ``"pytorch"``.
    """

    name: str
    shape: str
    sparsity: float
    backend: str
    reason: str
    expected_sparse: float
    expected_dense: float
    measured_sparse: float
    measured_dense: float
    weights: int = 0
    macs: int = 0
    kernel: str = "pytorch"

    @property
    def speedup(self) -> float:
        """Measured time of the dense layer over that of what runs."""
        runs = self.measured_sparse if self.backend == "sparse" else self.measured_dense
        return self.measured_dense / runs


class Explanation(list):
    """A list of :class:`LayerReport`; ``print`` shows a table."""

    def __str__(self) -> str:
        width = max([len(r.name) for r in self] + [5])
        shapes = max([len(r.shape) for r in self] + [5])
        head = (
            f"{'layer':<{width}}  {'shape':<{shapes}}  sparsity  runs    kernel      expected sparse / dense ms  "
            "measured sparse / dense ms  speed-up  why"
        )
        lines = [head]
        for r in self:
            lines.append(
                f"{r.name:<{width}}  {r.shape:<{shapes}}  {r.sparsity:8.3f}  {r.backend:<6}  {r.kernel:<10}  "
                f"     {_ms(r.expected_sparse)} / {_ms(r.expected_dense)}       "
                f"    {_ms(r.measured_sparse)} / {_ms(r.measured_dense)}  {r.speedup:7.2f}x  {r.reason}"
            )
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return "       –" if math.isnan(seconds) else f"{1e3 * seconds:8.3f}"


def explain(model: nn.Module, example_inputs: Tensor | tuple, train: bool = False) -> Explanation:
    """Per layer: shape, sparsity, which kernel runs, why, and expected and measured time against dense.

    Args:
        model: any module; its parameters, buffers, gradients and modes are as before afterwards.
        example_inputs: what ``model`` is called with: a tensor, or a tuple of arguments.
        train: measure forward and backward instead of forward.

    Returns:
        A list of :class:`LayerReport` in the order of execution, one for every Conv2d and Linear that ran; ``print``
        shows a table.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> _ = sk.sparsify_(sk.pruning.magnitude_(model, sparsity=0.95, distribution="uniform"))
        >>> [layer.name for layer in sk.explain(model, torch.randn(1, 64, 3, 3))]
        ['0', '2']
    """
    names = {module: name for name, module in model.named_modules()}
    reports = Explanation()
    for module, (input, needs_grad) in _inputs_of(model, example_inputs, train).items():
        weight = module.weight.detach()
        sparsity = float((weight == 0).float().mean()) if weight.numel() else 0.0
        if isinstance(module, SparseModule):
            with torch.set_grad_enabled(train):
                decision = dispatch.decide(module, input)
            sparse, dense = _measure(module, input, needs_grad, train)
        else:
            is_ours = isinstance(module, DepthwiseConv2d)
            why = (
                "depthwise, on kernels of ours"
                if is_ours
                else "a plain layer; sparsify_ converts layers that hold zeros"
            )
            decision = dispatch.Decision("dense", why)
            sparse, dense = math.nan, seconds_in_turns({"dense": _runner(module, input, needs_grad, train)})["dense"]
        shape = f"{'x'.join(map(str, weight.shape))} on {'x'.join(map(str, input.shape))}"
        macs = dispatch.shape_of(module, input).macs
        kernel = _kernel(module, input) if decision.backend == "sparse" else "pytorch"
        report = LayerReport(names[module], shape, sparsity, *decision, sparse, dense, weight.numel(), macs, kernel)
        reports.append(report)
    return reports


def autotune_(model: nn.Module, example_inputs: Tensor | tuple, train: bool = False) -> nn.Module:
    """Measure every sparse layer on the shapes of ``example_inputs``, and let dispatch follow that instead of the table.

    The measurements live in ``module.tuned``, by shape, and hold for this machine and number of threads. Two runs may
    choose differently; call it where speed matters more than bit-identical results.

    Args:
        model: any module with sparse layers, changed in ``module.tuned`` only.
        example_inputs: what ``model`` is called with: a tensor, or a tuple of arguments.
        train: measure forward and backward, for training, instead of forward.

    Returns:
        ``model``.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(64, 64)), min_sparsity=0)
        >>> len(sk.autotune_(model, torch.randn(8, 64))[0].tuned)
        1
    """
    for module, (input, needs_grad) in _inputs_of(model, example_inputs, train).items():
        if isinstance(module, SparseModule):
            if input.is_cuda and not gpu.missing():
                with gpu.tuning():
                    _with_backend(module, "sparse", _runner(module, input, needs_grad, train))()
            key = dispatch.tuned_key(dispatch.shape_of(module, input), train and module.is_trained, input)
            module.tuned[key] = _measure(module, input, needs_grad, train)
    return model


def _inputs_of(model: nn.Module, example_inputs: Tensor | tuple, train: bool) -> dict[nn.Module, tuple[Tensor, bool]]:
    """The input that every Conv2d and Linear got last, and whether its gradient was asked for, in order of execution."""
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs: dict[nn.Module, tuple[Tensor, bool]] = {}
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [
        layer.register_forward_pre_hook(lambda m, a: inputs.__setitem__(m, (a[0].detach(), a[0].requires_grad)))
        for layer in layers
    ]
    # Running a model in train mode would move its BatchNorm statistics and draw dropout's random numbers.
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.set_grad_enabled(train):
            model(*args)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return inputs


def _kernel(module: SparseModule, input: Tensor) -> str:
    """The variant of the sparse kernels that a layer's forward takes."""
    if not input.is_cuda:
        return _ops.backend()
    with gpu.watch() as calls, torch.no_grad():
        _with_backend(module, "sparse", lambda: module.forward(input))()
    return calls[-1][1] if calls else "reference"


def _runner(module: nn.Module, input: Tensor, needs_grad: bool, train: bool) -> Callable[[], object]:
    """Forward of one layer, or forward and backward, without its hooks."""
    if not train:

        def forward():
            with torch.no_grad():
                return module.forward(input)

        return forward
    wanted = [p for p in module.parameters() if p.requires_grad]
    if needs_grad:
        wanted.append(input := input.clone().requires_grad_())
    with torch.enable_grad():
        grad = torch.randn_like(module.forward(input))

    def step():
        with torch.enable_grad():
            out = module.forward(input)
            return torch.autograd.grad(out, wanted, grad) if wanted else out

    return step


def _measure(module: SparseModule, input: Tensor, needs_grad: bool, train: bool) -> tuple[float, float]:
    """Median seconds of (sparse, dense) for one layer, in alternating runs."""
    run = _runner(module, input, needs_grad, train)
    seconds = seconds_in_turns({backend: _with_backend(module, backend, run) for backend in ("sparse", "dense")})
    return seconds["sparse"], seconds["dense"]


def _with_backend(module: SparseModule, backend: str, run: Callable[[], object]) -> Callable[[], object]:
    def call():
        before, module.backend = module.backend, backend
        try:
            return run()
        finally:
            module.backend = before

    return call


def seconds_in_turns(
    functions: dict[str, Callable[[], object]], runs: int = RUNS, limit: float = math.inf
) -> dict[str, float]:
    """Median seconds of each function, taken in turns after one warm-up; once at least, then for ``limit`` seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for run in range(runs + 1):
        if run > 1 and time.perf_counter() - begin > limit:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if run:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}
