"""Re-growth: SET and RigL move a share of the kept weights every few steps; the sparsity never changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._checks import check_fraction, check_steps, generator, refuse_closure
from .base import Pruner, prune_masks
from .distributions import Distribution
from .layers import Rule
from .masks import top_k
from .schedules import Constant
from .scores import magnitude
from .states import StatePolicy

logger = logging.getLogger("sparsekit")


def regrow(weight: Tensor, mask: Tensor, growth: Tensor, share: float) -> Tensor:
    """Move ``share`` of the kept weights: the smallest |w| go, and as many with the largest ``growth`` come.

    As in google-research/rigl, a weight that was dropped may come back at once, with its value.

    Args:
        weight: any shape.
        mask: bool, of the same shape; True is kept.
        growth: of the same shape; what speaks for every weight that is not kept.
        share: fraction of the kept weights, in [0, 1]; rounded down to whole weights.

    Returns:
        The new mask, which keeps as many.

    Example:
        >>> import torch, sparsekit as sk
        >>> mask = torch.tensor([True, True, False, False])
        >>> sk.pruning.regrow(torch.tensor([3.0, 1.0, 0, 0]), mask, torch.tensor([0.0, 0, 4, 5]), share=0.5)
        tensor([ True, False, False,  True])
    """
    kept = int(mask.sum())
    moved = int(share * kept)
    staying = top_k(magnitude(weight).masked_fill(~mask, -torch.inf), kept - moved)
    return staying | top_k(growth.masked_fill(staying, -torch.inf), moved)


class _Regrowth(Pruner):
    """What :class:`SET` and :class:`RigL` share."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float = 0.9,
        *,
        interval: int = 100,
        end: int = 25_000,
        fraction: float = 0.3,
        start: str = "random",
        seed: int = 0,
        distribution: str | Distribution = "erk",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "follow",
    ):
        check_fraction(fraction, "fraction")
        if start not in ("random", "magnitude"):
            raise ValueError(f"start must be 'random' or 'magnitude', got {start!r}")
        check_steps(interval, "interval", least=1)
        check_steps(end, "end")
        if end < interval:
            raise ValueError(f"end must not be earlier than the first update, at interval = {interval}, got {end}")
        self.fraction, self.seed = fraction, seed
        schedule = Constant(sparsity, interval, end)
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)
        scores = {
            name: magnitude(layer.weight) if start == "magnitude" else self._random(name)
            for name, layer in self.layers.items()
        }
        self._set_masks(prune_masks(self.layers, scores, sparsity, distribution))
        self._skipping = optimizer.register_step_pre_hook(lambda _, *arguments: self._skip_step(*arguments))

    def update(self) -> None:
        share = self.schedule.cosine(self.steps, self.fraction)
        self._set_masks(self._masks(share))

    def finalize(self) -> nn.Module:
        self._skipping.remove()
        return super().finalize()

    def _masks(self, share: float) -> dict[str, Tensor]:
        raise NotImplementedError

    def _random(self, name: str) -> Tensor:
        """A number in [0, 1) for every weight of a layer, which depends on nothing but seed, step and layer."""
        number = list(self.layers).index(name)
        weight = self.layers[name].weight
        return torch.rand(weight.shape, generator=generator(self.seed, self.steps, number)).to(weight.device)

    def _skip_step(self, args: tuple, kwargs: Mapping) -> None:
        """An update takes the place of the optimizer step that it is counted for."""
        refuse_closure(args, kwargs, type(self).__name__)
        if self.schedule.updates_at(self.steps + 1):
            self.optimizer.zero_grad(set_to_none=True)

    def _finish_early(self) -> None:
        pass  # the target is met all the time

    def _settings(self) -> dict:
        return {**super()._settings(), "fraction": self.fraction, "seed": self.seed}


