"""What the GPU kernels should take, from the part's rates and each layer's shape alone: no GPU, no torch.

`python -m benchmarks.gpu --predict` prints the tables; docs/gpu.md explains the formulas. Times are seconds, sizes bytes.
A sparse kernel takes max(DRAM, shared memory, issue slots, L2) + staging + launch, a dense one DRAM + tensor cores +
launch: cuDNN's kernels do not overlap the two well, as measured on an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil
from typing import NamedTuple

from benchmarks.shapes import RESNET50, Layer

OPS = {"fwd": "forward", "dx": "input gradient", "dw": "weight gradient"}
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
BATCH = 32


class Part(NamedTuple):
    """A GPU: shared memory and clock of its multiprocessors, bandwidths that are reached, peaks of its tensor cores.

    Attributes:
        shared_bytes: shared memory of a multiprocessor.
        ffma: float32 multiply-adds of a multiprocessor in a clock, without tensor cores.
        dram, l2: bytes a second that are reached.
        tf32, fp16: peak multiply-adds a second of the tensor cores, dense.
    """

    name: str
    multiprocessors: int
    hertz: float
    shared_bytes: int
    ffma: int
    dram: float
    l2: float
    tf32: float
    fp16: float


A100 = Part("A100-SXM", 108, 1.41e9, 164 << 10, 64, 1.8e12, 4.0e12, 78e12, 156e12)
H100 = Part("H100-SXM", 132, 1.755e9, 228 << 10, 128, 3.0e12, 5.5e12, 247e12, 495e12)
PARTS = (A100, H100)


class Precision(NamedTuple):
    """How both sides compute: our kernels on `itemsize` bytes, cuDNN at `peak` multiply-adds a second."""

    name: str
    itemsize: int
    peak: Callable[[Part], float]
    fractions: dict[str, float]  # of the peak that cuDNN reaches, by op


# Fitted to cuDNN's times of six of ResNet-50's layers at batch 32 on an H100; float32 without TF32 is assumed.
TENSOR = {"fwd": 0.7, "dx": 0.7, "dw": 0.33}
PRECISIONS = {
    "tf32": Precision("TF32", 4, lambda part: part.tf32, TENSOR),
    "fp32": Precision(
        "float32", 4, lambda part: part.multiprocessors * part.ffma * part.hertz, {"fwd": 0.75, "dx": 0.75, "dw": 0.6}
    ),
    "fp16": Precision("float16", 2, lambda part: part.fp16, TENSOR),
}
DENSE_LAUNCH = 5e-6
# Winograd computes a 3 x 3 convolution of stride 1 in 4/9 of the multiply-adds, and loses half of that to transforms.
WINOGRAD = 1.5
LAUNCH = 3e-6


def tensor_bytes(layer: Layer, batch: int, itemsize: int) -> tuple[int, int]:
    """Input and output of a layer."""
    out = layer.size // layer.stride
    return batch * layer.in_channels * layer.size**2 * itemsize, batch * layer.out_channels * out**2 * itemsize


def weights(layer: Layer) -> int:
    return layer.in_channels * layer.out_channels * layer.kernel**2


def dram_floor(layer: Layer, part: Part, batch: int, itemsize: int) -> float:
    """No op is faster: input and output go through DRAM once, in one direction or the other."""
    return sum(tensor_bytes(layer, batch, itemsize)) / part.dram


def dense_seconds(layer: Layer, op: str, part: Part, precision: str = "tf32", batch: int = BATCH) -> float:
    """cuDNN."""
    how = PRECISIONS[precision]
    fraction = how.fractions[op]
    if precision == "fp32" and op != "dw" and layer.kernel == 3 and layer.stride == 1:
        fraction *= WINOGRAD
    moved = sum(tensor_bytes(layer, batch, how.itemsize)) + weights(layer) * how.itemsize
    return DENSE_LAUNCH + moved / part.dram + batch * layer.macs / (fraction * how.peak(part))


# --- the CUDA kernels: csrc/cuda/walks.h, tile.h and the plans of kernels.cu ------------------------------------------

LANES, WARPS, MOST_ROWS, MOST_SUMS = 32, 8, 16, 64
OTHER_BYTES = WARPS * (LANES * 8 + MOST_ROWS * 4) + 1024
SLOTS, ROWS = (8, 7, 4, 2), (16, 8, 4, 2, 1)
# Issue slots beside those that the inner loop takes for each slot, estimated from the source.
PER_NON_ZERO, PER_VISIT, PER_STAGED, PER_STORED, PER_REDUCTION = 3, 50, 6, 6, 44
SHUFFLES = 9  # of a reduction of eight sums, each a word a lane


class Walk(NamedTuple):
    """A gather: `rows` x `cols` target pixels read the `taps` (dy, dx) at `step` times their place."""

    batch: int
    rows: int
    cols: int
    source: int  # height and width
    step: int
    taps: tuple[tuple[int, int], ...]
    all_taps: int
    out_channels: int
    channels: int

    @property
    def has_taps(self) -> bool:
        dy, dx = self.taps[0] if self.taps else (0, 0)
        inside = (self.rows - 1) * self.step + dy < self.source and (self.cols - 1) * self.step + dx < self.source
        return self.all_taps > 1 or not self.taps or dy < 0 or dx < 0 or not inside


def forward_walk(layer: Layer, batch: int) -> Walk:
    out, padding = layer.size // layer.stride, layer.kernel // 2
    taps = tuple((y - padding, x - padding) for y in range(layer.kernel) for x in range(layer.kernel))
    return Walk(batch, out, out, layer.size, layer.stride, taps, len(taps), layer.out_channels, layer.in_channels)


def backward_walks(layer: Layer, batch: int) -> list[Walk]:
    """A walk for every residue of the stride, with the taps that meet it."""
    stride, padding = layer.stride, layer.kernel // 2
    walks = []
    for y in range(stride):
        for x in range(stride):
            taps = tuple(
                ((y + padding - ky) // stride, (x + padding - kx) // stride)
                for ky in range(layer.kernel)
                for kx in range(layer.kernel)
                if (y + padding - ky) % stride == 0 and (x + padding - kx) % stride == 0
            )
            rows, cols = (layer.size - y + stride - 1) // stride, (layer.size - x + stride - 1) // stride
            sizes = (batch, rows, cols, layer.size // stride, 1)
            walks.append(Walk(*sizes, taps, layer.kernel**2, layer.in_channels, layer.out_channels))
    return walks


class Tile(NamedTuple):
    """Floats of a channel's source that a tile stages, and how many tiles there are."""

    elements: int
    tiles: int


