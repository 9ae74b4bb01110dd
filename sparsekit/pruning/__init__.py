"""Pruning: scores rank weights, distributions share them out over layers, schedules say when, policies say what becomes of
the optimizer's state, methods combine them."""

from .alternating import ACDC, CrAM
from .base import Pruner, best_masks, prune_masks
from .batchnorm import recalibrate_batchnorm_
from .distributions import DISTRIBUTIONS, er, erk, global_, uniform
from .first_order import SNIP, Movement
from .latent import DNW, STR, TopKAST, soft_threshold
from .layers import first_and_last, prunable_layers
from .lottery import LTH
from .magnitude import GMP, magnitude_
from .masks import top_k
from .mfac_optimizer import MFACOptimizer
from .recipes import METHODS, PRESETS, Recipe, recipe
from .regrowth import SET, RigL, regrow
from .report import PruningReport, report
from .schedules import Constant, Cubic, Linear, OneShot, Phases, Rounds, Schedule
from .scores import magnitude, movement, sensitivity
from .second_order import MFAC, OBS, WoodFisher, obs_score
from .states import STATE_POLICIES

__all__ = [
    "ACDC",
    "DISTRIBUTIONS",
    "DNW",
    "GMP",
    "LTH",
    "METHODS",
    "MFAC",
    "OBS",
    "PRESETS",
    "SET",
    "SNIP",
    "STATE_POLICIES",
    "STR",
    "Constant",
    "CrAM",
    "Cubic",
    "Linear",
    "MFACOptimizer",
    "Movement",
    "OneShot",
    "Phases",
    "Pruner",
    "PruningReport",
    "Recipe",
    "RigL",
    "Rounds",
    "Schedule",
    "TopKAST",
    "WoodFisher",
    "best_masks",
    "er",
    "erk",
    "first_and_last",
    "global_",
    "magnitude",
    "magnitude_",
    "movement",
    "obs_score",
    "prunable_layers",
    "prune_masks",
    "recalibrate_batchnorm_",
    "recipe",
    "regrow",
    "report",
    "sensitivity",
    "soft_threshold",
    "top_k",
    "uniform",
]
