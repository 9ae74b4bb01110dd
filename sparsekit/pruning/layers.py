"""Which layers are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..nn import SparseModule
from ..nn.sparse import PARAMETERS, weight_id

Rule = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def prunable_layers(model: nn.Module, exclude: Rule | Iterable[Rule] = ()) -> dict[str, nn.Module]:
    """Every Conv2d and Linear of a model, dense or sparse, in the order of definition; tied weights once.

    Args:
        model: any module, or a layer itself, whose name is then ``""``.
        exclude: what to leave out, one rule or several: a qualified name or glob pattern (``"layer1.*"``; ``*`` also
            matches dots), a module class, or a function of (qualified name, module) that returns True. A layer with a
            tied weight is left out if a rule matches any of the layers that share it.

    Returns:
        Qualified name to layer.

    Raises:
        TypeError: a rule is none of these.
        ValueError: a pattern or class matches no layer, no layer is left, or a layer has no weight Parameter (lazy, or
            computed by a hook).

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> list(sk.pruning.prunable_layers(model)), list(sk.pruning.prunable_layers(model, exclude=torch.nn.Linear))
        (['0', '2'], ['0'])
    """
    rules = [exclude] if isinstance(exclude, str) or callable(exclude) else list(exclude)
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            _check_weight(name, module)
            groups.setdefault(weight_id(module), []).append((name, module))
    if not groups:
        raise ValueError(f"model must have a Conv2d or Linear layer to prune, got a {type(model).__name__} with none")
    for rule in rules:
        # A function may well match nothing; a name or class that does is a mistake in most cases.
        is_pattern = isinstance(rule, (str, type))
        if is_pattern and not any(_matches(rule, *layer) for group in groups.values() for layer in group):
            raise ValueError(f"exclude must match Conv2d or Linear layers, got {rule!r}, which matches none of them")
    layers = {}
    for group in groups.values():
        if not any(_matches(rule, *layer) for rule in rules for layer in group):
            # Of layers that share a weight, a sparse one knows the mask.
            name, module = max(group, key=lambda layer: isinstance(layer[1], SparseModule))
            layers[name] = module
    if not layers:
        raise ValueError(f"exclude must leave a layer to prune, got {exclude!r}, which matches all {len(groups)}")
    return layers


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """Names of the first and last prunable layers, by order of definition: conv1 and fc of a ResNet.

    Papers that prune uniformly keep these two dense: pass the result as ``exclude``.

    Args:
        model: any module.

    Returns:
        Two names; one if there is a single layer.

    Raises:
        ValueError: as :func:`prunable_layers`.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> sk.pruning.first_and_last(model)
        ('0', '3')
    """
    names = list(prunable_layers(model))
    return tuple(dict.fromkeys((names[0], names[-1])))


def _check_weight(name: str, module: nn.Module) -> None:
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        raise ValueError(f"layer {name!r} is lazy and has no weight yet; run the model once before pruning it")
    if isinstance(module._parameters.get("weight"), nn.Parameter) and module.weight.numel() == 0:
        raise ValueError(
            f"layer {name!r} has no weights to prune, its shape is {tuple(module.weight.shape)}; exclude it"
        )
    if not parametrize.is_parametrized(module, "weight") and not module._parameters.keys() & set(PARAMETERS):
        raise ValueError(f"the weight of layer {name!r} is not a Parameter; remove the hook that computes it")


def _matches(rule: Rule, name: str, module: nn.Module) -> bool:
    if isinstance(rule, str):
        return fnmatchcase(name, rule)
    if isinstance(rule, type):
        return isinstance(module, rule)
    if callable(rule):
        return bool(rule(name, module))
    raise TypeError(f"exclude must hold names, patterns, classes or functions of (name, module), got {rule!r}")