def tile_of(walk: Walk, slots: int) -> Tile:
    """As in csrc/cuda/tile.h: as many target pixels as fit `slots` places of a plane in shared memory."""
    if not walk.has_taps:
        return Tile(slots, ceil(walk.batch * walk.rows * walk.cols / slots))
    qy, qx = ([tap[axis] // walk.step for tap in walk.taps] or [0] for axis in (0, 1))
    residues = len({(dy % walk.step, dx % walk.step) for dy, dx in walk.taps}) or 1
    span_y, span_x = max(qy) - min(qy), max(qx) - min(qx)
    sources = ceil(walk.source / walk.step)

    def shared(q: list[int], targets: int) -> int:
        """Zeros that two neighbours have in common."""
        return min(max(min(-min(q), targets - 1 + max(q) - (sources - 1)), 0), max(q) - min(q))

    cols = walk.cols if walk.cols <= slots else ceil(walk.cols / ceil(walk.cols / slots))
    pitch = cols + span_x - (shared(qx, walk.cols) if cols == walk.cols else 0)
    rows = min(walk.rows, (slots - cols) // pitch + 1)
    rows = ceil(walk.rows / ceil(walk.rows / rows))
    whole = cols == walk.cols and rows == walk.rows
    image_pitch = (rows + span_y - (shared(qy, walk.rows) if whole else 0)) * pitch
    images = 1
    if whole:
        images = min(walk.batch, (slots - (rows - 1) * pitch - cols) // image_pitch + 1)
        images = ceil(walk.batch / ceil(walk.batch / images))
    plane = (images - 1) * image_pitch + (rows + span_y - 1) * pitch + cols + span_x
    tiles = ceil(walk.batch / images) * ceil(walk.rows / rows) * ceil(walk.cols / cols)
    return Tile(plane * residues, tiles)


class Plan(NamedTuple):
    """How a kernel is cut: slots of a lane, rows of a warp, channels staged at once."""

    slots: int
    rows: int
    tile: Tile
    chunk: int
    row_blocks: int


def plans(walk: Walk, part: Part) -> list[Plan]:
    """All that the kernel may choose from; tuning measures some of them."""
    found = []
    for slots in SLOTS:
        tile = tile_of(walk, slots * LANES)
        floats = (part.shared_bytes // 2 - OTHER_BYTES) // 4 - slots * LANES
        chunk = min(floats // tile.elements - 1, walk.channels)
        if chunk <= 0:
            continue
        chunk = ceil(walk.channels / ceil(walk.channels / chunk))
        for rows in ROWS:
            if slots * rows <= MOST_SUMS:
                found.append(Plan(slots, rows, tile, chunk, ceil(walk.out_channels / (rows * WARPS))))
    return found


class Prediction(NamedTuple):
    """Seconds, and what they are made of; `tiling` is (slots, rows) of the first walk."""

    dram: float
    shared: float
    issue: float
    l2: float
    staging: float
    launch: float
    tiling: tuple[int, int]

    @property
    def seconds(self) -> float:
        return max(self.dram, self.shared, self.issue, self.l2) + self.staging + self.launch

    @property
    def bound(self) -> str:
        return max(("dram", "shared", "issue", "l2"), key=lambda name: getattr(self, name))

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(*(a + b for a, b in zip(self[:-1], other[:-1])), self.tiling)


def _of_plan(walk: Walk, plan: Plan, op: str, sparsity: float, part: Part, itemsize: int) -> Prediction:
    """One launch, without DRAM. Shared memory does a word a lane and clock, a multiprocessor issues four instructions."""
    density = 1 - sparsity
    channels = walk.channels if walk.taps else 0
    used = density * channels * len(walk.taps)  # non-zeros of a row whose taps this walk has
    read = density * channels * walk.all_taps
    chunks = ceil(channels / plan.chunk)
    visits = chunks + read / LANES
    rows = walk.out_channels / plan.row_blocks  # of a block
    staged = channels * plan.tile.elements / LANES
    if op == "dw":
        # A broadcast for each non-zero, and eight sums reduced at once: shuffles, and a partial sum read and written.
        groups = read / 8 + visits / 2
        words = read * (plan.slots + 1) + groups * (SHUFFLES + 2) + visits * 2 + chunks * plan.slots
        instructions = read * (2 * plan.slots + PER_NON_ZERO) + groups * PER_REDUCTION + visits * PER_VISIT
    else:
        # Two non-zeros are broadcast at once.
        words = used * (plan.slots + 0.5) + visits * 2
        instructions = used * (2 * plan.slots + PER_NON_ZERO) + visits * PER_VISIT + plan.slots * PER_STORED
    # A block writes what it stages, and every warp reads where each element comes from.
    words = rows * words + staged + chunks * WARPS * plan.tile.elements / LANES
    instructions = rows * instructions + staged * PER_STAGED
    blocks = plan.tile.tiles * plan.row_blocks
    turns = ceil(blocks / part.multiprocessors)  # of the multiprocessor that does the most
    nnz = read * walk.out_channels
    bytes_per_non_zero = 4 + itemsize
    sums = 0.0
    if op == "dw":
        splits = min(max(ceil(4 * part.multiprocessors / plan.row_blocks), 1), plan.tile.tiles)
        of_block = ceil(plan.tile.tiles / splits)
        turns = ceil(splits * plan.row_blocks / part.multiprocessors) * of_block
        bytes_per_non_zero = 4 + 8
        sums = 2 * 4 * splits * nnz
    elif op == "dx":
        bytes_per_non_zero = 4 + 4 + 32  # the permutation makes every value a sector of its own
    clock = 1 / part.hertz
    # A strided row of pixels wastes what lies between them in each sector.
    return Prediction(
        dram=0,
        shared=turns * words * clock,
        issue=turns * instructions / 4 * clock,
        l2=(plan.tile.tiles * nnz * bytes_per_non_zero + sums) / part.l2,
        staging=blocks * channels * plan.tile.elements * walk.step * itemsize / part.l2,
        launch=(2 if op == "dw" else 1) * LAUNCH,
        tiling=(plan.slots, plan.rows),
    )


def sparse_prediction(
    layer: Layer, op: str, sparsity: float, part: Part, batch: int = BATCH, itemsize: int = 4
) -> Prediction:
    """The CUDA kernels with the best of their tilings."""
    walks = backward_walks(layer, batch) if op == "dx" else [forward_walk(layer, batch)]
    total = None
    for walk in walks:
        found = [_of_plan(walk, plan, op, sparsity, part, itemsize) for plan in plans(walk, part)]
        best = min(found, key=lambda prediction: prediction.seconds)
        total = best if total is None else total + best
    return total._replace(dram=dram_floor(layer, part, batch, itemsize))


def sparse_seconds(layer: Layer, op: str, sparsity: float, part: Part, batch: int = BATCH, itemsize: int = 4) -> float:
    return sparse_prediction(layer, op, sparsity, part, batch, itemsize).seconds


# --- other ways -------------------------------------------------------------------------------------------------------

VECTOR = 8
GATHERED = 0.35  # of the tensor cores' peak, where the columns of an operand are gathered


def condensed_seconds(
    layer: Layer, sparsity: float, part: Part, precision: str = "tf32", batch: int = BATCH, vector: int = VECTOR
) -> float:
    """The forward on tensor cores over the columns in which any of `vector` rows has a non-zero, 1 - s^V of them."""
    how = PRECISIONS[precision]
    macs = batch * layer.macs * (1 - sparsity**vector)
    tensor = macs / (GATHERED * how.peak(part))
    # Every gathered source element leaves shared memory once for `vector` rows.
    words = macs / vector * how.itemsize / 4
    shared = words / (LANES * part.multiprocessors * part.hertz)
    staging = sparse_prediction(layer, "fwd", sparsity, part, batch, how.itemsize).staging
    return max(dram_floor(layer, part, batch, how.itemsize), tensor, shared) + staging + LAUNCH


def optimizer_seconds(parameters: float, part: Part, buffers: int = 1) -> float:
    """A fused update of float32: weight, gradient and `buffers` of state are read, all but the gradient written."""
    return LAUNCH + parameters * 4 * (2 + buffers + 1 + buffers) / part.dram


# --- sums and break-evens ---------------------------------------------------------------------------------------------


def dense_total(ops: Iterable[str], part: Part, precision: str, batch: int = BATCH) -> float:
    """Seconds of cuDNN for all sparse convolutions of ResNet-50."""
    return sum(layer.count * dense_seconds(layer, op, part, precision, batch) for layer in RESNET50 for op in ops)


def sparse_total(ops: Iterable[str], sparsity: float, part: Part, precision: str, batch: int = BATCH) -> float:
    """Seconds of the CUDA kernels for all of them."""
    size = PRECISIONS[precision].itemsize
    return sum(x.count * sparse_seconds(x, op, sparsity, part, batch, size) for x in RESNET50 for op in ops)


def condensed_total(sparsity: float, part: Part, precision: str, batch: int = BATCH) -> float:
    return sum(layer.count * condensed_seconds(layer, sparsity, part, precision, batch) for layer in RESNET50)


def break_even(difference: Callable[[float], float], most: float = 0.999) -> float | None:
    """The sparsity from which on sparse wins; `difference` is sparse minus dense seconds, and falls. None: never."""
    if difference(most) > 0:
        return None
    low, high = 0.0, most
    if difference(low) <= 0:
        return low
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if difference(middle) > 0 else (low, middle)
    return high


def layer_break_even(layer: Layer, op: str, part: Part, precision: str, batch: int = BATCH) -> float | None:
    dense = dense_seconds(layer, op, part, precision, batch)
    itemsize = PRECISIONS[precision].itemsize
    return break_even(lambda s: sparse_seconds(layer, op, s, part, batch, itemsize) - dense)


def network_break_even(ops: Iterable[str], part: Part, precision: str, batch: int = BATCH) -> float | None:
    """Of all sparse convolutions together, all sparse at one sparsity."""
    dense = dense_total(ops, part, precision, batch)
    return break_even(lambda s: sparse_total(ops, s, part, precision, batch) - dense)


# --- tables -----------------------------------------------------------------------------------------------------------


def percent(sparsity: float | None) -> str:
    if sparsity is None:
        return "never"
    return f"{100 * sparsity:.1f} %" if sparsity else "always"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, aligned so that it reads as text too."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    cells = [
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))] for line in lines
    ]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def network_table(part: Part, batch: int = BATCH) -> str:
    """All sparse convolutions: dense and sparse milliseconds, speed-up, break-even."""
    head = ["", "dense ms", *(f"{100 * s:g} %" for s in SPARSITIES), "break-even"]
    rows = []
    for key, how in PRECISIONS.items():
        for title, ops in [*((name, (op,)) for op, name in OPS.items()), ("all three", tuple(OPS))]:
            dense = dense_total(ops, part, key, batch)
            sparse = [sparse_total(ops, s, part, key, batch) for s in SPARSITIES]
            cells = [f"{1e3 * seconds:.2f} ({dense / seconds:.2f}×)" for seconds in sparse]
            even = percent(network_break_even(ops, part, key, batch))
            rows.append([f"{how.name}, {title}", f"{1e3 * dense:.2f}", *cells, even])
    return table(head, rows)


def break_even_table(part: Part, batch: int = BATCH, layers: list[Layer] = RESNET50) -> str:
    """Layer by layer, the sparsity from which on the CUDA kernels win."""
    head = ["layer", *(f"{how.name} {op}" for how in PRECISIONS.values() for op in ("fwd", "dX", "dW"))]
    rows = [
        [layer.name, *(percent(layer_break_even(layer, op, part, key, batch)) for key in PRECISIONS for op in OPS)]
        for layer in layers
    ]
    return table(head, rows)


def layer_table(part: Part, op: str, precision: str, batch: int = BATCH, layers: list[Layer] = RESNET50) -> str:
    """Microseconds of one op, and the speed-up over cuDNN; `bound` is what bounds the kernel at 95 %."""
    how = PRECISIONS[precision]
    head = ["layer", "DRAM", f"dense {how.name}", *(f"{100 * s:g} %" for s in SPARSITIES), "slots×rows", "bound"]
    rows = []
    for layer in layers:
        dense = dense_seconds(layer, op, part, precision, batch)
        found = {s: sparse_prediction(layer, op, s, part, batch, how.itemsize) for s in SPARSITIES}
        cells = [f"{1e6 * p.seconds:.1f} ({dense / p.seconds:.2f}×)" for p in found.values()]
        floor = dram_floor(layer, part, batch, how.itemsize)
        at = found[0.95]
        rows.append(
            [layer.name, f"{1e6 * floor:.1f}", f"{1e6 * dense:.1f}", *cells, "{}×{}".format(*at.tiling), at.bound]
        )
    return table(head, rows)


def condensed_table(part: Part, batch: int = BATCH) -> str:
    """Forward on tensor cores over condensed columns, beside the CUDA kernels and cuDNN; milliseconds of all layers."""
    rows = []
    for key in ("tf32", "fp16"):
        name, dense = PRECISIONS[key].name, f"{1e3 * dense_total(('fwd',), part, key, batch):.2f}"
        sparse = [sparse_total(("fwd",), s, part, key, batch) for s in SPARSITIES]
        condensed = [condensed_total(s, part, key, batch) for s in SPARSITIES]
        rows.append([f"{name}, CUDA C++", dense, *(f"{1e3 * seconds:.2f}" for seconds in sparse)])
        rows.append([f"{name}, {VECTOR}×1 columns", dense, *(f"{1e3 * seconds:.2f}" for seconds in condensed)])
    return table(["", "cuDNN", *(f"{100 * s:g} %" for s in SPARSITIES)], rows)


def optimizer_table() -> str:
    """Microseconds of a fused update of ResNet-50's sparse convolutions, dense and on kept values alone."""
    parameters = sum(layer.count * weights(layer) for layer in RESNET50)
    rows = []
    for part in PARTS:
        for name, buffers in (("SGD with momentum", 1), ("AdamW", 2)):
            kept = [f"{1e6 * optimizer_seconds((1 - s) * parameters, part, buffers):.0f}" for s in SPARSITIES]
            rows.append([f"{part.name}, {name}", f"{1e6 * optimizer_seconds(parameters, part, buffers):.0f}", *kept])
    return table(["", "dense", *(f"{100 * s:g} %" for s in SPARSITIES)], rows)


def report(batch: int = BATCH, layers: list[Layer] = RESNET50) -> str:
    """Every table, for a terminal."""
    parts = []
    for part in PARTS:
        title = f"{part.name}, batch {batch}, predicted"
        parts += [
            f"{title}: all sparse convolutions of ResNet-50, ms (speed-up over cuDNN)",
            network_table(part, batch),
        ]
        parts += [f"{title}: break-even sparsity", break_even_table(part, batch, layers)]
        for key, how in PRECISIONS.items():
            for op, name in OPS.items():
                parts += [
                    f"{title}: {name}, µs (speed-up over cuDNN {how.name})",
                    layer_table(part, op, key, batch, layers),
                ]
        parts += [f"{title}: forward on tensor cores, ms", condensed_table(part, batch)]
    parts += ["a fused optimizer update, predicted, µs", optimizer_table()]
    return "\n\n".join(parts)
