"""Drop-in modules whose weights are sparse."""

from .sparse import SparseConv2d, SparseLinear, SparseModule

__all__ = ["SparseConv2d", "SparseLinear", "SparseModule"]
