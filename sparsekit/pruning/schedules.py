"""Schedules: at which optimizer steps masks change, and to which sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ._checks import check_sparsity, check_steps


class Schedule(Protocol):
    """A dataclass that maps a number of optimizer steps done to an overall sparsity.

    Attributes:
        sparsity: fraction of zeros at the end.
        end: optimizer step of the last update.
    """

    sparsity: float
    end: int

    def __call__(self, step: int) -> float:
        """Fraction of zeros after ``step`` optimizer steps, in [0, 1)."""

    def updates_at(self, step: int) -> bool:
        """Whether masks change after ``step`` optimizer steps; step 0 is before the first."""


@dataclass(frozen=True)
class OneShot:
    """Prune once, after ``end`` optimizer steps; nothing before.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        end: optimizer steps before pruning.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import sparsekit as sk
        >>> schedule = sk.pruning.OneShot(0.9, end=10)
        >>> schedule(9), schedule(10), schedule.updates_at(10)
        (0.0, 0.9, True)
    """

    sparsity: float
    end: int = 0

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_steps(self.end, "end")

    def __call__(self, step: int) -> float:
        return self.sparsity if step >= self.end else 0.0

    def updates_at(self, step: int) -> bool:
        return step == self.end


@dataclass(frozen=True)
class Cubic:
    """s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3 (Zhu & Gupta, arXiv 1710.01878, equation 1).

    Masks change at ``begin``, ``begin + interval``, … and at ``end``, whether or not the interval divides the rest.

    Args:
        sparsity: fraction of zeros s_f from ``end`` on, in [0, 1).
        begin: optimizer step t_0 of the first update.
        end: optimizer step t_1 of the last update.
        interval: optimizer steps between updates.
        initial_sparsity: fraction of zeros s_i at ``begin``, at most ``sparsity``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import sparsekit as sk
        >>> schedule = sk.pruning.Cubic(0.8, begin=0, end=100, interval=50)
        >>> [round(schedule(step), 3) for step in (0, 50, 100)]
        [0.0, 0.7, 0.8]
    """

    sparsity: float
    begin: int
    end: int
    interval: int = 1
    initial_sparsity: float = 0.0

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        check_steps(self.begin, "begin")
        check_steps(self.end, "end")
        check_steps(self.interval, "interval", least=1)
        if self.end <= self.begin:
            raise ValueError(f"end must be later than begin = {self.begin}, got {self.end}")
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity must be at most sparsity = {self.sparsity}, got {self.initial_sparsity}"
            )

    def __call__(self, step: int) -> float:
        progress = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - progress) ** 3

    def updates_at(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.interval == 0 or step == self.end)
