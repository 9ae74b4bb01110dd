"""A captured graph as a list of steps: layers with what is fused into them, and ATen ops for the rest.

A conv2d or linear takes in the BatchNorm after it (folded into its weight), then an addition of another tensor of its
shape, then a ReLU, ReLU6 or other clamp or activation; it runs where the last of them stood.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .. import _ops
from ..formats import Pattern
from .capture import Captured

aten = torch.ops.aten
# What clamps of a layer's result are called, and their bounds where no others are given.
CLAMPS = {
    "aten.relu.default": (0.0, math.inf),
    "aten.relu6.default": (0.0, 6.0),
    "aten.hardtanh.default": (-1.0, 1.0),
}
ACTIVATIONS = {f"aten.{name}.default": name for name in _ops.ACTIVATIONS if name}
BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)

# Arithmetic of sizes, by name, and indexing into what an op returns.
PYTHON_OPS = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "pow")
}
# ATen ops that a plan from a file may not name: they reach outside of their arguments.
FORBIDDEN = {"aten::from_file"}


class Ref(NamedTuple):
    """The value that a step left in a slot."""

    slot: int


class Const(NamedTuple):
    """One of the plan's tensors."""

    name: str


@dataclass
class Call:
    """A step that is one ATen op, or one of :data:`PYTHON_OPS`; PyTorch runs it."""

    target: str
    args: list
    kwargs: dict
    out: int


@dataclass
class Layer:
    """A step that is a convolution or linear layer: ``activation(clamp(layer(input) + bias + residual, low, high))``.

    Attributes:
        kind: ``"conv2d"`` or ``"linear"``.
        weight, bias: names of tensors; the weight is dense, ``[out_channels, in_channels / groups, kh, kw]`` or
            ``[out_features, in_features]``, BatchNorm folded.
        padding: (top, bottom, left, right), for conv2d as the other geometry.
        activation: None or one of :data:`ACTIVATIONS`.
        fused: what was taken in, for people.
    """

    name: str
    kind: str
    input: Ref
    weight: str
    bias: str | None
    out: int
    residual: Ref | None = None
    low: float = -math.inf
    high: float = math.inf
    activation: str | None = None
    stride: list[int] = field(default_factory=lambda: [1, 1])
    padding: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    groups: int = 1
    fused: list[str] = field(default_factory=list)


class Compressed(NamedTuple):
    """A weight as its non-zeros, row by row, and its shape; see :class:`sparsekit.formats.Pattern`."""

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    size: torch.Size

    @staticmethod
    def of(weight: Tensor, nnz: int | None = None) -> Compressed:
        """The non-zeros of a weight; ``nnz``: how many those are, if that is known."""
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        nnz = int(torch.count_nonzero(weight)) if nnz is None else nnz
        if columns and nnz == weight.numel():
            crow = torch.arange(0, weight.numel() + 1, columns, dtype=torch.int32)
            return Compressed(
                weight.flatten(), crow, torch.arange(columns, dtype=torch.int32).repeat(rows), weight.shape
            )
        kept = weight.flatten().nonzero().squeeze(1)
        return Compressed(weight.flatten()[kept], *_csr(kept, weight.shape), weight.shape)

    @property
    def nnz(self) -> int:
        return int(torch.count_nonzero(self.values))

    def dense(self) -> Tensor:
        """The weight itself."""
        empty = torch.empty(0, dtype=torch.int32)
        return _ops.decompress(self.values, Pattern(self.crow_indices, self.col_indices, *[empty] * 3), self.size)


