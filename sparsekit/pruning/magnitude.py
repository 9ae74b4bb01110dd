"""Magnitude pruning: one-shot, and gradual (GMP)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..convert import _bake_pruning, set_mask_
from ..nn import SparseModule
from .base import Pruner, prune_masks
from .distributions import Distribution
from .layers import Rule, prunable_layers
from .schedules import Cubic
from .scores import magnitude
from .states import StatePolicy


@torch.no_grad()
def magnitude_(
    model: nn.Module,
    sparsity: float = 0.9,
    distribution: str | Distribution = "global",
    *,
    exclude: Rule | Iterable[Rule] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """One-shot magnitude pruning, in place: keep the largest |w|.

    Weights of plain layers become zero and the layers stay plain, see :func:`sparsekit.sparsify_`; sparse layers get
    another mask, and what they have pruned stays pruned. Ties are broken by position. ``torch.nn.utils.prune`` masks and
    parametrizations of ``weight`` are made permanent first.

    Args:
        model: any module with Conv2d or Linear layers; every one is pruned, tied weights once.
        sparsity: fraction of zeros over the pruned layers, in [0, 1), met within one weight.
        distribution: ``"global"`` ranks all layers together, ``"uniform"`` gives every layer the same sparsity,
            ``"erk"`` follows :func:`~sparsekit.pruning.erk`; or a function as in :mod:`sparsekit.pruning.distributions`.
        exclude: layers to leave alone: names, glob patterns, classes or functions, see :func:`prunable_layers`;
            :func:`first_and_last` are the two that some results with ``"uniform"`` leave dense.
        optimizer: whose state follows the masks of sparse layers, in the middle of training.

    Returns:
        ``model``.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), ``distribution`` is unknown, weights are NaN, no layer is to be
            pruned, or an ``exclude`` rule matches nothing.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 10))
        >>> round(sk.sparsity(sk.pruning.magnitude_(model, sparsity=0.75)).overall, 2)
        0.75
    """
    layers = prunable_layers(model, exclude)
    for layer in layers.values():
        if not isinstance(layer, SparseModule):
            _bake_pruning(layer)
    scores = {name: magnitude(layer.weight) for name, layer in layers.items()}
    masks = prune_masks(layers, scores, sparsity, distribution)
    for name, layer in layers.items():
        if isinstance(layer, SparseModule):
            set_mask_(layer, masks[name], optimizer)
        else:
            layer.weight.masked_fill_(~masks[name], 0)
    return model


class GMP(Pruner):
    """Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878): the smallest |w| go, along a cubic schedule.

    Published settings for ResNet-50 on ImageNet, where an epoch has n optimizer steps: from scratch
    ``distribution="uniform", begin=20 * n, end=79 * n``; from a trained model ``begin=n, end=36 * n, interval=5 * n,
    initial_sparsity=0.05``, global.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers at the end, in [0, 1), met within one weight.
        begin: optimizer steps before the first update; with 0, ``initial_sparsity`` is pruned at once.
        end: optimizer steps before the last update.
        interval: optimizer steps between updates.
        initial_sparsity: fraction of zeros at ``begin``.
        distribution: a name in :data:`DISTRIBUTIONS`, or a function as in :mod:`sparsekit.pruning.distributions`.
        exclude: layers to leave alone: names, glob patterns, classes or functions, see :func:`prunable_layers`.
        optimizer_state: what an update of the masks does to the optimizer's state, see :class:`Pruner`.

    Raises:
        TypeError, ValueError: see :class:`Pruner` and :class:`Cubic`.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.GMP(model, optimizer, sparsity=0.75, end=10, interval=5)
        >>> for _ in range(10):
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float = 0.9,
        *,
        begin: int = 0,
        end: int = 1000,
        interval: int = 100,
        initial_sparsity: float = 0.0,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "follow",
    ):
        schedule = Cubic(sparsity, begin, end, interval, initial_sparsity)
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)

    def scores(self) -> dict[str, Tensor]:
        """|w| of every weight."""
        return {name: magnitude(layer.weight) for name, layer in self.layers.items()}
