"""Methods that train weights behind the ones the model shows: Top-KAST, DNW and STR.

Between steps, the layers hold the sparse weights, so that a model may be evaluated at any time. A hook before every
optimizer step puts the hidden ones in their place, and one after it shows the sparse ones again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ._checks import check_not_negative, check_sparsity, check_uncompressed, refuse_closure
from .base import Pruner, best_masks
from .distributions import Distribution
from .layers import Rule
from .schedules import Constant, OneShot, Schedule
from .scores import magnitude
from .states import StatePolicy, leave


class _Latent(Pruner):
    """What the methods of this file share; subclasses define :meth:`_show`, from hidden weights to those of the model."""

    restores = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        distribution: str | Distribution,
        exclude: Rule | Iterable[Rule],
        optimizer_state: str | StatePolicy = "follow",
    ):
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)
        check_uncompressed(self.layers, type(self).__name__)
        # {layer name: the weights that are trained}, dense
        self.latent = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self._hooks = [
            optimizer.register_step_pre_hook(lambda _, *arguments: self._check_and_begin(*arguments)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def _check_and_begin(self, args: tuple, kwargs: Mapping) -> None:
        refuse_closure(args, kwargs, type(self).__name__)
        self._before_step()

    @torch.no_grad()
    def _before_step(self) -> None:
        for name, layer in self.layers.items():
            layer.weight.copy_(self.latent[name])

    @torch.no_grad()
    def _after_step(self) -> None:
        for name, layer in self.layers.items():
            self.latent[name].copy_(layer.weight)
        self._show()

    def _show(self) -> None:
        raise NotImplementedError

    def finalize(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        self._set_masks({name: layer.weight.detach() != 0 for name, layer in self.layers.items()})
        return super().finalize()

    def _finish_early(self) -> None:
        pass  # the sparse weights are there all the time

    def state_dict(self) -> dict:
        states = {name: self.optimizer.state.get(layer.weight, {}) for name, layer in self.layers.items()}
        # Weights that the mask leaves out are trained too: their state would not be in a checkpoint.
        dense = {
            name: {key: value.clone() for key, value in state.items() if _goes_with(value, self.layers[name])}
            for name, state in states.items()
        }
        latent = {name: weight.clone() for name, weight in self.latent.items()}
        return {**super().state_dict(), "latent": latent, "hidden_state": dense}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        super().load_state_dict(state)
        for name, layer in self.layers.items():
            self.latent[name].copy_(state["latent"][name])
            for key, value in state["hidden_state"][name].items():
                self.optimizer.state[layer.weight][key].copy_(value)


def _goes_with(value, layer: nn.Module) -> bool:
    return torch.is_tensor(value) and value.shape == layer.weight.shape


class TopKAST(_Latent):
    """Top-KAST (Jayakumar et al., arXiv 2106.03517): always sparse, forward and backward.

    The forward pass uses the weights of largest |w|, the backward pass reaches more of them, so that others may rise.
    Both sets are chosen anew every ``interval`` steps. Weight decay acts on what the backward pass reaches: as it is on
    the weights in use, and ``exploration_decay`` times as strong on the others; weights out of reach rest.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers in the forward pass, in [0, 1), met within one weight.
        backward_sparsity: fraction of weights that no gradient reaches, in [0, ``sparsity``]; None: the backward pass reaches
            twice as many as the forward pass uses.
        interval: optimizer steps between choices.
        end: optimizer step of the last choice.
        exploration_decay: factor of the optimizer's ``weight_decay``; None: 1 / (1 - ``sparsity``), the paper's section 2.3.
        distribution: ``"uniform"``, ``"erk"``, ``"global"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.
        optimizer_state: what a choice of both sets does to the optimizer's state, see :class:`Pruner`.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or a setting is out of range, or a layer is compressed.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.TopKAST(model, optimizer, sparsity=0.75, backward_sparsity=0.5, interval=2, end=8)
        >>> for _ in range(10):
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
        backward_sparsity: float | None = None,
        interval: int = 100,
        end: int = 32_000,
        exploration_decay: float | None = None,
        distribution: str | Distribution = "uniform",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "follow",
    ):
        check_sparsity(sparsity)
        if backward_sparsity is None:
            backward_sparsity = max(0.0, 1 - 2 * (1 - sparsity))
        check_sparsity(backward_sparsity, "backward_sparsity")
        if backward_sparsity > sparsity:
            raise ValueError(f"backward_sparsity must be at most sparsity = {sparsity}, got {backward_sparsity}")
        if exploration_decay is None:
            exploration_decay = 1 / (1 - sparsity)
        check_not_negative(exploration_decay, "exploration_decay")
        self.backward_sparsity, self.exploration_decay = backward_sparsity, exploration_decay
        schedule = Constant(sparsity, interval, end)
        super().__init__(model, optimizer, schedule, distribution, exclude, optimizer_state)
        self.update()

    def update(self) -> None:
        scores = {name: magnitude(weight) for name, weight in self.latent.items()}
        self._set_masks(best_masks(scores, self.backward_sparsity, self.distribution))
        self.used = best_masks(scores, self.schedule.sparsity, self.distribution)
        self._show()

    def load_state_dict(self, state: Mapping) -> None:
        super().load_state_dict(state)
        self.used = {name: layer.weight.detach() != 0 for name, layer in self.layers.items()}

    @torch.no_grad()
    def _before_step(self) -> None:
        super()._before_step()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            weight, group = layer.weight, groups[id(layer.weight)]
            weight.masked_fill_(~layer.weight_mask, 0)  # out of reach of weight decay, too
            more = group.get("weight_decay", 0) * (self.exploration_decay - 1)
            if weight.grad is None or not more:
                continue
            explored = weight.masked_fill(self.used[name], 0)
            if group.get("decoupled_weight_decay"):
                weight.sub_(explored, alpha=group["lr"] * more)
            else:
                weight.grad.add_(explored, alpha=more)

    @torch.no_grad()
    def _after_step(self) -> None:
        for name, layer in self.layers.items():
            self.latent[name] = torch.where(layer.weight_mask, layer.weight, self.latent[name])
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        for name, layer in self.layers.items():
            layer.weight.copy_(self.latent[name].masked_fill(~self.used[name], 0))

    def _settings(self) -> dict:
        return {
            **super()._settings(),
            "backward_sparsity": self.backward_sparsity,
            "exploration_decay": self.exploration_decay,
        }


