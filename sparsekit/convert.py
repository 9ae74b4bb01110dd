"""Into sparse modules, out of them, and the one door through which masks change."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import _ops
from .nn.compressed import CompressedConv2d, CompressedLinear, CompressedModule
from .nn.depthwise import DepthwiseConv2d, is_depthwise
from .nn.norm import BatchNorm2d, Sequential
from .nn.pool import MaxPool2d
from .nn.sparse import SparseConv2d, SparseLinear, SparseModule, _check_mask, modules_of, take_compressed, weight_id

_SPARSE_CLASS = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}
_DENSE_CLASS = {sparse: dense for dense, sparse in _SPARSE_CLASS.items()}
_COMPRESSED_CLASS = {SparseConv2d: CompressedConv2d, SparseLinear: CompressedLinear}


def _fused_classes() -> dict[type, type]:
    """Of modules between sparse layers: PyTorch's or torchvision's class, and ours."""
    ours: dict[type, type] = {nn.BatchNorm2d: BatchNorm2d, nn.MaxPool2d: MaxPool2d, nn.Sequential: Sequential}
    if "torchvision" in sys.modules:
        from .nn import blocks

        ours |= blocks.FUSED
    return ours


def sparsify_(
    model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None, min_sparsity: float = 0.5
) -> nn.Module:
    """Turn the layers of ``model`` that hold zeros into sparse ones, in place.

    Modules change their class and keep everything else: the Parameter objects (so optimizers stay valid), hooks, tied
    weights, mode. ``torch.nn.utils.prune`` masks and parametrizations of ``weight`` are made permanent first. If a layer
    becomes sparse, BatchNorm2d, MaxPool2d, Sequential, torchvision's blocks and depthwise convolutions that stay dense become
    ours: the same, faster in training.

    Args:
        model: any module; subclasses of ``nn.Conv2d`` and ``nn.Linear`` with a forward of their own are left alone.
        filter_fn: called with (qualified name, module); False leaves that layer dense.
        min_sparsity: layers with a smaller fraction of zeros in the weight stay dense; 0 converts every layer.

    Returns:
        ``model``; ``model`` itself is converted if it is a layer.

    Raises:
        ValueError: ``min_sparsity`` is outside [0, 1].

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU())
        >>> _ = sk.pruning.magnitude_(model, sparsity=0.9, distribution="uniform")
        >>> sk.sparsify_(model)[0].sparsity > 0.89
        True
    """
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity must be in [0, 1], got {min_sparsity}")
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) or not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if filter_fn is not None and not filter_fn(name, module):
            continue
        if type(module) is DepthwiseConv2d:
            _plain_depthwise(module)
        mask = _bake_pruning(module)
        if type(module) not in _SPARSE_CLASS:
            continue
        if mask is None:
            mask = module.weight.detach() != 0
        if 1 - mask.float().mean().item() < min_sparsity:
            continue
        module.__class__ = _SPARSE_CLASS[type(module)]
        module._attach(mask)
    if any(isinstance(module, SparseModule) for module in model.modules()):
        ours = _fused_classes()
        for module in model.modules():
            module.__class__ = ours.get(type(module), type(module))
            if type(module) is nn.Conv2d and is_depthwise(module) and not module.weight.is_meta:
                module.__class__ = DepthwiseConv2d
                module._attach()
    _hide_structure_from_ddp(model)
    return model


def _plain_depthwise(module: DepthwiseConv2d) -> None:
    module._detach()
    module.__class__ = nn.Conv2d


def _hide_structure_from_ddp(model: nn.Module) -> None:
    """Keep masks and indices out of DDP's buffer broadcasts, which would write them behind every cache's back."""
    names = [
        f"{prefix}.{buffer}" if prefix else buffer
        for prefix, module in model.named_modules()
        if isinstance(module, SparseModule)
        for buffer in module._buffers
    ]
    if names:
        model._ddp_params_and_buffers_to_ignore = sorted(
            {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
        )


def _bake_pruning(module: nn.Module) -> Tensor | None:
    """Make ``torch.nn.utils.prune`` or a parametrization of ``weight`` permanent; return prune's mask if there is one."""
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        return None
    hooks = [k for k, hook in module._forward_pre_hooks.items() if getattr(hook, "_tensor_name", None) == "weight"]
    if not hooks or "weight_orig" not in module._parameters:
        return None
    # prune.remove makes the same change, but a module then holds a new Parameter in some versions of PyTorch.
    for key in hooks:
        del module._forward_pre_hooks[key]
    mask = module._buffers.pop("weight_mask").bool()
    weight = module._parameters.pop("weight_orig")
    module.__dict__.pop("weight", None)
    with torch.no_grad():
        weight.mul_(mask)
    module._parameters["weight"] = weight
    # nn.Module prints and saves parameters in order: weight before bias, as in a fresh module.
    for name in [name for name in module._parameters if name != "weight"]:
        module._parameters[name] = module._parameters.pop(name)
    return mask


