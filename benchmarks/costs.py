"""Fits the constants of sparsekit.dispatch to measured layers: `make bench-costs`. Prints them; paste them in."""

from __future__ import annotations

import numpy as np
import torch

import sparsekit as sk
from benchmarks.layers import measure
from benchmarks.shapes import RESNET50, Layer
from benchmarks.timing import keep_freed_memory
from sparsekit.dispatch import Shape, sparse_work

# Few channels and pixels, in large batches: what small networks are made of.
SMALL = [
    Layer(32, 32, 3, 1, 14, 1),
    Layer(32, 64, 3, 2, 14, 1),
    Layer(64, 64, 3, 1, 8, 1),
    Layer(64, 128, 3, 2, 8, 1),
    Layer(128, 128, 3, 1, 4, 1),
]
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
    layers = [(layer, 8) for layer in RESNET50] + [(layer, 64) for layer in SMALL]
    for isa in sk.available_backends()[1:]:
        with sk.use_isa(isa):
            rows, seconds, macs, dense_seconds = [], [], [], []
            for layer, batch in layers:
                times = measure(layer, batch, SPARSITIES, runs=3)
                out = layer.size // layer.stride
                shape = Shape(
                    "conv2d", layer.in_channels, layer.out_channels, layer.kernel**2, 1, layer.stride**2, batch,
                    layer.size**2, out**2,
                )  # fmt: skip
                for sparsity in SPARSITIES:
                    key = f"{100 * sparsity:g}"
                    work = sparse_work(shape, round((1 - sparsity) * shape.macs / (batch * out**2)))
                    rows.append([amount / 2 for amount in work])
                    seconds.append(times[f"{key}_fwd"])
                    rows.append(list(work))
                    seconds.append(times[f"{key}_dx"] + times[f"{key}_dw"])
                macs.append([shape.macs / 2])
                dense_seconds.append(times["dense_fwd"])
                macs.append([shape.macs])
                dense_seconds.append(times["dense_bwd"])
            costs = _relative_fit(rows, seconds)
            (mac,) = _relative_fit(macs, dense_seconds)
            error = np.median(np.abs(np.array(rows) @ costs / np.array(seconds) - 1))
            fma, move, row = costs
            print(f'"{isa}": Work({fma:.2g}, {move:.2g}, {row:.2g}),  # median error {error:.0%}')
    print(f'dense "{torch.backends.cpu.get_cpu_capability()}": {mac:.2g}')


if __name__ == "__main__":
    main()
