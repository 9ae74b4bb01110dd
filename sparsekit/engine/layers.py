"""A layer of a plan, ready to run on the sparse kernels or on PyTorch's."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops
from ..dispatch import Shape
from .plan import ACTIVATIONS, Layer, Plan

# Whether PyTorch has oneDNN's convolution with what follows fused, which inductor uses.
FUSED_DENSE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

# Vectors of a dense linear layer's input, at most, for which our kernel is about as fast as PyTorch's, or faster.
MOST_VECTORS = 128
# Features of the input, at least, of which MKL gives some to every thread where there are more than four times as many
# of them as of vectors, or of features of the output: bits would depend on the number of threads.
FEWEST_DIVIDED = 512

_ACTIVATE = {name: getattr(torch.ops.aten, f"{name}_").default for name in ACTIVATIONS.values()}
_ONEDNN = {None: "none", "silu": "swish", **{name: name for name in ("sigmoid", "hardsigmoid", "hardswish")}}


class Prepared:
    """A layer with its weight in the forms that run; several threads may run it at once.

    Attributes:
        layer: the plan's.
        weight, bias: its tensors.
        size, nnz, sparsity: of the weight.
    """

    def __init__(self, layer: Layer, plan: Plan):
        self.layer = layer
        self.size = plan.size_of(layer.weight)
        # F.linear takes one number for all, too.
        self.bias = None if layer.bias is None else plan.tensor(layer.bias).expand(self.size[0]).contiguous()
        self._plan = plan
        self._number: int | None = None
        self._reordered: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def weight(self) -> Tensor:
        return self._plan.tensor(self.layer.weight)

    @cached_property
    def nnz(self) -> int:
        return self._plan.nnz_of(self.layer.weight)

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(self.size.numel(), 1)

    def compressed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight's values, crow_indices and col_indices."""
        return self._plan.non_zeros(self.layer.weight)[:3]

    def compress(self) -> None:
        """Let the plan keep the weight's non-zeros alone, if that takes less memory. For layers that are not run dense."""
        if self.sparsity > 0.5:
            self._plan.compress(self.layer.weight)

    def unpack(self) -> None:
        """Free what only :meth:`run` needs, and makes when it needs it."""
        if self._number is not None:
            self._forget()
        self._number = self._reordered = None

    def shape_on(self, size: Sequence[int]) -> Shape:
        """What the layer costs depends on, for an input of this size."""
        layer, (rows, columns, *kernel) = self.layer, self.size
        if layer.kind == "linear":
            batch = math.prod(size[:-1])
            return Shape("linear", columns, rows, 1, 1, 1, batch, 1, 1)
        n, _, oh, ow = self.out_size(size)
        return Shape(
            "conv2d", columns * layer.groups, rows, math.prod(kernel), layer.groups,
            math.prod(layer.stride), n, size[2] * size[3], oh * ow,
        )  # fmt: skip

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size of the output for an input of this size."""
        layer, (rows, columns, *kernel) = self.layer, self.size
        if layer.kind == "linear":
            if size[-1] != columns:
                raise ValueError(f"layer {layer.name} takes {columns} features, got {size[-1]}")
            return *size[:-1], rows
        return _ops.output_size(size, rows, kernel, layer.stride, layer.padding, layer.dilation)

    def run(self, input: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        """``activation(clamp(layer(input) + bias + residual, low, high))``, on ``"sparse"`` or ``"dense"`` kernels."""
        layer = self.layer
        if backend == "sparse" and input.numel():
            geometry = (self.size[2:], layer.stride, layer.padding, layer.dilation, layer.groups)
            shared = (input, self._packed(), self.size[0], self.bias, residual, layer.low, layer.high)
            out = _ops.run_linear(*shared) if layer.kind == "linear" else _ops.run_conv2d(*shared, *geometry)
            return self._activate(out)
        if layer.kind == "linear":
            return self._finish(self._dense_linear(input, self.weight), residual)
        if input.shape[2:] == self.size[2:] == (1, 1) and layer.groups == 1 and not any(layer.padding):
            # oneDNN's convolution takes milliseconds here if its weight was reordered for another batch size.
            out = self._dense_linear(input.flatten(1), self.weight.flatten(1))
            return self._finish(out[:, :, None, None], residual)
        top, bottom, left, right = layer.padding
        reach = [d * (k - 1) for d, k in zip(layer.dilation, self.size[2:])]
        # Of windows that lie outside of the image as a whole, oneDNN reads what is behind it (found with torch 2.14.1).
        if top != bottom or left != right or top > reach[0] or left > reach[1]:
            input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
        geometry = (layer.stride, (top, left), layer.dilation, layer.groups)
        fused = FUSED_DENSE and input.numel() > 0
        if input.shape[1] == 1 and layer.stride[0] != layer.stride[1]:
            # oneDNN is wrong for one channel in channels_last and strides that differ (found with torch 2.14.1).
            fused, input = False, input.clone(memory_format=torch.contiguous_format)
        if not fused:
            return self._finish(F.conv2d(input, self.weight, self.bias, *geometry), residual)
        return self._dense(input, residual, *geometry)

    def _dense_linear(self, input: Tensor, weight: Tensor) -> Tensor:
        vectors, (rows, columns) = math.prod(input.shape[:-1]), weight.shape
        ours = vectors <= MOST_VECTORS or (columns >= FEWEST_DIVIDED and columns > 4 * min(vectors, rows))
        if _ops.backend() == "reference" or input.dtype != torch.float32 or not vectors or not ours:
            return F.linear(input, weight, self.bias)
        return _ops.dense_linear(input, weight.contiguous(), self.bias)

    def _packed(self) -> int:
        """The number of the layer in the sparse kernels' registry."""
        if (number := self._number) is None:
            with self._lock:
                if (number := self._number) is None:
                    number = _ops.add_layer(*self.compressed(), self.size[1:].numel())
                    self._forget = weakref.finalize(self, _ops.remove_layer, number)
                    self._number = number
        return number

    def _dense(self, input, residual, stride, padding, dilation, groups) -> Tensor:
        """oneDNN with the weight in its own layout, and what follows fused, as inductor does it; channels_last out."""
        if (weight := self._reordered) is None:
            weight = self._reordered = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, padding, stride, dilation, groups, input.shape
            )
        low, high, activation = self.layer.low, self.layer.high, self.layer.activation
        shared = (weight, self.bias, padding, stride, dilation, groups)
        unbounded, relu = (low, high) == (-math.inf, math.inf), (low, high) == (0, math.inf)
        if residual is not None:
            out = torch.ops.mkldnn._convolution_pointwise.binary(
                input, residual, *shared, "add", 1.0, "relu" if relu else None, [], None
            )
            return self._activate(out if relu or unbounded else out.clamp_(low, high))
        kind = "relu" if relu else "hardtanh" if not unbounded else _ONEDNN.get(activation, "none")
        bounds = [low, high] if kind == "hardtanh" else []
        return torch.ops.mkldnn._convolution_pointwise(input, *shared, kind, bounds, "")

    def _activate(self, out: Tensor) -> Tensor:
        return _ACTIVATE[self.layer.activation](out) if self.layer.activation else out

    def _finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            out += residual
        if (self.layer.low, self.layer.high) == (0, math.inf):
            return out.relu_()
        if (self.layer.low, self.layer.high) != (-math.inf, math.inf):
            return out.clamp_(self.layer.low, self.layer.high)
        return self._activate(out)
