"""How the work of a kernel is cut into programs: a fixed rule, or, if asked for, what was measured to be fastest.

A :class:`Config` says P pixels and R rows at once, U non-zeros at once, the rows that one program walks, and its warps.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
L1_BYTES = 128 << 10  # of the pixels that the rows of a program share; two programs on a multiprocessor of 256 KB


class Config(NamedTuple):
    """A program's share of the work.

    Attributes:
        pixels: P, target pixels (or batch entries) of a program.
        rows: R, rows that its warps walk at once.
        unroll: U, non-zeros of a row that are in flight.
        per_program: rows that a program walks one after the other; a multiple of ``rows``.
        warps: warps of a program.
        stages: loads that are in flight ahead of a product of matrices.
    """

    pixels: int
    rows: int
    unroll: int
    per_program: int
    warps: int
    stages: int = 1


_state = {"autotune": False}
_chosen: dict[Hashable, Config] = {}


def set_autotune(enabled: bool) -> None:
    """Choose configurations by measuring every candidate once per shape, instead of by the fixed rule (the default).

    What was measured stays chosen while this is on. Nothing is measured while a CUDA graph is captured or PyTorch
    traces: there a shape that was not met before runs what the rule says.
    """
    _state["autotune"] = enabled


def on_its_device(function: Callable) -> Callable:
    """Launch what ``function`` launches on the device of its first argument, the output."""

    @functools.wraps(function)
    def run(out: Tensor, *args, **kwargs):
        if not out.is_cuda:
            return function(out, *args, **kwargs)
        with torch.cuda.device(out.device):
            return function(out, *args, **kwargs)

    return run


def vector(period: int, dtype: torch.dtype) -> int:
    """Elements of a 16-byte load that may be used where runs of ``period`` elements are contiguous and aligned."""
    width = 16 // dtype.itemsize
    while period % width:
        width //= 2
    return width


def alignment(values: Tensor, col: Tensor) -> int:
    """Non-zeros that one load may take: 4, unless an array does not start on 16 bytes."""
    return 4 if values.data_ptr() % 16 == 0 and col.data_ptr() % 16 == 0 else 1


def _power_of_two(n: float) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


def pixel_configs(pixels: int, rows: int, bytes_per_pixel: int, width: int, unroll: int) -> list[Config]:
    """Candidates for a kernel whose programs share P pixels of the source among rows; the rule's choice is first.

    Args:
        pixels: targets of a row, in all images.
        rows: rows of the sparse matrix.
        bytes_per_pixel: what all channels of a pixel take.
        width: elements of one load.
        unroll: the rule's choice of U.
    """
    warps = 8
    # The widest loads that leave the pixels of a program in L1, and at least one full cache line.
    p = 128
    while p > 32 and p * bytes_per_pixel > L1_BYTES:
        p //= 2
    p = max(p, 8 * width)
    if INTERPRET:
        # The interpreter takes a program's time per instruction, not per element.
        p = min(max(_power_of_two(pixels), 16), 256)
    # A warp holds 32 * width pixels; where P is smaller, more rows share it.
    r = max(warps * 32 * width // p, warps)
    programs = max(-(-pixels // p), 1)
    # Enough programs for every multiprocessor, and then rows enough to use the pixels in L1 again.
    per_program = r
    while per_program < rows and per_program < 256 and programs * -(-rows // (2 * per_program)) >= 4 * 132:
        per_program *= 2
    chosen = Config(p, r, unroll, per_program, warps)
    others = [
        Config(p2, r2, u, max(r2, k), w)
        for w in (4, 8)
        for p2 in (p // 2, p, 2 * p)
        for r2 in [max(w * 32 * width // p2, w)]
        for u in (4, 8)
        for k in (r2, 64, 256)
        if p2 >= 8 * width
    ]
    return list(dict.fromkeys([chosen, *others]))


def register_limit(config: Config) -> dict[str, int]:
    """The option that gives a lane the registers its part of ``[R, U, P]`` needs: left alone, ptxas may aim for fewer, so
    that one program more fits a multiprocessor, and spill. Larger parts than the rule's are left to it."""
    part = config.pixels * config.rows * config.unroll // (32 * config.warps)
    if part > 64 or torch.version.hip is not None:
        return {}
    return {"maxnreg": 64 if part <= 8 else 80}


def panel_configs(pixels: int, rows: int, panel: int) -> list[Config]:
    """Candidates for the kernel on tensor cores, where ``unroll`` is K; the rule's choice is first."""
    p = 128 if pixels > 64 * 132 else 64
    programs = -(-pixels // p)
    per_program = panel
    while per_program < rows and per_program < 256 and programs * -(-rows // (2 * per_program)) >= 4 * 132:
        per_program *= 2
    chosen = Config(p, panel, 32, per_program, 4, 2)
    others = [
        Config(p2, panel, k, max(panel, n), w, stages)
        for p2, w in ((64, 4), (128, 4), (128, 8))
        for k in (32, 64)
        for n in (panel, 64, 256)
        for stages in (1, 3)
    ]
    return list(dict.fromkeys([chosen, *others]))


def split_tiles(pixels: int, nnz: int, per_tile: int) -> tuple[int, int]:
    """Tiles of ``per_tile`` pixels, and how many of them one split sums, so that the workspace stays below 64 MB."""
    tiles = -(-pixels // per_tile)
    return tiles, -(-tiles * nnz // (16 << 20)) or 1


def launch(key: Hashable, configs: Sequence[Config], run: Callable[[Config], None], out: Tensor) -> None:
    """Run the best of ``configs`` that is known for ``key``; measure first if that is on and allowed here."""
    if _state["autotune"] and out.is_cuda and not INTERPRET:
        key = (*key, out.device.index)
        if key in _chosen:
            return run(_chosen[key])
        if not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling():
            _chosen[key] = min(configs, key=lambda config: _seconds(run, config))
            return run(_chosen[key])
    return run(configs[0])


def _seconds(run: Callable[[Config], None], config: Config) -> float:
    try:
        run(config)
    except Exception as error:
        # Only what a part of the GPU is too small for; everything else is a mistake.
        if type(error).__name__ != "OutOfResources":
            raise
        return float("inf")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the GPU busy until all launches are queued, so that their overhead is not what is measured.
    busy = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    best = float("inf")
    for _ in range(3):
        for _ in range(4):
            busy.zero_()
        begin.record()
        for _ in range(5):
            run(config)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best
