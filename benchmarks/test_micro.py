"""Microbenchmarks, one layer per stage of ResNet-50: `pytest benchmarks/test_micro.py --benchmark-group-by=group`.

Forward, input gradient and masked weight gradient at 90 and 95 %, against PyTorch dense (NCHW and channels_last), and
against torch.sparse where it can do the layer: 1 x 1 convolutions as a CSR matrix product, its result left untransposed.
"""

import pytest
import torch

from benchmarks.layers import _dense
from benchmarks.shapes import RESNET50
from benchmarks.timing import keep_freed_memory
from sparsekit import _ops
from sparsekit.formats import pattern_from_mask

BATCH = 16
LAYERS = [layer for layer in RESNET50 if layer.stride == 1 and layer.in_channels in (64, 128, 256, 512)][::2]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

keep_freed_memory()


def operands(layer, sparsity=0.0):
    g = torch.Generator().manual_seed(0)
    out = layer.size // layer.stride
    x = torch.randn(BATCH, layer.in_channels, layer.size, layer.size, generator=g)
    dy = torch.randn(BATCH, layer.out_channels, out, out, generator=g)
    weight = torch.randn(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel, generator=g)
    return x, dy, weight, torch.rand(weight.shape, generator=g) >= sparsity


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_dense(benchmark, layer, way, layout):
    benchmark.group = f"{layer.name} {way}"
    x, dy, weight, _ = operands(layer)
    forward, backward = _dense(layer, *(t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy, weight)))
    benchmark.pedantic(forward if way == "forward" else backward, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("op", ["forward", "input_grad", "values_grad"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_sparsekit(benchmark, layer, op, sparsity):
    benchmark.group = f"{layer.name} {'forward' if op == 'forward' else 'backward'}"
    x, dy, weight, mask = operands(layer, sparsity)
    pattern = pattern_from_mask(mask)
    values = _ops.compress(weight, pattern)
    geometry = ([layer.kernel] * 2, [layer.stride] * 2, [layer.kernel // 2] * 4, [1, 1], 1)
    ops = torch.ops.sparsekit
    run = {
        "forward": lambda: ops.conv2d(x, values, *pattern, None, *geometry),
        "input_grad": lambda: ops.conv2d_input_grad(dy, values, *pattern[2:], list(x.shape), *geometry),
        "values_grad": lambda: ops.conv2d_values_grad(dy, x, *pattern[:2], *geometry),
    }[op]
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("layer", [x for x in LAYERS if x.kernel == 1], ids=lambda layer: layer.name)
def test_torch_sparse(benchmark, layer, sparsity):
    benchmark.group = f"{layer.name} forward"
    x, _, weight, mask = operands(layer, sparsity)
    matrix = (weight * mask).flatten(1).to_sparse_csr()

    def forward():
        return matrix @ x.transpose(0, 1).reshape(layer.in_channels, -1)

    benchmark.pedantic(forward, rounds=7, warmup_rounds=1)
