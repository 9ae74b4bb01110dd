"""A model as a functional graph of ATen ops, whose parameters and buffers are constants."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..convert import densify_


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


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> Captured:
    """Trace ``model``, in eval mode, for any batch size and the image size of ``inputs``.

    Args:
        model: any module; sparse layers become dense weights that hold zeros. It is not changed.
        inputs: tensors; the first dimension of those with two or more is the batch.

    Raises:
        ValueError: the model cannot be traced, say because its control flow depends on data, or it writes its buffers.
    """
    model = densify_(copy.deepcopy(model))
    # A dimension of 1 would be taken for a constant.
    single = all(t.shape[0] == 1 for t in inputs if t.dim() >= 2)
    examples = tuple(torch.cat([t, t]) if single and t.dim() >= 2 else t for t in inputs)
    dynamic = tuple({0: torch.export.Dim.AUTO} if t.dim() >= 2 else {} for t in examples)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, examples, dynamic_shapes=_for_signature(model, dynamic))
            program = program.run_decompositions({})
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


def _for_signature(model: nn.Module, dynamic: tuple):
    """torch.export wants one entry for a ``*args`` parameter, a tuple."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (dynamic,)
    return dynamic


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
