"""Second-order pruning: WoodFisher, oBS and M-FAC remove the weights whose loss, to second order, is smallest.

All three score a weight by w^2 / (2 [F^-1]_ii), the increase of the loss when it is removed and the others make up for it,
and then let the others do so: dw = -F^-1 (w_pruned / diag F^-1) (optimal brain surgeon). They differ in how much of the
inverse Fisher matrix F^-1 they know; see :mod:`sparsekit.pruning.fisher`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from ._checks import check_not_negative, check_steps, check_uncompressed
from .base import Pruner, prune_masks
from .distributions import Distribution
from .fisher import Batches, BlockFisher, LossFn, LowRankFisher, gradients
from .layers import Rule
from .schedules import Cubic, OneShot
from .states import StatePolicy


def obs_score(weight: Tensor, diagonal: Tensor) -> Tensor:
    """w^2 / (2 [F^-1]_ii) (arXiv 2004.14340, equation 13); both of one shape, as the result."""
    return weight.detach().square() / (2 * diagonal)


class _SecondOrder(Pruner):
    """What the methods of this file share."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        batches: Batches,
        loss_fn: LossFn,
        *,
        gradients: int,
        dampening: float,
        recompute: int = 1,
        memory: float = 2.5e9,
        begin: int = 0,
        end: int = 0,
        interval: int = 1,
        initial_sparsity: float = 0.0,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "follow",
    ):
        check_steps(gradients, "gradients", least=1)
        check_steps(recompute, "recompute", least=1)
        check_not_negative(dampening, "dampening")
        if not memory >= 0:
            raise ValueError(f"memory must be a number of bytes, at least 0, got {memory}")
        if dampening == 0:
            raise ValueError("dampening must be positive, got 0")
        if end == 0 and (begin, interval, initial_sparsity) != (0, 1, 0.0):
            raise ValueError(
                "end must be given where begin, interval or initial_sparsity is, got 0: pruning is one-shot"
            )
        self.batches, self.loss_fn = batches, loss_fn
        self.gradients, self.dampening, self.recompute, self.memory = gradients, dampening, recompute, memory
        schedule = OneShot(sparsity) if end == 0 else Cubic(sparsity, begin, end, interval, initial_sparsity)
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)
        self._check_memory()

    def _check_memory(self) -> None:
        """Raise MemoryError if an update would need more than is allowed."""
        raise NotImplementedError

    def _prune_to(self, sparsity: float) -> None:
        check_uncompressed(self.layers, type(self).__name__)
        self._check_memory()
        before = self.sparsity
        for part in range(1, self.recompute + 1):
            target = before + (sparsity - before) * part / self.recompute
            if target >= self.sparsity:
                self._prune_once(target)

    def _prune_once(self, sparsity: float) -> None:
        """Score, choose, move the other weights, and set the masks."""
        raise NotImplementedError

    def _gradients(self, names: Iterable[str], description: str = "gradients") -> Iterator[dict[str, Tensor]]:
        weights = {name: self.layers[name].weight for name in names}
        return gradients(self.model, weights, self.batches, self.loss_fn, self.gradients, description)

    @torch.no_grad()
    def _move(self, masks: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> None:
        """Add the updates, but for what the masks prune."""
        for name, update in updates.items():
            layer = self.layers[name]
            layer.weight.add_(update.masked_fill(~masks[name], 0))

    def _pruned_over_diagonal(self, name: str, masks: Mapping[str, Tensor], diagonal: Tensor) -> Tensor:
        """w / diag F^-1 where a weight is newly pruned, else 0."""
        layer = self.layers[name]
        gone = layer.weight_mask & ~masks[name]
        return (layer.weight.detach() / diagonal).masked_fill(~gone, 0)

    def _settings(self) -> dict:
        return {
            **super()._settings(),
            "gradients": self.gradients,
            "dampening": self.dampening,
            "recompute": self.recompute,
        }


class OBS(_SecondOrder):
    """Optimal brain surgeon with a block-diagonal Fisher matrix, as oBERT defines it (Kurtic et al., arXiv 2203.07259).

    The inverse takes 8 * ``block`` bytes a weight; layers are worked on in groups that fit into ``memory``, each with a pass
    over the gradients of its own, and another for the update if there are several groups: five, for ResNet-50 with block
    50. Beside ``memory``, an update holds the gradients of 8 mini-batches for one group, scores, and updates: 3.7 GB in all
    for ResNet-50 (``python -m benchmarks.fisher``). Under DDP, give every rank the same ``batches``, or masks will differ.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers at the end, in [0, 1), met within one weight.
        batches: ``(inputs, targets)`` mini-batches, at least ``gradients`` of them, the same whenever iterated.
        loss_fn: of (outputs, targets), the mean over a mini-batch.
        gradients: m, how many mini-batches' gradients make the Fisher matrix.
        block: weights in a block.
        dampening: lambda.
        recompute: times that an update of the masks computes the Fisher matrix anew, on equal parts of its way.
        memory: bytes that the inverse may take.
        begin, end, interval, initial_sparsity: of a cubic schedule, see :class:`Cubic`; one-shot, at once, without ``end``.
        distribution: ``"global"`` as published, ``"uniform"``, ``"erk"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.
        optimizer_state: what an update of the masks does to the optimizer's state, see :class:`Pruner`.

    Raises:
        MemoryError: a single layer's blocks take more than ``memory``; the message says how much.
        TypeError, ValueError: see :class:`Pruner`; a setting is out of range, or there are too few ``batches``.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(16)]
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> pruner = sk.pruning.OBS(model, optimizer, 0.75, batches, loss_fn, gradients=16, block=8, dampening=1e-4)
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        batches: Batches,
        loss_fn: LossFn,
        *,
        gradients: int = 1024,
        block: int = 50,
        dampening: float = 1e-7,
        **schedule,
    ):
        check_steps(block, "block", least=1)
        self.block = block
        super().__init__(
            model, optimizer, sparsity, batches, loss_fn, gradients=gradients, dampening=dampening, **schedule
        )

    def _prune_once(self, sparsity: float) -> None:
        groups = self._groups()
        scores, fisher = {}, None
        for number, group in enumerate(groups, 1):
            fisher = None  # make room for the next
            fisher = self._fisher(group, f"gradients, layers {number}/{len(groups)}")
            for name in group:
                scores[name] = obs_score(self.layers[name].weight, fisher.diagonal(name))
        if len(groups) > 1:
            fisher = None  # ranking wants room, too
        masks = prune_masks(self.layers, scores, sparsity, self.distribution)
        updates = {}
        for number, group in enumerate(groups, 1):
            if len(groups) > 1:
                fisher = None
                fisher = self._fisher(group, f"updates, layers {number}/{len(groups)}")
            for name in group:
                updates[name] = -fisher.solve(name, self._pruned_over_diagonal(name, masks, fisher.diagonal(name)))
        # All at once: the gradients of later groups are those of the old weights.
        self._move(masks, updates)
        self._set_masks(masks)

    def _check_memory(self) -> None:
        for name, layer in self.layers.items():
            needed = BlockFisher.bytes_for(layer.weight, self.block)
            if needed > self.memory:
                raise MemoryError(
                    f"block = {self.block} takes {needed:,} bytes for layer {name!r}, but memory = {self.memory:,.0f}; "
                    "choose a smaller block, or allow more memory"
                )

    def _groups(self) -> list[list[str]]:
        """Names of layers whose inverses fit into memory together."""
        groups, taken = [], math.inf
        for name, layer in self.layers.items():
            needed = BlockFisher.bytes_for(layer.weight, self.block)
            if taken + needed > self.memory:
                groups.append([])
                taken = 0
            groups[-1].append(name)
            taken += needed
        return groups

    def _fisher(self, names: list[str], description: str) -> BlockFisher:
        weights = {name: self.layers[name].weight.detach() for name in names}
        fisher = BlockFisher(weights, self.block, self.dampening, self.gradients)
        stream = self._gradients(names, description)
        while some := list(islice(stream, BlockFisher.AT_ONCE)):
            fisher.add(some)
        return fisher

    def _settings(self) -> dict:
        return {**super()._settings(), "block": self.block}


class WoodFisher(OBS):
    """WoodFisher (Singh & Alistarh, arXiv 2004.14340): :class:`OBS` with larger blocks and stronger dampening.

    Published for ResNet-50 on ImageNet: blocks of 2000 (1000 at 98 %), 400 gradients of 400 images, lambda 1e-5, GMP's
    schedule from a trained model. Such blocks take 8 * ``block`` bytes a weight, 38 GB for the largest layer of ResNet-50:
    allow that much ``memory``, or choose a smaller ``block``.

    Arguments, errors and example as :class:`OBS`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        batches: Batches,
        loss_fn: LossFn,
        *,
        gradients: int = 400,
        block: int = 2000,
        dampening: float = 1e-5,
        **schedule,
    ):
        super().__init__(
            model, optimizer, sparsity, batches, loss_fn,
            gradients=gradients, block=block, dampening=dampening, **schedule,
        )  # fmt: skip


