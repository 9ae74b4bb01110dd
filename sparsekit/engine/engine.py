"""The engine: a plan, made ready to run."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ops, dispatch
from ..dispatch import Shape
from ..formats import pattern_from_mask
from ..profile import Explanation, LayerReport, seconds_in_turns
from . import files, tuning
from .capture import capture
from .chains import Chain, choose
from .plan import Call, Const, Layer, Plan, Ref, last_uses, lower, resolve

# Below this fraction of zeros nobody measures whether sparse is faster.
LOWEST_SPARSITY = 0.3
# Whether PyTorch has oneDNN's convolution with what follows fused, which inductor uses.
FUSED_DENSE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
# Parts of the batch that autotuning tries: a part's activations may fit a cache where the batch's do not.
PARTS = (1, 2, 4, 8)


def compile(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], autotune: bool = True) -> Engine:
    """Make an inference engine of a pruned model: fused, on the sparse kernels where they are faster.

    The engine is a snapshot: later changes of ``model`` do not reach it. What it does not know runs in PyTorch, op by
    op. It takes any batch size and the image size of ``example_inputs``.

    Args:
        model: any module in eval mode, on the CPU; it is not changed.
        example_inputs: what ``model`` is called with, ``[n, channels, h, w]`` for a CNN: a tensor, or a tuple of them.
        autotune: measure every layer, sparse against dense, and which part of the batch to run at a time, instead of
            following the cost table. Measurements are kept on disk (:mod:`sparsekit.engine.tuning`). With False the
            same model gives the same plan, and bit-identical results for any number of threads where all layers run
            sparse.

    Returns:
        An :class:`Engine`.

    Raises:
        ValueError: the model is in training mode, not on the CPU, or cannot be captured as one graph.
        TypeError: ``example_inputs`` holds something other than tensors.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU()).eval()
        >>> fast = sk.compile(sk.pruning.magnitude_(model, sparsity=0.9), torch.randn(2, 3, 8, 8), autotune=False)
        >>> fast(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 64, 6, 6])
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _check_model(model, inputs)
    engine = Engine(lower(capture(model, inputs)))
    return engine.autotune_(*inputs) if autotune else engine.decide_(*inputs)


def load(path: str | os.PathLike) -> Engine:
    """Read an engine that :meth:`Engine.save` wrote; it needs neither the model nor its code.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an engine's file, damaged, or of a newer version.
    """
    plan, choices = files.read(path)
    engine = Engine(plan)
    try:
        engine._set_choices(choices)
    except RuntimeError as error:
        raise ValueError(f"path must be an engine's file, got {path}: {error}") from error
    return engine


def _check_model(model: nn.Module, inputs: tuple) -> None:
    for i, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"example_inputs must be tensors, got {type(tensor).__name__} at position {i}")
        if tensor.device.type != "cpu":
            raise ValueError(f"example_inputs must be on the CPU, got {tensor.device} at position {i}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        name = next(name for name, module in model.named_modules() if module.training)
        raise ValueError(f"model must be in eval mode (model.eval()), but {name or 'it'} is in training mode")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"model must be on the CPU, but {name} is on {tensor.device}")


