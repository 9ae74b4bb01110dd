"""Every op: schema, fake, autograd. The contract page: start reading here.

A sparse weight reaches the ops as ``values`` ``[nnz]`` and the five int32 tensors of a
:class:`sparsekit.formats.Pattern`. Convolutions take ``padding`` as (top, bottom, left, right). Each op has a slow
reference of the same signature in :mod:`sparsekit.reference`, and a C++ kernel under ``torch.ops.sparsekit_cpu`` that
writes into an output it is given. float32 on the CPU runs the C++ kernel; float32, float16 and bfloat16 on a GPU run a
kernel that :mod:`sparsekit.gpu` chooses; every other dtype, and everything where the package was installed without
kernels, runs the reference.

Ops never fall back in silence: :func:`backend` and :func:`sparsekit.gpu.backends` say what runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import gpu, reference
from .formats import Pattern

# zen4 is avx512 for cores that load one register a cycle, amx with units for products of tiles.
ISAS = ("generic", "avx2", "avx512", "zen4", "amx")

_LIBRARY = torch.library.Library("sparsekit", "DEF")
_state = {"native": False, "isa": "reference"}


# --- the compiled library -------------------------------------------------------------------------------------------


def _file() -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)


def _load() -> None:
    file = _file()
    if file is None:
        if os.environ.get("SPARSEKIT_ISA"):
            raise RuntimeError("SPARSEKIT_ISA is set, but sparsekit was installed without its C++ kernels")
        return
    torch.ops.load_library(str(file))
    _state["native"] = True
    set_isa(os.environ.get("SPARSEKIT_ISA") or torch.ops.sparsekit_cpu.best_isa())


@functools.cache
def build_id() -> str:
    """Tells builds of the compiled library from each other; ``"reference"`` if there is none."""
    file = _file()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file else "reference"


def backend() -> str:
    """What runs float32 on the CPU now: ``"amx"``, ``"zen4"``, ``"avx512"``, ``"avx2"``, ``"generic"`` or ``"reference"``."""
    return _state["isa"]


def available_backends() -> tuple[str, ...]:
    """The values that :func:`set_isa` accepts on this machine, slowest first."""
    if not _state["native"]:
        return ("reference",)
    best = torch.ops.sparsekit_cpu.best_isa()
    return ("reference", *ISAS[: ISAS.index("zen4" if best == "avx512" else best) + 1])


def set_isa(isa: str) -> None:
    """Choose the kernels for float32 on the CPU.

    Args:
        isa: ``"generic"``, ``"avx2"``, ``"avx512"``, ``"zen4"``, ``"amx"``, or ``"reference"`` for plain PyTorch.

    Raises:
        ValueError: this machine or this build cannot run ``isa``.
    """
    if isa not in available_backends():
        raise ValueError(f"isa must be one of {', '.join(available_backends())} on this machine, got {isa!r}")
    if isa != "reference":
        torch.ops.sparsekit_cpu.set_isa(isa)
    _state["isa"] = isa


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """:func:`set_isa` for the length of a ``with`` block."""
    before = backend()
    set_isa(isa)
    try:
        yield
    finally:
        set_isa(before)


def _runs_native(*tensors: Tensor) -> bool:
    return _state["isa"] != "reference" and all(t.dtype == torch.float32 and t.is_cpu for t in tensors)


def _kernels(*tensors: Tensor):
    """What runs an op on these tensors, its functions with the signatures of sparsekit_cpu; None is the reference."""
    if tensors[0].is_cuda:
        return gpu if gpu.runs(*tensors) else None
    return torch.ops.sparsekit_cpu if _runs_native(*tensors) else None


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# --- shapes ---------------------------------------------------------------------------------------------------------


def output_size(input_size, out_channels, kernel_size, stride, padding, dilation):
    """Shape of a convolution's output, ``[n, out_channels, oh, ow]``."""
    top, bottom, left, right = padding
    oh = (input_size[2] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    ow = (input_size[3] + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    return input_size[0], out_channels, oh, ow


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-D tensor is stored channels_last; a tensor that is both (one channel, one pixel) counts as NCHW."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _dense_layout(t: Tensor) -> Tensor:
    """``t``, copied to NCHW if it is neither NCHW nor channels_last contiguous."""
    return t if t.is_contiguous(memory_format=torch.channels_last) else t.contiguous()


def _empty(like: Tensor, size: Sequence[int]) -> Tensor:
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _pooled_size(input_size, kernel_size, stride, padding, dilation, ceil_mode):
    """Shape of what pooling leaves."""
    sizes = []
    for size, k, s, p, d in zip(input_size[2:], kernel_size, stride, padding, dilation):
        span = size + 2 * p - d * (k - 1) - 1
        out = (-(-span // s) if ceil_mode else span // s) + 1
        # The last window must start inside of the image or of its left padding.
        sizes.append(out - 1 if ceil_mode and (out - 1) * s >= size + p else out)
    return *input_size[:2], *sizes


# --- registration ---------------------------------------------------------------------------------------------------


def _without_autocast(function, device: str):
    # Dtypes were settled by the caller; autocast must not change them again inside the reference.
    def run(*args):
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


class _Call:
    """``torch.ops.sparsekit.<name>``, past PyTorch's dispatcher where nobody but autograd listens to it.

    Dispatcher and torch.library take a tenth of a millisecond for an op with a gradient, as long as some layers.
    """

    def __init__(self, name: str, functions: dict):
        self.name, self.functions = name, functions
        self.autograd: type[torch.autograd.Function] | None = None

    def __call__(self, *args):
        if not self.is_eager(*args):
            return getattr(torch.ops.sparsekit, self.name)(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self.autograd.apply(*args)
        return self.run(*args)

    def run(self, *args):
        return self.functions["cpu" if args[0].is_cpu else "cuda"](*args)

    def is_eager(self, *args) -> bool:
        """Whether a kernel may be called on these tensors right away."""
        return (
            self.autograd is not None
            and not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and all(_is_plain(a) for a in args if isinstance(a, Tensor))
        )


def _is_plain(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and (t.is_cpu or t.is_cuda)
        and not t.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(t)
    )


# What the rest of the package calls: an attribute for every op.
call = types.SimpleNamespace()


def _define(schema: str, function, fake) -> None:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    functions = {device: _without_autocast(function, device) for device in ("cpu", "cuda")}
    for device, run in functions.items():
        torch.library.impl(f"sparsekit::{name}", device.upper(), run, lib=_LIBRARY)
    torch.library.register_fake(f"sparsekit::{name}", fake, lib=_LIBRARY)
    setattr(call, name, _Call(name, functions))


_PATTERN = "Tensor crow_indices, Tensor col_indices, Tensor t_crow_indices, Tensor t_col_indices, Tensor t_permutation"
_GEOMETRY = "int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups"


# pattern: mask [out_channels, in_channels / groups, ...] -> the five tensors of a Pattern.
def _pattern(mask, groups):
    if _state["isa"] == "reference":
        return reference.pattern(mask, groups)
    mask = mask.contiguous()
    new = functools.partial(torch.empty, dtype=torch.int32)
    crow, t_crow = new(mask.shape[0] + 1), new(mask.shape[1] * groups + 1)
    torch.ops.sparsekit_cpu.count_rows(crow, mask, groups)
    col, t_col, t_permutation = (new(int(crow[-1])) for _ in range(3))
    torch.ops.sparsekit_cpu.fill_pattern(col, t_crow, t_col, t_permutation, crow, mask, groups)
    return crow, col, t_crow, t_col, t_permutation


def _pattern_fake(mask, groups):
    nnz = torch.library.get_ctx().new_dynamic_size()
    sizes = mask.shape[0] + 1, nnz, mask.shape[1] * groups + 1, nnz, nnz
    return tuple(mask.new_empty(size, dtype=torch.int32) for size in sizes)


_define("pattern(Tensor mask, int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _pattern, _pattern_fake)


# compress: the kept entries of a dense weight, [out_channels, ...] -> [nnz]. Its gradient is decompress.
def _compress(weight, crow_indices, col_indices):
    kernels = _kernels(weight)
    if kernels is None:
        return reference.compress(weight, crow_indices, col_indices)
    out = weight.new_empty(col_indices.shape)
    kernels.compress(out, weight, crow_indices, col_indices)
    return out


_define(
    "compress(Tensor weight, Tensor crow_indices, Tensor col_indices) -> Tensor",
    _compress,
    lambda weight, crow_indices, col_indices: weight.new_empty(col_indices.shape),
)


# decompress: values [nnz] -> dense weight of shape size, zero elsewhere. Its gradient is compress.
def _decompress(values, crow_indices, col_indices, size, channels_last):
    kernels = _kernels(values)
    if kernels is None:
        return reference.decompress(values, crow_indices, col_indices, size, channels_last)
    out = _decompress_fake(values, crow_indices, col_indices, size, channels_last)
    kernels.decompress(out, values.contiguous(), crow_indices, col_indices)
    return out


def _decompress_fake(values, crow_indices, col_indices, size, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=values.dtype, device=values.device, memory_format=layout)


_define(
    "decompress(Tensor values, Tensor crow_indices, Tensor col_indices, SymInt[] size, bool channels_last) -> Tensor",
    _decompress,
    _decompress_fake,
)


# conv2d: input [n, in_channels, h, w] -> [n, out_channels, oh, ow], in the input's memory format.
def _conv2d(
    input, values, crow, col, t_crow, t_col, t_permutation, bias, kernel_size, stride, padding, dilation, groups
):
    geometry = (kernel_size, stride, padding, dilation, groups)
    kernels = _kernels(input, values)
    if kernels is None:
        return reference.conv2d(input, values, crow, col, bias, *geometry)
    input = _dense_layout(input)
    out = _empty(input, output_size(input.shape, crow.numel() - 1, *geometry[:4]))
    kernels.conv2d(out, input, values.contiguous(), crow, col, bias, *geometry)
    return out


def _conv2d_fake(
    input, values, crow, col, t_crow, t_col, t_permutation, bias, kernel_size, stride, padding, dilation, groups
):
    return _empty(input, output_size(input.shape, crow.shape[0] - 1, kernel_size, stride, padding, dilation))


_define(f"conv2d(Tensor input, Tensor values, {_PATTERN}, Tensor? bias, {_GEOMETRY}) -> Tensor", _conv2d, _conv2d_fake)


# conv2d_input_grad: grad_output [n, out_channels, oh, ow] -> [n, in_channels, h, w] = input_size.
def _conv2d_input_grad(grad_output, values, t_crow, t_col, t_permutation, input_size, *geometry):
    kernels = _kernels(grad_output, values)
    if kernels is None:
        grad = reference.conv2d_input_grad(grad_output, values, t_crow, t_col, t_permutation, input_size, *geometry)
        return _empty(grad_output, input_size).copy_(grad)
    grad_output = _dense_layout(grad_output)
    out = _empty(grad_output, input_size)
    kernels.conv2d_input_grad(out, grad_output, values.contiguous(), t_crow, t_col, t_permutation, *geometry)
    return out


_define(
    "conv2d_input_grad(Tensor grad_output, Tensor values, Tensor t_crow_indices, Tensor t_col_indices, "
    f"Tensor t_permutation, SymInt[4] input_size, {_GEOMETRY}) -> Tensor",
    _conv2d_input_grad,
    lambda grad_output, values, t_crow, t_col, t_permutation, input_size, *geometry: _empty(grad_output, input_size),
)


# conv2d_values_grad: the weight gradient at the kept positions only, [nnz].
def _conv2d_values_grad(grad_output, input, crow, col, *geometry):
    kernels = _kernels(grad_output, input)
    if kernels is None:
        return reference.conv2d_values_grad(grad_output, input, crow, col, *geometry)
    out = input.new_empty(col.shape)
    kernels.conv2d_values_grad(out, _dense_layout(grad_output), _dense_layout(input), crow, col, *geometry)
    return out


_define(
    f"conv2d_values_grad(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, {_GEOMETRY}) -> Tensor",
    _conv2d_values_grad,
    lambda grad_output, input, crow, col, *geometry: input.new_empty(col.shape),
)


# conv2d_grads: conv2d_input_grad + other, which may be None, and conv2d_values_grad, for one look at grad_output.
def _conv2d_grads(grad_output, input, values, crow, col, t_crow, t_col, t_permutation, other, *geometry):
    if not _runs_native(grad_output, input, values):
        grad = _conv2d_input_grad(grad_output, values, t_crow, t_col, t_permutation, input.shape, *geometry)
        grad = grad if other is None else grad.add_(other)
        return grad, _conv2d_values_grad(grad_output, input, crow, col, *geometry)
    grad_output, input = _dense_layout(grad_output), _dense_layout(input)
    grad, of_values = _empty(grad_output, input.shape), values.new_empty(values.shape)
    other = other if other is None or other.stride() == grad.stride() else torch.empty_like(grad).copy_(other)
    patterns = crow, col, t_crow, t_col, t_permutation
    torch.ops.sparsekit_cpu.conv2d_grads(
        grad, of_values, grad_output, input, values.contiguous(), *patterns, other, *geometry
    )
    return grad, of_values


_define(
    f"conv2d_grads(Tensor grad_output, Tensor input, Tensor values, {_PATTERN}, Tensor? other, {_GEOMETRY}) "
    "-> (Tensor, Tensor)",
    _conv2d_grads,
    lambda grad_output, input, values, *_: (_empty(grad_output, input.shape), values.new_empty(values.shape)),
)


# conv2d_weight_grad: the dense weight gradient of one layer, [out_channels, in_channels / groups, kh, kw], for
# re-growth methods. PyTorch's own kernel: a dense result is dense work.
_define(
    f"conv2d_weight_grad(Tensor grad_output, Tensor input, {_GEOMETRY}) -> Tensor",
    lambda grad_output, input, *geometry: reference.conv2d_weight_grad(grad_output, input, *geometry).contiguous(),
    lambda grad_output, input, kernel_size, stride, padding, dilation, groups: input.new_empty(
        grad_output.shape[1], input.shape[1] // groups, *kernel_size
    ),
)


# linear: input [batch, in_features] -> [batch, out_features].
def _linear(input, values, crow, col, t_crow, t_col, t_permutation, bias):
    kernels = _kernels(input, values)
    if kernels is None:
        return reference.linear(input, values, crow, col, bias)
    out = input.new_empty(input.shape[0], crow.numel() - 1)
    kernels.linear(out, input.contiguous(), values.contiguous(), crow, col, bias)
    return out


_define(
    f"linear(Tensor input, Tensor values, {_PATTERN}, Tensor? bias) -> Tensor",
    _linear,
    lambda input, values, crow, col, t_crow, t_col, t_permutation, bias: input.new_empty(
        input.shape[0], crow.shape[0] - 1
    ),
)


# linear_input_grad: grad_output [batch, out_features] -> [batch, in_features].
def _linear_input_grad(grad_output, values, t_crow, t_col, t_permutation):
    kernels = _kernels(grad_output, values)
    if kernels is None:
        return reference.linear_input_grad(grad_output, values, t_crow, t_col, t_permutation)
    out = grad_output.new_empty(grad_output.shape[0], t_crow.numel() - 1)
    kernels.linear_input_grad(out, grad_output.contiguous(), values.contiguous(), t_crow, t_col, t_permutation)
    return out


_define(
    "linear_input_grad(Tensor grad_output, Tensor values, Tensor t_crow_indices, Tensor t_col_indices, "
    "Tensor t_permutation) -> Tensor",
    _linear_input_grad,
    lambda grad_output, values, t_crow, t_col, t_permutation: grad_output.new_empty(
        grad_output.shape[0], t_crow.shape[0] - 1
    ),
)


# linear_values_grad: the weight gradient at the kept positions only, [nnz].
def _linear_values_grad(grad_output, input, crow, col):
    kernels = _kernels(grad_output, input)
    if kernels is None:
        return reference.linear_values_grad(grad_output, input, crow, col)
    out = input.new_empty(col.shape)
    kernels.linear_values_grad(out, grad_output.contiguous(), input.contiguous(), crow, col)
    return out


_define(
    "linear_values_grad(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices) -> Tensor",
    _linear_values_grad,
    lambda grad_output, input, crow, col: input.new_empty(col.shape),
)


# bias_grad: grad_output [n, channels, ...] -> [channels]; its own kernel because PyTorch's sum depends on the threads.
def _bias_grad(grad_output):
    if not _runs_native(grad_output):
        return reference.bias_grad(grad_output)
    grad_output = _dense_layout(grad_output) if grad_output.dim() == 4 else grad_output.contiguous()
    out = grad_output.new_empty(grad_output.shape[1])
    torch.ops.sparsekit_cpu.bias_grad(out, grad_output)
    return out


_define(
    "bias_grad(Tensor grad_output) -> Tensor",
    _bias_grad,
    lambda grad_output: grad_output.new_empty(grad_output.shape[1]),
)


# batch_norm: input [n, channels, h, w] -> normalised by its own statistics, times weight, plus bias and residual, then
# ReLU if asked for; the statistics, mean and biased variance, [channels]; and with a residual and ReLU bits that tell
# where the result is more than 0, [n, channels, bytes], else empty. Only the first has a gradient.
def _batch_norm(input, weight, bias, residual, relu, eps):
    if not _runs_native(input, *_present((weight, bias, residual))):
        return reference.batch_norm(input, weight, bias, residual, relu, eps)
    out, mean, var, positive = _batch_norm_fake(input, weight, bias, residual, relu, eps)
    has_bits, residual = positive.dim() == 3, residual if residual is None else residual.contiguous()
    torch.ops.sparsekit_cpu.batch_norm(
        out, mean, var, positive if has_bits else None, input.contiguous(), weight, bias, residual, relu, eps
    )
    return out, mean, var, positive


def _batch_norm_fake(input, weight, bias, residual, relu, eps):
    n, channels, h, w = input.shape
    size = (n, channels, (h * w + 15) // 16 * 2) if residual is not None and relu else 0
    positive = input.new_empty(size, dtype=torch.uint8)
    return input.new_empty(input.shape), input.new_empty(channels), input.new_empty(channels), positive


_define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm,
    _batch_norm_fake,
)


# batch_norm_grad: grad_output [n, channels, h, w] -> the gradients of input, weight, bias and residual. The last is empty
# if ``positive`` is None: without ReLU it is grad_output.
def _batch_norm_grad(grad_output, input, positive, weight, bias, mean, var, relu, eps):
    if not _runs_native(grad_output, input):
        return reference.batch_norm_grad(grad_output, input, positive, weight, bias, mean, var, relu, eps)
    grads = _batch_norm_grad_fake(grad_output, input, positive, weight, bias, mean, var, relu, eps)
    of_residual = None if positive is None else grads[3]
    args = grad_output.contiguous(), input.contiguous(), positive, weight, bias, mean, var, relu, eps
    torch.ops.sparsekit_cpu.batch_norm_grad(*grads[:3], of_residual, *args)
    return grads


def _batch_norm_grad_fake(grad_output, input, positive, weight, bias, mean, var, relu, eps):
    of_residual = input.new_empty(0 if positive is None else input.shape)
    return input.new_empty(input.shape), input.new_empty(mean.shape), input.new_empty(mean.shape), of_residual


_define(
    "batch_norm_grad(Tensor grad_output, Tensor input, Tensor? positive, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, bool relu, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm_grad,
    _batch_norm_grad_fake,
)


# max_pool2d: input [n, channels, h, w] -> the largest of every window, NCHW; and which one it is, its place in the kernel,
# uint8, as large: of several the first, of NaNs the last. Only the first has a gradient.
_POOL = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"


def _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode):
    if math.prod(kernel_size) > reference.MOST_TAPS:
        raise ValueError(f"kernel_size must have at most {reference.MOST_TAPS} taps, got {tuple(kernel_size)}")
    if not _runs_native(input):
        return reference.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    out, taps = _max_pool2d_fake(input, kernel_size, stride, padding, dilation, ceil_mode)
    torch.ops.sparsekit_cpu.max_pool2d_taps(out, taps, input.contiguous(), kernel_size, stride, padding, dilation)
    return out, taps


def _max_pool2d_fake(input, *geometry):
    size = _pooled_size(input.shape, *geometry)
    return input.new_empty(size), input.new_empty(size, dtype=torch.uint8)


_define(f"max_pool2d(Tensor input, {_POOL}, bool ceil_mode) -> (Tensor, Tensor)", _max_pool2d, _max_pool2d_fake)


# max_pool2d_grad: grad_output [n, channels, oh, ow] -> the gradient of input, of input_size.
def _max_pool2d_grad(grad_output, taps, input_size, *geometry):
    if not _runs_native(grad_output):
        return reference.max_pool2d_grad(grad_output, taps, input_size, *geometry)
    grad = grad_output.new_empty(input_size)
    torch.ops.sparsekit_cpu.max_pool2d_grad(grad, grad_output.contiguous(), taps.contiguous(), *geometry[:4])
    return grad


_define(
    f"max_pool2d_grad(Tensor grad_output, Tensor taps, SymInt[] input_size, {_POOL}, bool ceil_mode) -> Tensor",
    _max_pool2d_grad,
    lambda grad_output, taps, input_size, *geometry: grad_output.new_empty(input_size),
)


# batch_norm_max_pool2d: max_pool2d(batch_norm(input)) without a residual -> what is pooled, [n, channels, oh, ow]; mean and
# variance, [channels]; and the windows' taps. Only the first has a gradient.
def _batch_norm_max_pool2d(input, weight, bias, relu, eps, *pool):
    if math.prod(pool[0]) > reference.MOST_TAPS:
        raise ValueError(f"kernel_size must have at most {reference.MOST_TAPS} taps, got {tuple(pool[0])}")
    if not _runs_native(input, *_present((weight, bias))):
        return reference.batch_norm_max_pool2d(input, weight, bias, relu, eps, *pool)
    found = _batch_norm_max_pool2d_fake(input, weight, bias, relu, eps, *pool)
    torch.ops.sparsekit_cpu.batch_norm_max_pool2d(*found, input.contiguous(), weight, bias, relu, eps, *pool[:4])
    return found


def _batch_norm_max_pool2d_fake(input, weight, bias, relu, eps, *pool):
    out, taps = _max_pool2d_fake(input, *pool)
    return out, input.new_empty(input.shape[1]), input.new_empty(input.shape[1]), taps


_define(
    f"batch_norm_max_pool2d(Tensor input, Tensor? weight, Tensor? bias, bool relu, float eps, {_POOL}, bool ceil_mode) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm_max_pool2d,
    _batch_norm_max_pool2d_fake,
)


# batch_norm_max_pool2d_grad: grad_output [n, channels, oh, ow] -> the gradients of input, weight and bias.
def _batch_norm_max_pool2d_grad(grad_output, taps, input, weight, bias, mean, var, relu, eps, *pool):
    if not _runs_native(grad_output, input):
        return reference.batch_norm_max_pool2d_grad(grad_output, taps, input, weight, bias, mean, var, relu, eps, *pool)
    grads = input.new_empty(input.shape), torch.empty_like(mean), torch.empty_like(mean)
    args = grad_output.contiguous(), taps.contiguous(), input.contiguous(), weight, bias, mean, var, relu, eps
    torch.ops.sparsekit_cpu.batch_norm_max_pool2d_grad(*grads, *args, *pool[:4])
    return grads


_define(
    "batch_norm_max_pool2d_grad(Tensor grad_output, Tensor taps, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
    f"Tensor var, bool relu, float eps, {_POOL}, bool ceil_mode) -> (Tensor, Tensor, Tensor)",
    _batch_norm_max_pool2d_grad,
    lambda grad_output, taps, input, weight, bias, mean, *_: (
        input.new_empty(input.shape), input.new_empty(mean.shape), input.new_empty(mean.shape),
    ),
)  # fmt: skip


# --- layers of an inference engine: no autograd, no reference ---------------------------------------------------------


def add_layer(values: Tensor, crow: Tensor, col: Tensor, columns: int) -> int:
    """A number under which the C++ side keeps a weight ``[rows, columns]`` packed, until :func:`remove_layer`."""
    return torch.ops.sparsekit_cpu.add_layer(values, crow, col, columns)


def remove_layer(layer: int) -> None:
    """Forget a layer; a call that is running it ends as if nothing had happened."""
    torch.ops.sparsekit_cpu.remove_layer(layer)


def max_pool2d(input, kernel_size, stride=(), padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    """``F.max_pool2d`` of float32 images, channels_last or NCHW in, NCHW out; no gradient."""
    geometry = _pool_geometry(kernel_size, stride, padding, dilation)
    input = _dense_layout(input)
    out = input.new_empty(_pooled_size(input.shape, *geometry, ceil_mode))
    torch.ops.sparsekit_cpu.max_pool2d(out, input, *geometry)
    return out


def _pool_geometry(kernel_size, stride, padding, dilation):
    """Pairs of kernel_size, stride, padding and dilation, from what ``F.max_pool2d`` takes."""
    kernel_size, padding, dilation = ((*v, *v)[:2] for v in (kernel_size, padding, dilation))
    return kernel_size, (*stride, *stride)[:2] or kernel_size, padding, dilation


def run_conv2d(input, layer, out_channels, bias, residual, low, high, kernel_size, stride, padding, dilation, groups):
    """``clamp(conv2d(input) + bias + residual, low, high)``, NCHW; ``residual`` may be None."""
    input = _dense_layout(input)
    out = input.new_empty(output_size(input.shape, out_channels, kernel_size, stride, padding, dilation))
    if residual is not None and residual.stride() != out.stride():
        residual = torch.empty_like(out).copy_(residual)
    torch.ops.sparsekit_cpu.run_conv2d(
        out, input, layer, bias, residual, low, high, kernel_size, stride, padding, dilation, groups
    )
    return out


def run_linear(input, layer, out_features, bias, residual, low, high):
    """``clamp(input @ weight.T + bias + residual, low, high)`` for input ``[..., in_features]``."""
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    out = rows.new_empty(rows.shape[0], out_features)
    if residual is not None:
        residual = residual.reshape(out.shape).contiguous()
    torch.ops.sparsekit_cpu.run_linear(out, rows, layer, bias, residual, low, high)
    return out.view(*input.shape[:-1], out_features)


def dense_linear(input, weight, bias):
    """``F.linear`` of float32, with the same bits for any number of threads, which PyTorch's does not promise."""
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1]).contiguous()
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    torch.ops.sparsekit_cpu.dense_linear(out, rows, weight, bias)
    return out.view(*input.shape[:-1], weight.shape[0])


# --- programs: chains of layers that run without PyTorch in between; tensors are numbers, inputs -1, -2, ... ----------

_NO_TENSOR = 2**63 - 1


def add_program(tensors: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]) -> int:
    """A number for a new program; each list holds (channels, height, width) after (channels, height, width)."""
    return torch.ops.sparsekit_cpu.add_program(tensors, inputs, outputs)


def remove_program(program: int) -> None:
    """Forget a program; a call that is running it ends as if nothing had happened."""
    torch.ops.sparsekit_cpu.remove_program(program)


def program_load(program: int, input: int, out: int) -> None:
    """Add: copy an input to a tensor."""
    torch.ops.sparsekit_cpu.program_load(program, input, out)


class Blocking(NamedTuple):
    """How the work of a program's layer is cut, where that is not what its sizes ask for.

    Attributes:
        channels: of a block, over those that fit the first-level cache.
        other_strips: strips of many pixels in place of few, or the other way around.
        pairs: taps beside their pixels may be added by shifting sums, where the CPU's kernels can.
    """

    channels: float = 1.0
    other_strips: bool = False
    pairs: bool = True


OWN_BLOCKING = Blocking()


def program_conv2d(
    program, input, out, residual, values, crow, col, bias, low, high, *geometry, dense=False, blocking=OWN_BLOCKING
) -> None:
    """Add: ``out = clamp(conv2d(input) + bias + residual, low, high)``; bias and residual may be None. ``dense``: compute
    it as if no weight were zero, for one group only, if most are not, or the CPU has tiles and the layer fills them."""
    residual = _NO_TENSOR if residual is None else residual
    torch.ops.sparsekit_cpu.program_conv2d(
        program, input, out, residual, values, crow, col, bias, low, high, *geometry, dense, *blocking
    )


def program_max_pool2d(
    program, input, out, kernel_size, stride=(), padding=(0, 0), dilation=(1, 1), ceil_mode=False
) -> None:
    """Add: ``out = F.max_pool2d(input)``."""
    geometry = _pool_geometry(kernel_size, stride, padding, dilation)
    torch.ops.sparsekit_cpu.program_max_pool2d(program, input, out, *geometry)


def program_avg_pool2d(
    program, input, out, kernel_size, stride=(), padding=(0, 0), ceil_mode=False, count_include_pad=True
) -> None:
    """Add: ``out = F.avg_pool2d(input)``."""
    *geometry, _ = _pool_geometry(kernel_size, stride, padding, (1, 1))
    torch.ops.sparsekit_cpu.program_avg_pool2d(program, input, out, *geometry, count_include_pad)


def program_mean(program: int, input: int, out: int) -> None:
    """Add: ``out``, ``[channels, 1, 1]``, is the mean of every channel."""
    torch.ops.sparsekit_cpu.program_mean(program, input, out)


# In the order of csrc/cpu/kernels.h.
ACTIVATIONS = (None, "sigmoid", "silu", "hardsigmoid", "hardswish")


def program_elementwise(
    program, input, out, gate=None, other=None, scale=None, shift=None, low=-math.inf, high=math.inf, activation=None
) -> None:
    """Add: ``out = activation(clamp(input * scale * gate + shift + other, low, high))``.

    ``scale`` and ``shift`` are ``[channels]``, ``gate`` a tensor of the program with one pixel a channel.
    """
    gate, other = (_NO_TENSOR if tensor is None else tensor for tensor in (gate, other))
    torch.ops.sparsekit_cpu.program_elementwise(
        program, input, out, gate, other, scale, shift, low, high, ACTIVATIONS.index(activation)
    )


def program_gather(program: int, inputs: Sequence[int], channels: Sequence[int], out: int) -> None:
    """Add: ``out = torch.cat(inputs, 1)[:, channels]``."""
    torch.ops.sparsekit_cpu.program_gather(program, inputs, channels, out)


def program_store(program: int, input: int, output: int) -> None:
    """Add: copy a tensor to output ``output``."""
    torch.ops.sparsekit_cpu.program_store(program, input, output)


def finish_program(program: int, single: bool = False) -> None:
    """Lay out memory and pack the weights; nothing can be added after it.

    ``single``: it is made for one image at a time, which threads share; it takes any number.
    """
    torch.ops.sparsekit_cpu.finish_program(program, single)


def program_floats(program: int) -> int:
    """The floats that an image takes on its way through a finished program, or two that some layers compute at once."""
    return torch.ops.sparsekit_cpu.program_floats(program)


def program_values(program: int, layer: int, crow: Tensor, col: Tensor) -> Tensor | None:
    """The values ``[nnz]`` of the weight of a finished program's layer, given its crow_indices and col_indices.

    ``layer``: by the order in which they were added. None if the program does not have them: the layer is computed as
    if nothing of it were zero, or its weight has its non-zeros elsewhere.
    """
    values = torch.empty(len(col))
    return values if torch.ops.sparsekit_cpu.program_values(values, program, layer, crow, col) else None


def program_holds(program: int, layer: int, crow: Tensor, col: Tensor) -> bool:
    """Whether :func:`program_values` would give any."""
    return torch.ops.sparsekit_cpu.program_holds(program, layer, crow, col)


def run_program(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    program: int,
    share: bool = False,
    seconds: Tensor | None = None,
) -> None:
    """Run it on images ``[n, channels, h, w]``, NCHW or channels_last.

    ``share``: two threads work on every image, not only on those that are left when each has had as many as the others.
    The results are the same. ``seconds``: float64 ``[layers]``, in the order in which they were added; what all threads
    took for each is added.
    """
    torch.ops.sparsekit_cpu.run_program(outputs, [_dense_layout(input) for input in inputs], program, share, seconds)


# --- autograd -------------------------------------------------------------------------------------------------------


def _register_autograd(name, backward, setup_context):
    torch.library.register_autograd(f"sparsekit::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    own = getattr(call, name)

    def forward(ctx, *inputs):  # with setup_context as a method, PyTorch would inspect signatures in every call
        output = own.run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    own.autograd = type(name, (torch.autograd.Function,), methods)


def _save_compress(ctx, inputs, output):
    weight, crow, col = inputs
    ctx.save_for_backward(crow, col)
    ctx.size, ctx.channels_last = weight.shape, weight.dim() == 4 and is_channels_last(weight)


def _compress_backward(ctx, grad):
    crow, col = ctx.saved_tensors
    return call.decompress(grad, crow, col, ctx.size, ctx.channels_last), None, None


def _save_decompress(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _decompress_backward(ctx, grad):
    return call.compress(grad, *ctx.saved_tensors), None, None, None, None


def _save_product(ctx, inputs, output):
    """Keep only what the gradients that are asked for will read."""
    input, values, crow, col, t_crow, t_col, t_permutation, _bias, *geometry = inputs
    needs_input, needs_values = ctx.needs_input_grad[:2]
    ctx.input_size, ctx.geometry = input.shape, geometry
    saved = [None] * 7
    if needs_input:
        saved[:1], saved[4:] = [values], [t_crow, t_col, t_permutation]
    if needs_values:
        saved[1:4] = input, crow, col
    ctx.save_for_backward(*saved)


def _conv2d_backward(ctx, grad, other=None):
    """``other`` is added to the gradient of the input."""
    values, input, crow, col, *transposed = ctx.saved_tensors
    grads = [None] * len(ctx.needs_input_grad)
    needs_input, needs_values = ctx.needs_input_grad[:2]
    if needs_input and needs_values:
        patterns = crow, col, *transposed
        grads[:2] = call.conv2d_grads(grad, input, values, *patterns, other, *ctx.geometry)
    elif needs_input:
        found = call.conv2d_input_grad(grad, values, *transposed, ctx.input_size, *ctx.geometry)
        grads[0] = found if other is None else found + other
    elif needs_values:
        grads[1] = call.conv2d_values_grad(grad, input, crow, col, *ctx.geometry)
    if ctx.needs_input_grad[7]:
        grads[7] = call.bias_grad(grad)
    return tuple(grads)


def _linear_backward(ctx, grad):
    values, input, crow, col, *transposed = ctx.saved_tensors
    needs_input, needs_values = ctx.needs_input_grad[:2]
    of_input = call.linear_input_grad(grad, values, *transposed) if needs_input else None
    of_values = call.linear_values_grad(grad, input, crow, col) if needs_values else None
    of_bias = call.bias_grad(grad) if ctx.needs_input_grad[7] else None
    return of_input, of_values, *[None] * 5, of_bias


class _ForkedConv2d(torch.autograd.Function):
    """conv2d, and its input once more, for whoever else wants it: the gradients of both are added in the kernel."""

    @staticmethod
    def forward(ctx, input, *rest):
        out = call.conv2d.run(input, *rest)
        _save_product(ctx, (input, *rest), out)
        ctx.set_materialize_grads(False)
        return out, input

    @staticmethod
    def backward(ctx, grad, other):
        if grad is None:
            return other, *[None] * (len(ctx.needs_input_grad) - 1)
        return _conv2d_backward(ctx, grad, other)


_register_autograd("compress", _compress_backward, _save_compress)
_register_autograd("decompress", _decompress_backward, _save_decompress)
_register_autograd("conv2d", _conv2d_backward, _save_product)
_register_autograd("linear", _linear_backward, _save_product)


def _save_batch_norm(ctx, inputs, output):
    input, weight, bias, _residual, ctx.relu, ctx.eps = inputs
    _out, mean, var, positive = output
    ctx.mark_non_differentiable(mean, var, positive)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, positive if positive.dim() == 3 else None, weight, bias, mean, var)


def _batch_norm_backward(ctx, grad, *_):
    grads = [None] * 6
    if grad is not None:
        input, positive, *rest = ctx.saved_tensors
        found = call.batch_norm_grad(grad, input, positive, *rest, ctx.relu, ctx.eps)
        grads[:4] = (*found[:3], grad if positive is None else found[3])
    return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad))


_register_autograd("batch_norm", _batch_norm_backward, _save_batch_norm)


class NormedConv(NamedTuple):
    """``relu(norm(conv(input)) + residual)``, a layer of :func:`conv2d_batch_norms`.

    Attributes:
        values, pattern: of the convolution, as in :func:`conv2d`.
        geometry: its kernel_size, stride, padding, dilation and groups.
        weight, bias: ``[out_channels]``, of the BatchNorm, or None.
        running: mean and variance of all batches, ``[out_channels]``, and how many there were, int64, which are updated in
            place; or three times None.
        momentum: how far they move to those of this batch; None: to the average of all.
        eps: added to the variance.
        relu: whether ReLU comes last.
        input: which source it reads. Sources are what comes from outside, then the results of the layers.
        residual: which one is added, which no later layer reads; -1 for none.
    """

    values: Tensor
    pattern: Pattern
    geometry: tuple
    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor | None, Tensor | None, Tensor | None]
    momentum: float | None
    eps: float
    relu: bool
    input: int = 0
    residual: int = -1

    @property
    def channels(self) -> int:
        return self.pattern.crow_indices.shape[0] - 1

    @property
    def has_bits(self) -> bool:
        return self.relu and self.residual >= 0


def _is_branch(layers: Sequence[NormedConv], index: int, outside: int) -> bool:
    """Whether a layer's result is but a residual, before any ReLU: it is normalized where it is added."""
    layer, source = layers[index], outside + index
    return (
        not layer.relu
        and layer.residual < 0
        and all(other.input != source for other in layers)
        and sum(other.residual == source for other in layers) == 1
    )


class _NormedConvs(torch.autograd.Function):
    """All layers on the CPU in one call each way; and with ``fork`` the first from outside once more.

    ``tensors``: from outside, then values, weight and bias of every layer.
    """

    @staticmethod
    def forward(ctx, layers, fork, *tensors):
        count = len(tensors) - 3 * len(layers)
        outside, parameters = tensors[:count], tensors[count:]
        sources, made, positives = [*outside], [], []
        for layer in layers:
            size = output_size(sources[layer.input].shape, layer.channels, *layer.geometry[:4])
            product = outside[0].new_empty(size)
            residual = sources[layer.residual] if layer.has_bits else None
            if _is_branch(layers, len(made), count):
                # Its result is not written; something must stand in its place.
                out, mean, var = product, *(product.new_empty(layer.channels) for _ in range(2))
            else:
                out, mean, var, positive = _batch_norm_fake(product, None, None, residual, layer.relu, layer.eps)
            sources.append(out)
            made.append((product, mean, var))
            positives += [positive] if layer.has_bits else []
        products, means, variances = map(list, zip(*made))
        values, weights, biases = (_present(parameters[i::3]) for i in range(3))
        patterns = [[*of_all] for of_all in zip(*(layer.pattern for layer in layers))]
        running = [_present(of_all) for of_all in zip(*(layer.running for layer in layers))]
        plan = [[getattr(layer, name) for layer in layers] for name in ("input", "residual", "relu", "eps")]
        momentums = [-1.0 if layer.momentum is None else layer.momentum for layer in layers]
        geometries = [n for layer in layers for n in (*itertools.chain(*layer.geometry[:4]), layer.geometry[4])]
        torch.ops.sparsekit_cpu.conv2d_batch_norms(
            sources[count:], products, means, variances, positives, *running, outside, values, *patterns[:2], weights,
            biases, *plan, momentums, geometries,
        )  # fmt: skip
        read = [sources[layer.input] for layer in layers]
        of_backward = outside, read, products, means, variances, positives, values, weights, biases
        ctx.counts = [*map(len, of_backward)]
        ctx.save_for_backward(*itertools.chain(*of_backward))
        ctx.layers, ctx.numbers = layers, (patterns, plan, geometries)
        ctx.set_materialize_grads(False)
        return (sources[-1], outside[0]) if fork else sources[-1]

    @staticmethod
    def backward(ctx, grad, other=None):
        if grad is None:
            return None, None, other, *[None] * (len(ctx.needs_input_grad) - 3)
        saved = iter(ctx.saved_tensors)
        outside, *kept, values, weights, biases = ([*itertools.islice(saved, count)] for count in ctx.counts)
        parameters = [values, *(some or [None] * len(values) for some in (weights, biases))]
        if torch.is_grad_enabled() or not call.conv2d.is_eager(grad):
            tensors = *outside, *itertools.chain(*zip(*parameters))
            return None, None, *_grads_apart(ctx.layers, tensors, ctx.needs_input_grad[2:], grad, other)
        patterns, plan, geometries = ctx.numbers
        of_outside, of_values = ([*map(torch.empty_like, some)] for some in (outside, values))
        of_weights, of_biases = ([*map(torch.empty_like, kept[2])] for _ in range(2))
        torch.ops.sparsekit_cpu.conv2d_batch_norms_grads(
            of_outside, of_values, of_weights, of_biases, other if other is None else other.contiguous(),
            grad.contiguous(), *kept, values, *patterns, weights, biases, *plan, geometries,
        )  # fmt: skip
        found = *of_outside, *itertools.chain(*zip(of_values, of_weights, of_biases))
        return None, None, *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad[2:]))


