"""Sparse or dense, layer by layer.

A training module asks :func:`decide`. In order: the user's choice (``module.backend``), what
:func:`sparsekit.autotune_` measured for this input shape, the cost table below. The table predicts the time of both
ways from shape, sparsity, threads and ISA alone, so that a resumed run computes what the first one did.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime
from torch.fx.experimental import symbolic_shapes

from . import _ops, gpu


class Decision(NamedTuple):
    """Which way a layer runs, and why.

    Attributes:
        backend: ``"sparse"`` or ``"dense"``.
        reason: one phrase for people.
        sparse_seconds: expected time of the sparse kernels; NaN if nothing predicts it.
        dense_seconds: expected time of PyTorch's dense kernels; NaN if nothing predicts it.
    """

    backend: str
    reason: str
    sparse_seconds: float = math.nan
    dense_seconds: float = math.nan


class Shape(NamedTuple):
    """What the cost of a layer depends on; a linear layer is a 1 x 1 convolution of ``batch`` pixels."""

    kind: str
    in_channels: int
    out_channels: int
    taps: int
    groups: int
    stride: int
    batch: int
    in_pixels: int
    out_pixels: int

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer."""
        return self.batch * self.out_pixels * self.out_channels * (self.in_channels // self.groups) * self.taps

    @property
    def key(self) -> str:
        """A JSON-safe name of the shape, for tuned results."""
        return "-".join(str(field) for field in self)


def shape_of(module, input: Tensor) -> Shape:
    """The :class:`Shape` of a sparse module on ``input``."""
    size = _traced_size(input) if torch.compiler.is_dynamo_compiling() else input.shape
    if hasattr(module, "kernel_size"):
        size = (1, *size) if len(size) == 3 else tuple(size)
        left, right, top, bottom = module._reversed_padding_repeated_twice
        if len(size) != 4:
            size = (1, module.in_channels, 1, 1)
        _, _, oh, ow = _ops.output_size(
            size, module.out_channels, module.kernel_size, module.stride, (top, bottom, left, right), module.dilation
        )
        return Shape(
            "conv2d",
            module.in_channels,
            module.out_channels,
            math.prod(module.kernel_size),
            module.groups,
            math.prod(module.stride),
            size[0],
            size[2] * size[3],
            oh * ow,
        )
    batch = math.prod(size) // max(module.in_features, 1)
    return Shape("linear", module.in_features, module.out_features, 1, 1, 1, batch, 1, 1)


def _traced_size(input: Tensor) -> tuple[int, ...]:
    """The size that Dynamo traces with; unguarded, for its graph runs inputs of other sizes too."""
    comptime(_remember_size)
    return _remembered_size()


_size: list[int] = []
_hint = getattr(symbolic_shapes, "optimization_hint", None) or symbolic_shapes.size_hint  # its name up to torch 2.11


def _remember_size(context) -> None:
    _size[:] = (int(_hint(n)) for n in context.get_local("input").size())  # hints of torch 2.10 are SymPy's


# Constants to Dynamo, which cannot trace the calls.
@torch.compiler.assume_constant_result
def _remembered_size() -> tuple[int, ...]:
    return tuple(_size)


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def tuned_key(shape: Shape, train: bool, input: Tensor) -> str:
    """Where a module keeps what :func:`sparsekit.autotune_` measured on this shape, with this many threads or this GPU."""
    place = _gpu_key(input.device.index, _computed_in(input)) if input.is_cuda else f"{_threads()}t"
    return f"{shape.key}-{'train' if train else 'eval'}-{place}"


@torch.compiler.assume_constant_result
def _gpu_key(index: int, dtype: torch.dtype) -> str:
    return f"{torch.cuda.get_device_name(index)}-{str(dtype).removeprefix('torch.')}-{int(_uses_tf32())}"


def _uses_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _computed_in(input: Tensor) -> torch.dtype:
    """The dtype that autocast leaves of a layer's input."""
    device = input.device.type
    is_cast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else input.dtype


class Work(NamedTuple):
    """What one forward of the sparse kernels does, in the units of :data:`SPARSE_COSTS`."""

    fma: float
    move: float
    row: float


def sparse_work(shape: Shape, nnz: int) -> Work:
    """The work of a layer with ``nnz`` kept weights."""
    moved = shape.batch * (shape.in_channels * shape.in_pixels + shape.out_channels * shape.out_pixels)
    if shape.taps == 1 and shape.stride == 1:
        return Work(nnz * _whole_registers(shape.batch * shape.out_pixels), moved, 0)
    # A convolution with a neighbourhood computes each image by itself, the column between two rows included, and copies
    # it row by row, once for every residue of the columns' stride.
    side = math.isqrt(shape.out_pixels)
    lanes = shape.batch * max(_whole_registers(side * (side + 1)), 2 * LANES)
    copied = shape.in_channels * math.sqrt(shape.in_pixels * shape.stride) + shape.out_channels * side
    return Work(nnz * lanes, moved, shape.batch * copied)


def _whole_registers(pixels: int) -> int:
    return -(-pixels // LANES) * LANES


LANES = 16  # floats in the widest register

# Seconds per unit of work on one thread, from `make bench-costs` on a CPU with two 512-bit FMA units a core, where dense
# is at its best; see benchmarks/costs.py for how they are fitted.
#   fma: one kept weight times one lane; move: one input or output element brought in or out; row: one row of an image
#   copied in or out.
SPARSE_COSTS = {
    "amx": Work(3.1e-11, 1.6e-10, 4.3e-9),
    "zen4": Work(3.1e-11, 1.5e-10, 5.1e-9),
    "avx512": Work(3.1e-11, 1.6e-10, 4.3e-9),
    "avx2": Work(3.8e-11, 1.9e-10, 4.9e-9),
    "generic": Work(7.2e-11, 3.1e-10, 4.6e-9),
    "reference": Work(1.0, 1.0, 1.0),
}
#   mac: one multiply-add of PyTorch's dense kernel, by the ISA that PyTorch itself uses.
DENSE_COSTS = {"AVX512": 1.4e-11, "AVX2": 2.8e-11, "NO AVX": 2.0e-10, "DEFAULT": 2.0e-10}
GROUPED_DENSE_FACTOR = 4.0
OVERHEAD_SECONDS = 6e-5


def predict(shape: Shape, nnz: int, train: bool) -> tuple[float, float]:
    """Expected seconds of (sparse, dense) for a layer's forward, or forward and backward if ``train``."""
    threads = _threads()
    passes = 3 if train else 1
    work = sum(cost * amount for cost, amount in zip(SPARSE_COSTS[_ops.backend()], sparse_work(shape, nnz)))
    mac = DENSE_COSTS.get(_capability(), DENSE_COSTS["DEFAULT"])
    if shape.groups > 1:
        mac *= GROUPED_DENSE_FACTOR
    sparse = passes * (OVERHEAD_SECONDS + work / threads)
    dense = passes * (OVERHEAD_SECONDS / 6 + mac * shape.macs / threads)
    return sparse, dense


class ChainWork(NamedTuple):
    """What a convolution does for an image within a chain of an engine (:mod:`sparsekit.engine.chains`), where tensors
    come in the layout that the kernels want, from a cache, and an image's weights from further away."""

    fma: float
    weight: float
    visit: float
    move: float


def chain_work(shape: Shape, nnz: int) -> ChainWork:
    """The work for one image of a layer with ``nnz`` kept weights, in the units of :data:`CHAIN_COSTS`."""
    side = math.isqrt(shape.out_pixels)
    lanes = _whole_registers(side * (side + 1))
    moved = shape.in_channels * shape.in_pixels + shape.out_channels * shape.out_pixels
    return ChainWork(nnz * lanes, nnz, shape.out_channels * lanes, moved)


# Seconds per unit on one thread, from `make bench-costs` as SPARSE_COSTS.
#   fma: one kept weight times one lane; weight: one kept weight fetched; visit: one output lane; move: one element.
CHAIN_COSTS = ChainWork(2.1e-11, 4.5e-11, 1.7e-11, 7.5e-11)
#   one weight times one lane, where a layer is computed as if no weight were zero.
CHAIN_DENSE = 1.15e-11
#   the same in matrix tiles, on CPUs with units for them, in the units of CHAIN_COSTS.
CHAIN_TILES = ChainWork(7.8e-12, 0, 4.1e-10, 0)
WITH_TILES = ("amx",)
#   an element copied into a chain or out of it.
CHAIN_COPY = 7.3e-10


def fills_tiles(shape: Shape) -> bool:
    """Whether matrix tiles, of 16 rows and columns and 32 terms, would not be empty for the most part."""
    return shape.out_channels >= 16 and shape.out_pixels >= 36 and shape.in_channels * shape.taps >= 32


def predict_in_chain(shape: Shape, nnz: int) -> tuple[float, float]:
    """Expected seconds of a convolution within a chain, on the sparse kernels and computed as if no weight were zero.

    The latter is infinite where it cannot be: for groups, and, without matrix tiles, where at least half of the weights are
    pruned, which hide an infinite input from their row.
    """
    ratio = SPARSE_COSTS[_ops.backend()].fma / SPARSE_COSTS["avx512"].fma * shape.batch / _threads()
    weights = shape.macs // (shape.batch * shape.out_pixels)
    sparse, all_of_it = chain_work(shape, nnz), chain_work(shape, weights)
    dense = math.inf
    if shape.groups == 1 and fills_tiles(shape) and _ops.backend() in WITH_TILES:
        dense = _seconds(CHAIN_TILES, all_of_it)
    elif shape.groups == 1 and nnz > weights / 2:
        dense = CHAIN_DENSE * all_of_it.fma
    return ratio * _seconds(CHAIN_COSTS, sparse), ratio * dense


def _seconds(costs: ChainWork, work: ChainWork) -> float:
    return sum(cost * amount for cost, amount in zip(costs, work))


class GpuCost(NamedTuple):
    """Seconds on an H100 per multiply-add of the sparse kernels and of PyTorch's dense ones, and per byte moved; or how
    many times as long something else takes."""

    sparse: float
    dense: float
    move: float


# Fitted to ResNet-50's layers on an H100, batch 32, caches cold (docs/gpu.md); TF32 is float32 as cuDNN computes it unless
# told otherwise. The sparse kernels wait for their first tile before they compute, so that their parts add up.
GPU_COSTS = {
    "float32": GpuCost(1.8e-13, 4.0e-14, 4.2e-13),
    "tf32": GpuCost(1.8e-13, 1.0e-14, 4.2e-13),
    "float16": GpuCost(2.5e-13, 4.5e-15, 4.2e-13),
    "bfloat16": GpuCost(2.5e-13, 4.5e-15, 4.2e-13),
}
GPU_START_SECONDS = {"sparse": 2.7e-5, "dense": 5e-6}
# By the data sheets: multiprocessors times clock, peak of the tensor cores, bandwidth. Others: by their multiprocessors.
GPU_SCALES = {"H100": GpuCost(1.0, 1.0, 1.0), "H200": GpuCost(1.0, 1.0, 0.7), "A100": GpuCost(1.52, 3.17, 1.67)}
GPU_MULTIPROCESSORS = 132


def gpu_seconds(shape: Shape, nnz: int, kind: str, itemsize: int, scale: GpuCost) -> tuple[float, float]:
    """Expected seconds of (sparse, dense) for one pass of a layer on a GPU.

    Args:
        shape: of the layer.
        nnz: kept weights.
        kind: a key of :data:`GPU_COSTS`.
        itemsize: bytes of an activation.
        scale: times as long as on an H100; see :data:`GPU_SCALES`.
    """
    cost = GpuCost(*(c * times for c, times in zip(GPU_COSTS[kind], scale)))
    moved = shape.batch * (shape.in_channels * shape.in_pixels + shape.out_channels * shape.out_pixels)
    move = cost.move * moved * itemsize
    sparse = cost.sparse * nnz * shape.batch * shape.out_pixels + move
    dense = max(cost.dense * shape.macs * (GROUPED_DENSE_FACTOR if shape.groups > 1 else 1), move)
    return GPU_START_SECONDS["sparse"] + sparse, GPU_START_SECONDS["dense"] + dense


def predict_on_gpu(shape: Shape, nnz: int, train: bool, dtype: torch.dtype, index: int) -> tuple[float, float]:
    """As :func:`predict`, on a GPU."""
    name = str(dtype).removeprefix("torch.")
    kind = "tf32" if name == "float32" and _uses_tf32() else name
    sparse, dense = gpu_seconds(shape, nnz, kind, dtype.itemsize, GpuCost(*_gpu_scale(index)))
    passes = 3 if train else 1
    return passes * sparse, passes * dense


@torch.compiler.assume_constant_result
def _gpu_scale(index: int) -> tuple[float, float, float]:
    facts = torch.cuda.get_device_properties(index)
    known = next((tuple(scale) for name, scale in GPU_SCALES.items() if name in facts.name), None)
    return known or (GPU_MULTIPROCESSORS / facts.multi_processor_count,) * 3


@torch.compiler.assume_constant_result
def _gpu_lacks() -> str:
    return gpu.missing()


def decide(module, input: Tensor) -> Decision:
    """Which way ``module`` runs on ``input``, and why. A graph of ``torch.compile`` keeps to what it was traced with."""
    if module.backend == "sparse":
        return Decision("sparse", "forced by module.backend")
    if module.backend == "dense":
        return Decision("dense", "forced by module.backend")
    if module.backend != "auto":
        raise ValueError(f"backend must be 'auto', 'sparse' or 'dense', got {module.backend!r}")
    if input.dtype == torch.float64:
        return Decision("dense", "no sparse kernels for float64")
    if input.device.type not in ("cpu", "cuda"):
        return Decision("dense", f"no sparse kernels for {input.device.type}")
    if input.is_cuda and _gpu_lacks():
        return Decision("dense", _gpu_lacks())
    if not input.is_cuda and _ops.backend() == "reference":
        return Decision("dense", "installed without C++ kernels")
    shape = shape_of(module, input)
    train = torch.is_grad_enabled() and module.is_trained
    measured = module.tuned.get(tuned_key(shape, train, input)) if module.tuned else None
    if measured:
        sparse, dense = measured
    elif input.is_cuda:
        sparse, dense = predict_on_gpu(shape, module._kept, train, _computed_in(input), input.device.index)
    else:
        sparse, dense = predict(shape, module._kept, train)
    backend = "sparse" if sparse < dense else "dense"
    return Decision(backend, "measured" if measured else "cost table", sparse, dense)
