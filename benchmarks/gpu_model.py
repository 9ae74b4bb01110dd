"""What the GPU kernels have to do, and what they should take: no GPU needed.

Of every kernel: multiply-adds, bytes through DRAM, and the time below which it cannot go on a part (its bound). The
expected times are those of sparsekit.dispatch's cost table, the only place that holds fitted figures; a part other than
the H100 is that table times the ratio of data sheets. docs/gpu.md explains the formulas and shows the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from benchmarks.shapes import RESNET50, Layer
from sparsekit.dispatch import GPU_COSTS, GPU_SCALES, GPU_START_SECONDS, GpuCost, Shape, gpu_seconds

OPS = {"fwd": "forward", "dx": "input gradient", "dw": "weight gradient"}
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
BATCH = 32
LANES = 32
INDEX_BYTES = 4


class Part(NamedTuple):
    """A GPU, by its data sheet.

    Attributes:
        dram: bytes a second.
        peaks: multiply-adds a second of PyTorch's dense kernels, by the key of :data:`PRECISIONS`.
        scale: times as long as on an H100, for sparsekit.dispatch.
    """

    name: str
    multiprocessors: int
    hertz: float
    dram: float
    peaks: dict[str, float]
    scale: GpuCost


A100 = Part("A100-SXM", 108, 1.41e9, 2.0e12, {"tf32": 78e12, "fp16": 156e12, "fp32": 9.7e12}, GPU_SCALES["A100"])
H100 = Part("H100-SXM", 132, 1.755e9, 3.35e12, {"tf32": 247e12, "fp16": 495e12, "fp32": 33.5e12}, GPU_SCALES["H100"])
H200 = H100._replace(name="H200-SXM", dram=4.8e12, scale=GPU_SCALES["H200"])
PARTS = (A100, H100)


class Precision(NamedTuple):
    """How both sides compute: activations of `itemsize` bytes, at the costs of `kind` in sparsekit.dispatch."""

    name: str
    itemsize: int
    kind: str


PRECISIONS = {
    "tf32": Precision("TF32", 4, "tf32"),
    "fp32": Precision("float32", 4, "float32"),
    "fp16": Precision("float16", 2, "float16"),
}


# --- what there is to do ----------------------------------------------------------------------------------------------


def weights(layer: Layer) -> int:
    return layer.in_channels * layer.out_channels * layer.kernel**2


def kept(layer: Layer, sparsity: float) -> int:
    """Non-zeros: a multiple of 16, as Triton compiles kernels anew for numbers that are not."""
    return max(round((1 - sparsity) * weights(layer) / 16), 1) * 16


def shape_of(layer: Layer, batch: int) -> Shape:
    pixels, taps = layer.size**2, layer.kernel**2
    out = (layer.size // layer.stride) ** 2
    return Shape("conv2d", layer.in_channels, layer.out_channels, taps, 1, layer.stride**2, batch, pixels, out)


class Work(NamedTuple):
    """Of one launch: multiply-adds, and bytes that DRAM has to move at least."""

    macs: int
    bytes: int


def sparse_work(layer: Layer, op: str, sparsity: float, batch: int = BATCH, itemsize: int = 4) -> Work:
    """The gather kernels. All ops meet every non-zero once for every output pixel; they differ in what is read of it."""
    shape, nnz = shape_of(layer, batch), kept(layer, sparsity)
    activations = batch * (shape.in_channels * shape.in_pixels + shape.out_channels * shape.out_pixels) * itemsize
    rows = layer.in_channels if op == "dx" else layer.out_channels
    # The input gradient finds its values through a permutation; the weight gradient writes them.
    of_non_zero = itemsize + INDEX_BYTES * (2 if op == "dx" else 1)
    return Work(nnz * batch * shape.out_pixels, activations + nnz * of_non_zero + INDEX_BYTES * (rows + 1))


def dense_work(layer: Layer, batch: int = BATCH, itemsize: int = 4) -> Work:
    """PyTorch's dense kernels, any op."""
    shape = shape_of(layer, batch)
    activations = batch * (shape.in_channels * shape.in_pixels + shape.out_channels * shape.out_pixels)
    return Work(shape.macs, (activations + weights(layer)) * itemsize)


class Bound(NamedTuple):
    """Seconds that DRAM and the load units need at least; the kernel takes no less than the longer."""

    dram: float
    loads: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def name(self) -> str:
        return "dram" if self.dram >= self.loads else "loads"