def _grads_apart(layers, tensors, needed, grad, other):
    """What the gradients of :class:`_NormedConvs` are, op by op, for who listens to every one of them."""
    with torch.enable_grad():
        count = len(tensors) - 3 * len(layers)
        sources = [*tensors[:count]]
        for i, layer in enumerate(layers):
            values, weight, bias = tensors[count + 3 * i : count + 3 * i + 3]
            product = call.conv2d(sources[layer.input], values, *layer.pattern, None, *layer.geometry)
            residual = sources[layer.residual] if layer.residual >= 0 else None
            sources.append(call.batch_norm(product, weight, bias, residual, layer.relu, layer.eps)[0])
    wanted = [t for t, needs in zip(tensors, needed) if needs]
    found = iter(
        torch.autograd.grad(sources[-1], wanted, grad, create_graph=torch.is_grad_enabled(), allow_unused=True)
    )
    first, *rest = (next(found) if needs else None for needs in needed)
    return first if other is None else other if first is None else first + other, *rest


def _save_max_pool2d(ctx, inputs, output):
    input, *ctx.geometry = inputs
    _out, taps = output
    ctx.mark_non_differentiable(taps)
    ctx.set_materialize_grads(False)
    ctx.input_size = input.shape
    ctx.save_for_backward(taps)