def densify_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Turn every module of ours in ``model`` back into the plain PyTorch module, in place, zeros included.

    Args:
        model: any module.
        optimizer: holds the Parameters of compressed layers, which are replaced; see :func:`decompress_`.

    Returns:
        ``model``.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(8, 8)), min_sparsity=0)
        >>> type(sk.densify_(model)[0]).__name__
        'Linear'
    """
    decompress_(model, optimizer)
    plain = {ours: theirs for theirs, ours in _fused_classes().items()}
    for module in model.modules():
        if isinstance(module, SparseModule):
            module._detach()
            module.__class__ = next(dense for sparse, dense in _DENSE_CLASS.items() if isinstance(module, sparse))
        elif type(module) is DepthwiseConv2d:
            _plain_depthwise(module)
        else:
            module.__class__ = plain.get(type(module), type(module))
    return model


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A state dict without masks, that the plain PyTorch model loads strictly; tensors are shared with ``model``, where
    it has them.

    Args:
        model: any module.

    Returns:
        Name to tensor.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(8, 8)), min_sparsity=0)
        >>> torch.nn.Sequential(torch.nn.Linear(8, 8)).load_state_dict(sk.dense_state_dict(model))
        <All keys matched successfully>
    """
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseModule):
            prefix = state_prefix(name)
            take_compressed(state, prefix)
            state.pop(f"{prefix}weight_mask", None)
    return state


def state_prefix(name: str) -> str:
    """What the entries of a module in a state dict begin with; torch's wrapper for checkpointing leaves itself out."""
    name = ".".join(part for part in name.split(".") if part != "_checkpoint_wrapped_module")
    return f"{name}." if name else ""


