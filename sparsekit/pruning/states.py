"""Optimizer-state policies: what an update of the masks does to momentum and the like.

Each sets the masks of some layers and takes care of the optimizer's state:
``policy({layer name: sparse layer}, {layer name: mask}, optimizer)``. Layers without a mask stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..convert import set_mask_
from ..nn import SparseModule

StatePolicy = Callable[[Mapping[str, SparseModule], Mapping[str, Tensor], torch.optim.Optimizer], None]


def follow(layers: Mapping[str, SparseModule], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """State is kept where weights are kept, dropped where they are pruned, and zero where they grow.

    Args:
        layers: name to sparse layer.
        masks: name to bool mask of the weight's shape; True is kept.
        optimizer: trains the layers' weights.

    Example:
        >>> import torch, sparsekit as sk
        >>> layer = sk.nn.SparseLinear(2, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
        >>> sk.pruning.STATE_POLICIES["follow"]({"fc": layer}, {"fc": torch.tensor([[True, False]])}, optimizer)
        >>> optimizer.state[layer.weight]["momentum_buffer"]
        tensor([[1., 0.]])
    """
    for name, mask in masks.items():
        set_mask_(layers[name], mask, optimizer)


def leave(layers: Mapping[str, SparseModule], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """State stays, that of pruned weights too: for methods that train those behind the model's back, and no others, as
    momentum would move pruned weights. Arguments as :func:`follow`."""
    for name, mask in masks.items():
        set_mask_(layers[name], mask)


def zero(layers: Mapping[str, SparseModule], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """No parameter has momentum, pruned layer or not; step counts go on. Arguments as :func:`follow`."""
    follow(layers, masks, optimizer)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and name != "step" and (value.dim() > 0 or value.shape == parameter.shape):
                value.zero_()


def forget(layers: Mapping[str, SparseModule], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """The optimizer begins anew, step counts too. Arguments as :func:`follow`."""
    follow(layers, masks, optimizer)
    optimizer.state.clear()


STATE_POLICIES: dict[str, StatePolicy] = {"follow": follow, "zero": zero, "forget": forget}


def policy_from(policy: str | StatePolicy) -> StatePolicy:
    """The function behind a name in :data:`STATE_POLICIES`; a function is returned as it is."""
    if callable(policy):
        return policy
    if policy not in STATE_POLICIES:
        known = ", ".join(repr(name) for name in STATE_POLICIES)
        raise ValueError(f"optimizer_state must be one of {known}, or a function, got {policy!r}")
    return STATE_POLICIES[policy]
