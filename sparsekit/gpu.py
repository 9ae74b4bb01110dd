"""Which kernels run on a GPU: CUDA C++ (``torch.ops.sparsekit_cuda``), Triton (:mod:`sparsekit.kernels`), or neither.

The functions here have the signatures of the ops under ``torch.ops.sparsekit_cpu``: they write into an output they are
given. Every call takes the backend that :func:`use_backend` forces, else the variant that :func:`tuning` measured as the
fastest for these shapes, else the first that can do it, in the order of :data:`BACKENDS`. With none of them, float32 and
everything else runs the reference, and dispatch prefers PyTorch's dense layers: :func:`missing` says what to install.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BACKENDS = ("cuda", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A bit each in a register of the CUDA kernels.
CUDA_TAPS = 32
# (slots of a lane, rows of a warp; see csrc/cuda/kernels.h) that tuning tries; 0 is the kernels' own choice.
TILINGS = ((0, 0), (8, 4), (7, 4), (4, 8), (4, 4), (2, 16))
# Rows that share their columns on tensor cores (kernels/condensed.py), which tuning tries for forwards in half precision.
PANELS = (16, 32)


class Variant(NamedTuple):
    """One way to run an op."""

    backend: str
    tiling: tuple[int, int] = (0, 0)
    panel: int = 0

    def __str__(self) -> str:
        if self.panel:
            return f"{self.backend} panels of {self.panel}"
        return self.backend if not any(self.tiling) else "{} {}x{}".format(self.backend, *self.tiling)


_state: dict = {"forced": None, "tuning": False, "calls": None}
# What tuning found: {key of the call: {variant: seconds}}, fastest first.
measured: dict[tuple, dict[Variant, float]] = {}
# Condensed structures by their col_indices, whose version tells if they were written since: {panel: (version, structure)}.
_condensed = WeakTensorKeyDictionary()


# --- what is there ----------------------------------------------------------------------------------------------------


@functools.cache
def lacks() -> dict[str, str]:
    """What every backend but the reference waits for, for people: ``{"cuda": ..., "triton": ...}``, less those that run."""
    from . import kernels

    built = hasattr(torch.ops.sparsekit_cuda, "conv2d")
    found = {
        "cuda": kernels.no_gpu() if built else "sparsekit was built without SPARSEKIT_CUDA=1",
        "triton": kernels.available()[1],
    }
    return {name: reason for name, reason in found.items() if reason}


def backends() -> tuple[str, ...]:
    """The values that :func:`use_backend` accepts in this installation, in the order of preference."""
    return tuple(name for name in BACKENDS if name not in lacks())


def missing() -> str:
    """What this installation lacks for GPU kernels, for people; empty if it has some."""
    if len(backends()) > 1:
        return ""
    return "no GPU kernels: " + "; ".join(f"{name}: {reason}" for name, reason in lacks().items())


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on CUDA tensors by one backend for the length of a ``with`` block.

    Raises:
        ValueError: ``name`` is not one of :func:`backends`.
    """
    if name not in backends():
        why = f" ({lacks()[name]})" if name in lacks() else ""
        raise ValueError(f"name must be one of {', '.join(backends())} in this installation, got {name!r}{why}")
    before, _state["forced"] = _state["forced"], name
    try:
        yield
    finally:
        _state["forced"] = before


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Within the ``with`` block, a call whose shapes are new measures every variant and remembers the fastest."""
    before, _state["tuning"] = _state["tuning"], True
    try:
        yield
    finally:
        _state["tuning"] = before


@contextlib.contextmanager
def watch() -> Iterator[list[tuple[str, str]]]:
    """A list that grows by (op, variant) with every call within the ``with`` block."""
    before, _state["calls"] = _state["calls"], []
    try:
        yield _state["calls"]
    finally:
        _state["calls"] = before


def runs(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: one dtype of :data:`DTYPES`, and a backend that is not the reference."""
    if _state["forced"] == "reference" or any(t.dtype != tensors[0].dtype for t in tensors):
        return False
    return tensors[0].dtype in DTYPES and len(backends()) > 1


