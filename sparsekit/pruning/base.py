"""The protocol of every pruning method: score -> mask -> set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..convert import set_mask_, sparsify_
from ..nn import SparseModule
from ..nn.sparse import weight_id
from .distributions import Distribution, distribution_from
from .layers import Rule, prunable_layers
from .masks import top_k
from .schedules import Schedule
from .states import StatePolicy, policy_from

logger = logging.getLogger("sparsekit")

# By how much a model may be sparser than asked: rounding, layer by layer, of whoever pruned it.
_SPARSER = 1e-3


def prune_masks(
    layers: Mapping[str, nn.Module],
    scores: Mapping[str, Tensor],
    sparsity: float,
    distribution: str | Distribution = "global",
) -> dict[str, Tensor]:
    """The masks that keep the best scores; what a sparse layer has pruned stays pruned.

    Args:
        layers: name to layer, as from :func:`prunable_layers`.
        scores: name to scores of the weight's shape; the lowest are pruned.
        sparsity: fraction of zeros over all ``layers``, in [0, 1), met within one weight. Layers that are sparser than
            that together keep their masks.
        distribution: a name in :data:`DISTRIBUTIONS`, or a function as in :mod:`sparsekit.pruning.distributions`.

    Returns:
        Name to bool mask of the weight's shape; True is kept.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), ``distribution`` is unknown, or scores are NaN.

    Example:
        >>> import torch, sparsekit as sk
        >>> layers = {"fc": torch.nn.Linear(3, 1)}
        >>> sk.pruning.prune_masks(layers, {"fc": torch.tensor([[3.0, 1.0, 2.0]])}, sparsity=0.3)
        {'fc': tensor([[ True, False,  True]])}
    """
    candidates = {}
    for name, module in layers.items():
        score = scores[name]
        if score.isnan().any():
            raise ValueError(f"scores must not hold NaN, got {int(score.isnan().sum())} of them in layer {name!r}")
        # Below the score of any weight that is kept, even of one that is exactly zero.
        is_sparse = isinstance(module, SparseModule)
        candidates[name] = score.masked_fill(~module.weight_mask, -torch.inf) if is_sparse else score
    return best_masks(candidates, sparsity, distribution)


def best_masks(
    scores: Mapping[str, Tensor], sparsity: float, distribution: str | Distribution = "global"
) -> dict[str, Tensor]:
    """The masks that keep the best scores, whatever was pruned before; a score of minus infinity is never kept.

    Arguments, returns and errors as :func:`prune_masks`.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.pruning.best_masks({"fc": torch.tensor([[3.0, 1.0, 2.0]])}, sparsity=0.3)
        {'fc': tensor([[ True, False,  True]])}
    """
    counts = distribution_from(distribution)(scores, sparsity)
    if callable(distribution):
        _check_counts(distribution, counts, scores)
    return {name: top_k(score, counts[name]) for name, score in scores.items()}


def _check_counts(distribution: Distribution, counts: Mapping[str, int], scores: Mapping[str, Tensor]) -> None:
    """Raise unless a function of the user's own keeps a possible number of weights in every layer."""
    name = _name(distribution)
    if counts.keys() != scores.keys():
        raise ValueError(f"distribution {name} must return a number for each of {list(scores)}, got {list(counts)}")
    for layer, score in scores.items():
        most, count = int((score != -torch.inf).sum()), counts[layer]
        if not 0 <= count <= most:
            raise ValueError(
                f"distribution {name} must keep 0 to {most} weights of layer {layer!r}, those not pruned, got {count}"
            )


