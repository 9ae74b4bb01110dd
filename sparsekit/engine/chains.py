"""Chains: neighbouring steps of a plan that the C++ engine runs image by image, without PyTorch in between."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

from .. import _ops
from .plan import Call, Layer, Plan, Ref, refs

# Shorter ones gain nothing: a chain copies its inputs and outputs.
FEWEST_CONVS = 2
# Zeros that a convolution may want beside its rows, as a part of them: everything at its size has them.
MOST_PADDING = 0.3

# Per slot: channels, height and width of an image.
Sizes = dict[int, list[int]]

POOL, MEAN = "aten.max_pool2d.default", "aten.adaptive_avg_pool2d.default"


class Chain:
    """Steps ``numbers`` of a plan as one program of the C++ engine.

    Attributes:
        numbers: of the steps, in order.
        inputs, outputs: slots that it reads and writes.
    """

    def __init__(self, plan: Plan, sizes: Sizes, numbers: Sequence[int], weight_of: Callable):
        """``weight_of(number)`` gives the weight of a layer: values, crow_indices, col_indices, bias, kernel_size."""
        steps = [plan.steps[n] for n in numbers]
        self.numbers = list(numbers)
        self.inputs, self.outputs = _ends(plan, numbers)
        self._out_sizes = [sizes[slot] for slot in self.outputs]
        in_sizes = [sizes[slot] for slot in self.inputs]

        # Means have no tensor: they are written where they leave the chain.
        made = [step.out for step in steps if not _is_mean(step)]
        loaded = [slot for slot in self.inputs if _needs_tensor(slot, steps)]
        tensor_of = {slot: i for i, slot in enumerate([*loaded, *made])}
        input_of = {slot: -1 - i for i, slot in enumerate(self.inputs)}
        groups = ([sizes[slot] for slot in tensor_of], in_sizes, self._out_sizes)
        self.number = _ops.add_program(*([n for size in group for n in size] for group in groups))
        weakref.finalize(self, _ops.remove_program, self.number)

        def value(slot: int) -> int:
            return tensor_of.get(slot, input_of.get(slot))

        for slot in loaded:
            _ops.program_load(self.number, input_of[slot], tensor_of[slot])
        for number, step in zip(numbers, steps):
            if isinstance(step, Layer):
                values, crow, col, bias, kernel = weight_of(number)
                residual = None if step.residual is None else value(step.residual.slot)
                geometry = (kernel, step.stride, step.padding, step.dilation, step.groups)
                _ops.program_conv2d(
                    self.number, value(step.input.slot), value(step.out), residual, values, crow, col, bias,
                    step.low, step.high, *geometry,
                )  # fmt: skip
            elif _is_mean(step):
                _ops.program_mean(self.number, value(step.args[0].slot), self.outputs.index(step.out))
            else:
                _ops.program_max_pool2d(self.number, value(step.args[0].slot), value(step.out), *step.args[1:])
        for index, slot in enumerate(self.outputs):
            if slot in tensor_of:
                _ops.program_store(self.number, tensor_of[slot], index)
        _ops.finish_program(self.number)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The values of ``outputs``, NCHW, given those of ``inputs``."""
        batch = len(inputs[0])
        outputs = [inputs[0].new_empty(batch, *size) for size in self._out_sizes]
        if batch:
            _ops.run_program(outputs, inputs, self.number)
        return outputs


def find(plan: Plan, sizes: Sizes, sparse: set[int]) -> list[list[int]]:
    """Numbers of the steps that can be chains, given which layers run sparse.

    A step between two steps of a chain that depends on neither runs before the chain.
    """
    found: list[list[int]] = []
    chain: list[int] = []
    written: dict[int, bool] = {}

    def close() -> None:
        # A mean without a convolution before it is better left to PyTorch.
        if sum(isinstance(plan.steps[n], Layer) for n in chain) >= FEWEST_CONVS:
            found.append(list(chain))
        chain.clear()
        written.clear()

    for number, step in enumerate(plan.steps):
        reads = {ref.slot for ref in refs(step)}
        if _fits(plan, sizes, number, sparse, written):
            chain.append(number)
            written[step.out] = _is_mean(step)
        elif reads & written.keys():
            close()
    close()
    return found


def check(plan: Plan, sizes: Sizes, numbers: list[int]) -> None:
    """Raise ValueError if steps ``numbers`` cannot be a chain."""
    layers = {number for number, step in enumerate(plan.steps) if isinstance(step, Layer)}
    written: dict[int, bool] = {}
    for number in range(numbers[0], numbers[-1] + 1) if numbers else ():
        step = plan.steps[number]
        inside = number in numbers
        if (
            not _fits(plan, sizes, number, layers, written)
            if inside
            else {ref.slot for ref in refs(step)} & written.keys()
        ):
            raise ValueError(f"step {number} does not fit into the chain {numbers}")
        if inside:
            written[step.out] = _is_mean(step)
    if not numbers or sorted(set(numbers)) != numbers:
        raise ValueError(f"a chain must be numbers of steps in order, got {numbers}")


def choose(
    plan: Plan, sizes: Sizes, alone: dict[int, float], sparse: dict[int, float], copy: Callable[[int], float]
) -> list[list[int]]:
    """The chains that are worth their copies.

    Args:
        plan: the plan.
        sizes: of what its slots hold.
        alone: seconds of every layer as it would run outside of chains.
        sparse: seconds of the layers that may run sparse in a chain, there.
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
            means = {step.out for step in steps if _is_mean(step)}
            copied = [slot for slot in inputs if _needs_tensor(slot, steps)] + [s for s in outputs if s not in means]
            inside = [n for n in numbers if n in sparse]
            saved = sum(alone[n] - sparse[n] for n in inside) - sum(map(copy, copied))
            if saved > 0:
                total += saved
                worth.append(numbers)
        return total, worth

    layers = {number for number, seconds in sparse.items() if seconds <= alone[number]}
    saved, worth = with_layers(layers)
    # A layer that is slower in a chain may be worth it as a link.
    for number in sorted(set(sparse) - layers, key=lambda n: sparse[n] - alone[n]):
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


def _fits(plan: Plan, sizes: Sizes, number: int, sparse: set[int], written: dict[int, bool]) -> bool:
    """Whether a step can follow in a chain that has written slots, each of them a mean or not."""
    step = plan.steps[number]

    def is_image(value) -> bool:
        return isinstance(value, Ref) and len(sizes.get(value.slot, ())) == 3

    if not is_image(Ref(step.out)):
        return False
    # A mean leaves the chain, and can be read after it only.
    if any(written.get(ref.slot) for ref in refs(step)):
        return False
    if isinstance(step, Layer):
        images = [step.input] if step.residual is None else [step.input, step.residual]
        beside = max(step.padding[2:])
        return number in sparse and all(map(is_image, images)) and beside <= MOST_PADDING * sizes[step.out][2] + 1
    if not step.args or not is_image(step.args[0]) or step.kwargs or refs(step.args[1:]):
        return False
    return step.args[0].slot in written if _is_mean(step) else step.target == POOL


def _is_mean(step: Call | Layer) -> bool:
    return isinstance(step, Call) and step.target == MEAN and list(step.args[1]) == [1, 1]


def _needs_tensor(slot: int, steps: list) -> bool:
    """Whether an input must be copied into the chain's layout: one that is only pooled is read where it is."""
    return any(isinstance(step, Layer) for step in steps if slot in {ref.slot for ref in refs(step)})