def bound(layer: Layer, op: str, sparsity: float, part: Part, batch: int = BATCH, itemsize: int = 4) -> Bound:
    """A multiply-add loads its source, from shared memory or L1: a word a lane, 32 of them a clock and multiprocessor."""
    work = sparse_work(layer, op, sparsity, batch, itemsize)
    return Bound(work.bytes / part.dram, work.macs / (LANES * part.multiprocessors * part.hertz))


# --- what it should take ----------------------------------------------------------------------------------------------


def sparse_seconds(layer: Layer, sparsity: float, part: Part, precision: str = "tf32", batch: int = BATCH) -> float:
    """The CUDA C++ kernels, any op."""
    how = PRECISIONS[precision]
    return gpu_seconds(shape_of(layer, batch), kept(layer, sparsity), how.kind, how.itemsize, part.scale)[0]


def dense_seconds(layer: Layer, part: Part, precision: str = "tf32", batch: int = BATCH) -> float:
    """cuDNN, any op."""
    how = PRECISIONS[precision]
    return gpu_seconds(shape_of(layer, batch), 0, how.kind, how.itemsize, part.scale)[1]


PANEL = 16
GATHERED = 0.35  # of the tensor cores' peak, where the columns of an operand are gathered: assumed, not measured


def condensed_seconds(layer: Layer, sparsity: float, part: Part, batch: int = BATCH, panel: int = PANEL) -> float:
    """The forward in float16 on tensor cores over the columns in which any of `panel` rows has a non-zero."""
    work = dense_work(layer, batch, 2)
    macs = work.macs * (1 - sparsity**panel)
    tensor = macs / (GATHERED * part.peaks["fp16"])
    # Every gathered element serves `panel` rows, two to a word.
    loads = macs / panel / 2 / (LANES * part.multiprocessors * part.hertz)
    return GPU_START_SECONDS["sparse"] + max(work.bytes / part.dram, tensor, loads)


def optimizer_seconds(parameters: float, part: Part, buffers: int = 1) -> float:
    """A fused update of float32: weight, gradient and `buffers` of state are read, all but the gradient written."""
    return GPU_START_SECONDS["dense"] + parameters * 4 * (2 + buffers + 1 + buffers) / part.dram


# --- sums and break-evens ---------------------------------------------------------------------------------------------


def total(seconds: Callable[[Layer], float]) -> float:
    """All sparse convolutions of ResNet-50."""
    return sum(layer.count * seconds(layer) for layer in RESNET50)


def break_even(sparse: Callable[[float], float], dense: float) -> float | None:
    """The sparsity from which on `sparse` seconds, which fall, are below `dense`; None if they never are."""
    low, high = 0.0, 0.9999
    if sparse(high) > dense:
        return None
    if sparse(low) <= dense:
        return low
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if sparse(middle) > dense else (low, middle)
    return high


def layer_break_even(layer: Layer, part: Part, precision: str, batch: int = BATCH) -> float | None:
    return break_even(
        lambda s: sparse_seconds(layer, s, part, precision, batch), dense_seconds(layer, part, precision, batch)
    )


def network_break_even(part: Part, precision: str, batch: int = BATCH) -> float | None:
    """Of all sparse convolutions together, all at one sparsity."""
    return break_even(
        lambda s: total(lambda layer: sparse_seconds(layer, s, part, precision, batch)),
        total(lambda layer: dense_seconds(layer, part, precision, batch)),
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def percent(sparsity: float | None) -> str:
    """Rounded up, as sparse loses below."""
    if sparsity is None:
        return "never"
    return f"{ceil(1000 * sparsity) / 10:.1f} %" if sparsity else "always"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned so that it reads as text too."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    cells = [
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))] for line in lines
    ]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def _levels() -> list[str]:
    return [f"{100 * s:g} %" for s in SPARSITIES]


def rates_table() -> str:
    """What the cost table makes of the parts: multiply-adds a second, and bytes."""
    rows = []
    for part in PARTS:
        for key, how in PRECISIONS.items():
            cost = GpuCost(*(c * times for c, times in zip(GPU_COSTS[how.kind], part.scale)))
            loads = LANES * part.multiprocessors * part.hertz
            rates = [f"{1e-12 / cost.dense:.0f} of {part.peaks[key] / 1e12:.0f}"]
            rates += [f"{1e-12 / cost.sparse:.2f} of {loads / 1e12:.2f}", f"{1e-12 / cost.move:.1f}"]
            rows.append([f"{part.name}, {how.name}", *rates, f"{part.dram / 1e12:.2f}"])
    return table(["", "dense TMAC/s", "sparse TMAC/s", "moved TB/s", "DRAM TB/s"], rows)


