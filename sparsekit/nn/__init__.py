"""Drop-in modules whose weights are sparse."""

from .norm import BatchNorm2d
from .pool import MaxPool2d
from .sparse import SparseConv2d, SparseLinear, SparseModule

__all__ = ["BatchNorm2d", "MaxPool2d", "SparseConv2d", "SparseLinear", "SparseModule"]
