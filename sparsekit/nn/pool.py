"""MaxPool2d of sparse models: PyTorch's, faster in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _ops


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``; float32 images on the CPU, NCHW, in training mode run the C++ kernels, others PyTorch's.

    The gradient has no gradient of its own: double backward raises NotImplementedError.

    Shape:
        - input: ``[n, channels, h, w]``
        - output: ``[n, channels, oh, ow]``

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.nn.MaxPool2d(3, stride=2, padding=1)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 2, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        geometry = self.fast_geometry(input)
        return super().forward(input) if geometry is None else _ops.call.max_pool2d(input, *geometry)[0]

    def fast_geometry(self, input: Tensor) -> tuple | None:
        """What the C++ kernels take besides ``input``, ``[n, channels, h, w]``; None if they do not take it."""
        how = self.kernel_size, self.stride, self.padding, self.dilation
        pairs = [[*v] if isinstance(v, (tuple, list)) else [v, v] for v in how]
        is_fast = (
            self.training
            and not self.return_indices
            and _ops.backend() != "reference"
            and input.dim() == 4
            and input.dtype == torch.float32
            and input.device.type == "cpu"
            and input.is_contiguous()
            and input.numel() > 0
            and all(2 * p <= k <= s for p, k, s in zip(pairs[2], pairs[0], input.shape[2:]))
            and math.prod(pairs[0]) <= _ops.reference.MOST_TAPS
            and pairs[3] == [1, 1]
        )
        return (*pairs, self.ceil_mode) if is_fast else None
