"""SparseConv2d and SparseLinear: nn.Conv2d and nn.Linear that compute only where their mask is.

``weight`` stays a dense Parameter and ``weight_mask`` a bool buffer of its shape, so that checkpoints, optimizers and
``copy.deepcopy`` see what they know. Behind them, non-persistent buffers hold the compressed
:class:`~sparsekit.formats.Pattern`. Masks change through :func:`sparsekit.set_mask_` only.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ops, dispatch
from ..formats import Pattern, mask_from_pattern, pattern_from_mask, validate_csr

logger = logging.getLogger("sparsekit")

# Every live sparse module: what finds the other owners of a tied weight, and the mask behind an optimizer's parameter.
_modules: weakref.WeakSet[SparseModule] = weakref.WeakSet()


# What the Parameter behind a layer's weight may be called.
PARAMETERS = ("weight", "weight_orig", "values")


def weight_id(module: nn.Module) -> int:
    """What layers have in common if and only if their weights are tied."""
    parameters = module._parameters
    # torch.nn.utils.prune and compress_ rename the Parameter; a parametrization hides it, and its layer counts as untied.
    return id(next((parameters[name] for name in PARAMETERS if name in parameters), module))


def modules_of(parameter: Tensor) -> Iterator[SparseModule]:
    """The live sparse modules that keep their weight in this Parameter."""
    return (m for m in list(_modules) if m._parameters.get(m.STORED) is parameter)


class SparseModule(nn.Module):
    """What :class:`SparseConv2d` and :class:`SparseLinear` share: a mask beside the weight, and its compressed form.

    Attributes:
        weight_mask: bool, the shape of ``weight``; True is kept.
        backend: ``"auto"`` follows the measurements of :func:`sparsekit.autotune_` if there are any, else the cost
            table in :mod:`sparsekit.dispatch`; ``"sparse"`` and ``"dense"`` force one of them.
        infer_mask: whether loading a checkpoint without a mask replaces an existing mask by the checkpoint's zeros.
        STORED: name of the Parameter that is trained: ``weight``, or ``values`` after :func:`sparsekit.compress_`.
        tuned: what :func:`sparsekit.autotune_` measured, ``{dispatch key: (sparse seconds, dense seconds)}``.
    """

    weight: nn.Parameter
    weight_mask: Tensor
    STORED = "weight"
    backend: str = "auto"
    infer_mask: bool = False
    groups: int = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._attach(torch.ones_like(self.weight, dtype=torch.bool))

    def _attach(self, mask: Tensor) -> None:
        """Turn a plain module, whose class was just set to a sparse one, into a sparse module."""
        self.tuned = {}
        self.register_buffer("weight_mask", None)
        for name in Pattern._fields:
            self.register_buffer(f"_{name}", None, persistent=False)
        self._set_mask(mask)
        _modules.add(self)

    def _detach(self) -> None:
        """Undo :meth:`_attach`; the caller sets the class back."""
        _modules.discard(self)
        for name in ("weight_mask", *(f"_{name}" for name in Pattern._fields)):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name in ("tuned", "_mask_version", "_kept", "backend", "infer_mask"):
            self.__dict__.pop(name, None)

    @property
    def stored(self) -> nn.Parameter:
        """The Parameter that is trained; ValueError if a parametrization or a pruning hook computes the weight."""
        if self.STORED not in self._parameters:
            raise ValueError(
                f"the {self.STORED} of this {type(self).__name__} must be a Parameter; remove the parametrization or the "
                "torch.nn.utils.prune hook that computes it"
            )
        return self._parameters[self.STORED]

    @property
    def is_trained(self) -> bool:
        """Whether the weight wants a gradient; it may be a parametrization's."""
        parameter = self._parameters.get(self.STORED)
        return (self.weight if parameter is None else parameter).requires_grad

    def _owners(self) -> set[SparseModule]:
        """The modules that share the weight, this one too."""
        parameter = self._parameters.get(self.STORED)
        return {self} if parameter is None else {self, *modules_of(parameter)}

    def _set_mask(self, mask: Tensor) -> None:
        """Install ``mask`` and what follows from it, and zero the weight outside of it."""
        mask = mask.detach().to(device=self.weight.device, dtype=torch.bool).clone()
        self.weight_mask = mask
        self._kept = mask.numel()
        self._remember_version()
        if mask.is_meta:
            return
        for name, indices in zip(Pattern._fields, pattern_from_mask(mask, self.groups)):
            setattr(self, f"_{name}", indices)
        self._kept = self._col_indices.numel()
        with torch.no_grad():
            self.weight.masked_fill_(~mask, 0)

    def _remember_version(self) -> None:
        mask = self.weight_mask
        self._mask_version = None if mask is None or mask.is_inference() or mask.is_meta else mask._version

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._remember_version()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._remember_version()
        _modules.add(self)

    @property
    def pattern(self) -> Pattern:
        """The compressed form of ``weight_mask``."""
        if (
            not torch.compiler.is_compiling()
            and self._mask_version is not None
            and self._mask_version != self.weight_mask._version
        ):
            warnings.warn(
                "weight_mask was written in place; change masks with sparsekit.set_mask_, which keeps the weight, the "
                "gradient and the optimizer state consistent",
                stacklevel=2,
            )
            self._set_mask(self.weight_mask)
        return Pattern(*(getattr(self, f"_{name}") for name in Pattern._fields))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the mask makes, in [0, 1]."""
        return 1 - self._kept / max(self.weight_mask.numel(), 1)

    def masked_weight(self) -> Tensor:
        """The dense weight with its pruned entries at zero; its gradient is masked too."""
        return self.weight if self._kept == self.weight.numel() else self.weight * self.weight_mask

    def compressed_weight(self) -> Tensor:
        """The kept weights, ``[nnz]``, in the order of ``pattern.col_indices``."""
        return _ops.compress(self.weight, self.pattern)

    def keeper(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """What a new mask leaves of a tensor that goes with :attr:`stored`, a gradient or an optimizer's state: what is
        kept stays, what grows starts at zero. The tensor itself may be changed."""
        dropped = ~(mask & self.weight_mask)
        return lambda tensor: tensor.masked_fill_(dropped, 0)

    def dense_weight_grad(self, input: Tensor, grad_output: Tensor) -> Tensor:
        """The gradient of every weight, pruned ones too, of the weight's shape: dense work, for re-growth methods."""
        raise NotImplementedError

    def runs_sparse(self, input: Tensor) -> bool:
        """Whether :meth:`forward` on ``input`` takes the sparse kernels: see :func:`sparsekit.dispatch.decide`."""
        return dispatch.decide(self, input).backend == "sparse"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4f}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        weight, mask = f"{prefix}weight", f"{prefix}weight_mask"
        take_compressed(state_dict, prefix)
        if f"{prefix}weight_orig" in state_dict:  # torch.nn.utils.prune
            state_dict[weight] = state_dict.pop(f"{prefix}weight_orig")
        if mask in state_dict:
            state_dict[mask] = state_dict[mask].bool()
        elif weight in state_dict:
            state_dict[mask] = self._mask_for(state_dict[weight], prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        mask = self.weight_mask
        for owner in self._owners():
            owner._set_mask(mask)

    def _mask_for(self, weight: Tensor, prefix: str) -> Tensor:
        """The mask to use with a checkpoint that brings none."""
        name = prefix.rstrip(".") or type(self).__name__
        zeros = weight == 0
        if self.sparsity == 0 or self.infer_mask:
            if zeros.any():
                logger.warning(
                    "%s: mask inferred from the checkpoint's zeros, sparsity %.4f", name, zeros.float().mean()
                )
            return ~zeros
        if weight.shape == self.weight_mask.shape:
            dropped = int((~zeros & ~self.weight_mask.to(zeros.device)).sum())
            warnings.warn(
                f"{name}: the checkpoint has no weight_mask; the module's own mask stays, and drops {dropped} "
                "non-zero weights of the checkpoint. Set infer_mask = True on the module to take the checkpoint's zeros",
                stacklevel=2,
            )
        return self.weight_mask


COMPRESSED_KEYS = ("values", "crow_indices", "col_indices", "size")


def take_compressed(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Replace a compressed layer's entries of a state dict, if they are all there, by its dense weight and its mask."""
    if not all(f"{prefix}{key}" in state_dict for key in COMPRESSED_KEYS):
        return
    values, crow, col, size = (state_dict.pop(f"{prefix}{key}") for key in COMPRESSED_KEYS)
    size = torch.Size(size.tolist())
    validate_csr(crow, col, math.prod(size[1:]))
    if crow.numel() != size[0] + 1 or values.shape != col.shape:
        raise ValueError(
            f"{prefix}values must be a weight of {tuple(size)}, got {values.numel()} in {crow.numel() - 1} rows"
        )
    pattern = Pattern(crow, col, crow, col, col)
    state_dict[f"{prefix}weight"] = _ops.decompress(values, pattern, size)
    state_dict[f"{prefix}weight_mask"] = mask_from_pattern(pattern, size)


def _check_mask(weight: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return weight.detach() != 0
    if mask.shape != weight.shape:
        raise ValueError(f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    return mask


class SparseConv2d(SparseModule, nn.Conv2d):
    """``nn.Conv2d`` with an unstructured sparse weight: same constructor, same shapes, same checkpoints.

    A fresh module keeps every weight; give it a mask with :meth:`from_dense`, :func:`sparsekit.sparsify_`,
    :func:`sparsekit.set_mask_`, or by loading a checkpoint that holds zeros.

    Shape:
        - input: ``[n, in_channels, h, w]`` or ``[in_channels, h, w]``, NCHW or channels_last
        - output: as ``nn.Conv2d``, in the input's memory format
        - weight, weight_mask: ``[out_channels, in_channels / groups, kh, kw]``

    Raises:
        ValueError, TypeError, NotImplementedError: see :func:`sparsekit._ops.conv2d`.

    Example:
        >>> import torch, sparsekit as sk
        >>> conv = torch.nn.Conv2d(64, 64, 3, padding=1)
        >>> mask = torch.rand_like(conv.weight) > 0.9
        >>> sparse = sk.nn.SparseConv2d.from_dense(conv, mask)
        >>> sparse(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
    """

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> SparseConv2d:
        """A sparse copy of ``conv``.

        Args:
            conv: any ``nn.Conv2d``; it is not changed.
            mask: bool, the weight's shape; None keeps the weights that are not zero.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``, or ``mask`` is not bool.
            ValueError: ``mask`` has another shape than the weight.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        mask = _check_mask(conv.weight, mask)
        sparse = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device="meta", dtype=conv.weight.dtype,
        )  # fmt: skip
        return _fill(sparse, conv, mask)

    def to_dense(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with the same weights, zeros included."""
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device="meta", dtype=self.weight.dtype,
        )  # fmt: skip
        return _copy_parameters(dense, self)

    def forked(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """``self(input), input``, for a block with a shortcut: the gradients of both are added in the kernel.

        Shape:
            - input: ``[n, in_channels, h, w]`` or ``[in_channels, h, w]``
            - returns: the output, as of the module, and the input

        Example:
            >>> import torch, sparsekit as sk
            >>> conv = sk.nn.SparseConv2d(8, 8, 3, padding=1)
            >>> out, shortcut = conv.forked(torch.randn(2, 8, 6, 6))
            >>> (out + shortcut).shape
            torch.Size([2, 8, 6, 6])
        """
        if not self.runs_sparse(input) or self.padding_mode != "zeros":
            return self.forward(input), input
        return self._conv_forward(input, None, self.bias, fork=True)

    def _conv_forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, fork: bool = False):
        if not self.runs_sparse(input):
            return super()._conv_forward(input, self.masked_weight(), bias)
        input, padding = self._padded(input)
        return _ops.conv2d(
            input, self.compressed_weight(), self.pattern, bias, **self._geometry, padding=padding, fork=fork
        )

    @property
    def _plain_geometry(self) -> tuple | None:
        """The geometry as :func:`sparsekit._ops.conv2d_batch_norms` takes it; None for layers that it cannot take."""
        if self.bias is not None or self.padding_mode != "zeros":
            return None
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return self.kernel_size, self.stride, (top, bottom, left, right), self.dilation, self.groups

    @property
    def _geometry(self) -> dict:
        return {
            "kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation, "groups": self.groups,
        }  # fmt: skip

    def _padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """The input, padded already if not with zeros, and the zeros that remain to be added: top, bottom, left, right."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode == "zeros":
            return input, (top, bottom, left, right)
        layout = torch.channels_last if _ops.is_channels_last(input) else torch.contiguous_format
        input = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
        return (input.contiguous(memory_format=layout) if input.dim() == 4 else input), (0, 0, 0, 0)

    def dense_weight_grad(self, input: Tensor, grad_output: Tensor) -> Tensor:
        input, padding = self._padded(input)
        if input.dim() == 3:
            input, grad_output = input.unsqueeze(0), grad_output.unsqueeze(0)
        geometry = (list(self.kernel_size), list(self.stride), list(padding), list(self.dilation), self.groups)
        dtype = self.stored.dtype
        return torch.ops.sparsekit.conv2d_weight_grad(grad_output.to(dtype), input.to(dtype), *geometry)


class SparseLinear(SparseModule, nn.Linear):
    """``nn.Linear`` with an unstructured sparse weight: same constructor, same shapes, same checkpoints.

    Shape:
        - input: ``[..., in_features]``
        - output: ``[..., out_features]``
        - weight, weight_mask: ``[out_features, in_features]``

    Raises:
        ValueError, TypeError, NotImplementedError: see :func:`sparsekit._ops.linear`.

    Example:
        >>> import torch, sparsekit as sk
        >>> linear = torch.nn.Linear(128, 64)
        >>> sparse = sk.nn.SparseLinear.from_dense(linear, torch.rand_like(linear.weight) > 0.9)
        >>> sparse(torch.randn(32, 128)).shape
        torch.Size([32, 64])
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """A sparse copy of ``linear``; arguments and errors as :meth:`SparseConv2d.from_dense`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        mask = _check_mask(linear.weight, mask)
        sparse = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=linear.weight.dtype
        )
        return _fill(sparse, linear, mask)

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the same weights, zeros included."""
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        return _copy_parameters(dense, self)

    def forward(self, input: Tensor) -> Tensor:
        if not self.runs_sparse(input):
            return F.linear(input, self.masked_weight(), self.bias)
        return _ops.linear(input, self.compressed_weight(), self.pattern, self.bias)

    def dense_weight_grad(self, input: Tensor, grad_output: Tensor) -> Tensor:
        dtype = self.stored.dtype
        rows, columns = grad_output.reshape(-1, self.out_features), input.reshape(-1, self.in_features)
        return rows.to(dtype).T @ columns.to(dtype)


def _copy_parameters(target: nn.Module, source: nn.Module) -> nn.Module:
    """Give ``target`` copies of ``source``'s parameters, and its mode."""
    for name in ("weight", "bias"):
        parameter = getattr(source, name)
        if parameter is not None:
            trained = source.stored if name == "weight" and isinstance(source, SparseModule) else parameter
            setattr(target, name, nn.Parameter(parameter.detach().clone(), trained.requires_grad))
    return target.train(source.training)


def _fill(sparse: SparseModule, dense: nn.Module, mask: Tensor) -> SparseModule:
    _copy_parameters(sparse, dense)
    sparse._set_mask(mask)
    return sparse