class SET(_Regrowth):
    """Sparse evolutionary training (Mocanu et al., arXiv 1707.04780), with RigL's schedule: weights grow at random.

    The mask starts at the target sparsity, and stays at it. Every ``interval`` steps, each layer drops the share
    ``fraction / 2 * (1 + cos(pi * step / end))`` of its kept weights, the smallest, and grows as many others, which start
    at zero with no momentum. On these steps the optimizer does nothing: its gradients are dropped.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers, in [0, 1), met within one weight.
        interval: optimizer steps between updates.
        end: optimizer step after which the masks stay; published: 25 000 of 32 000.
        fraction: share of the kept weights that moves at first, in [0, 1].
        start: how the first mask is chosen: ``"random"``, or ``"magnitude"`` for a model that is trained already.
        seed: of what is random; the same on every rank of a data-parallel run.
        distribution: ``"erk"`` as published, ``"uniform"``, ``"global"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.
        optimizer_state: what an update of the masks does to the optimizer's state, see :class:`Pruner`.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or a setting is out of range.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.SET(model, optimizer, sparsity=0.75, interval=2, end=8)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    def _masks(self, share: float) -> dict[str, Tensor]:
        return {
            name: regrow(layer.weight, layer.weight_mask, self._random(name), share)
            for name, layer in self.layers.items()
        }


class RigL(_Regrowth):
    """The rigged lottery (Evci et al., arXiv 1911.11134): as :class:`SET`, but where the gradient is largest, weights grow.

    The dense gradient is computed for the batch of an update only, layer by layer during its backward pass, and gone when
    the layer's new mask is found. It is averaged over the ranks of a data-parallel run. Of several backward passes before
    an update (gradient accumulation), the last one counts; within one, a layer that is called several times, or shares its
    weight, counts as a whole. A layer that no gradient reaches keeps its mask.

    Published for ResNet-50 on ImageNet: lr 0.1 for 256 images, divided by 10 at epochs 30, 70 and 90, weight decay 1e-4,
    label smoothing 0.1; 'Nx' runs are N times as long, ``end`` too.

    Arguments, errors and protocol are those of :class:`SET`.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.RigL(model, optimizer, sparsity=0.75, interval=2, end=8)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall
        0.75
    """

    def __init__(self, *args, **kwargs):
        self._next: dict[str, Tensor] = {}
        self._listeners: list[torch.utils.hooks.RemovableHandle] = []
        super().__init__(*args, **kwargs)
        self._listen()

    def step(self) -> bool:
        is_update = super().step()
        self._listen()
        return is_update

    def finalize(self) -> nn.Module:
        self._stop_listening()
        return super().finalize()

    def load_state_dict(self, state) -> None:
        super().load_state_dict(state)
        self._listen()

    def _masks(self, share: float) -> dict[str, Tensor]:
        if not self._next:
            logger.warning("RigL: no gradient reached a layer before the update at step %d: masks stay", self.steps)
        masks, self._next = self._next, {}
        return masks

    def _listen(self) -> None:
        """Be there when the gradients of an update come by; at all other times, be gone."""
        self._stop_listening()
        if not self.schedule.updates_at(self.steps + 1):
            return
        share = self.schedule.cosine(self.steps + 1, self.fraction)
        for name, layer in self.layers.items():
            listener = self._listener(name, share)
            for owner in layer._owners():
                self._listeners.append(owner.register_forward_hook(listener, with_kwargs=True))

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.remove()
        self._listeners = []

    def _listener(self, name: str, share: float):
        layer = self.layers[name]
        owners = layer._owners()
        # Calls whose gradient is to come, and the sum of those that came: nothing, for a layer that is called once.
        waiting, total = 0, None

        def on_forward(owner, args, kwargs, output):
            nonlocal waiting
            # A copy of the model takes hooks along.
            if output.requires_grad and owner in owners:
                waiting += 1
                input = (args[0] if args else kwargs["input"]).detach()
                output.register_hook(lambda grad: on_backward(owner, input, grad))

        @torch.no_grad()
        def on_backward(owner, input, grad):
            nonlocal waiting, total
            dense = owner.dense_weight_grad(input, grad)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(dense)  # the sum ranks as the mean does
            if total is not None:
                dense += total
            self._next[name] = regrow(layer.weight, layer.weight_mask, dense.abs(), share)
            waiting -= 1
            total = dense if waiting > 0 else None

        return on_forward
