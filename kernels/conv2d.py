"""Sparse convolution and its input gradient: one gather kernel.

A program owns P target pixels, counted through all images, and walks a range of rows, R at a time; every row's
non-zeros are walked U at a time as a tile ``[R, U, P]``, where P lies along the lanes, R along the warps, and U in each
thread's registers, so that U loads are in flight and their sum needs no other thread. Registers hold ``[R, P]`` sums.
All rows of a program read the same pixels of the source, which stay in L1; programs that run at once share them in L2.
The bound is L1: a load of the source per multiply-add, so at most 32 of them per clock and multiprocessor in float32,
and for kernels larger than 1 x 1 the instructions for addresses and masks, about 5 per multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .geometry import decode, inside, inside_bits, read_nonzeros, row_chunk, target_pixels
from .tuning import Config, alignment, launch, on_its_device, pixel_configs, register_limit, vector


@triton.jit(do_not_specialize=["images", "per_program"])
def conv2d_kernel(
    out, source, values, crow, place, select, bias, residual,
    images, place_stride, rows, per_group, channels, channels_per_group, per_program,
    target_h, target_w, source_h, source_w, top, left,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TRANSPOSED: tl.constexpr, GROUPED: tl.constexpr, CHECK: tl.constexpr, RELU: tl.constexpr,
    VECTOR: tl.constexpr, ALIGN: tl.constexpr, P: tl.constexpr, R: tl.constexpr, U: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """out[n, r, target] = relu(sum over row r's non-zeros of value * source[n, channel, tap] + bias + residual)."""
    TAPS: tl.constexpr = KH * KW
    BYTES: tl.constexpr = source.dtype.element_ty.primitive_bitwidth // 8
    blocks = tl.cdiv(rows, per_program)
    first = tl.program_id(0) % blocks * per_program
    tile = tl.program_id(0) // blocks

    index, count, image, offset, y, x, phase_y, phase_x = target_pixels(
        tile, images, target_h, target_w, top, left, SH, SW, TRANSPOSED, P, L
    )
    valid = index < count
    place += (phase_y * SW + phase_x) * place_stride
    target_area = target_h * target_w
    source_area = source_h * source_w
    written = image * rows * target_area + offset
    base = source + (image * channels * source_area + y * source_w + x)
    if CHECK and TAPS <= 32:
        bits = inside_bits(
            y, x, valid, source_h, source_w, phase_y, phase_x, KH, KW, SH, SW, DH, DW, TRANSPOSED
        )  # fmt: skip

    for r0 in range(first, tl.minimum(first + per_program, rows), R):
        r = r0 + tl.arange(0, R)
        start, end, aligned, length = row_chunk(crow, r, rows, ALIGN)
        if GROUPED:
            group = (r // per_group * channels_per_group).to(tl.int64) * source_area
        acc = tl.zeros([R, P // L, L], tl.float32)
        for step in range(0, length, U):
            j, load, keep = read_nonzeros(start, end, aligned, step, U, ALIGN)
            v = tl.where(keep, tl.load(values + j, load, 0).to(tl.float32), 0)
            shift = tl.load(place + j, load, 0).to(tl.int64)
            if select is None:
                shift *= source_area
            else:
                chosen = tl.load(select + j, load, 0)
            if GROUPED:
                shift += group[:, None]
            if not CHECK:
                take = keep[:, :, None, None]
            elif select is None:
                take = keep[:, :, None, None] & (bits[None, None, :, :] != 0)
            elif TAPS <= 32:
                take = (bits[None, None, :, :] & tl.where(keep, chosen, 0)[:, :, None, None]) != 0
            else:
                take = keep[:, :, None, None] & valid[None, None, :, :] & inside(
                    y[None, None, :, :], x[None, None, :, :],
                    (chosen // KW)[:, :, None, None], (chosen % KW)[:, :, None, None],
                    source_h, source_w, phase_y, phase_x, SH, SW, DH, DW, TRANSPOSED,
                )  # fmt: skip
            # Runs are claimed so that L goes along the lanes and R along the warps; the compiler joins loads only along
            # L, and only as far as they are aligned.
            at = base[None, None, :, :] + shift[:, :, None, None]
            at = tl.max_contiguous(tl.multiple_of(at, (1, 1, 1, VECTOR * BYTES)), (2, 1, 1, max(VECTOR, 4)))
            part = tl.load(at, take, 0).to(tl.float32)
            acc += tl.sum(part * v[:, :, None, None], 1)
        if bias is not None:
            acc += tl.load(bias + r, r < rows, 0).to(tl.float32)[:, None, None]
        # In this form the compiler sees that vectors are written whole or not at all.
        store = (r < rows)[:, None, None] & (index // VECTOR * VECTOR < count)[None, :, :]
        to = (r.to(tl.int64) * target_area)[:, None, None] + written[None, :, :]
        to = tl.max_contiguous(tl.multiple_of(to, (1, 1, VECTOR)), (2, 1, max(VECTOR, 4)))
        if residual is not None:
            acc += tl.load(residual + to, store, 0).to(tl.float32)
        if RELU:
            # A comparison, so that NaN stays NaN.
            acc = tl.where(acc < 0, 0, acc)
        tl.store(out + to, acc.to(out.dtype.element_ty), store)


@on_its_device
def conv2d(
    out: Tensor,
    input: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
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
    """``out = relu(conv2d(input) + bias + residual)``, with or without the last three.

    Args:
        out: ``[n, out_channels, oh, ow]``, written.
        input: ``[n, in_channels, h, w]``.
        values: ``[nnz]``.
        crow: ``[out_channels + 1]`` int32.
        col: ``[nnz]`` int32, ``(ic * kh + ky) * kw + kx`` with ``ic`` inside its group.
        bias: ``[out_channels]`` or None.
        kernel_size, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        groups: groups of channels.
        residual: shaped as ``out``, or None.
        relu: whether negative results become zero.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    _gather(out, input, values, crow, col, None, bias, residual, relu, *geometry)


@on_its_device
def conv2d_input_grad(
    out: Tensor,
    grad_output: Tensor,
    values: Tensor,
    t_crow: Tensor,
    t_col: Tensor,
    t_permutation: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """The gradient of :func:`conv2d` for its input; every element of ``out`` is written.

    Args:
        out: ``[n, in_channels, h, w]``, written.
        grad_output: ``[n, out_channels, oh, ow]``.
        values: ``[nnz]``, in the order of the forward.
        t_crow: ``[in_channels + 1]`` int32.
        t_col: ``[nnz]`` int32, ``(oc * kh + ky) * kw + kx`` with ``oc`` inside its group.
        t_permutation: ``[nnz]`` int32, position in ``values`` of every transposed non-zero.
        kernel_size, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        groups: groups of channels.
    """
    geometry = (kernel_size, stride, padding, dilation, groups)
    _gather(out, grad_output, values, t_crow, t_col, t_permutation, None, None, False, *geometry)


def _gather(
    out, source, values, crow, col, permutation, bias, residual, relu, kernel_size, stride, padding, dilation, groups
) -> None:
    """The forward, or with a permutation the input gradient."""
    if out.numel() == 0:
        return
    n, rows, target_h, target_w = out.shape
    _, channels, source_h, source_w = source.shape
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    transposed = permutation is not None
    steps = (sh, sw) if transposed else (1, 1)
    phases = steps[0] * steps[1]
    pixels = n * -(-target_h // steps[0]) * -(-target_w // steps[1])
    # A kernel of one tap that is never off the plane needs neither bits nor bounds.
    plain = not any(padding) and (not transposed or kh * kw * phases == 1)
    pointwise = plain and kh * kw * sh * sw == 1
    place, select, values = decode(values, col, permutation, source.shape, kernel_size, stride, dilation)
    width = vector(target_h * target_w, source.dtype) if pointwise else 1

    def run(config: Config) -> None:
        blocks = triton.cdiv(rows, config.per_program)
        conv2d_kernel[(triton.cdiv(pixels, config.pixels) * phases * blocks,)](
            out, source, values, crow, place, select, bias, residual,
            n, place.stride(0), rows, rows // groups, channels, channels // groups, config.per_program,
            target_h, target_w, source_h, source_w, padding[0], padding[2],
            KH=kh, KW=kw, SH=sh, SW=sw, DH=dh, DW=dw,
            TRANSPOSED=transposed, GROUPED=groups > 1, CHECK=not plain, RELU=relu,
            VECTOR=width, ALIGN=alignment(values, place), P=config.pixels, R=config.rows, U=config.unroll,
            L=min(32 * width, config.pixels), num_warps=config.warps, **register_limit(config),
        )  # fmt: skip

    key = (
        "conv2d",
        *out.shape,
        *source.shape,
        *kernel_size,
        *stride,
        *dilation,
        groups,
        transposed,
        values.numel(),
        out.dtype,
    )
    # Masks of more than 4 x 4 loads do not fit the predicate registers.
    unroll = 8 if pointwise else 4
    launch(key, pixel_configs(pixels * phases, rows, channels * source.element_size(), width, unroll), run, out)
