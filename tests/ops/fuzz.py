"""Random convolutions against the reference: shapes from seeds, so that one line reproduces a case.

A failing case prints the ``check(Case.random(SEED))``, ``check_block(SEED)`` or ``check_others(SEED)`` that reproduces it.
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
    def random(seed: int, large: bool = False, depthwise: bool = False) -> Case:
        """The case of ``seed``; ``large`` draws sizes that real networks have, ``depthwise`` what has kernels of its own."""
        r = random.Random(seed)
        groups = r.choice([1, 1, 1, 1, 2, 3])
        per_group = [1, 2, 3, 5, 8, 16, 17, 31, 64, 100] if not large else [64, 128, 256]
        channels = groups * r.choice(per_group), groups * r.choice(per_group)
        if not large and r.random() < 0.1:  # depthwise
            groups = r.choice([3, 16, 33])
            channels = groups, groups * r.choice([1, 2])
        if depthwise:
            groups = r.choice([2, 3, 16, 33])
            channels = groups, groups
        kernel = r.choice([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (1, 7), (7, 7)][: 4 if large else 8])
        stride = r.choice([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2), (4, 3)][: 3 if large else 6])
        dilation = r.choice([(1, 1), (1, 1), (1, 1), (2, 2), (3, 1)][: 2 if large else 5])
        padding = tuple(r.choice([0, 1, 1, 2, 3]) for _ in range(4)) if r.random() < 0.5 else (r.choice([0, 1, 3]),) * 4
        need = [dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1] for i in (0, 1)]
        choices = [1, 2, 5, 7, 8, 13, 14, 15, 17, 28, 33] if not large else [7, 14, 28, 56]
        size = tuple(max(n, 1, r.choice(choices)) for n in need)
        return Case(
            seed, r.choice([1, 1, 2, 3, 5, 16, 19, 32]), *channels, size, kernel, stride, padding, dilation, groups,
            r.choice([0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]), r.random() < 0.4 and not depthwise, r.random() < 0.5,
            r.random() < 0.5,
        )  # fmt: skip


def _draw(case: Case, generator, *size):
    if case.integers:
        return torch.randint(-4, 5, size, generator=generator).float()
    return torch.randn(size, generator=generator)


def _close(name: str, case: Case, actual, expected, terms: float) -> None:
    """Equal on integers; else within the rounding of a sum of ``terms`` products."""
    how = f"large={case.in_channels * case.out_channels > 4000}, depthwise={case.groups == case.in_channels > 1}"
    context = f"{name}: check(Case.random({case.seed}, {how}))  {case}"
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

    other = _draw(case, g, *x.shape).contiguous(memory_format=layout)
    for added in (None, other):
        both = torch.full_like(dx, NAN), torch.full_like(dw, NAN)
        native.conv2d_grads(*both, dy, x, values, *pattern, added, *geometry)
        start = 0 if added is None else added
        _close("conv2d_grads", case, both[0] - start, dx, pattern.nnz / case.in_channels + 1)
        assert torch.equal(both[1], dw), f"conv2d_grads: {case}"
    if not case.channels_last or case.groups == 1:
        added = other.clone(memory_format=torch.preserve_format)
        native.conv2d_grads(added, dw, dy, x, values, *pattern, added, *geometry)
        _close("conv2d_grads in place", case, added - other, dx, pattern.nnz / case.in_channels + 1)

    if not case.channels_last and y.numel() > case.out_channels:
        _check_normed(case, g, dy, x, values, pattern, geometry, other)

    db = torch.full((case.out_channels,), NAN)
    native.bias_grad(db, dy)
    _close("bias_grad", case, db, reference.bias_grad(dy), size[0] * size[2] * size[3])
    return float((y != 0).float().mean()) if y.numel() else 0.0


def _check_normed(case: Case, generator, dy, x, values, pattern, geometry, other) -> None:
    """A layer of conv2d_batch_norms and its gradients are what the two ops do one after the other, to the bit."""
    native, context, how = torch.ops.sparsekit_cpu, f"conv2d_batch_norms: {case}", (case.bias, 1e-2)
    weight, bias, shift = (torch.randn(case.out_channels, generator=generator) for _ in range(3))
    residual = _draw(case, generator, *dy.shape) if case.integers else None
    bits = (*dy.shape[:2], (dy.shape[2] * dy.shape[3] + 15) // 16 * 2)
    has_bits = residual is not None and case.bias
    found, expected = (
        [torch.full_like(t, NAN) for t in (dy, dy, weight, weight)]
        + ([torch.zeros(bits, dtype=torch.uint8)] if has_bits else [])
        for _ in range(2)
    )
    running = shift.clone(), weight.abs(), torch.tensor(2)
    outside = [x] if residual is None else [x, residual]
    plan = [0], [-1 if residual is None else 1], [int(case.bias)], [1e-2]
    numbers = [n for part in geometry[:4] for n in part] + [case.groups]
    lists = [[t] for t in found[:4]], found[4:], [[t] for t in running]
    native.conv2d_batch_norms(
        *lists[0], lists[1], *lists[2], outside, [values], *([t] for t in pattern[:2]), [weight], [bias], *plan, [-1.0],
        numbers,
    )  # fmt: skip
    out, product, mean, var, *positives = expected
    native.conv2d(product, x, values, *pattern[:2], None, *geometry)
    positive = positives[0] if has_bits else None
    native.batch_norm(out, mean, var, positive, product, weight, bias, residual, *how)
    assert all(torch.equal(a, b) for a, b in zip(found, expected)), context
    count = dy.numel() // case.out_channels
    torch.testing.assert_close(running[0], shift + (mean - shift) / 3, msg=context)
    torch.testing.assert_close(running[1], weight.abs() + (var * count / (count - 1) - weight.abs()) / 3, msg=context)
    assert running[2] == 3, context

    norm = product, positive, weight, bias, mean, var
    sizes = x, values, weight, bias, dy
    grads, both = ([torch.full_like(t, NAN) for t in sizes] for _ in range(2))
    native.conv2d_batch_norms_grads(
        [grads[0], grads[4]][: len(outside)], *([t] for t in grads[1:4]), other, dy, [x], [product], [mean], [var],
        positives, [values], *([t] for t in pattern), [weight], [bias], *plan, numbers,
    )  # fmt: skip
    of_product = torch.full_like(product, NAN)
    native.batch_norm_grad(of_product, *both[2:], dy, *norm, *how)
    native.conv2d_grads(*both[:2], of_product, x, values, *pattern, other, *geometry)
    compared = 4 if residual is None else 5
    assert all(torch.equal(a, b) for a, b in zip(grads[:compared], both)), context


def check_block(seed: int, size: tuple[int, ...] | None = None) -> None:
    """Compare a residual block in one call with PyTorch's, in float64, on images ``size`` or of a random one."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    context = f"check_block({seed}, {size})"

    def draw(*size):
        return torch.randn(size, generator=g)

    size = size or (r.choice([2, 3]), r.choice([8, 32]), *r.choice([(8, 8), (14, 14), (5, 7), (16, 4)]))
    x, channels, branch = draw(*size), size[1], r.choice([4, 33])
    stride, affine = r.choice([1, 1, 2]), r.random() < 0.8
    kernels = r.choice([(1, 3, 1), (3, 3), (1,), (3,)])
    widths = channels, *[branch] * (len(kernels) - 1), channels if stride == 1 else 2 * channels
    strides = [stride if i == (len(kernels) == 3) else 1 for i in range(len(kernels))]
    layers = []  # kernel, stride, width before and after, source, residual, relu
    if stride == 2 or r.random() < 0.5:
        layers.append((r.choice([1, 1, 3]), stride, channels, widths[-1], 0, -1, False))
    shortcut = len(layers)
    for i, kernel in enumerate(kernels):
        source, last = shortcut + i if i else 0, i + 1 == len(kernels)
        layers.append((kernel, strides[i], *widths[i : i + 2], source, shortcut if last else -1, r.random() < 0.8))
    x.requires_grad_()
    theirs, ours, checked = [x.double()], [], [x]
    for kernel, stride, before, after, source, residual, relu in layers:
        dense = draw(after, before, kernel, kernel)
        mask = torch.rand(dense.shape, generator=g) > r.choice([0.5, 0.9])
        pattern = pattern_from_mask(mask)
        values = _ops.compress(dense, pattern).requires_grad_()
        norm = [draw(after).requires_grad_(), draw(after).requires_grad_()] if affine else [None, None]
        geometry = (kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1), 1
        ours.append(_ops.NormedConv(values, pattern, geometry, *norm, (None,) * 3, 0.1, 1e-2, relu, source, residual))
        weight = _ops.decompress(values, pattern, dense.shape).double()
        y = torch.nn.functional.conv2d(theirs[source], weight, None, stride, kernel // 2)
        y = torch.nn.functional.batch_norm(
            y, None, None, *(t if t is None else t.double() for t in norm), True, 0, 1e-2
        )
        y = y if residual < 0 else y + theirs[residual]
        theirs.append(y.relu() if relu else y)
        checked += [values, *(t for t in norm if t is not None)]
    fork = shortcut > 0 and r.random() < 0.3
    # What rounding takes across a ReLU must not count.
    weights = draw(*theirs[-1].shape) * (theirs[-1].detach().abs() > 1e-3)
    also = draw(*x.shape) if fork else torch.zeros_like(x)
    expected = torch.autograd.grad((theirs[-1] * weights).sum() + (theirs[0] * also).sum(), checked)
    out = _ops.conv2d_batch_norms([x], ours, fork)
    assert out is not None, context
    out, again = out if fork else (out, x)
    torch.testing.assert_close(out.double(), theirs[-1], rtol=1e-3, atol=1e-3, msg=lambda m: f"{context}\n{m}")
    loss = (out * weights).sum() + (again * also).sum()
    _alike("gradients of conv2d_batch_norms", context, torch.autograd.grad(loss, checked), expected)


def check_others(seed: int) -> None:
    """Compare structures, pooling and normalization with the reference, on tensors of a random size."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    context, native = f"check_others({seed})", torch.ops.sparsekit_cpu

    groups = r.choice([1, 1, 2, 3])
    rows, columns = groups * r.choice([1, 2, 7, 33]), r.choice([1, 3, 16, 65])
    kernel = r.choice([(), (1, 1), (3, 3), (2, 5)]) if groups == 1 else r.choice([(1, 1), (3, 3)])
    mask = torch.rand(rows, columns, *kernel, generator=g) >= r.choice([0.0, 0.5, 0.95, 1.0])
    found = torch.ops.sparsekit.pattern(mask, groups)
    for ours, theirs in zip(found, reference.pattern(mask, groups), strict=True):
        assert torch.equal(ours, theirs), f"pattern: {context}"

    size = r.choice([1, 2, 5]), r.choice([1, 3, 16, 17]), r.choice([1, 2, 7, 14, 33]), r.choice([1, 3, 8, 13, 31])
    x = torch.randint(-4, 5, size, generator=g).float()
    pool = [r.choice([1, 2, 3]) for _ in range(2)]
    geometry = pool, [r.choice([1, 2, 3]) for _ in range(2)], [r.randint(0, k // 2) for k in pool], [1, 1]
    if all(n + 2 * p >= k for n, p, k in zip(size[2:], geometry[2], pool)):
        expected, expected_taps = reference.max_pool2d(x, *geometry, False)
        out, grad = torch.full_like(expected, NAN), torch.full_like(x, NAN)
        native.max_pool2d(out, x, *geometry)
        assert torch.equal(out, expected), f"max_pool2d: {context}"
        out, taps = torch.full_like(out, NAN), torch.full_like(expected_taps, 254)
        native.max_pool2d_taps(out, taps, x, *geometry)
        assert torch.equal(out, expected) and torch.equal(taps, expected_taps), f"max_pool2d_taps: {context}"
        dy = torch.randint(-4, 5, out.shape, generator=g).float()
        native.max_pool2d_grad(grad, dy, taps, *geometry)
        expected = reference.max_pool2d_grad(dy, taps, x.shape, *geometry, False)
        assert torch.equal(grad, expected), f"max_pool2d_grad: {context}"

    def draw(*shape, there=True):
        return torch.randn(*shape, generator=g) if there else None

    # One number has no variance, and ReLU then sees the rounding of zero.
    size = (size[0] + 1, *size[1:])
    affine, relu = r.random() < 0.7, r.random() < 0.5
    x, weight, bias = draw(*size), draw(size[1], there=affine), draw(size[1], there=affine)
    residual = draw(*size, there=r.random() < 0.5)
    expected = reference.batch_norm(x, weight, bias, residual, relu, 1e-2)
    found = [torch.full_like(t, NAN) for t in expected[:3]]
    *statistics, positive = expected[1:]
    # Without a residual the sign of what ReLU saw is computed again.
    positive = positive if residual is not None and relu else None
    bits = None if positive is None else torch.empty_like(positive)
    native.batch_norm(*found, bits, x, weight, bias, residual, relu, 1e-2)
    _alike("batch_norm", context, found, expected[:3])
    if bits is not None:
        assert torch.equal(reference.from_bits(bits, size), found[0] > 0), f"batch_norm: {context}"
    args = draw(*size), x, positive, weight, bias, *statistics, relu, 1e-2
    expected = reference.batch_norm_grad(*args)
    found = [torch.full_like(t, NAN) for t in expected]
    native.batch_norm_grad(*found[:3], None if positive is None else found[3], *args)
    _alike("batch_norm_grad", context, found if positive is not None else found[:3], expected)
    if all(n + 2 * p >= k for n, p, k in zip(size[2:], geometry[2], pool)):
        _check_pooled(context, x, weight, bias, relu, geometry)


def _check_pooled(context, x, weight, bias, relu, geometry) -> None:
    """batch_norm_max_pool2d and its gradients are what the two ops do one after the other, to the bit."""
    native, norm = torch.ops.sparsekit_cpu, (weight, bias)
    found = [torch.full_like(t, 77) for t in _ops._batch_norm_max_pool2d_fake(x, *norm, relu, 1e-2, *geometry, False)]
    native.batch_norm_max_pool2d(*found, x, *norm, relu, 1e-2, *geometry)
    whole, expected = torch.full_like(x, NAN), [torch.full_like(t, 88) for t in found]
    out, mean, var, taps = expected
    native.batch_norm(whole, mean, var, None, x, *norm, None, relu, 1e-2)
    native.max_pool2d_taps(out, taps, whole, *geometry)
    assert all(map(torch.equal, found, expected)), f"batch_norm_max_pool2d: {context}"
    grads, both = ([torch.full_like(t, NAN) for t in (x, mean, mean)] for _ in range(2))
    dy = out.sin()
    native.batch_norm_max_pool2d_grad(*grads, dy, taps, x, *norm, mean, var, relu, 1e-2, *geometry)
    native.max_pool2d_grad(whole, dy, taps, *geometry)
    native.batch_norm_grad(*both, None, whole, x, None, *norm, mean, var, relu, 1e-2)
    assert all(map(torch.equal, grads, both)), f"batch_norm_max_pool2d_grad: {context}"


def _alike(name: str, context: str, found, expected) -> None:
    for ours, theirs in zip(found, expected):
        scale = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-4 * max(scale, 1), msg=lambda m: f"{name}: {context}\n{m}"
        )
