"""Drop-in modules whose weights are sparse."""

from .compressed import CompressedConv2d, CompressedLinear, CompressedModule
from .depthwise import DepthwiseConv2d
from .norm import BatchNorm2d, Sequential
from .pool import MaxPool2d
from .sparse import SparseConv2d, SparseLinear, SparseModule

__all__ = [
    "BatchNorm2d",
    "CompressedConv2d",
    "CompressedLinear",
    "CompressedModule",
    "DepthwiseConv2d",
    "MaxPool2d",
    "Sequential",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
]