class _Ready:
    """A layer of the plan with its weight in the form that runs."""

    def __init__(self, layer: Layer, tensors: dict[str, Tensor]):
        self.layer = layer
        self.weight = tensors[layer.weight]
        self.bias = None if layer.bias is None else tensors[layer.bias]
        self.nnz = int(torch.count_nonzero(self.weight))
        self.sparsity = 1 - self.nnz / max(self.weight.numel(), 1)
        self.number: int | None = None
        self.reordered: Tensor | None = None
        self.expected = (math.nan, math.nan)  # seconds outside of a chain: sparse, dense
        self.seconds: tuple[float, float] | None = None  # the same, measured
        self.backend, self.reason = "dense", ""

    def compressed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight's values, crow_indices and col_indices."""
        pattern = pattern_from_mask(self.weight != 0, self.layer.groups)
        return _ops.compress(self.weight, pattern), pattern.crow_indices, pattern.col_indices

    def pack(self) -> None:
        """Hand the weight to the sparse kernels, once."""
        if self.number is None:
            self.number = _ops.add_layer(*self.compressed(), self.weight[0].numel())
            self._forget = weakref.finalize(self, _ops.remove_layer, self.number)

    def unpack(self) -> None:
        """Free what only :meth:`run` needs."""
        if self.number is not None:
            self._forget()
        self.number = self.reordered = None

    def shape_on(self, size: Sequence[int]) -> Shape:
        """What the layer costs depends on, for an input of this size."""
        layer, weight = self.layer, self.weight
        if layer.kind == "linear":
            batch = math.prod(size[:-1])
            return Shape("linear", weight.shape[1], weight.shape[0], 1, 1, 1, batch, 1, 1)
        n, _, oh, ow = _ops.output_size(
            size, len(weight), weight.shape[2:], layer.stride, layer.padding, layer.dilation
        )
        return Shape(
            "conv2d", weight.shape[1] * layer.groups, len(weight), math.prod(weight.shape[2:]), layer.groups,
            math.prod(layer.stride), n, size[2] * size[3], oh * ow,
        )  # fmt: skip

    def run(self, input: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        layer = self.layer
        if backend == "sparse" and input.numel():
            self.pack()
            geometry = (self.weight.shape[2:], layer.stride, layer.padding, layer.dilation, layer.groups)
            shared = (input, self.number, len(self.weight), self.bias, residual, layer.low, layer.high)
            return _ops.run_linear(*shared) if layer.kind == "linear" else _ops.run_conv2d(*shared, *geometry)
        if layer.kind == "linear":
            return self._finish(F.linear(input, self.weight, self.bias), residual)
        if input.shape[2:] == self.weight.shape[2:] == (1, 1) and layer.groups == 1 and not any(layer.padding):
            # oneDNN's convolution takes milliseconds here if its weight was reordered for another batch size.
            out = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)
            return self._finish(out[:, :, None, None], residual)
        top, bottom, left, right = layer.padding
        if top != bottom or left != right:
            input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
        geometry = (layer.stride, (top, left), layer.dilation, layer.groups)
        if not FUSED_DENSE or not input.numel():
            return self._finish(F.conv2d(input, self.weight, self.bias, *geometry), residual)
        return self._dense(input, residual, *geometry)

    def _dense(self, input, residual, stride, padding, dilation, groups) -> Tensor:
        """oneDNN with the weight in its own layout, and what follows fused, as inductor does it; channels_last out."""
        if self.reordered is None:
            self.reordered = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, padding, stride, dilation, groups, input.shape
            )
        clamps = self.layer.low > -math.inf or self.layer.high < math.inf
        relu = clamps and self.layer.low == 0 and self.layer.high == math.inf
        shared = (self.reordered, self.bias, padding, stride, dilation, groups)
        if residual is not None:
            out = torch.ops.mkldnn._convolution_pointwise.binary(
                input, residual, *shared, "add", 1.0, "relu" if relu else None, [], None
            )
            return out if relu or not clamps else out.clamp_(self.layer.low, self.layer.high)
        kind = "relu" if relu else "hardtanh" if clamps else "none"
        bounds = [self.layer.low, self.layer.high] if kind == "hardtanh" else []
        return torch.ops.mkldnn._convolution_pointwise(input, *shared, kind, bounds, "")

    def _finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            out += residual
        if self.layer.low == 0 and self.layer.high == math.inf:
            return out.relu_()
        if self.layer.low == -math.inf and self.layer.high == math.inf:
            return out
        return out.clamp_(self.layer.low, self.layer.high)