def _max_pool2d_backward(ctx, grad, _):
    found = None
    if grad is not None:
        found = call.max_pool2d_grad(grad, *ctx.saved_tensors, ctx.input_size, *ctx.geometry)
    return found, *[None] * len(ctx.geometry)


_register_autograd("max_pool2d", _max_pool2d_backward, _save_max_pool2d)


def _save_batch_norm_max_pool2d(ctx, inputs, output):
    input, weight, bias, *ctx.how = inputs
    _out, mean, var, taps = output
    ctx.mark_non_differentiable(mean, var, taps)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(taps, input, weight, bias, mean, var)


def _batch_norm_max_pool2d_backward(ctx, grad, *_):
    found = [None] * 3
    if grad is not None:
        found = call.batch_norm_max_pool2d_grad(grad, *ctx.saved_tensors, *ctx.how)
    return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad)), *[None] * len(ctx.how)


_register_autograd("batch_norm_max_pool2d", _batch_norm_max_pool2d_backward, _save_batch_norm_max_pool2d)


def _no_double_backward(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"sparsekit::{name} has no derivative: double backward is not supported")

    _register_autograd(name, backward, lambda ctx, inputs, output: None)


for _name in (
    "conv2d_input_grad",
    "conv2d_values_grad",
    "conv2d_grads",
    "conv2d_weight_grad",
    "linear_input_grad",
    "linear_values_grad",
    "bias_grad",
    "batch_norm_grad",
    "max_pool2d_grad",
    "batch_norm_max_pool2d_grad",
):
    _no_double_backward(_name)


