"""BatchNorm2d of sparse models: PyTorch's, faster in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _ops
from .pool import MaxPool2d
from .sparse import SparseConv2d


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, whose training step reads and writes memory once; everything else is PyTorch's.

    With dense convolutions BatchNorm is a tenth of a training step; beside sparse ones it is the largest part.
    float32 images on the CPU, NCHW, in training mode run the C++ kernels; others run PyTorch's. The gradient has no
    gradient of its own: double backward raises NotImplementedError.

    Shape:
        - input, output: ``[n, num_features, h, w]``

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.nn.BatchNorm2d(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """``relu(norm(input) + residual)`` at once.

        Args:
            input: ``[n, num_features, h, w]``.
            residual: what is added, of the same shape, or None.
            relu: whether ReLU follows.

        Raises:
            ValueError: as ``nn.BatchNorm2d``; ``residual`` has another shape than ``input``.
        """
        if residual is not None and residual.shape != input.shape:
            raise ValueError(f"residual must be {tuple(input.shape)} as input, got {tuple(residual.shape)}")
        if not self._is_fast(input, residual):
            out = super().forward(input)
            out = out if residual is None else out + residual
            return F.relu(out) if relu else out
        out, mean, var, _ = _ops.call.batch_norm(input, self.weight, self.bias, residual, relu, self.eps)
        if self.running_mean is not None:
            self._update(mean, var, input.numel() // input.shape[1])
        return out

    def pooled(self, input: Tensor, pool: MaxPool2d) -> Tensor:
        """``pool(relu(self(input)))``; in one go, without the large images between them, where both are fast.

        Args:
            input: what is normalized.
            pool: to which nobody listens, for its hooks are not called.

        Raises:
            ValueError, RuntimeError: as ``nn.BatchNorm2d`` and ``nn.MaxPool2d``.

        Shape:
            - input: ``[n, num_features, h, w]``
            - returns: ``[n, num_features, oh, ow]``

        Example:
            >>> import torch, sparsekit as sk
            >>> norm, pool = sk.nn.BatchNorm2d(8), sk.nn.MaxPool2d(3, stride=2, padding=1)
            >>> norm.pooled(torch.randn(2, 8, 4, 4), pool).shape
            torch.Size([2, 8, 2, 2])
        """
        geometry = pool.fast_geometry(input) if self._is_fast(input, None) else None
        if geometry is None:
            return pool(self(input, relu=True))
        out, mean, var, _ = _ops.call.batch_norm_max_pool2d(input, self.weight, self.bias, True, self.eps, *geometry)
        if self.running_mean is not None:
            self._update(mean, var, input.numel() // input.shape[1])
        return out

    def _is_fast(self, input: Tensor, residual: Tensor | None) -> bool:
        tensors = [t for t in (input, residual, self.weight, self.bias) if t is not None]
        return (
            self.training
            and _ops.backend() != "reference"
            and input.dim() == 4
            and input.shape[1] == self.num_features
            and input.numel() > self.num_features
            and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
            and all(t.is_contiguous() for t in tensors)
            and not torch.is_autocast_enabled("cpu")
        )

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """The running statistics, of which the variance is the unbiased one."""
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(var * (count / (count - 1)), factor)


class Normed(NamedTuple):
    """``relu(norm(conv(input)) + residual)``, a layer of :func:`chain`; nobody listens to ``norm``."""

    conv: nn.Module
    norm: BatchNorm2d
    relu: bool
    input: int = 0
    residual: int = -1


def chain(
    outside: Sequence[Tensor], layers: Sequence[Normed], fork: bool = False
) -> Tensor | tuple[Tensor, Tensor] | None:
    """All layers in one go: see :func:`sparsekit._ops.conv2d_batch_norms`.

    Returns:
        What that returns; None also where a layer is not sparse or runs dense, has a bias, pads with anything but zeros or
        is listened to, or where a norm is not in training mode.
    """
    like = outside[0]
    if not _ops.takes_batch_norms(like):
        return None
    sizes, geometries = [t.shape for t in outside], []
    for layer in layers:
        conv = layer.conv
        geometry = conv._plain_geometry if _is_ours(conv) else None
        if geometry is None or not layer.norm.training or layer.norm.num_features != conv.out_channels:
            return None
        # A tensor without memory tells of the shape where there is no result yet.
        if not conv.runs_sparse(like if layer.input == 0 else like.new_empty(()).expand(sizes[layer.input])):
            return None
        sizes.append(_ops.output_size(sizes[layer.input], conv.out_channels, *geometry[:4]))
        geometries.append(geometry)
    found = []
    for (conv, norm, relu, input, residual), geometry in zip(layers, geometries):
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        of_norm = norm.weight, norm.bias, running, norm.momentum, norm.eps, relu
        found.append(_ops.NormedConv(conv.compressed_weight(), conv.pattern, geometry, *of_norm, input, residual))
    return _ops.conv2d_batch_norms(outside, found, fork)


def normed(
    conv: nn.Module,
    norm: BatchNorm2d,
    input: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``relu(norm(conv(input)) + residual)``, and with ``fork`` the input too; in one go where that can be.

    Args:
        conv: any convolution; a sparse one goes along with its norm, unless somebody listens to it.
        norm: to which nobody listens.
        input: ``[n, c, h, w]``.
        residual: as of :class:`BatchNorm2d`.
        relu: as of :class:`BatchNorm2d`.
        fork: as of :func:`sparsekit._ops.conv2d`, for a block with a shortcut.
    """
    outside = [input] if residual is None else [input, residual]
    found = chain(outside, [Normed(conv, norm, relu, 0, len(outside) - 1 or -1)], fork)
    if found is not None:
        return found
    out, input = conv.forked(input) if fork and _is_ours(conv) else (conv(input), input)
    out = norm(out, residual, relu)
    return (out, input) if fork else out


def _is_ours(conv: nn.Module) -> bool:
    return isinstance(conv, SparseConv2d) and not is_watched(conv)


class Sequential(nn.Sequential):
    """``nn.Sequential`` that runs a BatchNorm2d of ours with the sparse convolution before it and the ReLU behind it, unless
    somebody listens to them.

    Example:
        >>> import torch, sparsekit as sk
        >>> block = sk.nn.Sequential(torch.nn.Conv2d(3, 8, 3), sk.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> bool((block(torch.randn(2, 3, 6, 6)) >= 0).all())
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        modules = list(self)
        while modules:
            module = modules.pop(0)
            if modules and isinstance(module, SparseConv2d) and is_plain_norm(modules[0]):
                relu = len(modules) > 1 and is_plain_relu(modules[1])
                input = normed(module, modules[0], input, relu=relu)
                del modules[: 1 + relu]
            elif modules and is_plain_norm(module) and is_plain_relu(modules[0]):
                input = module(input, relu=True)
                del modules[0]
            else:
                input = module(input)
        return input


def is_plain_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNorm2d of ours to which nobody listens."""
    return type(module) is BatchNorm2d and not is_watched(module)


def is_plain_relu(module: nn.Module) -> bool:
    """Whether what comes before ``module`` can do its work."""
    return type(module) is nn.ReLU and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody listens to a module, by a hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _has_any_global_hook() or any(getattr(module, name) for name in hooks)
