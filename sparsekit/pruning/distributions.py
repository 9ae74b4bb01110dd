"""Distributions: how an overall sparsity is shared out over layers.

Each maps ``{layer name: scores}`` and an overall sparsity to ``{layer name: number of weights to keep}``. Only
:func:`global_` looks at the values of finite scores. A score of minus infinity marks a weight that must stay pruned: a
layer keeps at most as many weights as it has other scores, and what it cannot take goes to the remaining layers. The sum
over layers is exactly the number of weights minus round(sparsity * number of weights), or everything that may be kept
if that is less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._checks import check_sparsity
from .masks import top_k

Distribution = Callable[[Mapping[str, Tensor], float], dict[str, int]]


def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """The same sparsity in every layer, within one weight.

    Args:
        scores: layer name to scores of the weight's shape.
        sparsity: overall fraction of zeros, in [0, 1).

    Returns:
        Layer name to number of weights to keep.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1).

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.uniform({"conv1": torch.rand(4, 3, 3, 3), "fc": torch.rand(10, 4)}, 0.9)
        {'conv1': 11, 'fc': 4}
    """
    return _share_out({name: s.numel() for name, s in scores.items()}, scores, sparsity)


def erk(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Erdős–Rényi kernel: density proportional to (sum of the weight's shape) / (product of the weight's shape).

    Evci et al., arXiv 1911.11134, section 3.1. Layers whose density would exceed 1 stay dense, and the scale of the
    others is solved again.

    Args:
        scores: layer name to scores of the weight's shape.
        sparsity: overall fraction of zeros, in [0, 1).

    Returns:
        Layer name to number of weights to keep.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1).

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.erk({"conv1": torch.rand(4, 3, 3, 3), "fc": torch.rand(10, 40)}, 0.9)
        {'conv1': 11, 'fc': 40}
    """
    # Kept weights are density times size, and the size is the product of the shape: the sum of the shape is left.
    return _share_out({name: sum(s.shape) for name, s in scores.items()}, scores, sparsity)


def er(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Erdős–Rényi (SET, arXiv 1707.04780): density proportional to (n_in + n_out) / (n_in * n_out), kernel sizes aside.

    Otherwise as :func:`erk`, from which it differs in convolutions alone.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.er({"conv1": torch.rand(4, 3, 3, 3), "fc": torch.rand(10, 40)}, 0.9)
        {'conv1': 28, 'fc': 23}
    """
    # Kept weights are density times size, and the size is n_in * n_out times that of the kernel.
    shares = {name: (s.shape[0] + s.shape[1]) * math.prod(s.shape[2:]) for name, s in scores.items()}
    return _share_out(shares, scores, sparsity)


def global_(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Rank the scores of all layers together; equal ones are kept in the order of layers, then row-major.

    Args:
        scores: layer name to scores, comparable between layers.
        sparsity: overall fraction of zeros, in [0, 1).

    Returns:
        Layer name to number of weights to keep.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), or a score is NaN.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.global_({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0, 4.0])}, 0.5)
        {'a': 1, 'b': 1}
    """
    kept = top_k(torch.cat([s.reshape(-1) for s in scores.values()]), _budget(scores, sparsity))
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: int(part.sum()) for name, part in zip(scores, parts)}


DISTRIBUTIONS: dict[str, Distribution] = {"global": global_, "uniform": uniform, "erk": erk, "er": er}


def distribution_from(distribution: str | Distribution) -> Distribution:
    """The function behind a name in :data:`DISTRIBUTIONS`; a function is returned as it is."""
    if callable(distribution):
        return distribution
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(repr(name) for name in DISTRIBUTIONS)
        raise ValueError(f"distribution must be one of {known}, or a function, got {distribution!r}")
    return DISTRIBUTIONS[distribution]


def _capacities(scores: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights every layer may keep."""
    return {name: int((s != -math.inf).sum()) for name, s in scores.items()}


def _budget(scores: Mapping[str, Tensor], sparsity: float) -> int:
    """How many weights all layers keep together."""
    check_sparsity(sparsity)
    total = sum(s.numel() for s in scores.values())
    if round(sparsity * total) == total:
        raise ValueError(f"sparsity must leave a weight of {total:,}, got {sparsity}")
    return min(total - round(sparsity * total), sum(_capacities(scores).values()))


def _share_out(shares: dict[str, int], scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Split the budget in proportion to ``shares``, at most a layer's capacity each, by largest remainders.

    In integers, so that no rounding error moves a weight.
    """
    kept, budget = _capacities(scores), _budget(scores, sparsity)
    shares = dict(shares)
    while True:
        total = sum(shares.values())
        full = [name for name, share in shares.items() if budget * share >= kept[name] * total]
        if not full:
            break
        for name in full:
            budget -= kept[name]
            del shares[name]
    remainders = {}
    for name, share in shares.items():
        kept[name], remainders[name] = divmod(budget * share, total)
    missing = budget - sum(kept[name] for name in shares)
    for name in sorted(shares, key=lambda name: -remainders[name])[:missing]:
        kept[name] += 1
    return kept
