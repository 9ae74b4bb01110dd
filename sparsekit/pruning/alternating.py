"""AC/DC, which alternates between sparse and dense training, and CrAM, whose steps look at the pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..convert import set_mask_
from ._checks import check_not_negative, check_sparsity, check_uncompressed, generator
from .base import Pruner, prune_masks
from .distributions import Distribution
from .layers import Rule
from .schedules import OneShot, Phases
from .scores import magnitude
from .states import StatePolicy, follow

_NEVER = 2**62


class ACDC(Pruner):
    """Alternating compressed/decompressed training (Peste et al., arXiv 2106.12379, algorithm 1).

    Sparse phases begin with one-shot magnitude pruning, and run on the sparse kernels. Dense phases begin with all weights
    restored: those that were pruned start from zero, and no weight has momentum.

    Published for ResNet-50 on ImageNet, where an epoch has n optimizer steps, of 100 epochs::

        phases=Phases.evenly(0.9, warmup=10 * n, sparse=5 * n, dense=5 * n, last_dense=10 * n, final=85 * n)

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded. As published, none is.
        optimizer: holds the weight of every pruned layer.
        phases: when they begin, and the sparsity.
        distribution: ``"global"`` or ``"uniform"`` as published, ``"erk"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.
        optimizer_state: what the beginning of a dense phase does to the optimizer's state, see :class:`Pruner`; where a
            sparse one begins, momentum goes with its weight.

    Raises:
        TypeError, ValueError: see :class:`Pruner` and :class:`Phases`.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.ACDC(model, optimizer, sk.pruning.Phases(0.75, prune_at=(2, 6), restore_at=(4,)))
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    restores = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        phases: Phases,
        *,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "zero",
    ):
        super().__init__(model, optimizer, phases, distribution, exclude, optimizer_state)

    def scores(self) -> dict[str, Tensor]:
        """|w| of every weight."""
        return {name: magnitude(layer.weight) for name, layer in self.layers.items()}

    def update(self) -> None:
        sparsity = self.schedule(self.steps)
        if sparsity > 0:
            self._prune_to(sparsity)
        else:
            self._restore()

    def _restore(self) -> None:
        self._set_masks({name: torch.ones_like(layer.weight_mask) for name, layer in self.layers.items()})

    def _prune_to(self, sparsity: float) -> None:
        follow(self.layers, prune_masks(self.layers, self.scores(), sparsity, self.distribution), self.optimizer)


class CrAM(Pruner):
    """CrAM+, compression-aware minimisation (Peste et al., arXiv 2207.14200, algorithm 1): dense models that survive pruning.

    Every step adds two gradients: that of the dense weights w, and that of the pruned ones, TopK(w + rho * gradient(w)),
    where those are kept; the sparsity is drawn anew for every step. All parameters of the optimizer ascend, the pruned
    layers' weights alone are pruned, and BatchNorm's running statistics are those of the dense weights. :meth:`finalize`
    prunes by magnitude, and BatchNorm wants :func:`recalibrate_batchnorm_` then.

    The gradients come from two passes: call ``pruner.backward(lambda: loss_fn(model(inputs), targets))`` instead of
    ``loss.backward()``.

    Args:
        model: every Conv2d and Linear becomes sparse unless excluded, and keeps all weights until the end.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers after :meth:`finalize`, in [0, 1), met within one weight.
        end: optimizer steps of the whole training, after which ``step`` prunes; None: only :meth:`finalize` does.
        rho: length of the ascent, in units of the gradient.
        levels: sparsities to draw from, each in [0, 1).
        seed: of the draws; the same on every rank of a data-parallel run.
        distribution: ``"global"``, ``"uniform"``, ``"erk"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or a setting is out of range.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.CrAM(model, optimizer, sparsity=0.75)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     inputs = torch.randn(8, 16)
        ...     loss = pruner.backward(lambda: model(inputs).square().mean())
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    needs_recalibration = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float = 0.9,
        *,
        end: int | None = None,
        rho: float = 0.05,
        levels: Sequence[float] = (0.5, 0.7, 0.9),
        seed: int = 0,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
    ):
        if not levels:
            raise ValueError("levels must hold at least one sparsity, got none")
        for level in levels:
            check_sparsity(level, "levels")
        check_not_negative(rho, "rho")
        self.rho, self.levels, self.seed, self._is_done = rho, tuple(levels), seed, False
        # Without an end, as late as finalize().
        super().__init__(model, optimizer, OneShot(sparsity, _NEVER if end is None else end), distribution, exclude)
        check_uncompressed(self.layers, "CrAM")

    def scores(self) -> dict[str, Tensor]:
        """|w| of every weight."""
        return {name: magnitude(layer.weight) for name, layer in self.layers.items()}

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Add both gradients of a batch to those that are there: ``loss`` runs the model twice.

        Under gradient accumulation, every micro-batch ascends along what has been accumulated so far.
        """
        value = super().backward(loss)
        if self.steps < self.schedule.end:
            with self._pruned():
                super().backward(loss)
        self._is_done = True
        return value

    def step(self) -> bool:
        if not self._is_done:
            raise RuntimeError("CrAM needs pruner.backward(loss) in the place of loss().backward(), before every step")
        self._is_done = False
        return super().step()

    def finalize(self) -> nn.Module:
        if self.schedule.end == _NEVER:
            self.schedule = OneShot(self.schedule.sparsity, self.steps)
            self.update()
        return super().finalize()

    def _settings(self) -> dict:
        return {**super()._settings(), "rho": self.rho, "levels": list(self.levels), "seed": self.seed}

    @contextmanager
    def _pruned(self) -> Iterator[None]:
        """The model at TopK(w + rho * gradient), whose gradients are added where weights are kept."""
        layers = self.layers
        pruned = {id(layer.weight) for layer in layers.values()}
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        others = [p for p in everything if p.grad is not None and id(p) not in pruned]
        unmoved = [p.detach().clone() for p in others]
        statistics = [
            buffer
            for m in self.model.modules()
            if isinstance(m, nn.modules.batchnorm._NormBase)
            for buffer in m.buffers()
        ]
        seen = [buffer.clone() for buffer in statistics]
        drawn = torch.randint(len(self.levels), (), generator=generator(self.seed, self.steps))
        old, kept, grads, ascended = {}, {}, {}, {}
        for name, layer in layers.items():
            weight = layer.weight
            old[name], kept[name], grads[name] = weight.detach().clone(), layer.weight_mask, weight.grad
            ascended[name] = old[name] if weight.grad is None else old[name] + self.rho * weight.grad
        scores = {name: magnitude(weight) for name, weight in ascended.items()}
        masks = prune_masks(layers, scores, self.levels[int(drawn)], self.distribution)
        try:
            for name, layer in layers.items():
                # set_mask_ would zero the gradient that is there.
                layer.weight.grad = None
                layer.weight.data.copy_(ascended[name])
                set_mask_(layer, masks[name])
            for parameter in others:
                parameter.data.add_(parameter.grad, alpha=self.rho)
            yield
        finally:
            for to, value in zip([p.data for p in others] + statistics, unmoved + seen):
                to.copy_(value)
            for name, layer in layers.items():
                added = layer.weight.grad
                layer.weight.grad = None
                set_mask_(layer, kept[name])
                layer.weight.data.copy_(old[name])
                parts = [grad for grad in (grads[name], added) if grad is not None]
                layer.weight.grad = sum(parts) if parts else None
