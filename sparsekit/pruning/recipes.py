"""Recipes: a method and its numbers, with times in epochs, so that one recipe fits any data set and any length."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._checks import check_sparsity
from .alternating import ACDC, CrAM
from .base import Pruner
from .first_order import SNIP, Movement
from .fisher import Batches, LossFn
from .latent import DNW, STR, TopKAST
from .layers import first_and_last
from .lottery import LTH
from .magnitude import GMP
from .regrowth import SET, RigL
from .schedules import Cubic, Linear, Phases, Rounds
from .second_order import MFAC, OBS, WoodFisher

logger = logging.getLogger("sparsekit")

METHODS: dict[str, type[Pruner]] = {
    method.__name__: method
    for method in (GMP, WoodFisher, MFAC, OBS, SET, RigL, TopKAST, STR, DNW, ACDC, LTH, CrAM, SNIP, Movement)
}
# Settings that are times.
_TIMES = {"begin", "end", "interval", "rewind_to", "warmup", "sparse", "dense", "last_dense", "final"}
_NEEDS_DATA = (WoodFisher, MFAC, OBS, SNIP)
# Every update takes the place of an optimizer step: no more than one in so many.
_LEAST_REGROWTH = 20
# Over these the weight decay of STR's thresholds acts as published: 100 epochs of ImageNet in batches of 256.
_STR_STEPS = 100 * 5004


@dataclass(frozen=True)
class Recipe:
    """A pruning method and its numbers.

    Attributes:
        method: name of a class of :mod:`sparsekit.pruning`.
        sparsity: fraction of zeros; STR has none, and reaches what it reaches.
        epochs: of the whole training; times in ``settings`` are epochs of it, and stretch with it. SET and RigL update at
            every 20th step at most, since the optimizer does nothing then; the weight decay of STR's thresholds grows as
            training has fewer steps than its authors', so that it does as much in all.
        settings: arguments of the method; ``exclude`` may be ``"first_and_last"``. Those of AC/DC are those of
            :meth:`Phases.evenly`.
        training: what else the authors trained with, for people: lr, momentum, ``milestones`` in epochs at which ``gamma``
            multiplies the rate … ``sparsekit prune`` takes the label smoothing from it.

    Raises:
        ValueError: no such method, or a number is out of range.

    Example:
        >>> import torch, sparsekit as sk
        >>> recipe = sk.pruning.recipe("gmp-90")
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = recipe.attach(model, optimizer, steps_per_epoch=50, epochs=20)
        >>> pruner.schedule.begin, pruner.schedule.end
        (200, 790)
    """

    method: str
    sparsity: float | None = 0.9
    epochs: float = 100
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        for name in ("settings", "training"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict, got {getattr(self, name)!r}")
        if self.sparsity is not None and self.method == "STR":
            raise ValueError(
                f"sparsity must be None for STR, which reaches what its weight decay leads to, got {self.sparsity}"
            )
        if self.sparsity is None and self.method != "STR":
            raise ValueError(f"sparsity must be given for {self.method}, got None")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)

    @property
    def needs_data(self) -> bool:
        """Whether :meth:`attach` needs ``batches`` and ``loss_fn``."""
        return METHODS[self.method] in _NEEDS_DATA

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        epochs: float | None = None,
        batches: Batches | None = None,
        loss_fn: LossFn | None = None,
    ) -> Pruner:
        """The pruner, attached.

        Args:
            model, optimizer: as of :class:`Pruner`.
            steps_per_epoch: optimizer steps.
            epochs: how long training is; None: as long as the recipe. Times stretch in proportion.
            batches, loss_fn: for methods that need gradients of their own, see :attr:`needs_data`.

        Raises:
            TypeError, ValueError: as the method; a setting that it does not know is named.
        """
        scale = steps_per_epoch * (1 if epochs is None else epochs / self.epochs)
        settings = {key: _steps(value, scale, key) if key in _TIMES else value for key, value in self.settings.items()}
        if settings.get("exclude") == "first_and_last":
            settings["exclude"] = first_and_last(model)
        total = round(steps_per_epoch * (self.epochs if epochs is None else epochs))
        pruner = self._attach(model, optimizer, settings, total, batches, loss_fn)
        if isinstance(pruner.schedule, (Cubic, Linear, Phases, Rounds)) and pruner.schedule.end > total:
            logger.warning(
                "the last update of %s comes after %d steps, but training has %d",
                self.method,
                pruner.schedule.end,
                total,
            )
        return pruner

    def _attach(self, model, optimizer, settings, total, batches, loss_fn) -> Pruner:
        method = METHODS[self.method]
        if method in (SET, RigL) and "interval" in settings:
            settings["interval"] = max(settings["interval"], _LEAST_REGROWTH)
            settings["end"] = max(settings.get("end", 0), settings["interval"])  # training may be shorter
        if method is ACDC:
            kept = {key: settings.pop(key) for key in ("distribution", "exclude", "optimizer_state") if key in settings}
            return ACDC(model, optimizer, Phases.evenly(self.sparsity, **settings), **kept)
        if method is STR:
            if "weight_decay" in settings:
                settings["weight_decay"] *= _STR_STEPS / max(total, 1)
            return STR(model, optimizer, **settings)
        if self.needs_data:
            if batches is None or loss_fn is None:
                raise ValueError(f"batches and loss_fn must be given for {self.method}, got None")
            return method(model, optimizer, self.sparsity, batches, loss_fn, **settings)
        return method(model, optimizer, self.sparsity, **settings)

    def at(self, sparsity: float) -> Recipe:
        """The same at another sparsity."""
        return replace(self, sparsity=sparsity)

    def to_dict(self) -> dict:
        """What :func:`recipe` makes the same recipe of; JSON and YAML can hold it."""
        return asdict(self)


def _steps(epochs: float, scale: float, name: str) -> int:
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)):
        raise TypeError(f"{name} must be a number of epochs, got {epochs!r}")
    # An interval of a few epochs must not vanish in a short run.
    return max(round(epochs * scale), 1) if epochs > 0 else round(epochs * scale)


_R = {
    "lr": 0.256, "momentum": 0.875, "weight_decay": 3.05e-5, "batch_size": 256, "schedule": "cosine", "warmup_epochs": 5,
}  # fmt: skip
_SMOOTH = {**_R, "label_smoothing": 0.1}
_FROM_DENSE = {
    "lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256, "schedule": "steps",
    "milestones": list(range(40, 100, 6)), "gamma": 0.6,
}  # fmt: skip
_GRADUAL = {"begin": 1, "end": 36, "interval": 5, "initial_sparsity": 0.05}
_REGROWTH = {"interval": 0.3125, "end": 78.125, "fraction": 0.3, "distribution": "erk"}
_STEPPED = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "batch_size": 256,
    "schedule": "steps",
    "milestones": [30, 70, 90],
    "gamma": 0.1,
    "label_smoothing": 0.1,
}

# The authors' recipes for ResNet-50 on ImageNet.
PRESETS: dict[str, Recipe] = {
    "gmp": Recipe(
        "GMP", settings={"begin": 20, "end": 79, "interval": 1, "distribution": "uniform"}, training=_SMOOTH
    ),
    "gmp-finetune": Recipe("GMP", settings=_GRADUAL, training=_FROM_DENSE),
    "woodfisher": Recipe("WoodFisher", settings=_GRADUAL, training=_FROM_DENSE),
    "mfac": Recipe("MFAC", settings=_GRADUAL, training=_FROM_DENSE),
    "obs": Recipe("OBS", settings=_GRADUAL, training=_FROM_DENSE),
    "set": Recipe("SET", settings=_REGROWTH, training=_STEPPED),
    "rigl": Recipe("RigL", settings=_REGROWTH, training=_STEPPED),
    "topkast": Recipe("TopKAST", settings={"interval": 0.3125, "end": 100}, training=_STEPPED),
    "str": Recipe(
        "STR", sparsity=None, settings={"initial": -3200.0, "weight_decay": 2.25e-5},
        training={**_SMOOTH, "weight_decay": 2.25e-5},
    ),
    "dnw": Recipe("DNW", training=_SMOOTH),
    "acdc": Recipe(
        "ACDC", settings={"warmup": 10, "sparse": 5, "dense": 5, "last_dense": 10, "final": 85}, training=_R
    ),
    "lth": Recipe("LTH", epochs=200, settings={"interval": 10, "rate": 0.2}, training=_FROM_DENSE),
    "lth-transfer": Recipe(
        "LTH", epochs=200, settings={"interval": 10, "rate": 0.2, "transfer": True},
        training={"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256, "schedule": "steps"},
    ),
    "cram": Recipe("CrAM", settings={"rho": 0.05, "levels": [0.5, 0.7, 0.9]}, training=_R),
    "snip": Recipe("SNIP", training=_R),
    "movement": Recipe("Movement", epochs=100, settings={"begin": 1, "end": 60, "interval": 1}, training=_FROM_DENSE),
}  # fmt: skip


def recipe(source: str | os.PathLike | dict) -> Recipe:
    """A recipe by name, from a YAML file, or from a dict.

    Args:
        source: the name of a preset, with or without a sparsity in per cent behind it (``"acdc-90"``, ``"rigl-97.5"``);
            the path of a ``.yaml`` or ``.yml`` file, or a dict, with the fields of :class:`Recipe`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a YAML file, without PyYAML.
        ValueError: no such preset, or fields that a recipe does not have.

    Example:
        >>> import sparsekit as sk
        >>> sk.pruning.recipe("acdc-95").sparsity
        0.95
    """
    if isinstance(source, dict):
        return _from_dict(source)
    if str(source).endswith((".yaml", ".yml")):
        return _from_dict(_read_yaml(Path(source)))
    if source in PRESETS:
        return PRESETS[source]
    name, _, percent = str(source).rpartition("-")
    try:
        sparsity = float(percent) / 100
        check_sparsity(sparsity)
        found = PRESETS[name]
    except (KeyError, ValueError):
        raise ValueError(
            f"source must be one of {', '.join(PRESETS)}, with or without a sparsity in [0, 100) % behind it as in "
            f"acdc-90, or a .yaml file, got {str(source)!r}"
        ) from None
    return found.at(sparsity)


def _from_dict(fields: Any) -> Recipe:
    known = Recipe.__dataclass_fields__
    if not isinstance(fields, dict) or "method" not in fields or fields.keys() - known:
        raise ValueError(f"a recipe must have a method, and may have {', '.join(known)}, got {fields!r}")
    return Recipe(**fields)


def _read_yaml(path: Path) -> Any:
    load: Callable[[str], Any]
    try:
        from yaml import YAMLError
        from yaml import safe_load as load
    except ImportError as error:
        raise ImportError("recipes in YAML need PyYAML: pip install pyyaml") from error
    try:
        return load(path.read_text())
    except YAMLError as error:
        raise ValueError(f"{path} must hold YAML, got an error: {error}") from error
