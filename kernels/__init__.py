"""GPU kernels in Triton, installed as ``sparsekit.kernels``: the native ops of the CPU, with the same signatures.

Every function writes into an output that it is given, reads nothing back to the host, and gives the same bits from run
to run, so all of them can be captured in CUDA graphs. Activations are NCHW contiguous, float32, float16 or bfloat16,
and sums are float32. Importing this package needs no Triton; using it does: :func:`available` says what is missing.
"""

from __future__ import annotations

import os

try:
    import triton
except ImportError as error:
    _missing: str | None = f"Triton cannot be imported ({error}): pip install triton"
else:
    _missing = None
    from .compress import bias_grad, compress, decompress
    from .condensed import CondensedPattern, condensed_conv2d, pack, pack_values
    from .conv2d import conv2d, conv2d_input_grad
    from .sddmm import conv2d_values_grad, linear_values_grad
    from .spmm import linear, linear_input_grad
    from .tuning import set_autotune

__all__ = [
    "CondensedPattern",
    "available",
    "bias_grad",
    "compress",
    "condensed_conv2d",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_values_grad",
    "decompress",
    "linear",
    "linear_input_grad",
    "linear_values_grad",
    "no_gpu",
    "pack",
    "pack_values",
    "set_autotune",
]


def available() -> tuple[bool, str]:
    """Whether these kernels run here, and why not if they do not.

    Returns:
        (True, "") or (False, reason). With ``TRITON_INTERPRET=1`` set before Triton is imported they run without a
        GPU, on CPU tensors and slowly.
    """
    if _missing:
        return False, _missing
    reason = "" if os.environ.get("TRITON_INTERPRET") == "1" else no_gpu()
    return not reason, reason


def no_gpu() -> str:
    """Why PyTorch has no GPU here, for people; empty if it has one."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built for the CPU: install one for GPUs, see https://pytorch.org/get-started"
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"PyTorch finds no GPU: {str(error).split('. ')[0]}"
    return "PyTorch finds no GPU"


def __getattr__(name: str):
    if _missing and name in __all__:
        raise ImportError(f"sparsekit.kernels.{name} needs Triton. {_missing}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
