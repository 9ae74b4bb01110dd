"""Sparse layers without a dense weight: what :func:`sparsekit.compress_` makes of them.

``values`` ``[nnz]`` takes the place of the Parameter ``weight``, so that gradients and optimizer state have as few
elements; no mask is kept beside the structure. ``weight`` and ``weight_mask`` are dense copies, made when asked for.
A state dict holds ``values``, ``crow_indices`` and ``col_indices``; every sparse layer loads it, and these load every
sparse layer's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _ops
from ..formats import Pattern, mask_from_pattern, pattern_from_mask
from .sparse import SparseConv2d, SparseLinear, SparseModule, take_compressed


class CompressedModule(SparseModule):
    """What :class:`CompressedConv2d` and :class:`CompressedLinear` share.

    Attributes:
        values: Parameter ``[nnz]``, the kept weights in the order of ``pattern.col_indices``.
    """

    values: nn.Parameter

    def __init__(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} is made by sparsekit.compress_ from a sparse layer")

    def _compress(self, values: nn.Parameter) -> None:
        """Turn a sparse module, whose class was just set to a compressed one, into a compressed module."""
        del self._buffers["weight_mask"]
        _replace(self._parameters, "weight", "values", values)

    def _decompress(self, weight: nn.Parameter) -> None:
        """Undo :meth:`_compress`; the caller sets the class back."""
        mask = self.weight_mask
        _replace(self._parameters, "values", "weight", weight)
        indices = dict(self._buffers)
        self._buffers.clear()
        self._buffers.update(weight_mask=mask, **indices)
        self._mask_version = mask._version

    @property
    def stored(self) -> nn.Parameter:
        return self._parameters["values"]

    @property
    def pattern(self) -> Pattern:
        return Pattern(*(self._buffers[f"_{name}"] for name in Pattern._fields))

    @property
    def dense_size(self) -> torch.Size:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """A dense copy; what is written to it is lost, gradients reach ``values`` through it."""
        return _ops.decompress(self.values, self.pattern, self.dense_size)

    @property
    def weight_mask(self) -> Tensor:
        """A copy; masks change through :func:`sparsekit.set_mask_` only."""
        return mask_from_pattern(self.pattern, self.dense_size)

    @property
    def sparsity(self) -> float:
        return 1 - self._kept / max(self.dense_size.numel(), 1)

    def masked_weight(self) -> Tensor:
        return self.weight

    def compressed_weight(self) -> Tensor:
        return self.values

    def keeper(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        old, new, size = self.pattern, pattern_from_mask(mask, self.groups), self.dense_size
        return lambda tensor: _ops.compress(_ops.decompress(tensor, old, size), new)

    def _set_mask(self, mask: Tensor) -> None:
        """Install the structure of ``mask``; the caller gives ``values`` their new size."""
        for name, indices in zip(Pattern._fields, pattern_from_mask(mask, self.groups)):
            setattr(self, f"_{name}", indices)
        self._kept = self._col_indices.numel()

    def _remember_version(self) -> None:
        pass

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}crow_indices"] = self._crow_indices
        destination[f"{prefix}col_indices"] = self._col_indices

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        weight, mask = None, None
        if f"{prefix}values" in state_dict:
            weight, mask = take_compressed(state_dict, prefix, self.dense_size)
        elif f"{prefix}weight" in state_dict:
            weight = state_dict.pop(f"{prefix}weight")
            given = state_dict.pop(f"{prefix}weight_mask", None)
            mask = self._mask_for(weight, prefix) if given is None else given.bool()
        if weight is not None and weight.shape == self.dense_size == mask.shape:
            self._set_mask(mask)
            self.values.data = self.values.new_empty(self._kept)
            state_dict[f"{prefix}values"] = _ops.compress(weight.to(self.values), self.pattern)
        elif weight is not None:
            args[-1].append(
                f"size mismatch for {prefix}weight: copying a param with shape {tuple(weight.shape)} from checkpoint, "
                f"the shape in current model is {tuple(self.dense_size)}."
            )
            state_dict[f"{prefix}values"] = self.values.data
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


class CompressedConv2d(CompressedModule, SparseConv2d):
    """:class:`~sparsekit.nn.SparseConv2d` whose Parameter is ``values`` ``[nnz]``; made by :func:`sparsekit.compress_`.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = sk.sparsify_(sk.pruning.magnitude_(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3)), 0.75))
        >>> sk.compress_(model)[0].values.shape
        torch.Size([144])
    """

    @property
    def dense_size(self) -> torch.Size:
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, None, self.bias)


class CompressedLinear(CompressedModule, SparseLinear):
    """:class:`~sparsekit.nn.SparseLinear` whose Parameter is ``values`` ``[nnz]``; made by :func:`sparsekit.compress_`."""

    @property
    def dense_size(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))


def _replace(parameters: dict[str, nn.Parameter | None], old: str, new: str, value: nn.Parameter) -> None:
    """Put a Parameter in the place of another, in the same position."""
    items = [(new, value) if name == old else (name, item) for name, item in parameters.items()]
    parameters.clear()
    parameters.update(items)
