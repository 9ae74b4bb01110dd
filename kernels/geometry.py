"""Where the taps of a convolution read: device functions that the convolution kernels share.

A *target* is an element that a kernel writes (or, for the weight gradient, a position of dY); its *source* is the plane
that the taps read. Forward: source row = target row * SH - top + ky * DH. Input gradient: source row = (target row +
top - ky * DH) / SH where that divides; targets are walked phase by phase of (target row + top) % SH, so that within a
phase the division disappears: with ky * DH = phase + SH * m, the source row is the target's number in its phase - m.
Either way a tap is a constant distance from the target's base, and which taps fall inside of the plane is one bit each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def phase_start(phase, padding, STRIDE: tl.constexpr):
    """First target of a phase, in [0, STRIDE)."""
    return (phase + STRIDE - padding % STRIDE) % STRIDE


@triton.jit
def tap_shift(
    ky, kx, phase_y, phase_x, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(rows, columns) from a target's base to what tap (ky, kx) reads; exact where the tap is in the phase."""
    if TRANSPOSED:
        return -((ky * DH - phase_y) // SH), -((kx * DW - phase_x) // SW)
    else:
        return ky * DH, kx * DW


@triton.jit
def tap_in_phase(
    ky, kx, phase_y, phase_x, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr
):  # fmt: skip
    return ((ky * DH - phase_y) % SH == 0) & ((kx * DW - phase_x) % SW == 0)


@triton.jit
def inside(
    y, x, ky, kx, height, width, phase_y, phase_x, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Whether tap (ky, kx) of the targets with bases (y, x) reads inside of the source plane."""
    dy, dx = tap_shift(ky, kx, phase_y, phase_x, SH, SW, DH, DW, TRANSPOSED)
    good = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    if TRANSPOSED:
        good = good & tap_in_phase(ky, kx, phase_y, phase_x, SH, SW, DH, DW)
    return good


@triton.jit
def inside_bits(
    y, x, valid, height, width, phase_y, phase_x, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """:func:`inside` for all of up to 32 taps: bit ky * KW + kx of an int32 per target."""
    bits = tl.zeros_like(y)
    for ky in tl.static_range(KH):
        for kx in tl.static_range(KW):
            good = inside(y, x, ky, kx, height, width, phase_y, phase_x, SH, SW, DH, DW, TRANSPOSED)
            bits = bits | ((good & valid).to(tl.int32) << (ky * KW + kx))
    return bits


@triton.jit
def target_pixels(
    tile, images, target_h, target_w, top, left, SH: tl.constexpr, SW: tl.constexpr, TRANSPOSED: tl.constexpr,
    P: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The P targets of a tile, ``[P / L, L]``: pixels of all images in order, or of all images in one phase.

    Returns:
        number and count of targets (those from count on are to be ignored; they are given pixel 0's place), image,
        offset in its plane, base row and column of what the taps read, and the phase (0 for the forward).
    """
    phase_y = 0
    phase_x = 0
    y0 = 0
    x0 = 0
    STEP_Y: tl.constexpr = SH if TRANSPOSED else 1
    STEP_X: tl.constexpr = SW if TRANSPOSED else 1
    if STEP_Y * STEP_X > 1:
        phase_y = tile % (SH * SW) // SW
        phase_x = tile % SW
        tile = tile // (SH * SW)
        y0 = phase_start(phase_y, top, SH)
        x0 = phase_start(phase_x, left, SW)
    count_y = tl.maximum((target_h - y0 + STEP_Y - 1) // STEP_Y, 0)
    count_x = tl.maximum((target_w - x0 + STEP_X - 1) // STEP_X, 0)
    index = tile * P + tl.arange(0, P // L)[:, None] * L + tl.arange(0, L)[None, :]
    count = images * count_y * count_x
    p = tl.where(index < count, index, 0)
    # A phase may have no targets.
    plane = tl.maximum(count_y * count_x, 1)
    width = tl.maximum(count_x, 1)
    qy = p % plane // width
    qx = p % plane % width
    if TRANSPOSED:
        y = (y0 + top - phase_y) // SH + qy
        x = (x0 + left - phase_x) // SW + qx
    else:
        y = qy * SH - top
        x = qx * SW - left
    offset = (y0 + qy * STEP_Y) * target_w + x0 + qx * STEP_X
    return index, count, (p // plane).to(tl.int64), offset, y, x, phase_y, phase_x


@triton.jit
def row_chunk(crow, r, rows, ALIGN: tl.constexpr):
    """Start and end of rows ``r``, the start rounded down so that loads can be vectors, and the longest row's length."""
    start = tl.load(crow + r, r < rows, 0)
    end = tl.load(crow + r + 1, r < rows, 0)
    aligned = tl.multiple_of(start // ALIGN * ALIGN, ALIGN)
    return start, end, aligned, tl.max(end - aligned, 0)


@triton.jit
def read_nonzeros(start, end, aligned, step, U: tl.constexpr, ALIGN: tl.constexpr):
    """Positions ``[rows, U]`` of the next non-zeros of every row, which of them to load, and which are in the row.

    A vector of ALIGN elements is loaded whole if any of them is before the row's end: it may reach past the end of the
    array, but never out of an aligned 16 bytes that hold a part of it. What is not in the row must not be used.
    """
    j = aligned[:, None] + step + tl.arange(0, U)[None, :]
    last = tl.multiple_of((end + ALIGN - 1) // ALIGN * ALIGN, ALIGN)
    return j, j < last[:, None], (j >= start[:, None]) & (j < end[:, None])


@triton.jit
def decode_kernel(
    place, select, moved, col, values, permutation, nnz, stride, source_h, source_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TRANSPOSED: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """What a column means in this geometry, once per non-zero (and phase) and not once per program.

    place[phase, j]: elements from a target's base to what non-zero j reads; select[j]: its bit in inside_bits, or its
    tap where there are more than 32; moved[j] = values[permutation[j]], if a permutation is given.
    """
    j = tl.program_id(0) * J + tl.arange(0, J)
    here = j < nnz
    # Unsigned, as that divides in fewer instructions.
    c = tl.load(col + j, here, 0).to(tl.uint32)
    tap = (c % (KH * KW)).to(tl.int32)
    channel = (c // (KH * KW)).to(tl.int32)
    tl.store(select + j, 1 << tap if KH * KW <= 32 else tap, here)
    for phase in tl.static_range(SH * SW if TRANSPOSED else 1):
        dy, dx = tap_shift(tap // KW, tap % KW, phase // SW, phase % SW, SH, SW, DH, DW, TRANSPOSED)
        tl.store(place + phase * stride + j, (channel * source_h + dy) * source_w + dx, here)
    if permutation is not None:
        tl.store(moved + j, tl.load(values + tl.load(permutation + j, here, 0), here, 0), here)


def decode(
    values: Tensor,
    col: Tensor,
    permutation: Tensor | None,
    source_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``place`` ``[phases, at least nnz]``, ``select`` and the values in the order of ``col``; see decode_kernel."""
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    transposed = permutation is not None
    phases = sh * sw if transposed else 1
    if kh * kw * phases == 1:
        # The column is the channel.
        return col, None, values if permutation is None else values.index_select(0, permutation)
    if math.prod(source_size[1:]) >= 1 << 31:
        raise ValueError(f"images of {tuple(source_size[1:])} have more elements than int32 can address")
    nnz = col.numel()
    # Rows of the workspace start on 16 bytes.
    padded = -(-nnz // 16) * 16
    work = torch.empty(phases + 1, padded, dtype=torch.int32, device=col.device)
    moved = values if permutation is None else torch.empty_like(values)
    if nnz:
        decode_kernel[(triton.cdiv(nnz, 256),)](
            work, work[phases], moved, col, values, permutation, nnz, padded, *source_size[2:],
            KH=kh, KW=kw, SH=sh, SW=sw, DH=dh, DW=dw, TRANSPOSED=transposed, J=256, num_warps=2,
        )  # fmt: skip
    return work, work[phases], moved