# --- the choice -------------------------------------------------------------------------------------------------------


def _variants(taps: int) -> list[Variant]:
    names = [_state["forced"]] if _state["forced"] else backends()
    found = []
    if "cuda" in names and taps <= CUDA_TAPS:
        found += [Variant("cuda", tiling) for tiling in TILINGS]
    if "triton" in names:
        found.append(Variant("triton"))
    if not found:
        raise NotImplementedError(f"the CUDA kernels take up to {CUDA_TAPS} taps, got {taps}; install triton")
    return found


def _seconds(function: Callable[[], object], runs: int = 10) -> float:
    """Mean seconds of a call on the current stream, after two to warm up."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for run in range(runs + 2):
        if run == 2:
            begin.record()
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / runs


# A variant as a call without arguments; None: it cannot run now.
Functions = Callable[[Variant], Callable[[], object] | None]


def _run(op: str, variants: list[Variant], key: tuple, functions: Functions) -> None:
    key = (op, *key, _state["forced"])
    known = measured.get(key)
    if known is None and _state["tuning"] and not torch.cuda.is_current_stream_capturing():
        seconds = {variant: _seconds(functions(variant)) for variant in variants}
        known = measured[key] = dict(sorted(seconds.items(), key=lambda item: item[1]))
    for variant in known or variants:
        function = functions(variant)
        if function is not None:
            break
    if _state["calls"] is not None:
        _state["calls"].append((op, str(variant)))
    function()


# --- the ops ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nchw(out: Tensor) -> Iterator[Tensor]:
    """A contiguous tensor to write ``out`` into."""
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    yield target
    if target is not out:
        out.copy_(target)


def conv2d(out, input, values, crow, col, bias, *geometry, residual=None, relu=False) -> None:
    """``out = relu(conv2d(input) + bias + residual)``; see :func:`sparsekit._ops.conv2d`."""
    kernel_size = geometry[0]
    input = input.contiguous()
    residual = residual if residual is None else residual.contiguous()
    variants = _variants(_taps(kernel_size))
    if Variant("triton") in variants and input.dtype != torch.float32:
        rows, groups = crow.numel() - 1, geometry[4]
        variants += [Variant("triton", panel=p) for p in PANELS if groups == 1 or rows // groups % p == 0]
    with _nchw(out) as y:

        def variant(v: Variant):
            if v.panel:
                return _on_panels(v.panel, y, input, values, crow, col, bias, geometry, residual, relu)
            if v.backend == "cuda":
                args = (y, input, values, crow, col, bias, residual, relu, *geometry, *v.tiling)
                return lambda: torch.ops.sparsekit_cuda.conv2d(*args)
            args = (y, input, values, crow, col, bias, *geometry)
            return lambda: _kernels().conv2d(*args, residual=residual, relu=relu)

        _run("conv2d", variants, _key(y, input, col, geometry), variant)


def _on_panels(panel: int, out, input, values, crow, col, bias, geometry, residual, relu):
    kernels, pattern = _kernels(), _condense(crow, col, panel)
    if pattern is None:
        return None

    def run():
        packed = kernels.pack_values(pattern, values)
        kernels.condensed_conv2d(out, input, pattern, packed, bias, *geometry, residual=residual, relu=relu)

    return run


def _condense(crow: Tensor, col: Tensor, panel: int):
    """The condensed structure of a weight, made once per mask; None if it would have to be made in a CUDA graph, where
    nothing can wait for the GPU."""
    found = _condensed.setdefault(col, {})
    version = 0 if col.is_inference() else col._version
    if panel not in found or found[panel][0] != version:
        if col.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found[panel] = version, _kernels().pack(crow, col, crow.numel() - 1, panel)
    return found[panel][1]


def conv2d_input_grad(out, grad_output, values, t_crow, t_col, t_permutation, *geometry) -> None:
    grad_output = grad_output.contiguous()
    with _nchw(out) as dx:
        args = (dx, grad_output, values, t_crow, t_col, t_permutation, *geometry)
        _run_plain("conv2d_input_grad", args, _key(dx, grad_output, t_col, geometry), geometry)


def conv2d_values_grad(out, grad_output, input, crow, col, *geometry) -> None:
    args = (out, grad_output.contiguous(), input.contiguous(), crow, col, *geometry)
    _run_plain("conv2d_values_grad", args, _key(args[1], args[2], col, geometry), geometry)


def _run_plain(op: str, args: tuple, key: tuple, geometry: tuple) -> None:
    def variant(v: Variant):
        if v.backend == "cuda":
            return lambda: getattr(torch.ops.sparsekit_cuda, op)(*args, *v.tiling)
        return lambda: getattr(_kernels(), op)(*args)

    _run(op, _variants(_taps(geometry[0])), key, variant)


def _taps(kernel_size) -> int:
    return kernel_size[0] * kernel_size[1]


def _key(a: Tensor, b: Tensor, col: Tensor, geometry: tuple) -> tuple:
    return (tuple(a.shape), tuple(b.shape), col.numel(), a.dtype, a.device.index, str(geometry))


# A linear layer is a 1 x 1 convolution of one image whose pixels are the batch; the kernels want pixels next to each
# other, so the CUDA kernels get a transposed copy.
_POINTWISE = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)


def _as_image(t: Tensor) -> Tensor:
    return t.t().contiguous().view(1, t.shape[1], 1, t.shape[0])


def _empty_image(t: Tensor) -> Tensor:
    return t.new_empty(1, t.shape[1], 1, t.shape[0])


def linear(out, input, values, crow, col, bias) -> None:
    """``out = input @ weight.T + bias``; see :func:`sparsekit._ops.linear`."""

    def cuda(tiling):
        y = _empty_image(out)
        torch.ops.sparsekit_cuda.conv2d(y, _as_image(input), values, crow, col, bias, None, False, *_POINTWISE, *tiling)
        out.copy_(y[0, :, 0].t())

    _run_linear("linear", cuda, (out, input, values, crow, col, bias), col)


def linear_input_grad(out, grad_output, values, t_crow, t_col, t_permutation) -> None:
    def cuda(tiling):
        dx = _empty_image(out)
        torch.ops.sparsekit_cuda.conv2d_input_grad(
            dx, _as_image(grad_output), values, t_crow, t_col, t_permutation, *_POINTWISE, *tiling
        )
        out.copy_(dx[0, :, 0].t())

    _run_linear("linear_input_grad", cuda, (out, grad_output, values, t_crow, t_col, t_permutation), t_col)


def linear_values_grad(out, grad_output, input, crow, col) -> None:
    def cuda(tiling):
        torch.ops.sparsekit_cuda.conv2d_values_grad(
            out, _as_image(grad_output), _as_image(input), crow, col, *_POINTWISE, *tiling
        )

    _run_linear("linear_values_grad", cuda, (out, grad_output, input, crow, col), col)


def _run_linear(op: str, cuda: Callable, args: tuple, col: Tensor) -> None:
    def variant(v: Variant):
        if v.backend == "cuda":
            return lambda: cuda(v.tiling)
        return lambda: getattr(_kernels(), op)(*args)

    _run(op, _variants(1), _key(args[0], args[1], col, ()), variant)


def compress(out, weight, crow, col) -> None:
    _move("compress", out, weight, crow, col)


def decompress(out, values, crow, col) -> None:
    _move("decompress", out, values, crow, col)


def _move(op: str, *args) -> None:
    # Bound by memory either way: nothing to measure.
    backend = _variants(1)[0].backend
    getattr(torch.ops.sparsekit_cuda if backend == "cuda" else _kernels(), op)(*args)


def _kernels():
    from . import kernels

    return kernels
