"""Argument checks that several files share."""

from __future__ import annotations


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
