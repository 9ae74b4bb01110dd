"""Pruning: scores rank weights, distributions share them out over layers, schedules say when, methods combine them."""

from .base import Pruner, prune_masks
from .batchnorm import recalibrate_batchnorm_
from .distributions import DISTRIBUTIONS, erk, global_, uniform
from .layers import first_and_last, prunable_layers
from .magnitude import GMP, magnitude_
from .masks import top_k
from .schedules import Cubic, OneShot, Schedule
from .scores import magnitude

__all__ = [
    "DISTRIBUTIONS",
    "GMP",
    "Cubic",
    "OneShot",
    "Pruner",
    "Schedule",
    "erk",
    "first_and_last",
    "global_",
    "magnitude",
    "magnitude_",
    "prunable_layers",
    "prune_masks",
    "recalibrate_batchnorm_",
    "top_k",
    "uniform",
]
