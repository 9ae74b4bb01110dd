"""Sparse convolution in half precision on tensor cores: panels of V rows over the union of their columns.

A panel's columns are those where any of its V rows has a non-zero, a fraction 1 - s^V at sparsity s; over them its
values are dense, ``[columns, V]``. A program owns P output pixels and a range of panels: for K columns at a time it
gathers X ``[K, P]``, which goes through shared memory into a product ``[V, K] x [K, P]`` with float32 sums in
registers. The pixels of X stay in L1 from panel to panel. The bound is L1 and L2: V multiply-adds per element of X.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import decode, inside, inside_bits, target_pixels
from .tuning import Config, launch, on_its_device, panel_configs, vector


class CondensedPattern(NamedTuple):
    """Where the panels of a weight are non-zero.

    Attributes:
        starts: ``[panels + 1]`` int32, start of every panel in ``columns``.
        columns: ``[total]`` int32, a panel's columns, ascending, as in ``col_indices``.
        slots: ``[nnz]`` int64, place of every non-zero in the packed values ``[total, V]``, flat.
        rows: rows of the weight.
        panel: V.
    """

    starts: Tensor
    columns: Tensor
    slots: Tensor
    rows: int
    panel: int


def pack(crow: Tensor, col: Tensor, rows: int, panel: int = 16) -> CondensedPattern:
    """Condense a structure: once per mask, as it waits for the GPU.

    Args:
        crow: ``[rows + 1]`` int32.
        col: ``[nnz]`` int32.
        rows: rows of the weight.
        panel: V: 16, 32 or 64 rows share their columns.

    Returns:
        The :class:`CondensedPattern`, on the device of ``col``.
    """
    if panel not in (16, 32, 64):
        raise ValueError(f"panel must be 16, 32 or 64, got {panel}")
    panels = -(-rows // panel)
    row = torch.repeat_interleave(torch.arange(rows, device=col.device), crow.diff().long(), output_size=col.numel())
    width = int(col.max()) + 1 if col.numel() else 1
    keys, place = torch.unique(row // panel * width + col, return_inverse=True)
    starts = torch.searchsorted(keys, torch.arange(panels + 1, device=col.device) * width)
    return CondensedPattern(
        starts.to(torch.int32), (keys % width).to(torch.int32), place * panel + row % panel, rows, panel
    )


def pack_values(pattern: CondensedPattern, values: Tensor) -> Tensor:
    """``values`` ``[nnz]`` in the places of ``pattern``: ``[total, V]``, zero where a row has no non-zero."""
    packed = values.new_zeros(pattern.columns.numel(), pattern.panel)
    packed.view(-1)[pattern.slots] = values
    return packed


@triton.jit(do_not_specialize=["images", "per_program"])
def condensed_conv2d_kernel(
    out, input, values, starts, place, select, bias, residual,
    images, rows, per_group, channels, channels_per_group, per_program, oh, ow, h, w, top, left,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CHECK: tl.constexpr, RELU: tl.constexpr, VECTOR: tl.constexpr,
    P: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[n, r, pixel] = relu(sum over the columns of r's panel of value * input[n, channel, tap] + bias + residual)."""
    TAPS: tl.constexpr = KH * KW
    BYTES: tl.constexpr = input.dtype.element_ty.primitive_bitwidth // 8
    panels = tl.cdiv(rows, V)
    blocks = tl.cdiv(panels, per_program)
    first = tl.program_id(0) % blocks * per_program
    index, count, image, offset, y, x, _, _ = target_pixels(
        tl.program_id(0) // blocks, images, oh, ow, top, left, SH, SW, False, P, P
    )
    written = image * rows * (oh * ow) + offset
    base = input + (image * channels * h * w + y * w + x)
    if CHECK and TAPS <= 32:
        bits = inside_bits(y, x, index < count, h, w, 0, 0, KH, KW, SH, SW, DH, DW, False)

    for panel in range(first, tl.minimum(first + per_program, panels)):
        r = panel * V + tl.arange(0, V)
        group = (panel * V // per_group * channels_per_group).to(tl.int64) * h * w
        end = tl.load(starts + panel + 1)
        acc = tl.zeros([V, P], tl.float32)
        for k in range(tl.load(starts + panel), end, K):
            j = k + tl.arange(0, K)
            keep = j < end
            shift = tl.load(place + j, keep, 0).to(tl.int64)
            if select is None:
                shift *= h * w
            else:
                chosen = tl.load(select + j, keep, 0)
            if not CHECK:
                take = keep[:, None]
            elif select is None:
                take = keep[:, None] & (bits != 0)
            elif TAPS <= 32:
                take = (bits & tl.where(keep, chosen, 0)[:, None]) != 0
            else:
                take = keep[:, None] & (index < count) & inside(
                    y, x, (chosen // KW)[:, None], (chosen % KW)[:, None], h, w, 0, 0, SH, SW, DH, DW, False
                )  # fmt: skip
            # Claimed runs of at least 2 lay P along the lanes; the compiler joins loads only as far as they are aligned.
            at = base + (shift + group)[:, None]
            at = tl.max_contiguous(tl.multiple_of(at, (1, VECTOR * BYTES)), (1, max(VECTOR, 2)))
            weight = tl.load(values + j.to(tl.int64)[None, :] * V + tl.arange(0, V)[:, None], keep[None, :], 0)
            acc = tl.dot(weight, tl.load(at, take, 0), acc)
        if bias is not None:
            acc += tl.load(bias + r, r < rows, 0).to(tl.float32)[:, None]
        # In this form the compiler sees that vectors are written whole or not at all.
        store = (r < rows)[:, None] & (index // VECTOR * VECTOR < count)
        to = (r.to(tl.int64) * (oh * ow))[:, None] + written
        to = tl.max_contiguous(tl.multiple_of(to, (1, VECTOR)), (1, max(VECTOR, 2)))
        if residual is not None:
            acc += tl.load(residual + to, store, 0).to(tl.float32)
        if RELU:
            # A comparison, so that NaN stays NaN.
            acc = tl.where(acc < 0, 0, acc)
        tl.store(out + to, acc.to(out.dtype.element_ty), store)


@on_its_device
def condensed_conv2d(
    out: Tensor,
    input: Tensor,
    pattern: CondensedPattern,
    packed: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> None:
    """:func:`sparsekit.kernels.conv2d` on tensor cores.

    Args:
        out: ``[n, out_channels, oh, ow]``, float16 or bfloat16, written.
        input: ``[n, in_channels, h, w]``.
        pattern: of the weight; see :func:`pack`.
        packed: ``[total, V]``, the values; see :func:`pack_values`.
        bias: ``[out_channels]`` or None.
        kernel_size, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        groups: groups of channels; V must divide their rows if there is more than one.
        residual: shaped as ``out``, or None.
        relu: whether negative results become zero.

    Raises:
        TypeError: not float16 or bfloat16.
        NotImplementedError: a panel would span two groups.
    """
    if input.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"input must be float16 or bfloat16, got {input.dtype}")
    if out.numel() == 0:
        return
    n, rows, oh, ow = out.shape
    _, channels, h, w = input.shape
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    if groups > 1 and rows // groups % pattern.panel:
        raise NotImplementedError(f"{rows // groups} rows of a group are no multiple of the panel, {pattern.panel}")
    plain = not any(padding)
    pointwise = plain and kh * kw * sh * sw == 1
    width = vector(oh * ow, input.dtype) if pointwise else 1
    place, select, _ = decode(packed, pattern.columns, None, input.shape, kernel_size, stride, dilation)

    def run(config: Config) -> None:
        panels = config.per_program // pattern.panel
        blocks = triton.cdiv(triton.cdiv(rows, pattern.panel), panels)
        condensed_conv2d_kernel[(triton.cdiv(n * oh * ow, config.pixels) * blocks,)](
            out, input, packed, pattern.starts, place, select, bias, residual,
            n, rows, rows // groups, channels, channels // groups, panels, oh, ow, h, w, padding[0], padding[2],
            KH=kh, KW=kw, SH=sh, SW=sw, DH=dh, DW=dw, CHECK=not plain, RELU=relu, VECTOR=width,
            P=config.pixels, V=pattern.panel, K=config.unroll, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = (
        "condensed",
        *out.shape,
        *input.shape,
        *kernel_size,
        *stride,
        *dilation,
        groups,
        pattern.panel,
        packed.shape[0],
    )
    launch(key, panel_configs(n * oh * ow, rows, pattern.panel), run, out)
