"""A model as a functional graph of ATen ops, whose parameters and buffers are constants."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from typing import NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as fx_config
from torch.overrides import TorchFunctionMode

from ..convert import densify_

# Ops whose result is memory of its own, so that writing into it changes nothing else.
FRESH = {
    "_native_batch_norm_legit_no_training", "adaptive_avg_pool2d", "add", "avg_pool2d", "batch_norm", "cat", "conv2d",
    "div", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "layer_norm", "leaky_relu", "linear", "max_pool2d",
    "mul", "relu", "sigmoid", "silu", "sub", "tanh",
}  # fmt: skip
DROPOUTS = {"alpha_dropout", "alpha_dropout_", "dropout", "dropout_", "feature_dropout", "feature_dropout_"}


class Captured(NamedTuple):
    """What :func:`capture` returns.

    Attributes:
        graph: placeholders are the inputs; every other tensor that is not computed is in ``constants``.
        constants: placeholder name to tensor, for the placeholders that are no inputs.
        names: placeholder name to the qualified name of that parameter or buffer.
        inputs: the placeholders of the inputs, in order.
        output_spec: how the outputs nest, a pytree.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    names: dict[str, str]
    inputs: list[fx.Node]
    output_spec: torch.utils._pytree.TreeSpec


def snapshot(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for :func:`capture`; sparse layers become dense weights that hold zeros."""
    return densify_(copy.deepcopy(model))


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> Captured:
    """Trace ``model``, a :func:`snapshot` in eval mode, for images of this size, and any batch if control flow lets it.

    Args:
        model: any module without sparse layers. It is not changed.
        inputs: tensors; the first dimension of those with two or more is the batch.

    Raises:
        ValueError: the model cannot be traced, say because its control flow depends on data, or it writes its buffers.
    """
    # A dimension of 1 would be taken for a constant.
    single = all(t.shape[0] == 1 for t in inputs if t.dim() >= 2)
    examples = tuple(torch.cat([t, t]) if single and t.dim() >= 2 else t for t in inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} if t.dim() >= 2 else {} for t in examples)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What is asked about a batch of 1 is written down then.
            with fx_config.patch(backed_size_oblivious=True):
                program = torch.export.export(model, examples, dynamic_shapes=_for_signature(model, dynamic))
            if not _takes_any_batch(program, dynamic, model, examples):  # then for this one
                program = torch.export.export(model, inputs)
            if not _make_functional(program.graph):
                program = program.run_decompositions({})
            _name_channels(program.graph)
    except Exception as error:
        raise ValueError(
            f"model cannot be captured as one graph: {_first_line(error)}; torch.compile(model, backend='sparsekit') "
            "runs such parts in PyTorch"
        ) from error
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ValueError("model must not change its buffers or inputs in forward; is it in eval mode?")
    sources = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    constants = {name: tensors[source].detach() for name, source in sources.items()}
    user = set(signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return Captured(
        program.graph, constants, sources, [n for n in placeholders if n.name in user], program.call_spec.out_spec
    )


def _takes_any_batch(program: torch.export.ExportedProgram, dynamic: tuple, model: nn.Module, examples: tuple) -> bool:
    """Whether control flow asked nothing about the batch, so that what was traced holds for all.

    That several inputs have the same one is no question. Whether it is 1 is asked by PyTorch's own functions too, to which
    it makes no difference; then the model's code tells.
    """
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    asked = [guard.expr for v in values if isinstance(v, Tensor) for guard in v.fake_mode.shape_env.guards]
    asked = [e for e in asked if not (e.is_Equality and all(side.is_Symbol for side in e.args))]
    if not program.range_constraints and any(dynamic):
        return False
    return not asked or (all(map(_is_about_one, asked)) and _is_alike_for_one(model, examples))


def _is_about_one(asked) -> bool:
    """Whether a sympy expression tells a size of 1 from larger ones, and nothing else."""
    symbols = list(asked.free_symbols)
    told = [sympy.Ne(symbols[0], 1), symbols[0] > 1, symbols[0] >= 2] if len(symbols) == 1 else []
    return getattr(asked, "canonical", asked) in [e.canonical for e in told]


class _Calls(TorchFunctionMode):
    """Writes down the functions that Python calls, dimensions of tensors, and other arguments."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, list]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        # Sizes are tuples to some versions of it, leaves to others.
        leaves = [x for leaf in leaves for x in (leaf if isinstance(leaf, torch.Size) else (leaf,))]
        arguments = [leaf.dim() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if func is not torch._assert:  # whose message may name sizes
            self.made.append((getattr(func, "__name__", str(func)), arguments))
        return func(*args, **(kwargs or {}))


def _is_alike_for_one(model: nn.Module, examples: tuple[Tensor, ...]) -> bool:
    """Whether the model does for a batch of 1 what it does for larger ones.

    Its Python code runs for both, on tensors without data, and calls the same functions in the same order; numbers among
    their arguments are the same, or go with the batch. Code that cannot run so is taken to be alike.
    """
    more, calls = 3, []
    for batch in (1, more):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Calls() as written:
            fakes = [mode.from_tensor(t) for t in examples]
            fakes = [t[:1].expand(batch, *t.shape[1:]).clone() if t.dim() >= 2 else t for t in fakes]
            try:
                model(*fakes)
            except Exception:
                return True
        calls.append(written.made)

    def go_together(a, b) -> bool:
        same = a == b or (a != a and b != b)
        return same or (isinstance(a, int) and isinstance(b, int) and b == more * a)

    return len(calls[0]) == len(calls[1]) and all(
        name == other and len(ones) == len(others) and all(map(go_together, ones, others))
        for (name, ones), (other, others) in zip(*calls)
    )


def _make_functional(graph: fx.Graph) -> bool:
    """Replace ops that write into their first argument by those that do not; False where that takes more to be right.

    In a third of the time of ``run_decompositions``, which traces everything again.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is operator.getitem or getattr(node.target, "__module__", "") == "_operator":
                continue
            return False
        name = _name(node)
        if name in DROPOUTS:
            if node.args[2]:
                return False
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target._schema.is_mutable:
            written = node.args[0]
            functional = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), node.target._overloadname, None)
            fresh = isinstance(written, fx.Node) and written.op == "call_function" and _name(written) in FRESH
            if functional is None or not name.endswith("_") or not fresh:
                return False
            if any(order[user] < order[node] and _is_view(user) for user in written.users):
                return False
            node.target = functional
            written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    return True


def _name_channels(graph: fx.Graph) -> None:
    """Say what is done to channels, without the sizes of images: shuffling them, and taking a part of them."""
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default)

    def before(node: fx.Node, targets: tuple) -> fx.Node | None:
        source = node.args[0] if node.args else None
        return source if isinstance(source, fx.Node) and source.target in targets and len(source.users) == 1 else None

    for node in list(graph.nodes):
        if node.target in views and node.meta["val"].dim() == 4:
            # view(n, groups, c / groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
            copy = before(node, (aten.contiguous.default, aten.clone.default)) or node
            turned = before(copy, (aten.transpose.int,))
            split = before(turned, views) if turned is not None and turned.args[1:] == (1, 2) else None
            source = split.args[0] if split is not None and split.meta["val"].dim() == 5 else None
            shapes = [tuple(map(str, n.meta["val"].shape)) for n in (source, split, node) if n is not None]
            if (
                source is None
                or shapes[0] != shapes[2]
                or shapes[0][0] != shapes[1][0]
                or shapes[0][2:] != shapes[1][3:]
            ):
                continue
            target, args = aten.channel_shuffle.default, (source, split.meta["val"].shape[1])
        elif node.target is operator.getitem and node.args[0].target is aten.chunk.default:
            source, _, *dim = node.args[0].args
            if dim != [1] or source.meta["val"].dim() != 4:
                continue
            parts = [part.shape[1] for part in node.args[0].meta["val"]]
            start = sum(parts[: node.args[1]])
            target, args = aten.slice.Tensor, (source, 1, start, start + parts[node.args[1]])
        else:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        new.meta = node.meta
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_view(node: fx.Node) -> bool:
    """Whether what a node returns may share memory with what it reads."""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(value.alias_info is not None for value in returns)


def _for_signature(model: nn.Module, dynamic: tuple):
    """torch.export wants one entry for a ``*args`` parameter, a tuple."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (dynamic,)
    return dynamic


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