def set_mask_(module: SparseModule, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> SparseModule:
    """Give a sparse layer another mask: the one door through which masks change.

    The weight, its gradient and the optimizer's state become zero where the new mask drops; where it grows, the weight
    stays at zero and its state starts at zero; what is kept is kept. Layers that share the weight get the mask too.

    Args:
        module: a :class:`~sparsekit.nn.SparseConv2d` or :class:`~sparsekit.nn.SparseLinear`.
        mask: bool, the weight's shape; True is kept.
        optimizer: whose state to keep consistent, if the weight is being trained.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not sparse, or ``mask`` is not bool.
        ValueError: ``mask`` has another shape than the weight.

    Example:
        >>> import torch, sparsekit as sk
        >>> layer = sk.nn.SparseLinear(8, 8)
        >>> sk.set_mask_(layer, torch.eye(8, dtype=torch.bool)).sparsity
        0.875
    """
    if not isinstance(module, SparseModule):
        raise TypeError(f"module must be a SparseConv2d or SparseLinear, got {type(module).__name__}; see sparsify_")
    parameter = module.stored
    mask = _check_mask(module.weight, mask).to(parameter.device)
    keep = module.keeper(mask)
    size = parameter.shape
    with torch.no_grad():
        kept = keep(parameter.data)
        grad = None if parameter.grad is None else keep(parameter.grad)
        for owner in module._owners():
            owner._set_mask(mask)
        if isinstance(module, CompressedModule):
            module.set_values(kept)
        parameter.grad = grad
        if optimizer is not None:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == size:
                    state[name] = keep(value)
                elif torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == size.numel():
                    # Gradients of several steps (MFACOptimizer).
                    state[name] = torch.stack([keep(row.view(size)).flatten() for row in value])
    return module


def keep_zeros(optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
    """Make any optimizer keep pruned weights at zero, by a hook after each step.

    Elementwise optimizers (SGD, Adam, AdamW, RMSprop …) need none: a zero weight with a zero gradient stays zero. Those
    that mix the entries of a weight (Muon, Shampoo) do.

    Args:
        optimizer: any ``torch.optim.Optimizer`` over a model with sparse layers.

    Returns:
        A handle; ``handle.remove()`` undoes it.

    Example:
        >>> import torch, sparsekit as sk
        >>> layer = sk.nn.SparseLinear(8, 8)
        >>> handle = sk.keep_zeros(torch.optim.SGD(layer.parameters(), lr=0.1))
    """
    reference = weakref.ref(optimizer)

    def zero_pruned(*_):
        with torch.no_grad():
            for group in reference().param_groups:
                for parameter in group["params"]:
                    for module in modules_of(parameter):
                        if not isinstance(module, CompressedModule):
                            parameter.masked_fill_(~module.weight_mask, 0)

    return optimizer.register_step_post_hook(zero_pruned)


def compress_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Train on kept weights alone: a Parameter ``values`` ``[nnz]`` instead of ``weight``, in place.

    Weights, gradients, optimizer state and indices of a layer then take 24 bytes a kept weight with SGD and momentum,
    where the dense layer takes 12 bytes a weight: a tenth at 95 % sparsity. Elementwise optimizers (SGD, Adam, AdamW,
    RMSprop …) compute what they compute on dense weights; with ``fused=True`` they update all layers' kept weights at
    once. Optimizers that look at a weight as a matrix (Muon, Shampoo, Adafactor) cannot work. ``values`` has one dimension
    and another name: rules for weight decay that go by either must know it, and ``nn.init`` on ``weight`` has no effect.
    Subclasses with a forward of their own stay as they are. Under DDP only kept values travel; it must be wrapped around
    the model afterwards, and masks may then change only if they keep as many weights.

    Args:
        model: its sparse layers become :class:`~sparsekit.nn.CompressedConv2d` and
            :class:`~sparsekit.nn.CompressedLinear`; others stay as they are.
        optimizer: holds ``model``'s Parameters; it gets the new ones, with their state. None: make one afterwards.

    Returns:
        ``model``; ``model`` itself is converted if it is a layer.

    Raises:
        ValueError: a sparse layer's weight is tied to a layer that is plain, has another mask or cannot be compressed; or
            the model is on the meta device. Nothing was changed.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = sk.sparsify_(sk.pruning.magnitude_(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.9))
        >>> [name for name, _ in sk.compress_(model).named_parameters()]
        ['0.values', '0.bias']
    """
    _check_compressible(model)
    for module in model.modules():
        if type(module) not in _COMPRESSED_CLASS:
            continue
        convert = partial(_ops.compress, pattern=module.pattern)
        owners = list(modules_of(module.stored))
        values = _exchange_parameter(module.stored, convert, optimizer)
        for owner in owners:
            owner.__class__ = _COMPRESSED_CLASS[type(owner)]
            owner._compress(values)
    _hide_structure_from_ddp(model)
    return model


def decompress_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Undo :func:`compress_`: dense weights with a mask beside them, in place.

    Args:
        model: any module.
        optimizer: holds ``model``'s Parameters; it gets the new ones, with their state.

    Returns:
        ``model``.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = sk.sparsify_(sk.pruning.magnitude_(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.9))
        >>> type(sk.decompress_(sk.compress_(model))[0]).__name__
        'SparseLinear'
    """
    for module in model.modules():
        if not isinstance(module, CompressedModule):
            continue
        convert = partial(_ops.decompress, pattern=module.pattern, size=module.dense_size)
        owners = list(modules_of(module.stored))
        weight = _exchange_parameter(module.stored, convert, optimizer)
        for owner in owners:
            owner._decompress(weight)
            owner.__class__ = next(c for c, compressed in _COMPRESSED_CLASS.items() if type(owner) is compressed)
    _hide_structure_from_ddp(model)
    return model


def _exchange_parameter(
    old: nn.Parameter, convert: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None
) -> nn.Parameter:
    """A Parameter of what ``convert`` makes of ``old``, its gradient and its state, which replaces it in ``optimizer``."""
    with torch.no_grad():
        new = nn.Parameter(convert(old.data), old.requires_grad)
        if old.grad is not None:
            new.grad = convert(old.grad)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"][:] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = {
                    name: convert(value) if torch.is_tensor(value) and value.shape == old.shape else value
                    for name, value in optimizer.state.pop(old).items()
                }
    return new


def _check_compressible(model: nn.Module) -> None:
    """Raise ValueError if a layer cannot be compressed for what its weight is or whom it is tied to."""
    sparse = {m.stored: m for m in model.modules() if type(m) in _COMPRESSED_CLASS}
    for name, module in model.named_modules():
        others = (
            [p for p in module._parameters.values() if p in sparse] if type(module) not in _COMPRESSED_CLASS else []
        )
        if others:
            kind = "sparse" if isinstance(module, SparseModule) else "plain"
            raise ValueError(
                f"model must not tie sparse weights to {kind} {type(module).__name__} layers, but ties {name}"
            )
    for parameter, module in sparse.items():
        if module.weight_mask.is_meta:
            raise ValueError("model must hold weights to be compressed, but is on the meta device")
        if any(not torch.equal(owner.weight_mask, module.weight_mask) for owner in modules_of(parameter)):
            raise ValueError("model must not tie sparse weights whose masks differ; set_mask_ gives them one")


class SparsityReport(dict):
    """``{layer name: fraction of zeros}``, printable; ``overall`` counts every listed weight.

    Attributes:
        overall: fraction of zeros over all listed layers.
        zeros: ``{layer name: number of zeros}``.
        numel: ``{layer name: number of weights}``.
    """

    def __init__(self, zeros: dict[str, int], numel: dict[str, int]):
        super().__init__({name: zeros[name] / max(numel[name], 1) for name in zeros})
        self.zeros, self.numel = zeros, numel
        self.overall = sum(zeros.values()) / max(sum(numel.values()), 1)

    def __str__(self) -> str:
        width = max([len(name) for name in self] + [len("overall")])
        lines = [f"{'layer':<{width}}  sparsity      weights"]
        lines += [f"{name:<{width}}  {value:8.4f}  {self.numel[name]:11,d}" for name, value in self.items()]
        return "\n".join([*lines, f"{'overall':<{width}}  {self.overall:8.4f}  {sum(self.numel.values()):11,d}"])


def sparsity(model: nn.Module) -> SparsityReport:
    """Fraction of zeros in the weight of every Conv2d and Linear, dense or sparse; tied weights count once.

    Args:
        model: any module.

    Returns:
        A dict by layer name, with ``.overall``; ``print`` shows a table.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.sparsity(torch.nn.Sequential(torch.nn.Linear(8, 8))).overall
        0.0
    """
    zeros, numel, seen = {}, {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if weight_id(module) not in seen:
            seen.add(weight_id(module))
            weight = module.weight
            zeros[name or type(module).__name__] = int((weight == 0).sum())
            numel[name or type(module).__name__] = weight.numel()
    return SparsityReport(zeros, numel)
