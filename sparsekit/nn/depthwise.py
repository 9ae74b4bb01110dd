"""Depthwise convolutions of sparse models: PyTorch's, faster in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _ops
from ..formats import pattern_from_mask


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a single channel a group, whose weight is dense; float32 images on the CPU, NCHW, run the C++
    kernels, others PyTorch's.

    The gradient has no gradient of its own: double backward raises NotImplementedError.

    Shape:
        - input: ``[n, channels, h, w]``
        - output: ``[n, channels, oh, ow]``

    Raises:
        ValueError: ``in_channels``, ``out_channels`` and ``groups`` differ.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.nn.DepthwiseConv2d(8, 8, 3, padding=1, groups=8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not is_depthwise(self):
            raise ValueError(
                f"in_channels, out_channels and groups must be equal and above 1, got {self.in_channels}, "
                f"{self.out_channels} and {self.groups}"
            )
        self._attach()

    def _attach(self) -> None:
        """Complete a plain module whose class was just set to this one."""
        self._pattern = pattern_from_mask(torch.ones(self.weight.shape, dtype=torch.bool), self.groups)

    def _detach(self) -> None:
        """Undo :meth:`_attach`; the caller sets the class back."""
        del self._pattern

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_fast = (
            _ops.backend() != "reference"
            and self.padding_mode == "zeros"
            and math.prod(self.stride) <= 4
            and input.dim() == 4
            and input.dtype == weight.dtype == torch.float32
            and input.device.type == "cpu"
            and input.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        )
        if not is_fast:
            return super()._conv_forward(input, weight, bias)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return _ops.conv2d(
            input,
            weight.reshape(-1),
            self._pattern,
            bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=(top, bottom, left, right),
            dilation=self.dilation,
            groups=self.groups,
        )


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether every channel is convolved by itself, into one channel."""
    return conv.groups == conv.in_channels == conv.out_channels > 1