# --- what the modules call: validation, autocast, half precision -----------------------------------------------------


def compress(weight: Tensor, pattern: Pattern) -> Tensor:
    """The kept entries of ``weight`` (``[out_channels, in_channels / groups, kh, kw]`` or 2-D) as ``[nnz]``."""
    return call.compress(weight, pattern.crow_indices, pattern.col_indices)


def decompress(values: Tensor, pattern: Pattern, size: Sequence[int], channels_last: bool = False) -> Tensor:
    """``values`` ``[nnz]`` as a dense weight of shape ``size``, zero where the pattern is not."""
    return call.decompress(values, pattern.crow_indices, pattern.col_indices, size, channels_last)


def _check_device(input: Tensor, values: Tensor, bias: Tensor | None) -> None:
    for name, t in (("input", input), ("values", values), ("bias", bias)):
        if t is not None and t.device.type not in ("cpu", "cuda", "meta"):
            raise NotImplementedError(f"{name} is on {t.device}: sparsekit has kernels for the CPU and for GPUs")
        if t is not None and t.device != input.device:
            raise ValueError(f"{name} must be on {input.device} like input, got {t.device}")
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")


def _run(op, input: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, *geometry) -> Tensor:
    """Apply ``op`` with the dtype rules of dense layers: autocast's dtype if on; float16/bfloat16 add up in float32."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    elif input.dtype != values.dtype:
        raise TypeError(f"input and weight must have the same dtype, got {input.dtype} and {values.dtype}")
    dtype = input.dtype
    if dtype in (torch.bfloat16, torch.float16):
        # Rounded to the low precision first, as a dense layer would do; the CPU's kernels then compute in float32.
        compute = dtype if device == "cuda" else torch.float32
        input, values = input.to(compute), values.to(dtype).to(compute)
        bias = bias if bias is None else bias.to(dtype).to(compute)
    return op(input, values, *pattern, bias, *geometry).to(dtype)


def conv2d(
    input: Tensor,
    values: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution with an unstructured sparse weight.

    Args:
        input: ``[n, in_channels, h, w]`` or ``[in_channels, h, w]``, NCHW or channels_last.
        values: ``[nnz]``, the kept weights in the order of ``pattern.col_indices``.
        pattern: where they are.
        bias: ``[out_channels]`` or None.
        kernel_size, stride, dilation: pairs (vertical, horizontal).
        padding: zeros added at (top, bottom, left, right).
        groups: as in ``nn.Conv2d``.
        fork: return the input too, for whoever else needs it: where both have gradients, they are added in the kernel.

    Returns:
        ``[n, out_channels, oh, ow]`` (or 3-D), in the input's memory format and dtype; with ``fork`` that and the input.

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
        TypeError: dtypes that do not fit.
        NotImplementedError: a device without kernels.

    Example:
        >>> import torch
        >>> from sparsekit import _ops
        >>> from sparsekit.formats import pattern_from_mask
        >>> weight = torch.randn(8, 4, 3, 3) * (torch.rand(8, 4, 3, 3) > 0.9)
        >>> pattern = pattern_from_mask(weight != 0)
        >>> values = _ops.compress(weight, pattern)
        >>> _ops.conv2d(torch.randn(2, 4, 6, 6), values, pattern, kernel_size=(3, 3), padding=(1, 1, 1, 1)).shape
        torch.Size([2, 8, 6, 6])
    """
    out_channels, in_channels = pattern.crow_indices.shape[0] - 1, pattern.t_crow_indices.shape[0] - 1
    if input.dim() == 3:
        out = conv2d(
            input.unsqueeze(0), values, pattern, bias,
            kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
        ).squeeze(0)  # fmt: skip
        return (out, input) if fork else out
    if input.dim() != 4 or input.shape[1] != in_channels:
        raise ValueError(f"input must be [n, {in_channels}, h, w] or [{in_channels}, h, w], got {tuple(input.shape)}")
    _check_operands(input, values, pattern, bias, out_channels)
    size = output_size(input.shape, out_channels, kernel_size, stride, padding, dilation)
    if size[2] < 1 or size[3] < 1:
        raise ValueError(
            f"input of {input.shape[2]} x {input.shape[3]} is smaller than the kernel "
            f"{tuple(kernel_size)} with dilation {tuple(dilation)} and padding {tuple(padding)}"
        )
    geometry = (list(kernel_size), list(stride), list(padding), list(dilation), groups)
    if fork and _runs_native(input, values) and not torch.is_autocast_enabled("cpu"):
        args = (input, values, *pattern, bias, *geometry)
        if torch.is_grad_enabled() and input.requires_grad and call.conv2d.is_eager(*args):
            return _ForkedConv2d.apply(*args)
    out = _run(call.conv2d, input, values, pattern, bias, *geometry)
    return (out, input) if fork else out


