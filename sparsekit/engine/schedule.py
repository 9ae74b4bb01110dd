"""How a plan runs for inputs of one size: what is sparse, which steps are chains, how many images at a time."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import _ops, dispatch
from ..profile import RUNS, Explanation, LayerReport, seconds_in_turns
from . import tuning
from .capture import FRESH
from .chains import Chain, choose
from .layers import Prepared
from .plan import Call, Const, Layer, Plan, Ref, last_uses, refs, resolve

BACKENDS = ("sparse", "dense")
# Below this fraction of zeros sparse is measured only where the cost table expects it to be faster: depthwise layers.
LOWEST_SPARSITY = 0.3
# Parts of the batch that tuning tries, each if the one before was a gain: a part's activations may fit a cache where
# the batch's do not. With chains, whose time per image does not depend on the batch, the first is taken untried, or
# more images where the tensors outside of chains are so small that malloc has the memory at hand.
PARTS = (8, 4, 2, 1)
PART_PIXELS = PARTS[0] * 224 * 224  # of smaller images more fit the same
AT_HAND = 32 << 20  # bytes; glibc gives larger blocks back
# Seconds after which tuning compares no longer: backends of a layer, and ways to run all of the model.
LAYER_SECONDS, MODEL_SECONDS = 0.03, 1.0
# Ways to cut the work of a layer in a chain, by name; all of the chain is run in each, until they took so long.
BLOCKINGS = {
    "as its sizes ask for": _ops.OWN_BLOCKING,
    "half the channels": _ops.Blocking(channels=0.5),
    "twice the channels": _ops.Blocking(channels=2.0),
    "other strips": _ops.Blocking(other_strips=True),
    "no pairs": _ops.Blocking(pairs=False),
}
BLOCKING_SECONDS = 1.0
WITH_PAIRS = ("avx512", "zen4", "amx")
# Images on which it compares all but the last two choices: what one takes hardly depends on how many more there are.
MOST_IMAGES = 4
LEAST_GAIN = 0.97


@dataclass
class Choice:
    """What a layer runs on outside of chains, and why.

    Attributes:
        expected: seconds on sparse and on dense kernels, by the cost table.
        seconds: the same, measured.
    """

    backend: str = "dense"
    reason: str = "not decided yet"
    expected: tuple[float, float] = (math.nan, math.nan)
    seconds: tuple[float, float] | None = None


class Schedule:
    """Runs a plan; all layers are dense until :meth:`decide`, :meth:`tune` or :meth:`restore`. Change it before others
    run it.

    Attributes:
        plan: the steps.
        spec: how its outputs nest.
        sizes: per slot of ``plan.per_image``, the dimensions after the batch.
        part: images that are run at a time; None runs the whole batch.
        share: whether two threads share every image of a chain.
        single: whether it was chosen for one image at a time, for which chains lie in memory in another way.
        blockings: how the work of layers in chains is cut, one of :data:`BLOCKINGS`, where not by the first of them.
        layers, choices: by the number of their step.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.spec = torch.utils._pytree.treespec_loads(plan.output_spec)
        self.sizes: dict[int, list[int]] = {}
        self.part: int | None = None
        self.share = self.single = False
        self.blockings: dict[int, str] = {}
        self.layers = {n: Prepared(s, plan) for n, s in enumerate(plan.steps) if isinstance(s, Layer)}
        self.choices = {number: Choice() for number in self.layers}
        self._functions = [None if isinstance(s, Layer) else _function(s.target) for s in plan.steps]
        self._own = _own_memory(plan)
        self._steps = self._with_unused(range(len(plan.steps)))
        self._items = self._steps

    def run(self, inputs: tuple[Tensor, ...]) -> list:
        """The plan's outputs, flat."""
        if self.part is None or len(inputs[0]) <= self.part:
            return self._outputs(self._run(inputs, self._items))
        count = -(-len(inputs[0]) // self.part)
        parts = [self._outputs(self._run((part,), self._items)) for part in inputs[0].chunk(count)]
        return [torch.cat(part) for part in zip(*parts)]

    def _run(
        self,
        inputs: tuple[Tensor, ...],
        items: list,
        run_layer: Callable | None = None,
        seconds: dict[int, float] | None = None,
    ) -> list:
        """Run steps and chains; ``run_layer(number, input, residual)`` instead of every layer; ``seconds`` as of
        :meth:`Chain.run`. Returns all slots."""
        slots: list = [None] * self.plan.slots
        slots[: len(inputs)] = inputs
        run_layer = run_layer or self._run_layer
        for item, unused, function in items:
            if isinstance(item, Chain):
                outputs = item.run([slots[slot] for slot in item.inputs], self.share, seconds)
                for slot, out in zip(item.outputs, outputs):
                    slots[slot] = out
            elif isinstance(step := self.plan.steps[item], Call):
                args = [self._value(v, slots) for v in step.args]
                kwargs = {k: self._value(v, slots) for k, v in step.kwargs.items()}
                slots[step.out] = function(*args, **kwargs)
            else:
                residual = None if step.residual is None else slots[step.residual.slot]
                slots[step.out] = run_layer(item, slots[step.input.slot], residual)
            for slot in unused:
                slots[slot] = None
        return slots

    def _run_layer(self, number: int, input: Tensor, residual: Tensor | None) -> Tensor:
        return self.layers[number].run(input, residual, self.choices[number].backend)

    def _value(self, v, slots: list):
        if isinstance(v, Ref):
            return slots[v.slot]
        if isinstance(v, Const):
            return self.plan.tensor(v.name)
        return [self._value(item, slots) for item in v] if isinstance(v, list) else v

    def _outputs(self, slots: list) -> list:
        return [self._value(v, slots) for v in self.plan.outputs]

    def _with_unused(self, items: Sequence) -> list[tuple]:
        """Items, each with the slots that nobody reads after it, and, of a call, with the function that runs it."""
        unused = last_uses([self._uses(item) for item in items], self.plan.outputs)
        return [(item, slots, self._function_of(item, slots)) for item, slots in zip(items, unused)]

    def _uses(self, item) -> tuple[list[int], list[int]]:
        """The slots that an item reads and writes."""
        return (item.inputs, item.outputs) if isinstance(item, Chain) else self.plan.uses(item)

    def _function_of(self, item, unused: list[int]) -> Callable | None:
        """Writes into its first argument where it can, and nobody reads that afterwards."""
        if isinstance(item, Chain) or isinstance(step := self.plan.steps[item], Layer):
            return None
        function, first = self._functions[item], step.args[0] if step.args else None
        writes = _writing(step.target)
        if writes is None or not isinstance(first, Ref) or first.slot not in unused or first.slot not in self._own:
            return function
        return lambda first, *args, **kwargs: (writes if _holds(first, args) else function)(first, *args, **kwargs)

    @property
    def chains(self) -> list[Chain]:
        """The chains that a call runs."""
        return [item for item, *_ in self._items if isinstance(item, Chain)]

    def decide(self, inputs: tuple[Tensor, ...]) -> None:
        """Choose by the cost table (:mod:`sparsekit.dispatch`), for inputs like these.

        Raises:
            ValueError: the model cannot take inputs of this size.
        """
        self.single = _is_single(inputs)
        self._predict(inputs)
        self.join(self._find_chains(inputs))

    def tune(self, inputs: tuple[Tensor, ...]) -> None:
        """Choose by measuring on these inputs what :mod:`sparsekit.engine.tuning` does not know already.

        Raises:
            ValueError: as :meth:`decide`.
        """
        some = (inputs[0][:MOST_IMAGES],) if self.plan.batched and inputs else inputs
        self.single = _is_single(inputs)
        shapes = self._predict(some)
        if not inputs:
            return
        with tuning.Cache() as cache:
            self._measure_layers(some, shapes, cache)
            self._tune_chains(some, cache)
            if self.chains:
                self._tune_blockings(some, cache)
            if self.chains and len(inputs[0]) >= torch.get_num_threads() > 1:
                self._tune_share(inputs, cache)
            if self.plan.batched and len(inputs[0]) > 1 and (not self.chains or self.part < len(inputs[0])):
                self._tune_part(inputs, cache)

    def _predict(self, inputs: tuple[Tensor, ...]) -> dict[int, torch.Size]:
        """Find all sizes, and choose by the cost table. Returns the size of every layer's input."""
        shapes: dict[int, torch.Size] = {}

        def note(number: int, input: Tensor, residual: Tensor | None) -> Tensor:
            shapes[number] = input.shape
            return input.new_empty(self.layers[number].out_size(input.shape))

        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # without data, as the model was captured
                fake = tuple(mode.from_tensor(t) for t in inputs)
                slots = self._run(fake, [(number, (), self._functions[number]) for number, *_ in self._steps], note)
            self.sizes = {slot: list(slots[slot].shape[1:]) for slot in self.plan.per_image}
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            sizes = ", ".join("x".join(map(str, t.shape)) for t in inputs)
            raise ValueError(f"the model cannot take inputs of size {sizes}: {error}") from error
        for number, size in shapes.items():
            layer, choice = self.layers[number], self.choices[number]
            if not _can_run_sparse(size):
                choice.expected, choice.reason = (math.nan, 0.0), "installed without C++ kernels"
                continue
            choice.expected = dispatch.predict(layer.shape_on(size), layer.nnz, train=False)
            choice.backend, choice.reason = _faster(choice.expected), "cost table"
        return shapes

    def _measure_layers(self, inputs: tuple[Tensor, ...], shapes: dict[int, torch.Size], cache: tuning.Cache) -> None:
        keys = {}
        for number, size in shapes.items():
            layer = self.layers[number]
            worth = layer.sparsity >= LOWEST_SPARSITY or self.choices[number].backend == "sparse"
            if worth and _can_run_sparse(size):
                keys[number] = f"{layer.shape_on(size).key}-{layer.nnz}-{layer.layer.residual is not None}"

        def measure(number: int, input: Tensor, residual: Tensor | None) -> Tensor:
            if number in keys:
                cache.seconds(keys[number], self._ways(number, input, residual), LAYER_SECONDS)
            return self._run_layer(number, input, residual)

        if not all(cache.knows(key, BACKENDS) for key in keys.values()):
            self._run(inputs, self._steps, measure)
        for number, key in keys.items():
            choice = self.choices[number]
            choice.seconds = tuple(cache.known(key)[backend] for backend in BACKENDS)
            choice.backend, choice.reason = _faster(choice.seconds), "measured"

    def _ways(self, number: int, input: Tensor, residual: Tensor | None) -> dict[str, Callable]:
        """A layer on the kernels that there are."""
        layer = self.layers[number]
        backends = BACKENDS if _can_run_sparse(input.shape) else ("dense",)
        return {backend: lambda backend=backend: layer.run(input, residual, backend) for backend in backends}

    def _find_chains(self, inputs: tuple[Tensor, ...]) -> list[list[int]]:
        """Numbers of the steps that would make chains, by measured and expected seconds."""
        if not inputs or not inputs[0].dim():
            return []
        batch, threads = len(inputs[0]), torch.get_num_threads()
        alone, chained = {}, {}
        for number in self.layers:
            seconds = self.choices[number].seconds or self.choices[number].expected
            alone[number] = min(seconds)
            in_chain = self._expected_in_chain(number, batch)
            if in_chain is not None and not math.isnan(seconds[0]):
                # Never more than outside: there, tensors come in another layout, and from further away.
                chained[number] = min(*in_chain, seconds[0])
        copy = dispatch.CHAIN_COPY * batch / threads
        chains = choose(self.plan, self.sizes, alone, chained, lambda slot: copy * math.prod(self.sizes[slot]))
        if _ops.backend() in dispatch.WITH_TILES:
            return chains
        # Where nothing is sparse, PyTorch's own kernels are as fast.
        return [numbers for numbers in chains if any(n in chained and not self._dense_in_chain(n) for n in numbers)]

    def _expected_in_chain(self, number: int, batch: int = 1) -> tuple[float, float] | None:
        """Seconds of a layer within a chain, sparse and computed as if nothing were zero; None if it cannot be in one."""
        layer = self.layers[number]
        size = self.sizes.get(layer.layer.input.slot)
        if layer.layer.kind != "conv2d" or size is None:
            return None
        return dispatch.predict_in_chain(layer.shape_on((batch, *size)), layer.nnz)

    def _dense_in_chain(self, number: int) -> bool:
        sparse, dense = self._expected_in_chain(number)
        return dense < sparse

    def join(self, chains: list[list[int]]) -> None:
        """Make chains of these steps, and of no others."""
        if chains != [chain.numbers for chain in self.chains]:
            self._items = self._items_of(chains, self.blockings)
        outside = [slot for item, *_ in self._items for slot in self._uses(item)[1]]
        largest = 4 * max((math.prod(self.sizes.get(slot, [])) for slot in outside), default=1)
        pixels = max(1, math.prod(self.sizes.get(0, [1])[1:]))
        images = max(PARTS[0], PART_PIXELS // pixels, 4 * torch.get_num_threads(), AT_HAND // max(1, largest))
        self.part = images if chains and self.plan.batched else None
        self.share = False

    def _items_of(self, chains: list[list[int]], blockings: dict[int, str]) -> list[tuple]:
        """What a call runs with chains of these steps."""

        def weight_of(number: int) -> tuple:
            layer, blocking = self.layers[number], BLOCKINGS[blockings.get(number, next(iter(BLOCKINGS)))]
            layer.compress()
            return *layer.compressed(), layer.bias, list(layer.size[2:]), self._dense_in_chain(number), blocking

        made = [Chain(self.plan, self.sizes, numbers, weight_of, self.single) for numbers in chains]
        last = {chain.numbers[-1]: chain for chain in made}
        inside = {number for numbers in chains for number in numbers}
        numbers = [number for number, *_ in self._steps if number in last or number not in inside]
        return self._with_unused([last.get(number, number) for number in numbers])

    def _tune_chains(self, inputs: tuple[Tensor, ...], cache: tuning.Cache) -> None:
        """Join steps to chains, if the whole is faster for it; all layers dense, if that is fastest of all."""
        chains = self._find_chains(inputs)
        if not chains and all(choice.backend == "dense" for choice in self.choices.values()):
            return

        def run_dense(number: int, input: Tensor, residual: Tensor | None) -> Tensor:
            return self.layers[number].run(input, residual, "dense")

        ways = {
            "dense": lambda: self._run(inputs, self._steps, run_dense),
            "alone": lambda: self._run(inputs, self._steps),
            "chained": lambda: self.run(inputs),
        }
        key = f"ways-{chains}-{self._key(inputs)}"
        if not cache.knows(key, ways):
            self.join(chains)
        seconds = cache.seconds(key, ways, MODEL_SECONDS)
        fastest = min(seconds, key=seconds.get)
        self.join(chains if fastest == "chained" else [])
        if fastest == "dense":
            for choice in self.choices.values():
                choice.backend, choice.reason = "dense", f"{choice.reason}; all of the model is faster dense"

    def _tune_blockings(self, inputs: tuple[Tensor, ...], cache: tuning.Cache) -> None:
        """Choose how the work of every sparse layer in a chain is cut, by what it takes there."""
        names = [name for name, way in BLOCKINGS.items() if way.pairs or _ops.backend() in WITH_PAIRS]
        keys = {}
        for number in self._chained() & self.layers.keys():
            layer = self.layers[number]
            shape = layer.shape_on((1, *self.sizes[layer.layer.input.slot]))
            if not self._dense_in_chain(number):
                keys[number] = f"blocking-{shape.key}-{layer.nnz}-{layer.layer.residual is not None}"
        if not all(cache.knows(key, names) for key in keys.values()):
            for key, seconds in self._seconds_of(inputs, names, keys).items():
                cache.keep(key, seconds)
        blockings = {}
        for number, key in keys.items():
            known = cache.known(key)
            fastest = min(known, key=known.get)
            if known[fastest] < LEAST_GAIN * known[names[0]]:
                blockings[number] = fastest
        if not blockings:
            return
        plain, cut = self._items, self._items_of([chain.numbers for chain in self.chains], blockings)
        ways = {"plain": lambda: self._run(inputs, plain), "cut": lambda: self._run(inputs, cut)}
        seconds = cache.seconds(f"blockings-{sorted(blockings.items())}-{self._key(inputs)}", ways, MODEL_SECONDS)
        if seconds["cut"] < LEAST_GAIN * seconds["plain"]:
            self.blockings, self._items = blockings, cut

    def _seconds_of(self, inputs: tuple[Tensor, ...], names: list[str], keys: dict[int, str]) -> dict[str, dict]:
        """Per key, what a layer takes in its chain when all are cut in one of these ways, by its name; now in the first."""
        (first, *others), chains = names, [chain.numbers for chain in self.chains]
        items = {first: self._items} | {name: self._items_of(chains, dict.fromkeys(keys, name)) for name in others}
        times: dict[str, dict[str, list[float]]] = {key: defaultdict(list) for key in keys.values()}
        begin = time.perf_counter()
        for turn in range(RUNS + 1):
            if turn > 2 and time.perf_counter() - begin > BLOCKING_SECONDS:
                break
            for name, some in items.items():
                seconds: dict[int, float] = {}
                self._run(inputs, some, seconds=seconds)
                for number, key in keys.items():
                    if turn:  # the first warms up
                        times[key][name].append(seconds[number])
        return {key: {name: statistics.median(t) for name, t in ways.items()} for key, ways in times.items()}

    def _tune_share(self, inputs: tuple[Tensor, ...], cache: tuning.Cache) -> None:
        def run(share: bool) -> Callable:
            def run() -> None:
                self.share = share
                self.run(inputs)

            return run

        ways = {"share": run(True), "own": run(False)}
        seconds = cache.seconds(f"share-{self.part}-{self._key(inputs)}", ways, MODEL_SECONDS)
        self.share = seconds["share"] < LEAST_GAIN * seconds["own"]

    def _tune_part(self, inputs: tuple[Tensor, ...], cache: tuning.Cache) -> None:
        def run_in(part: int | None) -> Callable:
            def run() -> None:
                self.part = part
                self.run(inputs)

            return run

        best = self.part
        for part in (part for part in PARTS if part < min(len(inputs[0]), best or math.inf)):
            key = f"parts-{best}-{part}-{bool(self.chains)}-{self._key(inputs)}"
            seconds = cache.seconds(key, {str(way): run_in(way) for way in (best, part)}, MODEL_SECONDS)
            if seconds[str(part)] > LEAST_GAIN * seconds[str(best)]:
                break
            best = part
        self.part = best

    def _key(self, inputs: tuple[Tensor, ...]) -> str:
        nnz = sum(layer.nnz for layer in self.layers.values())
        return f"{len(self.plan.steps)}-{nnz}-{'x'.join(map(str, inputs[0].shape))}"

    def tidy(self) -> None:
        """Free what :meth:`run` does not need."""
        chained = self._chained()
        for number, layer in self.layers.items():
            if number in chained:
                layer.unpack()
            if number in chained or self.choices[number].backend == "sparse":
                layer.compress()
        for chain in self.chains:
            for number in self.layers.keys() & set(chain.numbers):
                holds, values = (functools.partial(known, number) for known in (chain.holds, chain.values))
                self.plan.lend(self.layers[number].layer.weight, holds, values)

    def _chained(self) -> set[int]:
        return {number for chain in self.chains for number in chain.numbers}

    def explain(self, inputs: tuple[Tensor, ...]) -> Explanation:
        """See :meth:`Engine.explain`."""
        reports = Explanation()
        chained = self._chained()

        def report(number: int, input: Tensor, residual: Tensor | None) -> Tensor:
            layer, choice = self.layers[number], self.choices[number]
            shape = f"{'x'.join(map(str, layer.size))} on {'x'.join(map(str, input.shape))}"
            why = choice.reason
            if number in chained:
                why += "; in a chain" if choice.backend == "sparse" else "; a link in a chain"
                why += f", {self.blockings[number]}" if number in self.blockings else ""
            if layer.layer.fused:
                why += f"; with {', '.join(layer.layer.fused)}"
            backend = choice.backend
            if number in chained:
                backend = "dense" if self._dense_in_chain(number) else "sparse"
            expected = (math.nan, math.nan)
            if _can_run_sparse(input.shape):
                expected = dispatch.predict(layer.shape_on(input.shape), layer.nnz, train=False)
            seconds = seconds_in_turns(self._ways(number, input, residual))
            measured = (seconds.get(way, math.nan) for way in BACKENDS)
            kernel = _ops.backend() if backend == "sparse" or number in chained else "pytorch"
            times = (*expected, *measured)
            reports.append(LayerReport(layer.layer.name, shape, layer.sparsity, backend, why, *times, kernel=kernel))
            return self._run_layer(number, input, residual)

        self._run(inputs, self._steps, report)
        self.tidy()
        return reports

    def saved(self) -> dict:
        """What was chosen, for JSON; :meth:`restore` takes it."""
        return {
            "sizes": self.sizes,
            "part": self.part,
            "share": self.share,
            "single": self.single,
            "blockings": self.blockings,
            "layers": {str(n): [c.backend, c.reason, c.seconds] for n, c in self.choices.items()},
            "chains": [chain.numbers for chain in self.chains],
        }

    def restore(self, saved: dict) -> None:
        """Choose what was chosen before. Raises RuntimeError if that cannot be."""
        self.sizes = {int(slot): list(size) for slot, size in saved["sizes"].items()}
        for number, choice in self.choices.items():
            choice.backend, choice.reason, seconds = saved["layers"][str(number)]
            choice.seconds = None if seconds is None else tuple(seconds)
        self.blockings = {int(number): name for number, name in saved["blockings"].items()}
        self.single = saved["single"]
        self.join(saved["chains"])
        self.part, self.share = saved["part"], saved["share"]


def _is_single(inputs: tuple[Tensor, ...]) -> bool:
    """Whether these are inputs of one image. Not whether there are more threads, on which results must not depend."""
    return bool(inputs) and inputs[0].shape[:1] == (1,)


def _faster(seconds: tuple[float, float]) -> str:
    return "sparse" if seconds[0] < seconds[1] else "dense"


def _function(target: str) -> Callable:
    """What runs a step that is no layer: PyTorch's op, or our own where that is faster."""
    function = resolve(target)
    if target == "aten.view.default":  # layers may leave another layout than they did in PyTorch
        return torch.ops.aten.reshape.default
    if target != "aten.max_pool2d.default":
        return function

    def max_pool2d(input: Tensor, *args):
        # Ours leaves NCHW: dense layers, which work in channels_last, would copy what it leaves.
        usable = input.dim() == 4 and input.dtype == torch.float32 and input.numel() and input.is_contiguous()
        return _ops.max_pool2d(input, *args) if usable and _ops.backend() != "reference" else function(input, *args)

    return max_pool2d


# Ops that may write their result into their first argument.
WRITING = {"add", "div", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mul", "relu", "sigmoid", "silu"}


def _writing(target: str) -> Callable | None:
    """The op that does what ``target`` does in place."""
    name = target.split(".")[1]
    return resolve(target.replace(name, f"{name}_", 1)) if name in WRITING and target.startswith("aten.") else None


def _holds(first: Tensor, args: tuple) -> bool:
    """Whether the result of an elementwise op on these has the size and dtype of its first argument."""
    return all(
        other.dtype == first.dtype and torch.broadcast_shapes(other.shape, first.shape) == first.shape
        for other in args
        if isinstance(other, Tensor)
    )


def _own_memory(plan: Plan) -> set[int]:
    """Slots whose value shares memory with no other."""
    own, viewed = set(), set()
    for step in plan.steps:
        name = "" if isinstance(step, Layer) else step.target.split(".")[1]
        if isinstance(step, Layer) or name in FRESH:
            own.add(step.out)
        else:
            viewed.update(ref.slot for ref in refs(step))
    return own - viewed


def _can_run_sparse(size: torch.Size) -> bool:
    return _ops.backend() != "reference" and size.numel() > 0