class Pruner:
    """A pruning method attached to a model and its optimizer; many subclasses define :meth:`scores` alone.

    All pruned layers become sparse modules at once, with the Parameters the optimizer knows. Weights that a mask has
    pruned stay pruned, but for methods that let weights come back. Zeros in a layer that is still plain are weights like
    any other: to keep them pruned, call :func:`sparsekit.sparsify_` first. An optimizer that mixes the entries of a weight
    needs :func:`sparsekit.keep_zeros`.

    To resume, build the same model and pruner, then load the state dicts of model, optimizer and pruner.

    Args:
        model: pruned in place.
        optimizer: holds the weight of every pruned layer.
        schedule: when masks change and to which sparsity; an update at step 0 happens here.
        distribution: a name in :data:`DISTRIBUTIONS`, or a function as in :mod:`sparsekit.pruning.distributions`.
        exclude: layers to leave alone, see :func:`prunable_layers`. Sparsity counts the others.
        optimizer_state: what an update of the masks does to the optimizer's state: a name in :data:`STATE_POLICIES`, or a
            function as in :mod:`sparsekit.pruning.states`.

    Attributes:
        layers: ``{name: sparse layer}``, what is pruned; tied weights once.
        steps: optimizer steps counted so far.
        needs_recalibration: whether BatchNorm wants :func:`recalibrate_batchnorm_` after :meth:`finalize`.
        restores: whether what was pruned before may come back.

    Raises:
        TypeError: a layer is of a class that cannot become sparse; exclude it.
        ValueError: an unknown ``distribution`` or ``optimizer_state``, no layer to prune, an ``exclude`` rule that matches
            nothing, an ``optimizer`` that lacks a weight, or layers that are sparser already than they are to be.

    Example:
        >>> import torch, sparsekit as sk
        >>> class Random(sk.pruning.Pruner):
        ...     def scores(self):
        ...         return {name: torch.rand_like(layer.weight) for name, layer in self.layers.items()}
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> pruner = Random(model, torch.optim.SGD(model.parameters(), lr=0.1), sk.pruning.OneShot(0.5))
        >>> pruner.finalize()[0].sparsity
        0.5
    """

    needs_recalibration = False
    restores = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        distribution: str | Distribution = "global",
        exclude: Rule | Iterable[Rule] = (),
        optimizer_state: str | StatePolicy = "follow",
    ):
        distribution_from(distribution)
        self._policy, self.optimizer_state = policy_from(optimizer_state), optimizer_state
        self.model, self.optimizer, self.schedule, self.distribution = model, optimizer, schedule, distribution
        self.steps = 0
        self._is_final = False
        self.layers: dict[str, SparseModule] = _sparse_layers(model, exclude)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        foreign = [name for name, layer in self.layers.items() if id(layer.stored) not in held]
        if foreign:
            raise ValueError(
                f"optimizer must hold the weight of every pruned layer, but lacks those of {len(foreign)}, "
                f"such as {foreign[0]!r}; build it from this model's parameters, or exclude them"
            )
        if not self.restores and self.sparsity > schedule.sparsity + _SPARSER:
            raise ValueError(
                f"sparsity must be at least {self.sparsity:.4f}, that of the layers already, since {type(self).__name__} "
                f"restores no weights, got {schedule.sparsity}"
            )
        if schedule.updates_at(0):
            self.update()

    def scores(self) -> dict[str, Tensor]:
        """What every weight is worth: ``{name of layer: scores of the weight's shape}``; the lowest are pruned."""
        raise NotImplementedError(f"{type(self).__name__} must define scores()")

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that the masks make over all pruned layers, in [0, 1]."""
        masks = [layer.weight_mask for layer in self.layers.values()]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Compute the gradients of a batch, as the method wants them: ``loss().backward()`` for most.

        Loops that call this instead work with every method; a loop of one's own may call ``backward()`` itself unless
        the method says otherwise (:class:`CrAM`).

        Args:
            loss: runs the model on the batch, and returns the scalar loss.

        Returns:
            The loss, detached.
        """
        value = loss()
        value.backward()
        return value.detach()

    def step(self) -> bool:
        """Count an optimizer step and follow the schedule: call it once after every ``optimizer.step()``.

        Returns:
            Whether the masks were updated.

        Raises:
            RuntimeError: after :meth:`finalize`.
        """
        if self._is_final:
            raise RuntimeError(f"{type(self).__name__} is finalized: it has nothing to do in further steps")
        self.steps += 1
        is_update = self.schedule.updates_at(self.steps)
        if is_update:
            self.update()
        return is_update

    def update(self) -> None:
        """Score the weights, choose the masks for the sparsity of this step, and set them."""
        self._prune_to(self.schedule(self.steps))

    def finalize(self) -> nn.Module:
        """End pruning: the target sparsity is met, and every pruned weight is exactly zero.

        If the schedule is not over, what is missing is pruned at once, with a warning in the log.

        Returns:
            The model, whose pruned layers are :class:`~sparsekit.nn.SparseConv2d` and
            :class:`~sparsekit.nn.SparseLinear`.
        """
        if self._is_final:
            return self.model
        if self.steps < self.schedule.end:
            self._finish_early()
        self._is_final = True
        for layer in self.layers.values():
            set_mask_(layer, layer.weight_mask, self.optimizer)
        return self.model

    def _finish_early(self) -> None:
        """Meet the target of a schedule that is not over."""
        logger.warning(
            "%s finalized after %d of %d steps: pruning from sparsity %.4f to %.4f at once",
            type(self).__name__, self.steps, self.schedule.end, self.sparsity, self.schedule.sparsity,
        )  # fmt: skip
        self._prune_to(self.schedule.sparsity)

    def state_dict(self) -> dict:
        """The number of steps, the settings it belongs to, and what else the method remembers, tensors among it; masks are
        in the model's state dict. :func:`sparsekit.io.save_checkpoint` takes it as ``extra``."""
        return {"steps": self.steps, **self._settings()}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue where ``state`` was taken; load the model's and the optimizer's state too.

        Args:
            state: from :meth:`state_dict`.

        Raises:
            ValueError: ``state`` is of another method, or of one with other settings.
        """
        for key, value in self._settings().items():
            # Files know lists only.
            if _as_lists(state.get(key)) != _as_lists(value):
                raise ValueError(f"state must be of a pruner with {key} = {value!r}, got {state.get(key)!r}")
        self.steps = state["steps"]

    def _settings(self) -> dict:
        return {
            "method": type(self).__name__,
            "schedule": {"kind": type(self.schedule).__name__, **asdict(self.schedule)},
            "distribution": _name(self.distribution),
            "optimizer_state": _name(self.optimizer_state),
            "layers": list(self.layers),
        }

    def _prune_to(self, sparsity: float) -> None:
        self._set_masks(prune_masks(self.layers, self.scores(), sparsity, self.distribution))

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self._policy(self.layers, masks, self.optimizer)


def _name(part: str | Callable) -> str:
    """Of a part of a method, for states."""
    return part if isinstance(part, str) else getattr(part, "__name__", type(part).__name__)


def _as_lists(value):
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _sparse_layers(model: nn.Module, exclude: Rule | Iterable[Rule]) -> dict[str, SparseModule]:
    """The layers to prune, after they became sparse; those that were plain keep every weight."""
    layers = prunable_layers(model, exclude)
    chosen = {weight_id(layer) for layer in layers.values()}
    plain = [layer for layer in layers.values() if _has_no_mask(layer)]
    sparsify_(model, filter_fn=lambda _, module: weight_id(module) in chosen, min_sparsity=0)
    for name, layer in layers.items():
        if not isinstance(layer, SparseModule):
            raise TypeError(
                f"layer {name!r} is a {type(layer).__name__}, which cannot become sparse: only nn.Conv2d, nn.Linear and "
                "their sparse versions can, not other subclasses; exclude it"
            )
    for layer in plain:
        # sparsify_ takes zeros for pruned weights; a zero-initialised layer must still be able to learn.
        set_mask_(layer, torch.ones_like(layer.weight_mask))
    return layers


def _has_no_mask(layer: nn.Module) -> bool:
    """Whether neither a sparse module nor torch.nn.utils.prune says which weights are pruned."""
    return not isinstance(layer, SparseModule) and "weight_orig" not in layer._parameters