def takes_batch_norms(input: Tensor) -> bool:
    """Whether :func:`conv2d_batch_norms` may take this input, as far as it alone tells."""
    return (
        torch.is_grad_enabled()
        and input.requires_grad
        and input.dim() == 4
        and _state["isa"] != "reference"
        and call.conv2d.is_eager()
        and _is_plain_float32(input)
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain_float32(t: Tensor) -> bool:
    """Whether it is what the C++ kernels read."""
    return t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() and _is_plain(t)


def conv2d_batch_norms(
    outside: Sequence[Tensor], layers: Sequence[NormedConv], fork: bool = False
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Convolutions, each with BatchNorm by the statistics of the batch, as one node of the graph of gradients.

    Between two calls Python and PyTorch find that the kernels have emptied the caches; one call for the layers of a block
    makes a step of a large sparse model some percent faster.

    Args:
        outside: what the layers read besides their own results, ``[n, channels, h, w]``, NCHW.
        layers: in the order in which they run.
        fork: as in :func:`conv2d`, for the first from outside.

    Returns:
        The last layer's result, ``[n, out_channels, oh, ow]``, with ``fork`` that and ``outside[0]``; or None where they
        have to be called one after the other: without gradients of both ``outside[0]`` and the values, with other dtypes,
        devices or layouts, under autocast, while something traces, where only some layers have an affine BatchNorm or
        statistics, where ``outside[0]`` is a residual and forked too, and for arguments that do not fit, of which they tell.

    Example:
        >>> import torch
        >>> from sparsekit import _ops
        >>> from sparsekit.formats import pattern_from_mask
        >>> dense = torch.randn(4, 4, 3, 3) * (torch.rand(4, 4, 3, 3) > 0.9)
        >>> pattern = pattern_from_mask(dense != 0)
        >>> values, x = _ops.compress(dense, pattern).requires_grad_(), torch.randn(2, 4, 6, 6, requires_grad=True)
        >>> geometry = (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
        >>> norm = {"weight": None, "bias": None, "running": (None,) * 3, "momentum": 0.1, "eps": 1e-5, "relu": True}
        >>> first = _ops.NormedConv(values, pattern, geometry, **norm)
        >>> y = _ops.conv2d_batch_norms([x], [first, first._replace(input=1, residual=0)])
        >>> y is None or y.shape == (2, 4, 6, 6)
        True
    """
    if not takes_batch_norms(outside[0]) or not all(map(_is_plain_float32, outside)):
        return None
    sizes = [t.shape for t in outside]
    for layer in layers:
        vectors = _present((layer.weight, layer.bias, *layer.running[:2]))
        size = output_size(sizes[layer.input], layer.channels, *layer.geometry[:4])
        if (
            not layer.values.requires_grad
            or not all(map(_is_plain_float32, (layer.values, *vectors)))
            or any(t.shape != (layer.channels,) for t in vectors)
            or sizes[layer.input][1] != layer.pattern.t_crow_indices.shape[0] - 1
            or layer.values.shape != layer.pattern.col_indices.shape
            or min(size) < 1
            or size[0] * size[2] * size[3] < 2
            or (layer.residual >= 0 and sizes[layer.residual] != size)
        ):
            return None
        sizes.append(size)
    for of_all in zip(*((layer.weight, layer.bias, *layer.running) for layer in layers)):
        if 0 < len(_present(of_all)) < len(layers):
            return None
    if len({t is None for t in layers[0].running}) > 1 or (fork and any(layer.residual == 0 for layer in layers)):
        return None
    parameters = itertools.chain(*((layer.values, layer.weight, layer.bias) for layer in layers))
    return _NormedConvs.apply(layers, fork, *outside, *parameters)


def linear(input: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None = None) -> Tensor:
    """Linear layer with an unstructured sparse weight.

    Args:
        input: ``[..., in_features]``.
        values: ``[nnz]``, the kept weights in the order of ``pattern.col_indices``.
        pattern: where they are.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`conv2d`.

    Example:
        >>> import torch
        >>> from sparsekit import _ops
        >>> from sparsekit.formats import pattern_from_mask
        >>> weight = torch.randn(8, 16) * (torch.rand(8, 16) > 0.9)
        >>> pattern = pattern_from_mask(weight != 0)
        >>> _ops.linear(torch.randn(5, 16), _ops.compress(weight, pattern), pattern).shape
        torch.Size([5, 8])
    """
    out_features, in_features = pattern.crow_indices.shape[0] - 1, pattern.t_crow_indices.shape[0] - 1
    if input.dim() < 1 or input.shape[-1] != in_features:
        raise ValueError(f"input must be [..., {in_features}], got {tuple(input.shape)}")
    _check_operands(input, values, pattern, bias, out_features)
    out = _run(call.linear, input.reshape(-1, in_features), values, pattern, bias)
    return out.view(*input.shape[:-1], out_features)


def _check_operands(input: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, rows: int) -> None:
    if values.shape != pattern.col_indices.shape:
        raise ValueError(f"values must be [{pattern.nnz}] like pattern.col_indices, got {tuple(values.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must be [{rows}], got {tuple(bias.shape)}")
    _check_device(input, values, bias)


_load()
