"""Lottery tickets: prune, rewind, train again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ._checks import check_steps, check_uncompressed
from .base import Pruner, prune_masks
from .distributions import Distribution
from .layers import Rule
from .schedules import Rounds
from .scores import magnitude
from .states import StatePolicy, follow


class LTH(Pruner):
    """Lottery tickets by iterative magnitude pruning (Frankle & Carbin, arXiv 1803.03635), with rewinding (1912.05671).

    A round trains for ``interval`` optimizer steps, prunes the share ``rate`` of the remaining weights, and rewinds
    everything else, BatchNorm statistics included, to what it was at step ``rewind_to``; the optimizer forgets its state.
    Rounds go on until ``sparsity``; train on after the last to get the accuracy of the ticket.

    For transfer (LTH-T, arXiv 2012.06908) start from a pretrained model, with ``transfer=True``: the result is the mask on
    the *pretrained* weights. Published: 19 rounds of 10 epochs, lr 1e-4.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers, in [0, 1), met within one weight.
        interval: optimizer steps of a round.
        rate: share of the remaining weights that a round prunes, in (0, 1).
        rewind_to: optimizer step whose weights come back, before the end of the first round; 0: those given here.
        transfer: whether :meth:`finalize` rewinds, too.
        distribution: ``"global"`` as published, ``"uniform"``, ``"erk"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.
        optimizer_state: what rewinding does to the optimizer's state, see :class:`Pruner`.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or a setting is out of range, or a layer is compressed.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.LTH(model, optimizer, sparsity=0.75, interval=2, rate=0.5)
        >>> for _ in range(6):
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
        interval: int,
        rate: float = 0.2,
        rewind_to: int = 0,
        transfer: bool = False,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "forget",
    ):
        check_steps(rewind_to, "rewind_to")
        schedule = Rounds(sparsity, interval, rate)
        if rewind_to >= interval:
            raise ValueError(f"rewind_to must be earlier than the first round ends, at {interval}, got {rewind_to}")
        self.rewind_to, self.transfer = rewind_to, transfer
        self.needs_recalibration = transfer
        self._start: dict[str, Tensor] = {}
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)
        check_uncompressed(self.layers, "LTH")
        if rewind_to == 0:
            self._remember()

    def scores(self) -> dict[str, Tensor]:
        """|w| of every weight."""
        return {name: magnitude(layer.weight) for name, layer in self.layers.items()}

    def step(self) -> bool:
        is_update = super().step()
        if self.steps == self.rewind_to:
            self._remember()
        return is_update

    def update(self) -> None:
        masks = prune_masks(self.layers, self.scores(), self.schedule(self.steps), self.distribution)
        follow(self.layers, masks, self.optimizer)
        self._rewind()

    def finalize(self) -> nn.Module:
        super().finalize()
        if self.transfer:
            self._rewind()
        return self.model

    def state_dict(self) -> dict:
        return {**super().state_dict(), "start": {name: tensor.clone() for name, tensor in self._start.items()}}

    def load_state_dict(self, state: Mapping) -> None:
        super().load_state_dict(state)
        self._start = dict(state["start"])

    def _remember(self) -> None:
        self._start = {name: tensor.clone() for name, tensor in self._tensors()}

    @torch.no_grad()
    def _rewind(self) -> None:
        if not self._start:
            raise RuntimeError(f"LTH cannot rewind to step {self.rewind_to}, which training has not reached yet")
        for name, tensor in self._tensors():
            tensor.copy_(self._start[name])
        self._set_masks({name: layer.weight_mask for name, layer in self.layers.items()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """All that training changes: Parameters and buffers, but for the masks."""
        return [(n, t.detach()) for n, t in self.model.state_dict().items() if not n.endswith("weight_mask")]

    def _settings(self) -> dict:
        return {**super()._settings(), "rewind_to": self.rewind_to, "transfer": self.transfer}
