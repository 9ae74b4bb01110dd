"""Scores: how much a weight is worth; the lowest are pruned first."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w| (Zhu & Gupta, arXiv 1710.01878, section 3).

    Args:
        weight: any shape.

    Returns:
        Scores of the same shape, detached.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.magnitude(torch.tensor([[-2.0, 1.0]]))
        tensor([[2., 1.]])
    """
    return weight.detach().abs()
