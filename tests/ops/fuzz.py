"""Random convolutions against the reference: shapes from seeds, so that one line reproduces a case.

A failing case prints the ``check(Case.random(SEED))`` that reproduces it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from sparsekit import _ops, reference
from sparsekit.formats import pattern_from_mask

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A convolution: geometry, sparsity, memory format, kind of data, and the seed of its numbers."""

    seed: int
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    sparsity: float
    channels_last: bool
    integers: bool
    bias: bool

    @staticmethod
    def random(seed: int, large: bool = False) -> Case:
        """The case of ``seed``; ``large`` draws sizes that real networks have."""
        r = random.Random(seed)
        groups = r.choice([1, 1, 1, 1, 2, 3])
        per_group = [1, 2, 3, 5, 8, 16, 17, 31, 64, 100] if not large else [64, 128, 256]
        channels = groups * r.choice(per_group), groups * r.choice(per_group)
        if not large and r.random() < 0.1:  # depthwise
            groups = r.choice([3, 16, 33])
            channels = groups, groups * r.choice([1, 2])
        kernel = r.choice([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (1, 7), (7, 7)][: 4 if large else 8])
        stride = r.choice([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2), (4, 3)][: 3 if large else 6])
        dilation = r.choice([(1, 1), (1, 1), (1, 1), (2, 2), (3, 1)][: 2 if large else 5])
        padding = tuple(r.choice([0, 1, 1, 2, 3]) for _ in range(4)) if r.random() < 0.5 else (r.choice([0, 1, 3]),) * 4
        need = [dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1] for i in (0, 1)]
        choices = [1, 2, 5, 7, 8, 13, 14, 17, 28, 33] if not large else [7, 14, 28, 56]
        size = tuple(max(n, 1, r.choice(choices)) for n in need)
        return Case(
            seed, r.choice([1, 1, 2, 3, 5, 16, 19, 32]), *channels, size, kernel, stride, padding, dilation, groups,
            r.choice([0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]), r.random() < 0.4, r.random() < 0.5, r.random() < 0.5,
        )  # fmt: skip


def _draw(case: Case, generator, *size):
    if case.integers:
        return torch.randint(-4, 5, size, generator=generator).float()
    return torch.randn(size, generator=generator)


def _close(name: str, case: Case, actual, expected, terms: float) -> None:
    """Equal on integers; else within the rounding of a sum of ``terms`` products."""
    context = f"{name}: check(Case.random({case.seed}, large={case.in_channels * case.out_channels > 4000}))  {case}"
    if case.integers:
        assert torch.equal(actual, expected), context
    else:
        torch.testing.assert_close(
            actual, expected, rtol=1.3e-6 * math.sqrt(max(terms, 1)), atol=1e-5 * math.sqrt(max(terms, 1)),
            msg=lambda m: f"{context}\n{m}",
        )  # fmt: skip


def check(case: Case) -> float:
    """Compare every native op with the reference on ``case``; outputs start as NaN.

    Returns:
        Fraction of the forward's outputs that are not zero, to tell cases that prove something.
    """
    g = torch.Generator().manual_seed(case.seed)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    native = torch.ops.sparsekit_cpu
    x = _draw(case, g, case.batch, case.in_channels, *case.size).contiguous(memory_format=layout)
    shape = (case.out_channels, case.in_channels // case.groups, *case.kernel)
    mask = torch.rand(shape, generator=g) >= case.sparsity
    pattern = pattern_from_mask(mask, case.groups)
    values = _draw(case, g, pattern.nnz)
    bias = _draw(case, g, case.out_channels) if case.bias else None
    geometry = (list(case.kernel), list(case.stride), list(case.padding), list(case.dilation), case.groups)
    size = _ops.output_size(x.shape, case.out_channels, *geometry[:4])
    per_output = pattern.nnz / case.out_channels

    y = torch.full(size, NAN).contiguous(memory_format=layout)
    native.conv2d(y, x, values, *pattern[:2], bias, *geometry)
    _close("conv2d", case, y, reference.conv2d(x, values, *pattern[:2], bias, *geometry), per_output)

    dy = _draw(case, g, *size).contiguous(memory_format=layout)
    dx = torch.full(x.shape, NAN).contiguous(memory_format=layout)
    native.conv2d_input_grad(dx, dy, values, *pattern[2:], *geometry)
    expected = reference.conv2d_input_grad(dy, values, *pattern[2:], x.shape, *geometry)
    _close("conv2d_input_grad", case, dx, expected, pattern.nnz / case.in_channels)

    dw = torch.full((pattern.nnz,), NAN)
    native.conv2d_values_grad(dw, dy, x, *pattern[:2], *geometry)
    expected = reference.conv2d_values_grad(dy, x, *pattern[:2], *geometry)
    _close("conv2d_values_grad", case, dw, expected, size[0] * size[2] * size[3])

    db = torch.full((case.out_channels,), NAN)
    native.bias_grad(db, dy)
    _close("bias_grad", case, db, reference.bias_grad(dy), size[0] * size[2] * size[3])
    return float((y != 0).float().mean()) if y.numel() else 0.0
