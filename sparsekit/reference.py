"""The slow, obvious PyTorch version of every op: the specification, the oracle of the tests, and the fallback.

Signatures are those of the ops in :mod:`sparsekit._ops`; shapes are documented there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import row_indices


def pattern(mask: Tensor, groups: int) -> tuple[Tensor, ...]:
    rows = mask.flatten(1)
    mask_t = _transposed(mask, groups)
    position = torch.empty(rows.numel(), dtype=torch.int32, device=mask.device)
    flat, flat_t = (m.reshape(-1).nonzero().squeeze(1) for m in (rows, mask_t))
    position[flat] = torch.arange(flat.numel(), dtype=torch.int32, device=mask.device)
    return (
        _crow(rows),
        (flat % max(rows.shape[1], 1)).to(torch.int32),
        _crow(mask_t),
        (flat_t % max(mask_t.shape[1], 1)).to(torch.int32),
        _transposed(position.view(mask.shape), groups).reshape(-1)[flat_t],
    )


def _crow(mask: Tensor) -> Tensor:
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask.sum(1), 0, dtype=torch.int32, out=crow[1:])
    return crow


def _transposed(dense: Tensor, groups: int) -> Tensor:
    """``[out, in / groups, ...]`` -> ``[in, out / groups * ...]``: the weight of the transposed convolution."""
    rows, cols = dense.shape[:2]
    taps = math.prod(dense.shape[2:])
    grouped = dense.reshape(groups, rows // groups, cols, taps)
    return grouped.transpose(1, 2).reshape(groups * cols, rows // groups * taps)


def compress(weight: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1)[row_indices(crow_indices), col_indices.long()]


def decompress(
    values: Tensor, crow_indices: Tensor, col_indices: Tensor, size: Sequence[int], channels_last: bool
) -> Tensor:
    weight = values.new_zeros(size)
    weight.view(size[0], -1)[row_indices(crow_indices), col_indices.long()] = values
    return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight


def _dense(values, crow_indices, col_indices, in_channels, kernel_size, groups):
    size = (crow_indices.numel() - 1, in_channels // groups, *kernel_size)
    return decompress(values, crow_indices, col_indices, size, False)


def _pad(input: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(input, (left, right, top, bottom))


def conv2d(input, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups):
    weight = _dense(values, crow_indices, col_indices, input.shape[1], kernel_size, groups)
    return F.conv2d(_pad(input, padding), weight, bias, stride, 0, dilation, groups)


def _backward(grad_output, padded, weight, stride, dilation, groups, which):
    grads = torch.ops.aten.convolution_backward(
        grad_output, padded, weight, None, stride, [0, 0], dilation, False, [0, 0], groups, which
    )
    return grads[which.index(True)]


def conv2d_input_grad(
    grad_output,
    values,
    t_crow_indices,
    t_col_indices,
    t_permutation,
    input_size,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
):
    # The transposed weight, [in_channels, out_channels / groups, kh, kw], brought back to the order of the forward.
    weight_t = values.new_zeros(input_size[1], grad_output.shape[1] // groups, *kernel_size)
    weight_t.view(input_size[1], -1)[row_indices(t_crow_indices), t_col_indices.long()] = values[t_permutation.long()]
    weight = weight_t.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    top, bottom, left, right = padding
    n, c, h, w = input_size
    padded = grad_output.new_empty(n, c, h + top + bottom, w + left + right)
    grad = _backward(grad_output, padded, weight, stride, dilation, groups, [True, False, False])
    return grad[:, :, top : top + h, left : left + w]


def conv2d_values_grad(grad_output, input, crow_indices, col_indices, kernel_size, stride, padding, dilation, groups):
    grad = conv2d_weight_grad(grad_output, input, kernel_size, stride, padding, dilation, groups)
    return compress(grad, crow_indices, col_indices)


def conv2d_weight_grad(grad_output, input, kernel_size, stride, padding, dilation, groups):
    weight = input.new_empty(grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    return _backward(grad_output, _pad(input, padding), weight, stride, dilation, groups, [False, True, False])


def linear(input, values, crow_indices, col_indices, bias):
    weight = decompress(values, crow_indices, col_indices, (crow_indices.numel() - 1, input.shape[1]), False)
    return F.linear(input, weight, bias)


def linear_input_grad(grad_output, values, t_crow_indices, t_col_indices, t_permutation):
    size = (t_crow_indices.numel() - 1, grad_output.shape[1])
    return grad_output @ decompress(values[t_permutation.long()], t_crow_indices, t_col_indices, size, False).t()


def linear_values_grad(grad_output, input, crow_indices, col_indices):
    return compress(grad_output.t() @ input, crow_indices, col_indices)


def bias_grad(grad_output):
    return grad_output.sum([d for d in range(grad_output.dim()) if d != 1])


def _channels(t: Tensor | None) -> Tensor | None:
    return None if t is None else t[:, None, None]


def to_bits(positive):
    """bool ``[n, channels, h, w]`` as uint8 ``[n, channels, bytes]``, whole pairs of bytes, the lowest bit first."""
    lanes = positive.flatten(2)
    lanes = F.pad(lanes, (0, -lanes.shape[2] % 16)).unflatten(2, (-1, 8))
    return (lanes.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)


def from_bits(bits, shape):
    lanes = bits.unsqueeze(3) >> torch.arange(8, dtype=torch.uint8) & 1
    return lanes.flatten(2)[..., : shape[2] * shape[3]].view(shape).bool()


def batch_norm(input, weight, bias, residual, relu, eps):
    var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
    out = (input - _channels(mean)) * _channels((var + eps).rsqrt())
    out = out if weight is None else out * _channels(weight)
    out = out if bias is None else out + _channels(bias)
    out = out if residual is None else out + residual
    positive = to_bits(~(out <= 0)) if residual is not None and relu else input.new_empty(0, dtype=torch.uint8)
    return (out.relu() if relu else out).contiguous(), mean, var, positive


def batch_norm_grad(grad_output, input, positive, weight, bias, mean, var, relu, eps):
    inverse = (var + eps).rsqrt()
    scaled = (input - _channels(mean)) * _channels(inverse)
    if positive is not None:
        grad_output = grad_output * from_bits(positive, input.shape)
    elif relu:
        value = scaled if weight is None else scaled * _channels(weight)
        value = value if bias is None else value + _channels(bias)
        grad_output = grad_output.masked_fill(value <= 0, 0)
    grad_bias, grad_weight = grad_output.sum((0, 2, 3)), (grad_output * scaled).sum((0, 2, 3))
    count = input.numel() / max(input.shape[1], 1)
    grad = grad_output - _channels(grad_bias / count) - scaled * _channels(grad_weight / count)
    grad = grad * _channels(inverse if weight is None else inverse * weight)
    of_residual = input.new_empty(0) if positive is None else grad_output.contiguous()
    return grad.contiguous(), grad_weight, grad_bias, of_residual


MOST_TAPS = 255  # of a kernel of max pooling; also the tap of a window without pixels


def _windows(images, size, taps, stride, padding, dilation):
    """(number of the tap, what it reads in every window, ``[n, c, oh, ow]``) of images ``[n, c, h, w]``; NaN beyond them."""
    reach = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(stride, size, dilation, taps)]
    pads = [(p, max(r - n - p, 0)) for p, r, n in zip(padding, reach, images.shape[2:])]
    padded = F.pad(images, [*pads[1], *pads[0]], value=math.nan)
    for tap in range(taps[0] * taps[1]):
        y, x = (d * i for d, i in zip(dilation, divmod(tap, taps[1])))
        rows, columns = (slice(at, at + s * (n - 1) + 1, s) for at, s, n in zip((y, x), stride, size))
        yield tap, padded[:, :, rows, columns]


def max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode):
    out = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode).contiguous()
    geometry = out.shape[2:], kernel_size, stride, padding, dilation
    taps, largest = torch.full_like(out, MOST_TAPS, dtype=torch.uint8), torch.full_like(out, -math.inf)
    inside = _windows(torch.ones_like(input), *geometry)
    for (tap, value), (_, there) in zip(_windows(input, *geometry), inside):
        better = (there == 1) & ((value > largest) | value.isnan() | (taps == MOST_TAPS))
        taps[better] = tap
        largest = torch.where(better, value, largest)
    return out, taps


def max_pool2d_grad(grad_output, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode):
    pixels = torch.arange(input_size[2] * input_size[3], dtype=torch.float64, device=grad_output.device)
    pixels = pixels.view(1, 1, *input_size[2:])
    grad = grad_output.new_zeros(input_size).flatten(2)
    for tap, pixel in _windows(pixels, grad_output.shape[2:], kernel_size, stride, padding, dilation):
        chosen = torch.where(taps == tap, grad_output, 0).flatten(2)
        grad.scatter_add_(2, pixel.nan_to_num().long().flatten(2).expand_as(chosen), chosen)
    return grad.view(input_size)


def batch_norm_max_pool2d(input, weight, bias, relu, eps, *pool):
    out, mean, var, _ = batch_norm(input, weight, bias, None, relu, eps)
    out, taps = max_pool2d(out, *pool)
    return out, mean, var, taps


def batch_norm_max_pool2d_grad(grad_output, taps, input, weight, bias, mean, var, relu, eps, *pool):
    grad = max_pool2d_grad(grad_output, taps, input.shape, *pool)
    return batch_norm_grad(grad, input, None, weight, bias, mean, var, relu, eps)[:3]
