"""Sparse linear layers and their input gradients.

A large batch is a 1 x 1 convolution whose pixels are the batch: features by batch, so activations are transposed on the
way in and out, and conv2d's kernel and bound apply. A small batch keeps its layout: a program owns R rows, their
non-zeros lie along the lanes, so values and columns are read once, in order, and each of the batch's rows, which fit
L1, is gathered from; registers hold ``[batch, R, U]`` sums. There the bound is reading values and columns from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .conv2d import conv2d
from .tuning import on_its_device

ROWS_BATCH = 16  # the largest batch that keeps its layout


@triton.jit(do_not_specialize=["batch"])
def linear_kernel(
    out, input, values, crow, col, bias, batch, in_features, out_features,
    B: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """out[b, r] = sum over row r's non-zeros of value * input[b, column] + bias[r]."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    b = tl.arange(0, B)
    start = tl.load(crow + r, r < out_features, 0)
    end = tl.load(crow + r + 1, r < out_features, 0)
    acc = tl.zeros([B, R, U], tl.float32)
    for step in range(0, tl.max(end - start, 0), U):
        j = start[:, None] + step + tl.arange(0, U)[None, :]
        keep = j < end[:, None]
        c = tl.load(col + j, keep, 0)
        v = tl.load(values + j, keep, 0).to(tl.float32)
        place = (b.to(tl.int64) * in_features)[:, None, None] + c[None, :, :]
        # Claimed runs lay U along the lanes; nothing is aligned, so no loads are joined.
        place = tl.max_contiguous(tl.multiple_of(place, (1, 1, 1)), (1, 1, 2))
        x = tl.load(input + place, keep[None, :, :] & (b < batch)[:, None, None], 0)
        acc += v[None, :, :] * x.to(tl.float32)
    sums = tl.sum(acc, 2)
    if bias is not None:
        sums += tl.load(bias + r, r < out_features, 0).to(tl.float32)[None, :]
    to = (b.to(tl.int64) * out_features)[:, None] + r[None, :]
    tl.store(out + to, sums.to(out.dtype.element_ty), (b < batch)[:, None] & (r < out_features)[None, :])


def transposed(t: Tensor) -> Tensor:
    """``[batch, features]`` as one image ``[1, features, 1, batch]``, copied."""
    return t.t().contiguous()[None, :, None, :]


@on_its_device
def linear(out: Tensor, input: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> None:
    """``out = input @ weight.t() + bias``.

    Args:
        out: ``[batch, out_features]``, written.
        input: ``[batch, in_features]``.
        values: ``[nnz]``.
        crow: ``[out_features + 1]`` int32.
        col: ``[nnz]`` int32.
        bias: ``[out_features]`` or None.
    """
    if out.numel() == 0:
        return
    batch, out_features = out.shape
    if batch > ROWS_BATCH:
        wide = out.new_empty(1, out_features, 1, batch)
        conv2d(wide, transposed(input), values, crow, col, bias, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
        out.copy_(wide[0, :, 0, :].t())
        return
    b = triton.next_power_of_2(batch)
    linear_kernel[(triton.cdiv(out_features, 4),)](
        out, input, values, crow, col, bias, batch, input.shape[1], out_features,
        B=b, R=4, U=128 if b < 4 else 64 if b < 16 else 32, num_warps=4,
    )  # fmt: skip


@on_its_device
def linear_input_grad(
    out: Tensor, grad_output: Tensor, values: Tensor, t_crow: Tensor, t_col: Tensor, t_permutation: Tensor
) -> None:
    """``out = grad_output @ weight``.

    Args:
        out: ``[batch, in_features]``, written.
        grad_output: ``[batch, out_features]``.
        values: ``[nnz]``, in the order of the forward.
        t_crow: ``[in_features + 1]`` int32.
        t_col: ``[nnz]`` int32.
        t_permutation: ``[nnz]`` int32, position in ``values`` of every transposed non-zero.
    """
    linear(out, grad_output, values.index_select(0, t_permutation), t_crow, t_col, None)