class Engine(nn.Module):
    """What :func:`sparsekit.compile` returns: call it like the model. For inference; several threads may call it at once.

    Attributes:
        plan: the steps, see :mod:`sparsekit.engine.plan`.
        part: images that are run at a time; None runs the whole batch.
    """

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.part: int | None = None
        self.eval()
        self._layers = {i: _Ready(s, plan.tensors) for i, s in enumerate(plan.steps) if isinstance(s, Layer)}
        self._functions = [None if isinstance(s, Layer) else _function(s.target) for s in plan.steps]
        self._set_chains([])
        self._spec = torch.utils._pytree.treespec_loads(plan.output_spec)
        self._decided, self._lock = False, threading.Lock()

    def forward(self, *inputs: Tensor):
        """As the model's. Raises TypeError or ValueError if the inputs are not like those it was compiled for."""
        self._check_inputs(inputs)
        with torch.no_grad():
            self._decide_once(inputs)
            if self.part is None or len(inputs[0]) <= self.part:
                outputs = self._run(inputs)
            else:
                parts = [self._run((part,)) for part in inputs[0].split(self.part)]
                outputs = [torch.cat(part) for part in zip(*parts)]
        return torch.utils._pytree.tree_unflatten(outputs, self._spec)

    def accepts(self, *inputs: Tensor) -> bool:
        """Whether it was compiled for inputs like these."""
        try:
            self._check_inputs(inputs)
        except (TypeError, ValueError):
            return False
        return True

    def _check_inputs(self, inputs: tuple) -> None:
        if len(inputs) != len(self.plan.inputs):
            raise TypeError(f"the engine takes {len(self.plan.inputs)} inputs, got {len(inputs)}")
        for i, (tensor, (dtype, shape)) in enumerate(zip(inputs, self.plan.inputs)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"input {i} must be a tensor, got {type(tensor).__name__}")
            if tensor.device.type != "cpu":
                raise ValueError(f"input {i} must be on the CPU, got {tensor.device}")
            if str(tensor.dtype) != f"torch.{dtype}":
                raise TypeError(f"input {i} must be {dtype}, got {str(tensor.dtype).removeprefix('torch.')}")
            if tensor.dim() != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape)):
                wanted = "x".join("n" if s is None else str(s) for s in shape)
                raise ValueError(
                    f"input {i} must have the shape that the engine was compiled for, {wanted}, got "
                    f"{'x'.join(map(str, tensor.shape))}; compile the model again for other sizes"
                )

    def _run(self, inputs: tuple[Tensor, ...], observe: Callable | None = None) -> list:
        slots: list = [None] * self.plan.slots
        slots[: len(inputs)] = inputs
        tensors = self.plan.tensors

        def value(v):
            if isinstance(v, Ref):
                return slots[v.slot]
            if isinstance(v, Const):
                return tensors[v.name]
            return [value(item) for item in v] if isinstance(v, list) else v

        for item, unused in self._schedule if observe is None else self._steps:
            if isinstance(item, Chain):
                for slot, out in zip(item.outputs, item.run([slots[slot] for slot in item.inputs])):
                    slots[slot] = out
            elif isinstance(step := self.plan.steps[item], Call):
                slots[step.out] = self._functions[item](
                    *map(value, step.args), **{k: value(v) for k, v in step.kwargs.items()}
                )
            else:
                ready = self._layers[item]
                residual = None if step.residual is None else slots[step.residual.slot]
                if observe is not None:
                    observe(ready, slots[step.input.slot], residual)
                slots[step.out] = ready.run(slots[step.input.slot], residual, ready.backend)
            for slot in unused:
                slots[slot] = None
        return [value(v) for v in self.plan.outputs]

    def _set_chains(self, chains: list[Chain]) -> None:
        """What a call runs: steps, by number, and chains, each with the slots that nobody reads after it."""
        last = {chain.numbers[-1]: chain for chain in chains}
        inside = {number for chain in chains for number in chain.numbers}
        steps = range(len(self.plan.steps))
        items = [last.get(number, number) for number in steps if number in last or number not in inside]

        def with_unused(items: list) -> list[tuple]:
            uses = [(item.inputs, item.outputs) if isinstance(item, Chain) else self.plan.uses(item) for item in items]
            return list(zip(items, last_uses(uses, self.plan.outputs)))

        self._steps = with_unused(list(steps))  # all of them, one by one
        self._schedule = with_unused(items) if chains else self._steps

    def _choose_chains(self, batch: int) -> list[list[int]]:
        """Numbers of the steps that would make chains, by measured and expected seconds."""
        alone, sparse = {}, {}
        for number, ready in self._layers.items():
            seconds = ready.seconds or ready.expected
            alone[number] = min(seconds)
            size = self.plan.sizes.get(ready.layer.input.slot)
            if ready.layer.kind == "conv2d" and size is not None and not math.isnan(seconds[0]):
                # Never more than outside: there, tensors come in another layout, and from further away.
                expected = dispatch.predict_in_chain(ready.shape_on((batch, *size)), ready.nnz)
                sparse[number] = min(expected, seconds[0])
        threads = torch.get_num_threads()
        copy = dispatch.CHAIN_COPY * batch / threads
        return choose(self.plan, alone, sparse, lambda slot: copy * math.prod(self.plan.sizes[slot]))

    def _make_chains(self, chains: list[list[int]]) -> None:
        """Join steps to chains, whose layers run sparse."""

        def weight_of(number: int) -> tuple:
            ready = self._layers[number]
            return *ready.compressed(), ready.bias, list(ready.weight.shape[2:])

        made = [Chain(self.plan, numbers, weight_of) for numbers in chains]
        self._set_chains(made)
        for number in (number for chain in chains for number in chain if number in self._layers):
            ready = self._layers[number]
            if ready.backend != "sparse":
                ready.backend, ready.reason = "sparse", f"a link, {ready.reason}"
            ready.unpack()

    def decide_(self, *inputs: Tensor) -> Engine:
        """Choose what runs sparse by the cost table (:mod:`sparsekit.dispatch`), for inputs like these. Returns self."""

        def decide(ready: _Ready, input: Tensor, residual) -> None:
            if not _can_run_sparse(input):
                ready.backend, ready.reason = "dense", "installed without C++ kernels"
                ready.expected = math.nan, 0.0
                return
            ready.expected = sparse, dense = self._expected(ready, input)
            ready.backend, ready.reason = ("sparse" if sparse < dense else "dense"), "cost table"

        self._check_inputs(inputs)
        with torch.no_grad():
            self.part = None
            self._run(inputs, decide)
            self._make_chains(self._choose_chains(len(inputs[0])) if inputs else [])
        self._decided = True
        return self

    def _decide_once(self, inputs: tuple[Tensor, ...]) -> None:
        if not self._decided:
            with self._lock:
                if not self._decided:
                    self.decide_(*inputs)

    @staticmethod
    def _expected(ready: _Ready, input: Tensor) -> tuple[float, float]:
        return dispatch.predict(ready.shape_on(input.shape), ready.nnz, train=False)

    def autotune_(self, *inputs: Tensor) -> Engine:
        """Measure, and choose per layer what is faster, and how much of the batch to run at a time. Returns self.

        Args:
            inputs: as for a call; the batch size that matters.
        """
        self.decide_(*inputs)
        with torch.no_grad(), tuning.Cache() as cache:
            self._run(inputs, lambda *call: self._measure(cache, *call))
            self._tune_chains(inputs, cache)
            if self.plan.batched and len(inputs[0]) > 1:
                self._tune_part(inputs, cache)
        return self

    def _measure(self, cache: tuning.Cache, ready: _Ready, input: Tensor, residual: Tensor | None) -> None:
        if ready.sparsity < LOWEST_SPARSITY or not _can_run_sparse(input):
            return
        key = f"{ready.shape_on(input.shape).key}-{ready.nnz}-{residual is not None}"
        ready.seconds = cache.get(key, lambda: self._time(ready, input, residual, "sparse", "dense"))
        ready.backend = "sparse" if ready.seconds[0] < ready.seconds[1] else "dense"
        ready.reason = "measured"

    @staticmethod
    def _time(ready: _Ready, input: Tensor, residual: Tensor | None, *backends: str) -> tuple[float, ...]:
        """Seconds of a layer on each of ``backends``."""
        runs = {backend: lambda backend=backend: ready.run(input, residual, backend) for backend in backends}
        return tuple(seconds_in_turns(runs).values())

    def _tune_chains(self, inputs: tuple[Tensor, ...], cache: tuning.Cache) -> None:
        """Join steps to chains, if the whole is faster for it."""
        chains = self._choose_chains(len(inputs[0])) if inputs else []
        self._make_chains([])
        if not chains:
            return
        alone = {number: (ready.backend, ready.reason) for number, ready in self._layers.items()}
        without = self._schedule
        self._make_chains(chains)
        joined, chained = self._schedule, {n: (r.backend, r.reason) for n, r in self._layers.items()}

        def use(schedule: list, backends: dict) -> None:
            self._schedule = schedule
            for number, ready in self._layers.items():
                ready.backend, ready.reason = backends[number]

        def run(*way) -> None:
            use(*way)
            self._run(inputs)

        ways = {"alone": (without, alone), "chained": (joined, chained)}
        key = f"chains-{self._key(inputs)}"
        runs = {name: lambda way=way: run(*way) for name, way in ways.items()}
        seconds = cache.get(key, lambda: tuple(seconds_in_turns(runs, runs=3).values()))
        use(*ways["alone" if seconds[0] < seconds[1] else "chained"])

    def _key(self, inputs: tuple[Tensor, ...]) -> str:
        nnz = sum(ready.nnz for ready in self._layers.values())
        return f"{len(self.plan.steps)}-{nnz}-{'x'.join(map(str, inputs[0].shape))}"

    def _tune_part(self, inputs: tuple[Tensor, ...], cache: tuning.Cache) -> None:
        batch = len(inputs[0])
        parts = [None, *(part for part in PARTS if part < batch)]
        key = f"part-{self._key(inputs)}"

        def run_in(part):
            def run():
                self.part = part
                self.forward(*inputs)

            return run

        runs = {str(part): run_in(part) for part in parts}
        seconds = cache.get(key, lambda: tuple(seconds_in_turns(runs, runs=3).values()))
        self.part = parts[min(range(len(parts)), key=lambda i: seconds[i])]

    def explain(self, *inputs: Tensor) -> Explanation:
        """Per layer: shape, sparsity, what runs, why, and expected and measured time against dense.

        Times are those of layers by themselves; in a chain they take less.

        Args:
            inputs: as for a call; layers are measured on what they get here.

        Returns:
            A list of :class:`sparsekit.profile.LayerReport` in the order of execution; ``print`` shows a table.
        """
        reports = Explanation()
        chained: set[int] = set()

        def report(ready: _Ready, input: Tensor, residual: Tensor | None) -> None:
            runs_sparse = _can_run_sparse(input)
            if runs_sparse:
                sparse, dense = self._time(ready, input, residual, "sparse", "dense")
            else:
                sparse, (dense,) = math.nan, self._time(ready, input, residual, "dense")
            shape = f"{'x'.join(map(str, ready.weight.shape))} on {'x'.join(map(str, input.shape))}"
            why = ready.reason + ("; in a chain" if id(ready) in chained else "")
            why += f"; with {', '.join(ready.layer.fused)}" if ready.layer.fused else ""
            expected = self._expected(ready, input) if runs_sparse else (math.nan, math.nan)
            reports.append(
                LayerReport(ready.layer.name, shape, ready.sparsity, ready.backend, why, *expected, sparse, dense)
            )

        self._check_inputs(inputs)
        with torch.no_grad():
            self._decide_once(inputs)
            chains = [item.numbers for item, _ in self._schedule if isinstance(item, Chain)]
            chained.update(id(self._layers.get(number)) for numbers in chains for number in numbers)
            self._run(inputs, report)
        return reports

    def save(self, path: str | os.PathLike) -> None:
        """Write the engine to one safetensors file, weights compressed, atomically; :func:`sparsekit.load` reads it."""
        files.write(path, self.plan, self._choices())

    def _choices(self) -> dict:
        return {
            "decided": self._decided,
            "part": self.part,
            "layers": {str(i): [r.backend, r.reason, r.seconds] for i, r in self._layers.items()},
            "chains": [item.numbers for item, _ in self._schedule if isinstance(item, Chain)],
            "machine": tuning.machine(),
        }

    def _set_choices(self, choices: dict) -> None:
        # Another machine decides anew, by its own cost table.
        if not choices["decided"] or choices["machine"] != tuning.machine():
            return
        self.part = choices["part"]
        for i, ready in self._layers.items():
            ready.backend, ready.reason, seconds = choices["layers"][str(i)]
            ready.seconds = None if seconds is None else tuple(seconds)
        self._make_chains(choices["chains"])
        self._decided = True

    def extra_repr(self) -> str:
        sparse = sum(ready.backend == "sparse" for ready in self._layers.values())
        return f"{len(self.plan.steps)} steps, {len(self._layers)} layers, {sparse} of them sparse, part={self.part}"

    def __deepcopy__(self, memo):
        copy = Engine(self.plan)
        copy._set_choices(self._choices())
        return copy

    def __reduce__(self):
        raise TypeError("an engine cannot be pickled; use engine.save(path) and sparsekit.load(path)")


def _function(target: str) -> Callable:
    """What runs a step that is no layer: PyTorch's op, or our own where that is faster."""
    function = resolve(target)
    if target == "aten.view.default":  # layers may leave another layout than they did in PyTorch
        return torch.ops.aten.reshape.default
    if target != "aten.max_pool2d.default":
        return function

    def max_pool2d(input: Tensor, *args):
        if _ops.backend() == "reference" or input.dim() != 4 or input.dtype != torch.float32 or not input.numel():
            return function(input, *args)
        return _ops.max_pool2d(input, *args)

    return max_pool2d


def _can_run_sparse(input: Tensor) -> bool:
    return _ops.backend() != "reference" and input.numel() > 0
