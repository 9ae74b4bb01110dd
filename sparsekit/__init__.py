"""PyTorch kernels that make pruned CNNs fast, and the pruning and transfer loops that run on them."""

from . import nn, pruning
from ._ops import available_backends, backend, set_isa, use_isa
from ._version import __version__
from .convert import dense_state_dict, densify_, keep_zeros, set_mask_, sparsify_, sparsity
from .profile import autotune_, explain

__all__ = [
    "autotune_",
    "available_backends",
    "backend",
    "dense_state_dict",
    "densify_",
    "explain",
    "keep_zeros",
    "nn",
    "pruning",
    "set_isa",
    "set_mask_",
    "sparsify_",
    "sparsity",
    "use_isa",
]
