"""PyTorch kernels that make pruned CNNs fast, and the pruning and transfer loops that run on them."""

from . import gpu, io, nn, pruning
from ._ops import available_backends, backend, set_isa, use_isa
from ._version import __version__
from .convert import (
    compress_,
    decompress_,
    dense_state_dict,
    densify_,
    keep_zeros,
    set_mask_,
    sparsify_,
    sparsity,
)
from .distributed import check_masks
from .engine import compile, load
from .profile import autotune_, explain

__all__ = [
    "autotune_",
    "available_backends",
    "backend",
    "check_masks",
    "compile",
    "compress_",
    "decompress_",
    "dense_state_dict",
    "densify_",
    "explain",
    "gpu",
    "io",
    "keep_zeros",
    "load",
    "nn",
    "pruning",
    "set_isa",
    "set_mask_",
    "sparsify_",
    "sparsity",
    "use_isa",
]


def __getattr__(name: str):
    # Loaded when asked for: it needs torchvision and the rest of the `transfer` extra.
    if name == "transfer":
        import importlib

        return importlib.import_module(".transfer", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
