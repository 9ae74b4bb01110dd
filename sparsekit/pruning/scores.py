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


def sensitivity(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * gradient|: how much the loss would change, to first order, without w (SNIP, arXiv 1810.02340, equation 5).

    Args:
        weight, grad: one shape.

    Returns:
        Scores of the same shape, detached.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.sensitivity(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 3.0]))
        tensor([1., 3.])
    """
    return (weight.detach() * grad.detach()).abs()


def movement(weight: Tensor, grad: Tensor) -> Tensor:
    """-w * gradient: positive where a step of descent takes w away from zero (Sanh et al., arXiv 2005.07683, equation 5).

    Args:
        weight, grad: one shape.

    Returns:
        Scores of the same shape, detached; movement pruning adds them up over steps.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.movement(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 3.0]))
        tensor([ 1., -3.])
    """
    return -weight.detach() * grad.detach()
