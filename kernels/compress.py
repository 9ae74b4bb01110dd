"""Dense weights to values and back, and sums over a dimension that gradients end with.

compress and decompress: a program owns a row, its non-zeros lie along the lanes; bound by memory.
bias_grad and the splits of a weight gradient: a program sums a tile ``[T, J]`` after the other down a range of rows,
registers hold ``[T, J]`` sums, and the end is a tree over T: a fixed order, so the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import on_its_device


@triton.jit
def copy_kept_kernel(
    values, weight, crow, col, row_stride, channel_stride, y_stride, x_stride,
    KH: tl.constexpr, KW: tl.constexpr, TO_VALUES: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """values[j] = weight[row, column of j], or the other way."""
    row = tl.program_id(0)
    end = tl.load(crow + row + 1)
    weight += row.to(tl.int64) * row_stride
    for first in range(tl.load(crow + row), end, J):
        j = first + tl.arange(0, J)
        c = tl.load(col + j, j < end, 0)
        channel = (c // (KH * KW)).to(tl.int64)
        to = channel * channel_stride + c // KW % KH * y_stride + c % KW * x_stride
        if TO_VALUES:
            tl.store(values + j, tl.load(weight + to, j < end, 0), j < end)
        else:
            tl.store(weight + to, tl.load(values + j, j < end, 0), j < end)


@triton.jit(do_not_specialize=["per_split"])
def sum_columns_kernel(out, source, rows, columns, per_split, T: tl.constexpr, J: tl.constexpr):
    """out[split, j] = sum of source[i, j] over the split's rows i."""
    blocks = tl.cdiv(columns, J)
    split = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * J + tl.arange(0, J)
    sums = tl.zeros([T, J], tl.float32)
    last = tl.minimum((split + 1) * per_split, rows)
    for first in range(split * per_split, last, T):
        i = first + tl.arange(0, T)
        place = i.to(tl.int64)[:, None] * columns + j[None, :]
        sums += tl.load(source + place, (i < last)[:, None] & (j < columns)[None, :], 0).to(tl.float32)
    tl.store(out + split.to(tl.int64) * columns + j, tl.sum(sums, 0).to(out.dtype.element_ty), j < columns)


@triton.jit(do_not_specialize=["planes", "per_split"])
def sum_planes_kernel(out, source, planes, channels, area, per_split, J: tl.constexpr):
    """out[split, channel] = sum of source[n, channel, :] over the split's images n."""
    channel = tl.program_id(0) % channels
    split = tl.program_id(0) // channels
    sums = tl.zeros([J], tl.float32)
    first = split * per_split
    count = (tl.minimum(first + per_split, planes) - first) * area
    for at in range(0, count, J):
        p = at + tl.arange(0, J)
        image = (first + p // area).to(tl.int64)
        sums += tl.load(source + (image * channels + channel) * area + p % area, p < count, 0).to(tl.float32)
    tl.store(out + split * channels + channel, tl.sum(sums, 0).to(out.dtype.element_ty))


def _copy(values: Tensor, weight: Tensor, crow: Tensor, col: Tensor, to_values: bool) -> None:
    if values.numel() == 0:
        return
    strides = (*weight.stride(), 0, 0) if weight.dim() == 2 else weight.stride()
    kh, kw = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    copy_kept_kernel[(weight.shape[0],)](
        values, weight, crow, col, *strides, KH=kh, KW=kw, TO_VALUES=to_values, J=256, num_warps=2
    )


@on_its_device
def compress(out: Tensor, weight: Tensor, crow: Tensor, col: Tensor) -> None:
    """The kept entries of a dense weight.

    Args:
        out: ``[nnz]``, written.
        weight: ``[out_features, in_features]`` or ``[out_channels, in_channels / groups, kh, kw]``, of any strides.
        crow: ``[rows + 1]`` int32.
        col: ``[nnz]`` int32.
    """
    _copy(out, weight, crow, col, True)


@on_its_device
def decompress(out: Tensor, values: Tensor, crow: Tensor, col: Tensor) -> None:
    """The dense weight of ``values``, zero elsewhere.

    Args:
        out: ``[out_features, in_features]`` or ``[out_channels, in_channels / groups, kh, kw]``, of any strides; written.
        values: ``[nnz]``.
        crow: ``[rows + 1]`` int32.
        col: ``[nnz]`` int32.
    """
    out.zero_()
    _copy(values, out, crow, col, False)


def sum_columns(out: Tensor, source: Tensor) -> None:
    """``out = source.sum(0)`` in a fixed order: ``[rows, columns]`` to ``[columns]``, accumulated in float32."""
    rows, columns = source.shape
    blocks = triton.cdiv(columns, 32)
    # Few columns of many rows are summed in two steps, so that more than a few multiprocessors work.
    splits = max(1, min(triton.cdiv(rows, 256), 512 // blocks))
    sums = out if splits == 1 else torch.empty(splits, columns, dtype=torch.float32, device=out.device)
    sum_columns_kernel[(splits * blocks,)](
        sums, source, rows, columns, triton.cdiv(rows, splits), T=32, J=32, num_warps=4
    )
    if splits > 1:
        sum_columns_kernel[(blocks,)](out, sums, splits, columns, splits, T=32, J=32, num_warps=4)


@on_its_device
def bias_grad(out: Tensor, grad_output: Tensor) -> None:
    """The sum over everything but channels.

    Args:
        out: ``[channels]``, written.
        grad_output: ``[n, channels, oh, ow]`` or ``[batch, channels]``.
    """
    if grad_output.numel() == 0:
        out.zero_()
        return
    n, channels = grad_output.shape[:2]
    area = grad_output[0, 0].numel()
    if area == 1:
        sum_columns(out, grad_output.view(n, channels))
        return
    # A program sums 16 K elements, or one image.
    per_split = max(1, (1 << 14) // area)
    splits = triton.cdiv(n, per_split)
    sums = out if splits == 1 else torch.empty(splits, channels, dtype=torch.float32, device=out.device)
    sum_planes_kernel[(splits * channels,)](
        sums, grad_output, n, channels, area, per_split, J=1024, num_warps=4
    )  # fmt: skip
    if splits > 1:
        sum_columns(out, sums)
