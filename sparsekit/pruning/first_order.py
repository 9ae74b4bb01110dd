"""First-order pruning: SNIP, before training, and movement pruning, during finetuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ._checks import check_steps, check_uncompressed, refuse_closure
from .base import Pruner
from .distributions import Distribution
from .fisher import Batches, LossFn, gradients
from .layers import Rule
from .schedules import Cubic, OneShot
from .scores import movement, sensitivity
from .states import StatePolicy


class SNIP(Pruner):
    """Single-shot network pruning (Lee et al., arXiv 1810.02340): prune before training, by :func:`sensitivity`.

    Under DDP, give every rank the same ``batches``, or masks will differ.

    Args:
        model: pruned in place, at once; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers, in [0, 1), met within one weight.
        batches: ``(inputs, targets)`` mini-batches, at least ``gradients`` of them.
        loss_fn: of (outputs, targets), the mean over a mini-batch.
        gradients: mini-batches whose mean gradient counts.
        distribution: ``"global"`` as published, ``"uniform"``, ``"erk"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or there are too few ``batches``.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [(torch.randn(8, 16), torch.randint(4, (8,)))]
        >>> pruner = sk.pruning.SNIP(model, optimizer, 0.75, batches, torch.nn.functional.cross_entropy)
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
        gradients: int = 1,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
    ):
        check_steps(gradients, "gradients", least=1)
        self.batches, self.loss_fn, self.gradients = batches, loss_fn, gradients
        super().__init__(model, optimizer, OneShot(sparsity), distribution, exclude)

    def scores(self) -> dict[str, Tensor]:
        """|w * mean gradient| of every weight."""
        check_uncompressed(self.layers, "SNIP")
        weights = {name: layer.weight for name, layer in self.layers.items()}
        total: dict[str, Tensor] = {}
        for grads in gradients(self.model, weights, self.batches, self.loss_fn, self.gradients):
            total = {name: total[name] + grad if total else grad for name, grad in grads.items()}
        return {name: sensitivity(weight, total[name]) for name, weight in weights.items()}


class Movement(Pruner):
    """Movement pruning, hard (Sanh et al., arXiv 2005.07683): weights go that training moves towards zero.

    Scores are :func:`movement`, added up over the optimizer steps since the beginning; a cubic schedule says how many go.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers at the end, in [0, 1), met within one weight.
        begin, end, interval, initial_sparsity: of the schedule, see :class:`Cubic`; ``begin`` must be positive.
        distribution: ``"global"``, ``"uniform"``, ``"erk"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.
        optimizer_state: what an update of the masks does to the optimizer's state, see :class:`Pruner`.

    Raises:
        TypeError, ValueError: see :class:`Pruner` and :class:`Cubic`; or a layer is compressed.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = sk.pruning.Movement(model, optimizer, 0.75, begin=2, end=8, interval=2)
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float = 0.9,
        *,
        begin: int = 1,
        end: int = 1000,
        interval: int = 100,
        initial_sparsity: float = 0.0,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "follow",
    ):
        check_steps(begin, "begin", least=1)
        schedule = Cubic(sparsity, begin, end, interval, initial_sparsity)
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)
        check_uncompressed(self.layers, "Movement")
        self.total = {name: torch.zeros_like(layer.weight) for name, layer in self.layers.items()}
        self._watching = optimizer.register_step_pre_hook(lambda _, *arguments: self._add_up(*arguments))

    def scores(self) -> dict[str, Tensor]:
        """The sum over steps of -w * gradient."""
        return self.total

    @torch.no_grad()
    def _add_up(self, args: tuple, kwargs: Mapping) -> None:
        refuse_closure(args, kwargs, "Movement")
        for name, layer in self.layers.items():
            if layer.weight.grad is not None:
                self.total[name] += movement(layer.weight, layer.weight.grad)

    def finalize(self) -> nn.Module:
        self._watching.remove()
        return super().finalize()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "total": {name: total.clone() for name, total in self.total.items()}}

    def load_state_dict(self, state: Mapping) -> None:
        super().load_state_dict(state)
        for name, total in self.total.items():
            total.copy_(state["total"][name])
