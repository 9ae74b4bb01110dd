"""Sparse layers without a dense weight: what :func:`sparsekit.compress_` makes of them.

``values`` ``[nnz]`` takes the place of the Parameter ``weight``, so that gradients and optimizer state have as few
elements; no mask is kept beside the structure. ``weight`` and ``weight_mask`` are dense copies, made when asked for.
A state dict holds ``values``, ``crow_indices``, ``col_indices`` and ``size``, the dense shape; every sparse layer loads it,
and these load every sparse layer's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _ops
from ..formats import Pattern, mask_from_pattern, pattern_from_mask
from .sparse import COMPRESSED_KEYS, SparseConv2d, SparseLinear, SparseModule, take_compressed


class CompressedModule(SparseModule):
    """What :class:`CompressedConv2d` and :class:`CompressedLinear` share.

    Attributes:
        values: Parameter ``[nnz]``, the kept weights in the order of ``pattern.col_indices``.
    """

    values: nn.Parameter
    STORED = "values"

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

    def set_values(self, values: Tensor) -> None:
        """Give the Parameter other values, and another size if need be; its gradient and its hooks are lost then."""
        parameter = self.values
        if values.shape != parameter.shape:
            # autograd keeps a node of the old size for as long as some graph lives; another dtype makes it forget.
            parameter.grad = None
            parameter.data = values.new_empty(
                0, dtype=torch.float64 if values.dtype != torch.float64 else torch.float32
            )
        parameter.data = values

    def reset_parameters(self) -> None:
        dense = self.to_dense()
        dense.reset_parameters()
        with torch.no_grad():
            self.values.copy_(_ops.compress(dense.weight, self.pattern))
            if self.bias is not None:
                self.bias.copy_(dense.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}crow_indices"] = self._crow_indices
        destination[f"{prefix}col_indices"] = self._col_indices
        destination[f"{prefix}size"] = torch.tensor(self.dense_size)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        take_compressed(state_dict, prefix)
        if f"{prefix}weight_orig" in state_dict:  # torch.nn.utils.prune
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}weight_orig")
        weight, mask = (state_dict.pop(f"{prefix}{name}", None) for name in ("weight", "weight_mask"))
        if weight is not None:
            mask = self._mask_for(weight, prefix) if mask is None else mask.bool()
            state_dict[f"{prefix}values"] = self.values.data
            if weight.shape == self.dense_size == mask.shape:
                for owner in self._owners():
                    owner._set_mask(mask)
                if not self.values.is_meta:
                    self.set_values(self.values.new_empty(self._kept))
                state_dict[f"{prefix}values"] = _ops.compress(weight.to(self.values.dtype), self.pattern)
            else:
                errors.append(
                    f"size mismatch for {prefix}weight: copying a param with shape {weight.shape} from checkpoint, the "
                    f"shape in current model is {self.dense_size}."
                )
        elif strict and f"{prefix}values" in state_dict:
            missing += [f"{prefix}{key}" for key in COMPRESSED_KEYS if f"{prefix}{key}" not in state_dict]
        nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors)


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
