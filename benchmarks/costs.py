"""Fits the constants of sparsekit.dispatch to measured layers: `make bench-costs`. Prints them; paste them in."""

from __future__ import annotations

import math

import numpy as np
import torch

import sparsekit as sk
from benchmarks.layers import measure
from benchmarks.shapes import RESNET50
from benchmarks.timing import keep_freed_memory

BATCH = 8
SPARSITIES = [0.5, 0.8, 0.9, 0.95, 0.98]


def _relative_fit(rows: list[list[float]], seconds: list[float]) -> np.ndarray:
    """Least squares of the relative error, constants not below zero."""
    a, b = np.array(rows), np.array(seconds)
    a = a / b[:, None]
    free = list(range(a.shape[1]))
    while True:
        solution = np.zeros(a.shape[1])
        solution[free] = np.linalg.lstsq(a[:, free], np.ones(len(b)), rcond=None)[0]
        if (solution >= 0).all():
            return solution
        free.remove(int(solution.argmin()))


def main() -> None:
    torch.set_num_threads(2)
    keep_freed_memory()
    for isa in sk.available_backends()[1:]:
        with sk.use_isa(isa):
            rows, seconds, macs, dense_seconds = [], [], [], []
            for layer in RESNET50:
                times = measure(layer, BATCH, SPARSITIES, runs=3)
                out = layer.size // layer.stride
                pixels = math.ceil(BATCH * out * out / 16) * 16
                moved = BATCH * (layer.in_channels * layer.size**2 + layer.out_channels * out**2)
                for sparsity in SPARSITIES:
                    key = f"{100 * sparsity:g}"
                    nnz = (1 - sparsity) * layer.in_channels * layer.out_channels * layer.kernel**2
                    rows.append([nnz * pixels / 2, moved / 2])
                    seconds.append(times[f"{key}_fwd"])
                    rows.append([nnz * pixels, moved])
                    seconds.append(times[f"{key}_dx"] + times[f"{key}_dw"])
                macs.append([BATCH * layer.macs / 2])
                dense_seconds.append(times["dense_fwd"])
                macs.append([BATCH * layer.macs])
                dense_seconds.append(times["dense_bwd"])
            fma, move = _relative_fit(rows, seconds)
            (mac,) = _relative_fit(macs, dense_seconds)
            error = np.median(np.abs(np.array(rows) @ [fma, move] / np.array(seconds) - 1))
            print(f'"{isa}": {{"fma": {fma:.2g}, "move": {move:.2g}}},  # median error {error:.0%}')
    print(f'dense "{torch.backends.cpu.get_cpu_capability()}": {mac:.2g}')


if __name__ == "__main__":
    main()
