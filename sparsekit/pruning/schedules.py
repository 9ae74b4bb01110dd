"""Schedules: at which optimizer steps masks change, and to which sparsity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

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
class _Gradual:
    """s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^POWER."""

    POWER: ClassVar[int]

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
        return self.sparsity + (self.initial_sparsity - self.sparsity) * (1 - progress) ** self.POWER

    def updates_at(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.interval == 0 or step == self.end)


@dataclass(frozen=True)
class Cubic(_Gradual):
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

    POWER = 3


@dataclass(frozen=True)
class Linear(_Gradual):
    """s(t) goes from ``initial_sparsity`` at ``begin`` to ``sparsity`` at ``end`` by equal amounts; as :class:`Cubic`.

    Example:
        >>> import sparsekit as sk
        >>> schedule = sk.pruning.Linear(0.8, begin=0, end=100, interval=50)
        >>> [schedule(step) for step in (0, 50, 100)]
        [0.0, 0.4, 0.8]
    """

    POWER = 1


@dataclass(frozen=True)
class Constant:
    """The same sparsity all the time; masks change every ``interval`` steps, for the last time at or before ``end``.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        interval: optimizer steps between updates; the first is after ``interval`` steps.
        end: optimizer step after which masks stay.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import sparsekit as sk
        >>> schedule = sk.pruning.Constant(0.9, interval=100, end=250)
        >>> [step for step in range(400) if schedule.updates_at(step)]
        [100, 200]
    """

    sparsity: float
    interval: int
    end: int

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_steps(self.interval, "interval", least=1)
        check_steps(self.end, "end")

    def __call__(self, step: int) -> float:
        return self.sparsity

    def updates_at(self, step: int) -> bool:
        return 0 < step <= self.end and step % self.interval == 0

    def cosine(self, step: int, initial: float) -> float:
        """``initial / 2 * (1 + cos(pi * step / end))``: RigL's share of weights to move (arXiv 1911.11134, section 3)."""
        return initial / 2 * (1 + math.cos(math.pi * min(step / max(self.end, 1), 1.0)))


@dataclass(frozen=True)
class Phases:
    """Sparse and dense phases in turn (AC/DC, arXiv 2106.12379): ``sparsity`` from every step in ``prune_at`` on, 0 from
    every step in ``restore_at`` on.

    Args:
        sparsity: fraction of zeros in sparse phases, in [0, 1).
        prune_at: optimizer steps at which sparse phases begin.
        restore_at: optimizer steps at which dense phases begin, one between two of ``prune_at`` each.

    Raises:
        ValueError: an argument is out of range, or the phases do not take turns.

    Example:
        >>> import sparsekit as sk
        >>> schedule = sk.pruning.Phases(0.9, prune_at=(10, 20), restore_at=(15,))
        >>> [schedule(step) for step in (9, 10, 15, 20)]
        [0.0, 0.9, 0.0, 0.9]
    """

    sparsity: float
    prune_at: tuple[int, ...]
    restore_at: tuple[int, ...] = ()

    def __post_init__(self):
        check_sparsity(self.sparsity)
        if not self.prune_at:
            raise ValueError("prune_at must hold at least one optimizer step, got none")
        for step in (*self.prune_at, *self.restore_at):
            check_steps(step, "prune_at and restore_at")
        steps = [step for pair in zip(self.prune_at, (*self.restore_at, math.inf)) for step in pair]
        if len(self.restore_at) != len(self.prune_at) - 1 or any(a >= b for a, b in zip(steps, steps[1:])):
            raise ValueError(
                f"prune_at and restore_at must take turns, and begin and end with prune_at, got {self.prune_at} and "
                f"{self.restore_at}"
            )

    @classmethod
    def evenly(cls, sparsity: float, *, warmup: int, sparse: int, dense: int, last_dense: int, final: int) -> Phases:
        """``warmup`` dense steps, then ``sparse`` and ``dense`` ones in turn, as long as they fit, ``last_dense`` ones in
        place of the last ``dense``, and sparse from step ``final`` on.

        Example:
            >>> import sparsekit as sk
            >>> sk.pruning.Phases.evenly(0.9, warmup=10, sparse=5, dense=5, last_dense=10, final=85).prune_at
            (10, 20, 30, 40, 50, 60, 70, 85)
        """
        for name, steps in (("warmup", warmup), ("last_dense", last_dense), ("final", final)):
            check_steps(steps, name)
        for name, steps in (("sparse", sparse), ("dense", dense)):
            check_steps(steps, name, least=1)
        if final < warmup:
            raise ValueError(f"final must not be earlier than warmup = {warmup}, got {final}")
        prune_at = []
        while warmup + sparse <= final - last_dense:
            prune_at.append(warmup)
            warmup += sparse + dense
        restore_at = [step + sparse for step in prune_at]
        return cls(sparsity, (*prune_at, final), tuple(restore_at))

    @property
    def end(self) -> int:
        return self.prune_at[-1]

    def __call__(self, step: int) -> float:
        pruned, restored = (
            max((s for s in steps if s <= step), default=-1) for steps in (self.prune_at, self.restore_at)
        )
        return self.sparsity if pruned > restored else 0.0

    def updates_at(self, step: int) -> bool:
        return step in self.prune_at or step in self.restore_at


@dataclass(frozen=True)
class Rounds:
    """Every round prunes the same share of what is left (lottery tickets, arXiv 1803.03635, section 2), until ``sparsity``.

    Args:
        sparsity: fraction of zeros after the last round, in [0, 1); the last round prunes less if it must.
        interval: optimizer steps of a round; it prunes at its end.
        rate: share of the remaining weights that a round prunes, in (0, 1).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import sparsekit as sk
        >>> schedule = sk.pruning.Rounds(0.4, interval=10, rate=0.2)
        >>> [round(schedule(step), 2) for step in (9, 10, 20, 30)], schedule.end
        ([0.0, 0.2, 0.36, 0.4], 30)
    """

    sparsity: float
    interval: int
    rate: float = 0.2

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_steps(self.interval, "interval", least=1)
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be in (0, 1), got {self.rate}")

    @property
    def end(self) -> int:
        rounds = math.log(1 - self.sparsity) / math.log(1 - self.rate)
        # A target that whole rounds meet must not need another one for its rounding error.
        return math.ceil(rounds - 1e-9) * self.interval

    def __call__(self, step: int) -> float:
        return min(self.sparsity, 1 - (1 - self.rate) ** (step // self.interval))

    def updates_at(self, step: int) -> bool:
        return 0 < step <= self.end and step % self.interval == 0
