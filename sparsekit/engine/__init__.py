"""The inference engine: a pruned model as a plan of fused layers on the sparse kernels.

``capture`` turns a model into a graph of ATen ops, ``plan`` folds BatchNorm and fuses what follows a layer into it,
``schedule`` decides what runs sparse for inputs of one size, joins steps to ``chains`` and runs them; ``engine`` holds the
schedules, saves and loads; ``backend`` is its door for ``torch.compile``.
"""

from .backend import sparsekit_backend
from .engine import Engine, compile, load

__all__ = ["Engine", "compile", "load", "sparsekit_backend"]
