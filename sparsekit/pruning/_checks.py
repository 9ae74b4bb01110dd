"""Argument checks that several files share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..nn import CompressedModule


def check_sparsity(value: float, name: str = "sparsity") -> None:
    """Raise unless ``value``, the argument called ``name``, is a fraction of zeros in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_steps(value: int, name: str, least: int = 0) -> None:
    """Raise unless ``value``, the argument called ``name``, is a whole number of at least ``least`` optimizer steps."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of optimizer steps, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} optimizer steps, got {value}")


def check_fraction(value: float, name: str) -> None:
    """Raise unless ``value``, the argument called ``name``, is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_not_negative(value: float, name: str) -> None:
    """Raise unless ``value``, the argument called ``name``, is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def refuse_closure(args: tuple, kwargs: Mapping, method: str) -> None:
    """Raise if an optimizer's step, whose arguments a hook was given, computes gradients itself, too late for ``method``."""
    if any(argument is not None for argument in (*args[1:], *kwargs.values())):
        raise RuntimeError(f"{method} needs gradients before optimizer.step(): call it without a closure")


def check_uncompressed(layers: Mapping[str, nn.Module], method: str) -> None:
    """Raise if a layer has no dense weight, which ``method`` works on."""
    for name, layer in layers.items():
        if isinstance(layer, CompressedModule):
            raise ValueError(
                f"{method} needs dense weights, but layer {name!r} is compressed; decompress_ the model first"
            )


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on nothing but ``numbers``, such as a seed and a step."""
    mixed = 0
    for number in numbers:
        mixed = (1_000_003 * mixed + number) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