class Lent(NamedTuple):
    """A weight whose values somebody else keeps, in a form that runs: where its non-zeros are, and who knows them.

    Attributes:
        gaps: uint8, from each non-zero to the next in the flat weight, the first from one before it; 255 is a part of
            a gap that goes on.
        values: gives them, ``[nnz]``, for crow_indices and col_indices.
    """

    gaps: Tensor
    size: torch.Size
    nnz: int
    values: Callable[[Tensor, Tensor], Tensor]

    @staticmethod
    def of(
        weight: Compressed, holds: Callable[[Tensor, Tensor], bool], values: Callable[[Tensor, Tensor], Tensor]
    ) -> Lent | None:
        """None if ``holds``, given crow_indices and col_indices, says that ``values`` has none for them."""
        _, crow, col, size = weight
        if not holds(crow, col):
            return None
        if len(col) == size.numel():
            return Lent(torch.ones(len(col), dtype=torch.uint8), size, weight.nnz, values)
        gaps = col.to(torch.int32 if size.numel() < 2**31 else torch.int64, copy=True)
        gaps[1:] -= col[:-1]
        # Where a row begins, those that end since the one before lie between.
        filled = crow.diff().nonzero().squeeze(1)
        gaps[crow[filled].long()] += (filled.diff(prepend=filled.new_zeros(1)) * size[1:].numel()).to(gaps.dtype)
        gaps[:1] += 1
        if len(gaps) and int(gaps.max()) >= 255:
            more = gaps // 255
            coded = torch.full((len(gaps) + int(more.sum()),), 255, dtype=torch.uint8)
            coded[torch.arange(len(gaps)) + more.cumsum(0)] = (gaps % 255).byte()
        else:
            coded = gaps.byte()
        return Lent(coded, size, weight.nnz, values)

    def back(self) -> Compressed:
        """The weight with its values."""
        places = self.gaps.cumsum(0)[self.gaps != 255] - 1
        crow, col = _csr(places, self.size)
        return Compressed(self.values(crow, col), crow, col, self.size)

    def dense(self) -> Tensor:
        """The weight itself."""
        return self.back().dense()


def _csr(kept: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of the non-zeros at these places of a flat weight."""
    rows, columns = size[0], size[1:].numel()
    row = kept // columns
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return crow, (kept - row * columns).int()


@dataclass
class Plan:
    """All of a model: steps in order, the tensors they name, and its inputs and outputs.

    Attributes:
        inputs: per input its dtype's name and its shape, None where any size will do; input i is in slot i.
        outputs: flat, nested by ``output_spec``; slots or constants.
        batched: whether images do not meet: the plan may be run on parts of the batch.
        per_image: slots that hold a float32 tensor whose first dimension is the batch.
        tensors: by name, but for the compressed ones.
        compressed: weights that nobody wants dense; see :class:`Compressed` and :class:`Lent`.
    """

    steps: list[Call | Layer]
    tensors: dict[str, Tensor]
    inputs: list[tuple[str, list[int | None]]]
    outputs: list[Any]
    output_spec: str
    slots: int
    batched: bool
    per_image: list[int] = field(default_factory=list)
    compressed: dict[str, Compressed | Lent] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)  # of non-zeros

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, dense, and so it stays; several threads may ask at once."""
        with self._lock:
            if (known := self.compressed.pop(name, None)) is not None:
                self.tensors[name] = known.dense()
            return self.tensors[name]

    def non_zeros(self, name: str) -> Compressed:
        """One of the weights, compressed."""
        with self._lock:
            known = self.compressed.get(name)
            return self._compressed(name) if known is None else _whole(known)

    def compress(self, name: str) -> None:
        """Keep a weight as its non-zeros, until somebody wants it dense."""
        with self._lock:
            if name not in self.compressed:
                self.compressed[name] = self._compressed(name)
                self.tensors.pop(name)

    def lend(self, name: str, holds: Callable, values: Callable) -> None:
        """Keep of a weight only what ``values`` does not know; see :meth:`Lent.of`."""
        with self._lock:
            known = self.compressed.get(name)
            if isinstance(known, Lent):
                return
            if (lent := Lent.of(known or self._compressed(name), holds, values)) is not None:
                self.compressed[name] = lent
                self.tensors.pop(name, None)

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Compressed]]:
        """``tensors`` and ``compressed`` of one moment; weights that are smaller so are dense."""
        with self._lock:
            tensors, compressed = dict(self.tensors), dict(self.compressed)
        whole = {name: _whole(weight) for name, weight in compressed.items()}
        dense = {name: weight.dense() for name, weight in whole.items() if 2 * weight.nnz > weight.size.numel()}
        return tensors | dense, {name: weight for name, weight in whole.items() if name not in dense}

    def nnz_of(self, name: str) -> int:
        """How many elements of one of the weights are not zero."""
        with self._lock:
            known = self.compressed.get(name)
            return self._count(name) if known is None else known.nnz

    def _count(self, name: str) -> int:
        if name not in self._counts:
            self._counts[name] = int(torch.count_nonzero(self.tensors[name]))
        return self._counts[name]

    def _compressed(self, name: str) -> Compressed:
        return Compressed.of(self.tensors[name], self._count(name))

    def size_of(self, name: str) -> torch.Size:
        """The shape of one of the tensors."""
        with self._lock:
            known = self.compressed.get(name)
            return self.tensors[name].shape if known is None else known.size

    def uses(self, number: int) -> tuple[list[int], list[int]]:
        """The slots that a step reads and writes."""
        step = self.steps[number]
        return [ref.slot for ref in refs(step)], [step.out]


