"""Fits the constants of sparsekit.dispatch to measured layers: `make bench-costs`. Prints them; paste them in."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import sparsekit as sk
from benchmarks.layers import measure
from benchmarks.shapes import RESNET50, Layer
from benchmarks.timing import keep_freed_memory
from sparsekit.dispatch import WITH_TILES, Shape, chain_work, sparse_work
from sparsekit.profile import seconds_in_turns

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


def _shape(layer: Layer, batch: int) -> Shape:
    out = layer.size // layer.stride
    return Shape(
        "conv2d", layer.in_channels, layer.out_channels, layer.kernel**2, 1, layer.stride**2, batch, layer.size**2, out**2
    )  # fmt: skip


def _chain_seconds(layers: list[Layer], sparsity: float, times: tuple[int, ...]) -> list[float]:
    """Seconds an image, on one thread, of a chain that has ``layers``, which end as they begin, so many times."""
    images = torch.randn(2, layers[0].in_channels, layers[0].size, layers[0].size)
    runs = {}
    for count in times:
        convs = [
            nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.kernel // 2)
            for layer in layers * count
        ]
        model = sk.pruning.magnitude_(nn.Sequential(*convs).eval(), sparsity=sparsity, distribution="uniform")
        engine = sk.compile(model, images, autotune=False)
        engine._schedule_for((images,)).join([list(range(len(convs)))])
        runs[str(count)] = lambda engine=engine: engine(images)
    return [seconds / len(images) for seconds in seconds_in_turns(runs, runs=9).values()]


def _pairs() -> list[tuple[list[Layer], list[int]]]:
    """Layers that keep an image's size, each with one that leads back, and how many weights they have."""
    pairs = []
    for layer in RESNET50:
        if layer.stride == 1:
            pair = [layer, Layer(layer.out_channels, layer.in_channels, 1, 1, layer.size, 1)]
            pairs.append((pair, [one.in_channels * one.out_channels * one.kernel**2 for one in pair]))
    return pairs


def fit_chains() -> None:
    """What a convolution costs inside of a chain: long chains against short ones, so that copies cancel."""
    torch.set_num_threads(1)
    rows, seconds, copies, dense = [], [], [], []
    for pair, weights in _pairs():
        short, long = _chain_seconds(pair, 0.0, (1, 4))
        work = sum(chain_work(_shape(one, 1), n).fma for one, n in zip(pair, weights))
        dense.append((long - short) / 3 / work)
        for sparsity in SPARSITIES:
            short, long = _chain_seconds(pair, sparsity, (1, 4))
            work = [chain_work(_shape(one, 1), round((1 - sparsity) * n)) for one, n in zip(pair, weights)]
            rows.append([sum(amounts) for amounts in zip(*work)])
            seconds.append((long - short) / 3)
            copies.append((short - seconds[-1]) / (2 * pair[0].in_channels * pair[0].size ** 2))
    costs = _relative_fit(rows, seconds)
    error = np.median(np.abs(np.array(rows) @ costs / np.array(seconds) - 1))
    print(f"CHAIN_COSTS = ChainWork({', '.join(f'{cost:.2g}' for cost in costs)})  # median error {error:.0%}")
    print(f"CHAIN_DENSE = {np.median(dense):.2g}")
    print(f"CHAIN_COPY = {np.median(copies):.2g}")


def fit_tiles() -> None:
    """What a convolution costs in matrix tiles inside of a chain."""
    torch.set_num_threads(1)
    rows, seconds = [], []
    for pair, weights in _pairs():
        short, long = _chain_seconds(pair, 0.0, (1, 4))
        work = [chain_work(_shape(one, 1), n)._replace(weight=0) for one, n in zip(pair, weights)]
        rows.append([sum(amounts) for amounts in zip(*work)])
        seconds.append((long - short) / 3)
    costs = _relative_fit(rows, seconds)
    error = np.median(np.abs(np.array(rows) @ costs / np.array(seconds) - 1))
    print(f"CHAIN_TILES = ChainWork({', '.join(f'{cost:.2g}' for cost in costs)})  # median error {error:.0%}")


def main() -> None:
    best = sk.backend()
    if best in WITH_TILES:
        fit_tiles()
        sk.set_isa("avx512")
    fit_chains()
    sk.set_isa(best)
    torch.set_num_threads(2)
    keep_freed_memory()
    layers = [(layer, 8) for layer in RESNET50] + [(layer, 64) for layer in SMALL]
    for isa in sk.available_backends()[1:]:
        with sk.use_isa(isa):
            rows, seconds, macs, dense_seconds = [], [], [], []
            for layer, batch in layers:
                times = measure(layer, batch, SPARSITIES, runs=3)
                shape = _shape(layer, batch)
                for sparsity in SPARSITIES:
                    key = f"{100 * sparsity:g}"
                    work = sparse_work(shape, round((1 - sparsity) * shape.macs / (batch * shape.out_pixels)))
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