class DNW(_Latent):
    """Discovering neural wirings (Wortsman et al., arXiv 1906.00586): the largest |w| are used, all weights are trained.

    The gradient passes straight through the choice, to every weight: it is dense, and so is the work of training.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer.
        sparsity: fraction of zeros over the pruned layers, in [0, 1), met within one weight.
        distribution: ``"uniform"`` as published, ``"erk"``, ``"global"``, or a function.
        exclude: layers to leave alone, see :func:`prunable_layers`.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or a layer is compressed.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.DNW(model, optimizer, sparsity=0.75)
        >>> for _ in range(4):
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
        distribution: str | Distribution = "uniform",
        exclude: Rule | Iterable[Rule] = (),
    ):
        super().__init__(model, optimizer, Constant(sparsity, 1, 0), distribution, exclude)
        self._set_masks({name: torch.ones_like(layer.weight_mask) for name, layer in self.layers.items()})
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        scores = {name: magnitude(weight) for name, weight in self.latent.items()}
        for name, mask in best_masks(scores, self.schedule.sparsity, self.distribution).items():
            self.layers[name].weight.copy_(self.latent[name].masked_fill(~mask, 0))


def soft_threshold(weight: Tensor, s: Tensor) -> Tensor:
    """sign(w) * relu(|w| - sigmoid(s)) (Kusupati et al., arXiv 2002.03231, equation 2).

    Args:
        weight: any shape.
        s: a scalar; the threshold is its sigmoid.

    Returns:
        The shape of ``weight``, differentiable in both.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.soft_threshold(torch.tensor([-2.0, 0.25, 1.0]), torch.tensor(0.0))
        tensor([-1.5000,  0.0000,  0.5000])
    """
    return weight.sign() * torch.relu(weight.abs() - torch.sigmoid(s))


class STR(_Latent):
    """Soft threshold reparameterisation (Kusupati et al., arXiv 2002.03231): every layer learns its threshold.

    The model uses :func:`soft_threshold` of the weights; gradient and weight decay move weights and thresholds. The
    sparsity is what comes out: it rises with the weight decay, and with how long it acts. The thresholds become a
    parameter group of the optimizer. As a mask may change with every step, so does the structure of a layer.

    Published for ResNet-50 on ImageNet, lr 0.256, 100 epochs: 90.23 % at ``initial=-3200``, weight decay 2.25e-5.

    Args:
        model: pruned in place; every Conv2d and Linear becomes sparse unless excluded.
        optimizer: holds the weight of every pruned layer; gets a parameter group more.
        initial: what every threshold's s starts from; the threshold is sigmoid(s).
        weight_decay: of s; None: the optimizer's own.
        exclude: layers to leave alone, see :func:`prunable_layers`.

    Attributes:
        s: ``{layer name: scalar Parameter}``.

    Raises:
        TypeError, ValueError: see :class:`Pruner`; or a layer is compressed.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = sk.pruning.STR(model, optimizer, initial=-3.0, weight_decay=0.1)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     _ = pruner.step()
        >>> sk.sparsity(pruner.finalize()).overall > 0.2
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        initial: float = -3200.0,
        weight_decay: float | None = None,
        exclude: Rule | Iterable[Rule] = (),
    ):
        # Momentum goes on where weights are hidden.
        super().__init__(model, optimizer, OneShot(0.0), "global", exclude, leave)
        self.initial = initial
        self.s = {name: nn.Parameter(layer.weight.new_full((), initial)) for name, layer in self.layers.items()}
        group = {"params": list(self.s.values())}
        if weight_decay is not None:
            check_not_negative(weight_decay, "weight_decay")
            group["weight_decay"] = weight_decay
        optimizer.add_param_group(group)
        self._show()

    def update(self) -> None:
        pass  # every optimizer step is one

    @torch.no_grad()
    def _before_step(self) -> None:
        # Here, since data-parallel gradients are those of all ranks by now.
        for name, layer in self.layers.items():
            s, weight = self.s[name], layer.weight
            # Weights in use have the sign of the hidden ones; the others are 0.
            slope = torch.sigmoid(s) * (1 - torch.sigmoid(s))
            s.grad = None if weight.grad is None else -slope * (weight.grad * weight.sign()).sum()
        super()._before_step()

    @torch.no_grad()
    def _show(self) -> None:
        for name, layer in self.layers.items():
            weight = soft_threshold(self.latent[name], self.s[name])
            mask = weight != 0
            if not torch.equal(mask, layer.weight_mask):
                self._set_masks({name: mask})
            layer.weight.copy_(weight)

    def finalize(self) -> nn.Module:
        super().finalize()
        thresholds = {id(s) for s in self.s.values()}
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if not all(id(p) in thresholds for p in group["params"])]
        for s in self.s.values():
            self.optimizer.state.pop(s, None)
        return self.model

    def state_dict(self) -> dict:
        return {**super().state_dict(), "s": {name: s.detach().clone() for name, s in self.s.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        super().load_state_dict(state)
        for name, s in self.s.items():
            s.copy_(state["s"][name])

    def _settings(self) -> dict:
        return {**super()._settings(), "initial": self.initial}