def _whole(weight: Compressed | Lent) -> Compressed:
    return weight.back() if isinstance(weight, Lent) else weight


def last_uses(uses: list[tuple[list[int], list[int]]], outputs: list) -> list[list[int]]:
    """Per item of a schedule that reads and writes slots, those that neither a later item nor ``outputs`` read."""
    last = {slot: number for number, (reads, writes) in enumerate(uses) for slot in (*writes, *reads)}
    for output in refs(outputs):
        last.pop(output.slot, None)
    unused: list[list[int]] = [[] for _ in uses]
    for slot, number in last.items():
        unused[number].append(slot)
    return unused


def refs(value) -> list[Ref]:
    """Every :class:`Ref` in a step, or in nested lists and dicts."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, Const):
        return []
    if isinstance(value, Layer):
        return refs([value.input, value.residual])
    if isinstance(value, Call):
        return refs([value.args, value.kwargs])
    if isinstance(value, dict):
        return refs(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [ref for item in value for ref in refs(item)]
    return []


def resolve(target: str):
    """The function that a step's ``target`` names.

    Raises:
        ValueError: there is no such op, or it is one that a plan may not use.
    """
    if target in PYTHON_OPS:
        return PYTHON_OPS[target]
    parts = target.split(".")
    if len(parts) == 3 and f"{parts[0]}::{parts[1]}" not in FORBIDDEN:
        try:
            return getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
        except (AttributeError, RuntimeError):
            pass
    raise ValueError(f"target must be the name of an op, got {target!r}")


def lower(captured: Captured) -> Plan:
    """Fuse, and number the values."""
    return _Lowering(captured).plan()


class _Lowering:
    def __init__(self, captured: Captured):
        self.captured = captured
        self.constants = captured.constants
        self.tensors: dict[str, Tensor] = {}
        self.slot = {node: i for i, node in enumerate(captured.inputs)}
        self.layers: dict[fx.Node, tuple[fx.Node, dict]] = {}  # the last node of a layer: its first, and what is fused
        self.inside: set[fx.Node] = set()  # nodes that a layer has taken in

    def plan(self) -> Plan:
        nodes = list(self.captured.graph.nodes)
        for node in nodes:
            if node.target in (aten.conv2d.default, aten.conv2d.padding, aten.linear.default):
                self._fuse(node)
        steps: list[Call | Layer] = []
        for node in nodes:
            if node.op != "call_function" or node in self.inside:
                continue
            # Checks of sizes that tracing left behind; inputs are checked when they come.
            if "assert" in str(node.target) or "sym_constrain" in str(node.target):
                continue
            if not node.users and node not in self.layers:
                continue
            steps.append(self._layer(node) if node in self.layers else self._call(node))
        output = nodes[-1].args[0]
        any_size = _takes_any_size(self.captured)
        return Plan(
            steps,
            self.tensors,
            [_input(node, any_size) for node in self.captured.inputs],
            [self._value(v) for v in output],
            torch.utils._pytree.treespec_dumps(self.captured.output_spec),
            len(self.slot),
            _is_batched(self.captured),
            self._per_image(),
        )

    def _per_image(self) -> list[int]:
        first = self.captured.inputs[0].meta["val"] if self.captured.inputs else None
        if not isinstance(first, Tensor) or first.dim() == 0:
            return []
        batch = str(first.shape[0])

        def is_one_per_image(value) -> bool:
            return (
                isinstance(value, Tensor)
                and value.dtype == torch.float32
                and value.dim() > 1
                and str(value.shape[0]) == batch
                and all(isinstance(size, int) for size in value.shape[1:])
            )

        return [slot for node, slot in self.slot.items() if is_one_per_image(node.meta.get("val"))]

    def _constant(self, node) -> Tensor | None:
        return self.constants.get(node.name) if isinstance(node, fx.Node) else None

    def _fuse(self, first: fx.Node) -> None:
        """Find what follows a layer and can be a part of it."""
        weight, bias = self._constant(first.args[1]), None
        if len(first.args) > 2 and first.args[2] is not None:
            bias = self._constant(first.args[2])
            if bias is None:
                return
        if weight is None or weight.dtype != torch.float32 or first.meta["val"].dtype != torch.float32:
            return
        if first.args[0].meta["val"].dim() != 4 and first.target is not aten.linear.default:
            return
        parts: dict[str, Any] = {"scale": None, "shift": None, "residual": None, "fused": []}
        last, inside = first, []

        def only_user(node: fx.Node, target) -> fx.Node | None:
            users = list(node.users)
            return users[0] if len(users) == 1 and users[0].target is target else None

        for norm in (only_user(last, target) for target in BATCH_NORMS):
            if norm is None or norm.args[0] is not last or not (folded := self._batch_norm(norm)):
                continue
            result = norm
            if norm.target is not aten.batch_norm.default:
                result = only_user(norm, operator.getitem)
                if result is None or result.args[1] != 0:
                    continue
            parts["scale"], parts["shift"] = folded
            parts["fused"].append("BatchNorm")
            inside += [last] if result is norm else [last, norm]
            last = result
        add = only_user(last, aten.add.Tensor)
        if add is not None and add.kwargs.get("alpha", 1) == 1 and add not in self.inside and add not in self.layers:
            other = add.args[1] if add.args[0] is last else add.args[0]
            if other is not last and isinstance(other, fx.Node) and self._same(other, last):
                parts["residual"] = other
                parts["fused"].append("add")
                inside.append(last)
                last = add
        users = list(last.users)
        target = str(users[0].target) if len(users) == 1 else ""
        if target in CLAMPS:
            low, high = CLAMPS[target]
            given = users[0].args[1:]
            parts["low"], parts["high"] = given[0] if given else low, given[1] if len(given) > 1 else high
            names = {(0, math.inf): "ReLU", (0, 6): "ReLU6"}
            parts["fused"].append(names.get((parts["low"], parts["high"]), "clamp"))
        elif target in ACTIVATIONS:
            parts["activation"] = ACTIVATIONS[target]
            parts["fused"].append(ACTIVATIONS[target])
        if target in CLAMPS or target in ACTIVATIONS:
            inside.append(last)
            last = users[0]
        self.inside.update(inside)
        self.layers[last] = (first, parts)

    def _same(self, a: fx.Node, b: fx.Node) -> bool:
        x, y = a.meta.get("val"), b.meta.get("val")
        return isinstance(x, Tensor) and a.name not in self.constants and x.shape == y.shape and x.dtype == y.dtype

    def _batch_norm(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        """The factor and the summand of a BatchNorm, float64, ``[channels]``."""
        _, gamma, beta, mean, var, *rest = node.args
        if node.target is aten.batch_norm.default:
            training, _, eps, _ = rest
            if training:
                return None
        else:
            _, eps = rest
        mean, var = self._constant(mean), self._constant(var)
        if mean is None or var is None:
            return None
        scale = (var.double() + eps).rsqrt()
        if gamma is not None:
            if self._constant(gamma) is None:
                return None
            scale = scale * self._constant(gamma).double()
        shift = -mean.double() * scale
        if beta is not None:
            if self._constant(beta) is None:
                return None
            shift = shift + self._constant(beta).double()
        return scale, shift

    def _layer(self, node: fx.Node) -> Layer:
        first, parts = self.layers[node]
        weight = self._constant(first.args[1])
        bias = self._constant(first.args[2]) if len(first.args) > 2 and first.args[2] is not None else None
        name = self.captured.names[first.args[1].name].removesuffix(".weight")
        if parts["scale"] is not None:
            scale = parts["scale"]
            weight = (weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).float()
            shift = parts["shift"] if bias is None else parts["shift"] + bias.double() * scale
            bias = shift.float()
        kind = "linear" if first.target is aten.linear.default else "conv2d"
        # Two calls of one module may be fused with different things.
        key = f"{len(self.tensors)}.{name}"
        self.tensors[f"{key}.weight"] = weight
        if bias is not None:
            self.tensors[f"{key}.bias"] = bias
        layer = Layer(
            name,
            kind,
            self._value(first.args[0]),
            f"{key}.weight",
            None if bias is None else f"{key}.bias",
            self._new_slot(node),
            None if parts["residual"] is None else self._value(parts["residual"]),
            parts.get("low", -math.inf),
            parts.get("high", math.inf),
            parts.get("activation"),
            fused=parts["fused"],
        )
        if kind == "conv2d":
            given = list(first.args[3:])
            stride, padding, dilation, groups = given + [1, 0, 1, 1][len(given) :]
            layer.stride, layer.dilation, layer.groups = _pair(stride), _pair(dilation), groups
            layer.padding = _sides(padding, weight.shape[2:], layer.dilation)
        return layer

    def _call(self, node: fx.Node) -> Call:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = str(target)
            if "as_strided" in name:
                raise ValueError("model uses as_strided, which depends on the memory layout of what comes before")
        else:
            names = {function: name for name, function in PYTHON_OPS.items()}
            if target not in names:
                raise ValueError(f"model uses {target}, which a plan cannot hold")
            name = names[target]
        return Call(
            name,
            [self._value(a) for a in node.args],
            {k: self._value(v) for k, v in node.kwargs.items()},
            self._new_slot(node),
        )

    def _new_slot(self, node: fx.Node) -> int:
        self.slot[node] = len(self.slot)
        return self.slot[node]

    def _value(self, value):
        if isinstance(value, fx.Node):
            if value.name in self.constants:
                self.tensors.setdefault(value.name, self.constants[value.name])
                return Const(value.name)
            return Ref(self.slot[value])
        if isinstance(value, (list, tuple)):
            return [self._value(v) for v in value]
        return value


def _pair(value) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) and len(value) == 2 else [int(_only(value))] * 2


def _only(value):
    return value[0] if isinstance(value, (list, tuple)) else value


def _sides(padding, kernel, dilation) -> list[int]:
    """Padding of ``aten.conv2d`` as (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        total = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
    h, w = _pair(padding)
    return [h, h, w, w]


def _input(node: fx.Node, any_size: bool) -> tuple[str, list[int | None]]:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise ValueError(f"inputs must be tensors, got {type(value).__name__}")
    fixed = 2 if any_size and value.dim() == 4 else value.dim()
    shape = [_number(s) if i < fixed else None for i, s in enumerate(value.shape)]
    return str(value.dtype).removeprefix("torch."), shape


def _number(size) -> int | None:
    """A size as a number, if the model was captured for this one only; its control flow may have fixed a symbol."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


# Ops that treat every image by itself, and every size of images alike.
PER_IMAGE = {
    "_native_batch_norm_legit_no_training", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm",
    "channel_shuffle", "clamp", "clone", "contiguous", "conv2d", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "linear", "max_pool2d", "relu", "relu6", "sigmoid", "silu", "sym_size", "tanh",
}  # fmt: skip
# The same where both operands are tensors: a number may have been computed from the size.
ARITHMETIC = {"add", "div", "mul", "sub"}


def _computed(captured: Captured) -> list[tuple[fx.Node, str, Any]]:
    """Every computed node with the name of its op and the op's second argument."""
    computed = []
    for node in captured.graph.nodes:
        if node.op == "call_function":
            is_op = isinstance(node.target, torch._ops.OpOverload)
            name = node.target._schema.name.removeprefix("aten::") if is_op else f"operator.{node.target.__name__}"
            computed.append((node, name, node.args[1] if len(node.args) > 1 else None))
    return computed


def _is_batched(captured: Captured) -> bool:
    """Whether every value is one per image along its first dimension, computed from that image alone."""
    images = [node.meta["val"] for node in captured.inputs]
    if len(images) != 1 or not images[0].dim() or _number(images[0].shape[0]) is not None:
        return False
    batch = images[0].shape[0]
    for node, name, second in _computed(captured):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and (value.dim() == 0 or str(value.shape[0]) != str(batch)):
            return False
        per_image = (
            name in PER_IMAGE | ARITHMETIC | {"operator.getitem"}
            or (name in ("cat", "slice") and second == 1)
            or (name == "mean" and isinstance(second, (list, tuple)) and _within_image(node.args[0], second))
            or (name in ("view", "flatten", "reshape") and _keeps_batch(node, batch))
        )
        if not per_image:
            return False
    outputs = list(captured.graph.nodes)[-1].args[0]
    return all(isinstance(o, fx.Node) and isinstance(o.meta.get("val"), Tensor) for o in outputs)


def _takes_any_size(captured: Captured) -> bool:
    """Whether the graph would be the same for other heights and widths.

    Tracing turns sizes into numbers: what is computed with a number that could be one makes this False.
    """
    if not any(isinstance(node.meta["val"], Tensor) and node.meta["val"].dim() == 4 for node in captured.inputs):
        return False
    for node, name, second in _computed(captured):
        source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
        if name in ("max_pool2d", "avg_pool2d"):
            # F.avg_pool2d(x, x.shape[2:]) is a mean over all pixels.
            free = all(k < size for k, size in zip(_pair(second), source.shape[2:]))
        elif name in ("view", "reshape"):
            free = len(second) == 2 and second[1] == -1 and _keeps_batch(node, source.shape[0])
        elif name == "clamp":
            free = second in (None, 0, 0.0) and len(node.args) < 3 and not node.kwargs
        else:
            free = (
                name in PER_IMAGE
                or (name in ARITHMETIC and isinstance(second, fx.Node))
                or name in ("cat", "flatten", "mean")
                or (name == "slice" and second == 1)
                or name.startswith("operator.")  # sizes of the batch, the only ones that are not numbers here
            )
        if not free:
            return False
    return True


def _within_image(source: fx.Node, dims) -> bool:
    return all(d % source.meta["val"].dim() for d in dims)


def _keeps_batch(node: fx.Node, batch) -> bool:
    source = node.args[0].meta["val"]
    return str(source.shape[0]) == str(batch) == str(node.meta["val"].shape[0])