def network_table(part: Part, batch: int = BATCH) -> str:
    """All sparse convolutions, one pass: dense and sparse milliseconds, speed-up, break-even; and the kernels' bound."""
    rows = []
    for key, how in PRECISIONS.items():
        dense = total(lambda layer, key=key: dense_seconds(layer, part, key, batch))
        sparse = [total(lambda layer, s=s, key=key: sparse_seconds(layer, s, part, key, batch)) for s in SPARSITIES]
        cells = [f"{1e3 * seconds:.2f} ({dense / seconds:.2f}×)" for seconds in sparse]
        rows.append([how.name, f"{1e3 * dense:.2f}", *cells, percent(network_break_even(part, key, batch))])
    for size, name in ((4, "bound, 4 bytes"), (2, "bound, 2 bytes")):
        least = [
            total(lambda layer, s=s, size=size: bound(layer, "fwd", s, part, batch, size).seconds) for s in SPARSITIES
        ]
        rows.append([name, "", *(f"{1e3 * seconds:.2f}" for seconds in least), ""])
    return table(["", "dense ms", *_levels(), "break-even"], rows)


def layer_table(part: Part, precision: str, batch: int = BATCH, layers: list[Layer] = RESNET50) -> str:
    """A pass of every layer: its work at 95 %, and microseconds, with the speed-up over cuDNN."""
    how = PRECISIONS[precision]
    head = ["layer", "GFLOP, MB at 95 %", "bound at 95 %", f"dense {how.name}", *_levels(), "break-even"]
    rows = []
    for layer in layers:
        work = sparse_work(layer, "fwd", 0.95, batch, how.itemsize)
        least = bound(layer, "fwd", 0.95, part, batch, how.itemsize)
        dense = dense_seconds(layer, part, precision, batch)
        sparse = [sparse_seconds(layer, s, part, precision, batch) for s in SPARSITIES]
        rows.append(
            [layer.name, f"{2e-9 * work.macs:.2f}, {1e-6 * work.bytes:.1f}", f"{1e6 * least.seconds:.1f} {least.name}"]
            + [f"{1e6 * dense:.1f}", *(f"{1e6 * s:.1f} ({dense / s:.2f}×)" for s in sparse)]
            + [percent(layer_break_even(layer, part, precision, batch))]
        )
    return table(head, rows)


def condensed_table(batch: int = BATCH) -> str:
    """Forward in float16 of all layers, ms: tensor cores over condensed columns, the CUDA kernels, and cuDNN."""
    rows = []
    for part in PARTS:
        dense = f"{1e3 * total(lambda layer, part=part: dense_seconds(layer, part, 'fp16', batch)):.2f}"
        for name, seconds in (("CUDA C++", sparse_seconds), (f"{PANEL}×1 columns", condensed_seconds)):
            extra = ("fp16",) if seconds is sparse_seconds else ()
            found = [
                total(lambda layer, s=s, f=seconds, part=part, extra=extra: f(layer, s, part, *extra, batch=batch))
                for s in SPARSITIES
            ]
            rows.append([f"{part.name}, {name}", dense, *(f"{1e3 * t:.2f}" for t in found)])
    return table(["", "cuDNN", *_levels()], rows)


def optimizer_table() -> str:
    """Microseconds of a fused update of ResNet-50's sparse convolutions, dense and on kept values alone."""
    parameters = sum(layer.count * weights(layer) for layer in RESNET50)
    rows = []
    for part in PARTS:
        for name, buffers in (("SGD with momentum", 1), ("AdamW", 2)):
            found = [optimizer_seconds((1 - s) * parameters, part, buffers) for s in (0.0, *SPARSITIES)]
            rows.append([f"{part.name}, {name}", *(f"{1e6 * seconds:.0f}" for seconds in found)])
    return table(["", "dense", *_levels()], rows)


def report(batch: int = BATCH, layers: list[Layer] = RESNET50) -> str:
    """Every table, as docs/gpu.md has them."""
    found = ["### Rates that the cost table implies", rates_table()]
    for part in PARTS:
        found += [
            f"### {part.name}: all 52 sparse convolutions, one pass, batch {batch}, ms",
            network_table(part, batch),
        ]
    for part in PARTS:
        for key in ("tf32", "fp16"):
            name = PRECISIONS[key].name
            found += [f"### {part.name}: a pass of every layer in {name}, µs", layer_table(part, key, batch, layers)]
    found += ["### Forward over condensed columns on tensor cores, float16, ms", condensed_table(batch)]
    found += ["### A fused optimizer update, µs", optimizer_table()]
    return "\n\n".join(found)
