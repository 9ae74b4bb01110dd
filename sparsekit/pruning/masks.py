"""From scores to a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, count: int) -> Tensor:
    """Keep exactly the ``count`` highest scores; among equal ones, those that come first in row-major order.

    The mask depends on nothing but the scores: neither on the number of threads, nor on the memory layout.

    Args:
        scores: any shape, without NaN.
        count: how many to keep.

    Returns:
        Bool mask of the shape of ``scores``; True is kept.

    Raises:
        ValueError: ``count`` is outside [0, number of scores], or a score is NaN.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.top_k(torch.tensor([1.0, 3.0, 1.0, 2.0]), 3)
        tensor([ True,  True, False,  True])
    """
    flat = scores.reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"count must be in [0, {flat.numel()}], the number of scores, got {count}")
    if flat.isnan().any():
        raise ValueError("scores must not hold NaN")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # topk is free to choose among equal scores, so only the threshold is taken from it. kthvalue would do the same,
    # but CUDA refuses it under torch.use_deterministic_algorithms.
    threshold = flat.topk(count, sorted=False).values.min()
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)
