"""Chains: neighbouring steps of a plan that the C++ engine runs image by image, without PyTorch in between."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _ops
from .plan import ACTIVATIONS, CLAMPS, Call, Const, Layer, Plan, Ref, refs

# Shorter ones gain nothing: a chain copies its inputs and outputs.
FEWEST_CONVS = 2
# Zeros that a convolution may want beside its rows, as a part of them: everything at its size has them.
MOST_PADDING = 0.3

# Per slot: channels, height and width of an image, or channels alone.
Sizes = dict[int, list[int]]

# What steps that are no layers do. Those but max_pool follow others of their chain: alone, they gain nothing.
KINDS = {
    "aten.max_pool2d.default": "max_pool",
    "aten.avg_pool2d.default": "avg_pool",
    "aten.adaptive_avg_pool2d.default": "mean",
    "aten.mean.dim": "mean",
    "aten.batch_norm.default": "affine",
    "aten.add.Tensor": "sum",
    "aten.mul.Tensor": "gate",
    "aten.cat.default": "concat",
    "aten.slice.Tensor": "slice",
    "aten.channel_shuffle.default": "shuffle",
    **dict.fromkeys(CLAMPS, "activation"),
    **dict.fromkeys(ACTIVATIONS, "activation"),
}


class Chain:
    """Steps ``numbers`` of a plan as one program of the C++ engine.

    Attributes:
        numbers: of the steps, in order.
        inputs, outputs: slots that it reads and writes.
    """

    def __init__(self, plan: Plan, sizes: Sizes, numbers: Sequence[int], weight_of: Callable, single: bool = False):
        """``weight_of(number)`` gives the weight of a layer: values, crow_indices, col_indices, bias, kernel_size,
        whether it is computed as if nothing of it were zero, and how its work is cut (:class:`_ops.Blocking`).
        ``single``: as of :func:`_ops.finish_program`."""
        self.numbers = list(numbers)
        self.inputs, self.outputs = _ends(plan, numbers)
        self._out_sizes = [sizes[slot] for slot in self.outputs]
        builder = _Builder(plan, sizes, self, weight_of)
        groups = (builder.tensors, [sizes[slot] for slot in self.inputs], [_image(size) for size in self._out_sizes])
        self.number = _ops.add_program(*([n for size in group for n in size] for group in groups))
        weakref.finalize(self, _ops.remove_program, self.number)
        for function, args, kwargs in builder.instructions:
            function(self.number, *args, **kwargs)
        _ops.finish_program(self.number, single)
        self._count, self._place = len(builder.instructions), builder.place

    def run(
        self, inputs: Sequence[Tensor], share: bool = False, seconds: dict[int, float] | None = None
    ) -> list[Tensor]:
        """The values of ``outputs``, NCHW, given those of ``inputs``.

        ``share``: as of :func:`_ops.run_program`. ``seconds``: gets what every layer took, all threads together, by the
        number of its step.
        """
        batch = len(inputs[0])
        outputs = [inputs[0].new_empty(batch, *_image(size)) for size in self._out_sizes]
        spent = None if seconds is None else torch.zeros(self._count, dtype=torch.float64)
        if batch:
            _ops.run_program(outputs, inputs, self.number, share, spent)
        if seconds is not None:
            seconds |= {number: float(spent[place]) for number, place in self._place.items()}
        return [out.view(batch, *size) for out, size in zip(outputs, self._out_sizes)]

    def values(self, number: int, crow: Tensor, col: Tensor) -> Tensor | None:
        """As :func:`_ops.program_values`, of the layer that is step ``number``."""
        return _ops.program_values(self.number, self._place[number], crow, col)

    def holds(self, number: int, crow: Tensor, col: Tensor) -> bool:
        """As :func:`_ops.program_holds`, of the layer that is step ``number``."""
        return _ops.program_holds(self.number, self._place[number], crow, col)


class _Builder:
    """What a chain's program is made of.

    Attributes:
        tensors: sizes of the program's tensors.
        instructions: functions of :mod:`sparsekit._ops`, with their arguments after the program's number.
        place: of layers among the instructions, by the number of their step.
    """

    def __init__(self, plan: Plan, sizes: Sizes, chain: Chain, weight_of: Callable):
        self.plan, self.sizes, self.weight_of = plan, sizes, weight_of
        self.tensors: list[list[int]] = []
        self.instructions: list[tuple] = []
        self.place: dict[int, int] = {}
        self.number_of = {slot: -1 - i for i, slot in enumerate(chain.inputs)}
        self.pending: dict[int, dict] = {}  # slot: what the only reader of it, an activation, takes over
        steps = [plan.steps[n] for n in chain.numbers]
        for slot in chain.inputs:
            if _needs_tensor(slot, steps):
                source = self.number_of[slot]
                self.add(_ops.program_load, source, self.new(slot))
        self.readers: dict[int, list] = {}
        for step in plan.steps:
            for ref in refs(step):
                self.readers.setdefault(ref.slot, []).append(step)
        self.kept = {ref.slot for ref in refs(plan.outputs)}
        self.inside = {id(step) for step in steps}
        for number, step in zip(chain.numbers, steps):
            self.layer(number, step) if isinstance(step, Layer) else self.call(step)
        for index, slot in enumerate(chain.outputs):
            self.add(_ops.program_store, self.number_of[slot], index)

    def new(self, slot: int) -> int:
        """A tensor for what a slot holds."""
        self.number_of[slot] = self.hidden(slot)
        return self.number_of[slot]

    def hidden(self, slot: int) -> int:
        """A tensor of the same size."""
        self.tensors.append(_image(self.sizes[slot]))
        return len(self.tensors) - 1

    def add(self, function: Callable, *args, **kwargs) -> None:
        self.instructions.append((function, args, kwargs))

    def layer(self, number: int, step: Layer) -> None:
        values, crow, col, bias, kernel, dense, blocking = self.weight_of(number)
        source = self.number_of[step.input.slot]
        residual = None if step.residual is None else self.number_of[step.residual.slot]
        out = self.hidden(step.out) if step.activation else self.new(step.out)
        geometry = (kernel, step.stride, step.padding, step.dilation, step.groups)
        self.place[number] = len(self.instructions)
        self.add(
            _ops.program_conv2d, source, out, residual, values, crow, col, bias, step.low, step.high, *geometry,
            dense=dense, blocking=blocking,
        )  # fmt: skip
        if step.activation:
            self.add(_ops.program_elementwise, out, self.new(step.out), activation=step.activation)

    def call(self, step: Call) -> None:
        kind, args = KINDS[step.target], step.args
        images = [self.number_of.get(ref.slot) for ref in refs(args)]
        if kind == "activation":
            low, high, activation = _bounds(step)
            fused = self.pending.pop(args[0].slot, {"input": images[0]})
            self.elementwise(step, low=low, high=high, activation=activation, **fused)
        elif kind == "affine":
            scale, shift = _affine(self.plan, step)
            self.elementwise(step, input=images[0], scale=scale, shift=shift)
        elif kind == "sum":
            self.elementwise(step, input=images[0], other=images[1])
        elif kind == "gate":
            first, second = images if _is_gate(self.sizes, *args) else images[::-1]
            self.elementwise(step, input=first, gate=second)
        elif kind in ("concat", "slice", "shuffle"):
            count = sum(self.sizes[ref.slot][0] for ref in refs(args))
            channels = torch.arange(count)
            if kind == "slice":
                channels = channels[args[2] : args[3]]
            elif kind == "shuffle":
                channels = channels.view(args[1], -1).T.flatten()
            self.add(_ops.program_gather, images, channels.tolist(), self.new(step.out))
        elif kind == "mean":
            self.add(_ops.program_mean, images[0], self.new(step.out))
        elif kind == "avg_pool":
            self.add(_ops.program_avg_pool2d, images[0], self.new(step.out), *args[1:])
        else:
            self.add(_ops.program_max_pool2d, images[0], self.new(step.out), *args[1:])

    def elementwise(self, step: Call, input: int, **what) -> None:
        readers = self.readers.get(step.out, [])
        follows = len(readers) == 1 and id(readers[0]) in self.inside and step.out not in self.kept
        if follows and "low" not in what and _kind(readers[0]) == "activation":
            self.pending[step.out] = {"input": input, **what}
        else:
            self.add(_ops.program_elementwise, input, self.new(step.out), **what)


def find(plan: Plan, sizes: Sizes, layers: set[int]) -> list[list[int]]:
    """Numbers of the steps that can be chains, given which layers may be in one.

    A step between two steps of a chain that depends on neither runs before the chain.
    """
    found: list[list[int]] = []
    chain: list[int] = []
    written: set[int] = set()

    def close() -> None:
        # What else there is without a convolution is better left to PyTorch.
        if sum(isinstance(plan.steps[n], Layer) for n in chain) >= FEWEST_CONVS:
            found.append(list(chain))
        chain.clear()
        written.clear()

    for number, step in enumerate(plan.steps):
        if _fits(plan, sizes, number, layers, written):
            chain.append(number)
            written.add(step.out)
        elif written & {ref.slot for ref in refs(step)}:
            close()
    close()
    return found


def check(plan: Plan, sizes: Sizes, numbers: list[int]) -> None:
    """Raise ValueError if steps ``numbers`` cannot be a chain."""
    layers = {number for number, step in enumerate(plan.steps) if isinstance(step, Layer)}
    written: set[int] = set()
    for number in range(numbers[0], numbers[-1] + 1) if numbers else ():
        step = plan.steps[number]
        inside = number in numbers
        reads = {ref.slot for ref in refs(step)}
        if not _fits(plan, sizes, number, layers, written) if inside else reads & written:
            raise ValueError(f"step {number} does not fit into the chain {numbers}")
        if inside:
            written.add(step.out)
    if not numbers or sorted(set(numbers)) != numbers:
        raise ValueError(f"a chain must be numbers of steps in order, got {numbers}")


def choose(
    plan: Plan, sizes: Sizes, alone: dict[int, float], chained: dict[int, float], copy: Callable[[int], float]
) -> list[list[int]]:
    """The chains that are worth their copies.

    Args:
        plan: the plan.
        sizes: of what its slots hold.
        alone: seconds of every layer as it would run outside of chains.
        chained: seconds of the layers that may be in a chain, there.
        copy: seconds that it takes to copy the value of a slot into or out of a chain.

    Returns:
        Numbers of the steps of every chain.
    """

    def with_layers(layers: set[int]) -> tuple[float, list[list[int]]]:
        """The time that chains of these layers save, and the chains that save any."""
        total, worth = 0.0, []
        for numbers in find(plan, sizes, layers):
            inputs, outputs = _ends(plan, numbers)
            steps = [plan.steps[n] for n in numbers]
            copied = [slot for slot in inputs if _is_copied(slot, steps)] + outputs
            inside = [n for n in numbers if n in chained]
            saved = sum(alone[n] - chained[n] for n in inside) - sum(map(copy, copied))
            if saved > 0:
                total += saved
                worth.append(numbers)
        return total, worth

    layers = {number for number, seconds in chained.items() if seconds <= alone[number]}
    saved, worth = with_layers(layers)
    # A layer that is slower in a chain may be worth it as a link.
    for number in sorted(set(chained) - layers, key=lambda n: chained[n] - alone[n]):
        more, longer = with_layers(layers | {number})
        if more > saved:
            layers, saved, worth = layers | {number}, more, longer
    return worth


def _ends(plan: Plan, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """The slots that steps read from elsewhere, and those that are read elsewhere."""
    chosen = set(numbers)
    steps = [plan.steps[n] for n in numbers]
    inside = {step.out for step in steps}
    elsewhere = {ref.slot for n, s in enumerate(plan.steps) if n not in chosen for ref in refs(s)}
    elsewhere |= {ref.slot for ref in refs(plan.outputs)}
    return sorted({ref.slot for step in steps for ref in refs(step)} - inside), sorted(inside & elsewhere)


def _fits(plan: Plan, sizes: Sizes, number: int, layers: set[int], written: set[int]) -> bool:
    """Whether a step can follow in a chain that has written slots."""
    step = plan.steps[number]

    def is_image(value) -> bool:
        return isinstance(value, Ref) and len(sizes.get(value.slot, ())) == 3

    if isinstance(step, Layer):
        images = [step.input, Ref(step.out)] + ([] if step.residual is None else [step.residual])
        beside = max(step.padding[2:])
        return number in layers and all(map(is_image, images)) and beside <= MOST_PADDING * sizes[step.out][2] + 1
    kind, args = _kind(step), step.args
    if kind is None or not args or step.kwargs or step.out not in sizes:
        return False
    operands = args[0] if kind == "concat" else args[:2] if kind in ("sum", "gate") else args[:1]
    rest = args[2:] if kind in ("sum", "gate") else args[1:]
    if not all(map(is_image, operands)) or refs(rest) or (kind != "mean" and not is_image(Ref(step.out))):
        return False
    follows = [operand.slot in written for operand in operands]
    if kind == "max_pool":
        return True
    if kind == "avg_pool":
        return all(follows) and (len(args) < 6 or args[5] is None)
    if kind == "mean":
        given = args[1]
        whole = given == [1, 1] if step.target.endswith("pool2d.default") else sorted(d % 4 for d in given) == [2, 3]
        return all(follows) and whole and len(args) <= 3
    if kind == "affine":
        return all(follows) and _affine(plan, step) is not None
    if kind == "sum":
        return any(follows) and sizes[args[0].slot] == sizes[args[1].slot] and not rest
    if kind == "gate":
        return any(follows) and not rest and (_is_gate(sizes, *args) or _is_gate(sizes, *args[::-1]))
    if kind in ("concat", "slice"):
        return all(follows) and args[1] == 1 and len(args) == (2 if kind == "concat" else 4)
    if kind == "shuffle":
        return all(follows)
    return all(follows) and _bounds(step) is not None


def _kind(step: Call | Layer) -> str | None:
    return None if isinstance(step, Layer) else KINDS.get(step.target)


def _is_gate(sizes: Sizes, image: Ref, gate: Ref) -> bool:
    return sizes[gate.slot] == [sizes[image.slot][0], 1, 1]


def _bounds(step: Call) -> tuple[float, float, str | None]:
    """Of an activation: what it clamps to, or its name."""
    if step.target in CLAMPS:
        low, high = CLAMPS[step.target]
        given = step.args[1:]
        return (given[0] if given else low), (given[1] if len(given) > 1 else high), None
    return -math.inf, math.inf, step.target.split(".")[1]


def _affine(plan: Plan, step: Call) -> tuple[Tensor, Tensor] | None:
    """The factors and summands of a BatchNorm whose statistics are constants, ``[channels]``."""
    _, gamma, beta, mean, var, training, _, eps, *_ = step.args
    if training or not all(isinstance(v, Const) for v in (mean, var)):
        return None
    if not all(v is None or isinstance(v, Const) for v in (gamma, beta)):
        return None
    mean, var = (plan.tensor(v.name).double() for v in (mean, var))
    scale = (var + eps).rsqrt() * (1 if gamma is None else plan.tensor(gamma.name).double())
    shift = (0 if beta is None else plan.tensor(beta.name).double()) - mean * scale
    return scale.to(torch.float32), shift.to(torch.float32)


def _image(size: list[int]) -> list[int]:
    """A size with height and width."""
    return [*size, 1, 1][:3]


def _is_copied(slot: int, steps: list) -> bool:
    """Whether an input is copied into the chain's layout: one that is only pooled is read where it is."""
    return any(_kind(step) != "max_pool" for step in _readers(slot, steps))


def _needs_tensor(slot: int, steps: list) -> bool:
    """Whether that copy is a tensor of the chain: a layer that is the only one to read it packs it for itself."""
    readers = [step for step in _readers(slot, steps) if _kind(step) != "max_pool"]
    if len(readers) == 1 and isinstance(readers[0], Layer):
        return readers[0].residual is not None and readers[0].residual.slot == slot
    return bool(readers)


def _readers(slot: int, steps: list) -> list:
    return [step for step in steps if slot in {ref.slot for ref in refs(step)}]
