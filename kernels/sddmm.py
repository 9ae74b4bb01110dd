"""Weight gradients at the kept positions only: sampled products of dY and X, summed over pixels.

A program owns a few tiles of P pixels and a range of rows, R at a time: a tile of dY ``[R, P]`` stays in registers and
meets the row's non-zeros U at a time as ``[R, U, P]`` loads of X, P along the lanes and R along the warps; the sum over
lanes is a shuffle per non-zero and tile. X is reused through L1 by all rows of a program, as in conv2d. The sums of the
splits go to a workspace ``[splits, nnz]`` in float32 and a second kernel adds them in a fixed order: no atomics.
The bound is L1 and the shuffles, which share its pipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compress import sum_columns
from .geometry import decode, inside, inside_bits, read_nonzeros, row_chunk, target_pixels
from .spmm import ROWS_BATCH, transposed
from .tuning import Config, alignment, launch, on_its_device, pixel_configs, register_limit, split_tiles, vector


@triton.jit(do_not_specialize=["images", "per_program", "tiles_per_split"])
def conv2d_values_grad_kernel(
    out, grad_output, input, crow, place, select,
    images, rows, per_group, channels, channels_per_group, per_program, tiles_per_split, nnz,
    oh, ow, h, w, top, left,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPED: tl.constexpr, CHECK: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, U: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """out[split, j] = sum over the split's pixels of grad_output[n, row of j, pixel] * input[n, channel, tap of j]."""
    TAPS: tl.constexpr = KH * KW
    BYTES: tl.constexpr = input.dtype.element_ty.primitive_bitwidth // 8
    blocks = tl.cdiv(rows, per_program)
    first = tl.program_id(0) % blocks * per_program
    split = tl.program_id(0) // blocks
    out += split.to(tl.int64) * nnz
    area = oh * ow
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tl.cdiv(images * area, P))):
        index, count, image, offset, y, x, _, _ = target_pixels(tile, images, oh, ow, top, left, SH, SW, False, P, L)
        # In this form the compiler sees that vectors are read whole or not at all.
        valid = index // VECTOR * VECTOR < count
        read = image * rows * area + offset
        base = input + (image * channels * h * w + y * w + x)
        if CHECK and TAPS <= 32:
            bits = inside_bits(y, x, valid, h, w, 0, 0, KH, KW, SH, SW, DH, DW, False)

        for r0 in range(first, tl.minimum(first + per_program, rows), R):
            r = r0 + tl.arange(0, R)
            start, end, aligned, length = row_chunk(crow, r, rows, ALIGN)
            if GROUPED:
                group = (r // per_group * channels_per_group).to(tl.int64) * h * w
            of = (r.to(tl.int64) * area)[:, None, None] + read[None, :, :]
            of = tl.max_contiguous(tl.multiple_of(of, (1, 1, VECTOR)), (2, 1, max(VECTOR, 4)))
            dy = tl.load(grad_output + of, (r < rows)[:, None, None] & valid[None, :, :], 0).to(tl.float32)
            for step in range(0, length, U):
                j, load, keep = read_nonzeros(start, end, aligned, step, U, ALIGN)
                shift = tl.load(place + j, load, 0).to(tl.int64)
                if select is None:
                    shift *= h * w
                else:
                    chosen = tl.load(select + j, load, 0)
                if GROUPED:
                    shift += group[:, None]
                if not CHECK:
                    take = keep[:, :, None, None] & valid[None, None, :, :]
                elif select is None:
                    take = keep[:, :, None, None] & (bits[None, None, :, :] != 0)
                elif TAPS <= 32:
                    take = (bits[None, None, :, :] & tl.where(keep, chosen, 0)[:, :, None, None]) != 0
                else:
                    take = keep[:, :, None, None] & valid[None, None, :, :] & inside(
                        y[None, None, :, :], x[None, None, :, :],
                        (chosen // KW)[:, :, None, None], (chosen % KW)[:, :, None, None],
                        h, w, 0, 0, SH, SW, DH, DW, False,
                    )  # fmt: skip
                # Runs are claimed so that L goes along the lanes and R along the warps; the compiler joins loads only
                # along L, and only as far as they are aligned.
                at = base[None, None, :, :] + shift[:, :, None, None]
                at = tl.max_contiguous(tl.multiple_of(at, (1, 1, 1, VECTOR * BYTES)), (2, 1, 1, max(VECTOR, 4)))
                products = tl.load(at, take, 0).to(tl.float32) * dy[:, None, :, :]
                found = tl.sum(tl.sum(products, 2), 2)
                if tile > split * tiles_per_split:
                    found += tl.load(out + j, keep, 0)
                tl.store(out + j, found.to(out.dtype.element_ty), keep)
        # The next tile of this program adds to what this one stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["batch"])
def linear_values_grad_kernel(
    out, grad_output, input, crow, col, batch, in_features, out_features, R: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    """out[j] = sum over the batch of grad_output[b, row of j] * input[b, column of j]; non-zeros lie along the lanes."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    start = tl.load(crow + r, r < out_features, 0)
    end = tl.load(crow + r + 1, r < out_features, 0)
    for step in range(0, tl.max(end - start, 0), U):
        j = start[:, None] + step + tl.arange(0, U)[None, :]
        keep = j < end[:, None]
        c = tl.load(col + j, keep, 0)
        found = tl.zeros([R, U], tl.float32)
        for b in range(batch):
            b = tl.cast(b, tl.int64)
            dy = tl.load(grad_output + b * out_features + r, r < out_features, 0).to(tl.float32)
            found += dy[:, None] * tl.load(input + b * in_features + c, keep, 0).to(tl.float32)
        tl.store(out + j, found.to(out.dtype.element_ty), keep)


@on_its_device
def conv2d_values_grad(
    out: Tensor,
    grad_output: Tensor,
    input: Tensor,
    crow: Tensor,
    col: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """The gradient of a convolution for its kept weights.

    Args:
        out: ``[nnz]``, written.
        grad_output: ``[n, out_channels, oh, ow]``.
        input: ``[n, in_channels, h, w]``.
        crow: ``[out_channels + 1]`` int32.
        col: ``[nnz]`` int32, ``(ic * kh + ky) * kw + kx`` with ``ic`` inside its group.
        kernel_size, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        groups: groups of channels.
    """
    nnz = out.numel()
    if nnz == 0:
        return
    if grad_output.numel() == 0:
        out.zero_()
        return
    n, rows, oh, ow = grad_output.shape
    _, channels, h, w = input.shape
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    plain = not any(padding)
    pointwise = plain and kh * kw * sh * sw == 1
    place, select, _ = decode(out, col, None, input.shape, kernel_size, stride, dilation)
    width = vector(oh * ow, input.dtype) if pointwise else 1

    def run(config: Config) -> None:
        tiles, per_split = split_tiles(n * oh * ow, nnz, config.pixels)
        splits = triton.cdiv(tiles, per_split)
        direct = splits == 1 and out.dtype == torch.float32
        sums = out if direct else torch.empty(splits, nnz, dtype=torch.float32, device=out.device)
        conv2d_values_grad_kernel[(splits * triton.cdiv(rows, config.per_program),)](
            sums, grad_output, input, crow, place, select,
            n, rows, rows // groups, channels, channels // groups, config.per_program, per_split, nnz,
            oh, ow, h, w, padding[0], padding[2],
            KH=kh, KW=kw, SH=sh, SW=sw, DH=dh, DW=dw,
            GROUPED=groups > 1, CHECK=not plain, VECTOR=width, ALIGN=alignment(place, place),
            P=config.pixels, R=config.rows, U=config.unroll, L=min(32 * width, config.pixels),
            num_warps=config.warps, **register_limit(config),
        )  # fmt: skip
        if not direct:
            sum_columns(out, sums)

    key = ("values_grad", tuple(grad_output.shape), channels, kh, kw, sh, sw, dh, dw, groups, nnz, input.dtype)
    launch(key, pixel_configs(n * oh * ow, rows, channels * input.element_size(), width, 4), run, out)


@on_its_device
def linear_values_grad(out: Tensor, grad_output: Tensor, input: Tensor, crow: Tensor, col: Tensor) -> None:
    """The gradient of a linear layer for its kept weights.

    Args:
        out: ``[nnz]``, written.
        grad_output: ``[batch, out_features]``.
        input: ``[batch, in_features]``.
        crow: ``[out_features + 1]`` int32.
        col: ``[nnz]`` int32.
    """
    if out.numel() == 0:
        return
    batch, out_features = grad_output.shape
    if batch > ROWS_BATCH:
        # A 1 x 1 convolution whose pixels are the batch.
        geometry = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
        conv2d_values_grad(out, transposed(grad_output), transposed(input), crow, col, *geometry)
        return
    linear_values_grad_kernel[(triton.cdiv(out_features, 4),)](
        out, grad_output, input, crow, col, batch, input.shape[1], out_features, R=4, U=128, num_warps=4
    )
