"""Mask <-> compressed structure.

A weight of shape ``[out_channels, in_channels / groups, kh, kw]`` (or ``[out_features, in_features]``) is seen as a
CSR matrix of ``out_channels`` rows and ``in_channels / groups * kh * kw`` columns. The input gradient walks the same
non-zeros in the order of the transposed convolution, so a :class:`Pattern` holds both orders, and the permutation
between them. Values are never stored here: they belong to the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_NNZ = 2**31 - 1


class Pattern(NamedTuple):
    """Where a weight is non-zero. All tensors are int32, contiguous and on the weight's device.

    Attributes:
        crow_indices: ``[out_channels + 1]``, start of every row in ``col_indices``.
        col_indices: ``[nnz]``, ``(ic * kh + ky) * kw + kx``, ascending in a row; ``ic`` counts inside its group.
        t_crow_indices: ``[in_channels + 1]``, the same for the transposed weight; ``in_channels`` counts all groups.
        t_col_indices: ``[nnz]``, ``(oc * kh + ky) * kw + kx``, ascending in a row; ``oc`` counts inside its group.
        t_permutation: ``[nnz]``, position in ``col_indices`` of every transposed non-zero.
    """

    crow_indices: Tensor
    col_indices: Tensor
    t_crow_indices: Tensor
    t_col_indices: Tensor
    t_permutation: Tensor

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.col_indices.numel()


def pattern_from_mask(mask: Tensor, groups: int = 1) -> Pattern:
    """Compress a mask.

    Args:
        mask: bool, ``[out_channels, in_channels / groups, kh, kw]`` or ``[out_features, in_features]``; True is kept.
        groups: groups of the convolution.

    Returns:
        The :class:`Pattern` of the kept positions.

    Raises:
        TypeError: ``mask`` is not bool.
        ValueError: wrong number of dimensions, ``groups`` does not divide the rows, or too many non-zeros for int32.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"mask must have 2 or 4 dimensions, got shape {tuple(mask.shape)}")
    if groups < 1 or mask.shape[0] % groups:
        raise ValueError(f"groups must divide the {mask.shape[0]} rows of the mask, got {groups}")
    if mask.numel() > MAX_NNZ:
        raise ValueError(f"mask has {mask.numel()} elements, more than int32 indices can address ({MAX_NNZ})")
    # Structures are made on the CPU, wherever they are used.
    pattern = torch.ops.sparsekit.pattern(mask.cpu(), groups)
    return Pattern(*(indices.to(mask.device) for indices in pattern))


def mask_from_pattern(pattern: Pattern, size: torch.Size | tuple[int, ...]) -> Tensor:
    """The bool mask of shape ``size`` whose compressed form is ``pattern``."""
    mask = torch.zeros(size, dtype=torch.bool, device=pattern.col_indices.device)
    mask.view(size[0], -1)[row_indices(pattern.crow_indices), pattern.col_indices.long()] = True
    return mask


def row_indices(crow_indices: Tensor) -> Tensor:
    """Row of every non-zero, ``[nnz]`` int64, from ``crow_indices`` ``[rows + 1]``."""
    counts = crow_indices.diff().long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


def validate_csr(crow_indices: Tensor, col_indices: Tensor, columns: int) -> None:
    """Check a CSR structure in full, O(nnz): for files and for callers who bring their own indices.

    Args:
        crow_indices: int32 ``[rows + 1]``.
        col_indices: int32 ``[nnz]``.
        columns: number of columns.

    Raises:
        TypeError: an index tensor is not int32.
        ValueError: not contiguous 1-D, not monotone, out of range, or columns of a row not ascending.
    """
    for name, t in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if t.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {t.dtype}")
        if t.dim() != 1 or not t.is_contiguous():
            raise ValueError(f"{name} must be 1-D and contiguous, got shape {tuple(t.shape)}, strides {t.stride()}")
    if crow_indices.numel() < 1 or crow_indices[0] != 0 or crow_indices[-1] != col_indices.numel():
        raise ValueError(f"crow_indices must run from 0 to nnz = {col_indices.numel()}, got {_ends(crow_indices)}")
    if (crow_indices.diff() < 0).any():
        raise ValueError("crow_indices must not decrease")
    if col_indices.numel():
        low, high = (int(end) for end in col_indices.aminmax())
        if low < 0 or high >= columns:
            raise ValueError(f"col_indices must lie in [0, {columns}), got [{low}, {high}]")
        begins_row = torch.zeros(col_indices.numel() + 1, dtype=torch.bool, device=col_indices.device)
        begins_row[crow_indices.long()] = True
        if not ((col_indices[1:] > col_indices[:-1]) | begins_row[1:-1]).all():
            raise ValueError("col_indices must ascend within each row")


def _ends(t: Tensor) -> str:
    return f"{int(t[0])} to {int(t[-1])}" if t.numel() else "nothing"