class MFAC(_SecondOrder):
    """M-FAC, static (Frantar et al., arXiv 2107.03356, section 3): the whole Fisher matrix, without blocks.

    Holds 8 * ``gradients`` bytes a weight; the optimizer of the paper is :class:`MFACOptimizer`.

    Args:
        gradients: m, how many mini-batches' gradients make the Fisher matrix.
        dampening: lambda.
        memory: bytes that they may take.

    Raises:
        MemoryError: they take more than ``memory``; the message says how much.

    Other arguments, errors and protocol as :class:`OBS`.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(16)]
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> pruner = sk.pruning.MFAC(model, optimizer, 0.75, batches, loss_fn, gradients=16)
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        batches: Batches,
        loss_fn: LossFn,
        *,
        gradients: int = 1024,
        dampening: float = 1e-5,
        **schedule,
    ):
        super().__init__(
            model, optimizer, sparsity, batches, loss_fn, gradients=gradients, dampening=dampening, **schedule
        )

    def _check_memory(self) -> None:
        needed = LowRankFisher.bytes_for([layer.weight for layer in self.layers.values()], self.gradients)
        if needed > self.memory:
            raise MemoryError(
                f"gradients = {self.gradients} take {needed:,} bytes, but memory = {self.memory:,.0f}; choose fewer, or "
                "allow more memory"
            )

    def _prune_once(self, sparsity: float) -> None:
        weights = {name: layer.weight.detach() for name, layer in self.layers.items()}
        fisher = LowRankFisher(weights, self.dampening, self.gradients)
        fisher.add(self._gradients(weights))
        diagonals = {name: fisher.diagonal(name) for name in weights}
        scores = {name: obs_score(weight, diagonals[name]) for name, weight in weights.items()}
        masks = prune_masks(self.layers, scores, sparsity, self.distribution)
        pruned = {name: self._pruned_over_diagonal(name, masks, diagonals[name]) for name in weights}
        self._move(masks, {name: -update for name, update in fisher.solve_all(pruned).items()})
        self._set_masks(masks)
