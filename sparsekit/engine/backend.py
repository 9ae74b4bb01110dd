"""``torch.compile(model, backend="sparsekit")``: the engine through PyTorch's own door."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .capture import capture, snapshot
from .engine import Engine
from .plan import lower

logger = logging.getLogger("sparsekit")

MOST_ENGINES = 8  # per graph, for inputs of different sizes


def sparsekit_backend(graph: fx.GraphModule, example_inputs: list) -> Callable:
    """Dynamo's contract: a function of the graph's inputs that returns what the graph returns.

    Parameters and buffers are inputs of the graph; their values become an engine's weights, and when they have changed
    the engine is built anew (what is written through ``parameter.data`` goes unnoticed, as by autograd). A graph that
    records gradients, or that cannot become an engine, runs in PyTorch as it is, and the reason is logged.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in example_inputs if isinstance(t, Tensor)):
        return _in_pytorch(graph, "gradients are recorded; call it under torch.no_grad() or torch.inference_mode()")
    tensors = [i for i, value in enumerate(example_inputs) if isinstance(value, Tensor)]
    try:
        sized = _without_symbols(graph, example_inputs)
    except ValueError as error:
        return _in_pytorch(graph, str(error))
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    fixed = [k for k, i in enumerate(tensors) if _is_weight(nodes[i], example_inputs[i])]
    return torch.compiler.disable(_Engines(sized, tensors, fixed))


def _is_weight(node: fx.Node, value: Tensor) -> bool:
    if isinstance(value, nn.Parameter):
        return True
    guard = getattr(getattr(node.meta.get("grapharg"), "source", None), "guard_source", None)
    guard = guard() if callable(guard) else guard
    return guard is not None and "NN_MODULE" in guard.name


def _without_symbols(graph: fx.GraphModule, example_inputs: list) -> fx.GraphModule:
    """The graph as a function of its tensors alone: a size among its inputs is read off one of them."""
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if all(isinstance(value, Tensor) for value in example_inputs):
        return graph
    where = {}
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                where.setdefault(str(size), (node, dim))
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, value in zip(nodes, example_inputs):
        if isinstance(value, Tensor):
            copies[node] = copied.node_copy(node)
    for node, value in zip(nodes, example_inputs):
        if isinstance(value, Tensor):
            continue
        size = str(node.meta.get("example_value", value))
        if size not in where:
            raise ValueError(f"{size} is no size of an input")
        tensor, dim = where[size]
        copies[node] = copied.call_function(torch.ops.aten.sym_size.int, (copies[tensor], dim))
    for node in graph.graph.nodes:
        if node not in copies:
            copies[node] = copied.node_copy(node, lambda n: copies[n])
    return fx.GraphModule(graph, copied)


def _in_pytorch(graph: fx.GraphModule, reason: str) -> Callable:
    logger.warning("sparsekit runs this graph in PyTorch: %s", reason)
    return graph.forward


class _Bound(nn.Module):
    """The graph with its weights in it, a function of the other inputs."""

    def __init__(self, graph: fx.GraphModule, weights: dict[int, Tensor], count: int):
        super().__init__()
        self.graph_module = graph
        self.positions, self.count = list(weights), count
        for i, tensor in weights.items():
            self.register_buffer(f"weight_{i}", tensor.detach())
        self.eval()

    def forward(self, *inputs: Tensor):
        rest = iter(inputs)
        return self.graph_module(
            *(getattr(self, f"weight_{i}") if i in self.positions else next(rest) for i in range(self.count))
        )


class _Engines:
    """Engines for the sizes met, which follow the weights they are called with.

    The first call builds one: while Dynamo traces, nothing else can be traced.
    """

    def __init__(self, graph: fx.GraphModule, tensors: list[int], fixed: list[int]):
        self._graph, self._tensors, self._fixed = graph, tensors, fixed
        self._weights: list | None = None
        self._engines: list[Engine] = []
        self._plain = False

    def __call__(self, *inputs):
        tensors = [inputs[i] for i in self._tensors]
        # Tensors made in inference mode count no versions; they cannot be written outside of it either.
        weights = [
            (tensors[i].data_ptr(), None if tensors[i].is_inference() else tensors[i]._version) for i in self._fixed
        ]
        if weights != self._weights:
            self._engines, self._weights = [], weights
        others = tuple(t for i, t in enumerate(tensors) if i not in self._fixed)
        for engine in self._engines:
            if engine.accepts(*others):
                return engine(*others)
        if self._plain:
            return self._graph(*tensors)
        bound = _Bound(self._graph, {i: tensors[i] for i in self._fixed}, len(tensors))
        try:
            engine = Engine(lower(capture(snapshot(bound), others)))
        except ValueError as error:
            self._plain = True
            return _in_pytorch(self._graph, str(error))(*tensors)
        self._engines = [engine, *self._engines[: MOST_ENGINES - 1]]
        return engine(*others)
