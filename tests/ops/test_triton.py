"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter; and ahead of time.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own.
Numbers are small integers, whose sums float32 holds exactly: results must equal the float64 reference rounded once.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit import _ops, gpu, kernels, reference
from sparsekit.formats import pattern_from_mask

triton = pytest.importorskip("triton", reason="Triton is not installed")

NAN = float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter took a loop's bounds in a way that NumPy 2.4 refuses, until 3.8.
INTERPRETER_WORKS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) or tuple(
    map(int, numpy.__version__.split(".")[:2])
) < (2, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

runs = pytest.mark.skipif(not kernels.available()[0], reason="no GPU: test_in_the_interpreter runs this in a process")
compiles = pytest.mark.skipif(INTERPRETED, reason="compiles, does not interpret")


@pytest.mark.skipif(INTERPRETED or kernels.available()[0], reason="runs on the GPU, or is the interpreter")
@pytest.mark.skipif(not INTERPRETER_WORKS, reason="this Triton's interpreter does not work with this NumPy")
def test_in_the_interpreter():
    """Half of the tests in each of two processes at once."""
    half = "linear or condensed or half_precision or rounding"
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-k", names, __file__],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for names in (half, f"not ({half})")
    ]  # fmt: skip
    for run, printed in [(run, run.communicate()[0]) for run in runs]:
        assert run.returncode == 0, printed
        assert re.search(r"[1-9]\d* passed", printed), printed


# --- results -------------------------------------------------------------------------------------------------------

# name: input size, out_channels, kernel, stride, padding (top, bottom, left, right), dilation, groups, sparsity
CONVOLUTIONS = {
    "1x1": ((2, 9, 4, 4), 8, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.6),
    "1x1 odd": ((3, 7, 7, 5), 5, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.6),
    "1x1 pairs": ((2, 3, 3, 2), 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.3),
    "1x1 stride 2": ((2, 5, 7, 6), 6, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1, 0.6),
    "1x1 stride 3, 1": ((1, 5, 7, 6), 6, (1, 1), (3, 1), (0, 0, 0, 0), (1, 1), 1, 0.6),
    "1x1 padded": ((1, 5, 4, 4), 6, (1, 1), (1, 1), (1, 0, 2, 1), (1, 1), 1, 0.6),
    "1x1 groups": ((1, 6, 4, 4), 9, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 3, 0.3),
    "one pixel": ((1, 20, 1, 1), 33, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.8),
    "one of all": ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.0),
    "3x3": ((2, 5, 9, 7), 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.7),
    "3x3 valid": ((2, 5, 9, 7), 6, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.7),
    "3x3 stride 2": ((2, 5, 9, 8), 6, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, 0.7),
    "3x3 stride 3": ((2, 4, 10, 11), 3, (3, 3), (3, 3), (1, 0, 0, 2), (1, 1), 1, 0.5),
    "3x3 stride 1, 2": ((1, 4, 6, 9), 5, (3, 3), (1, 2), (2, 0, 1, 3), (1, 1), 1, 0.5),
    "3x3 dilated": ((1, 4, 11, 12), 5, (3, 3), (1, 1), (2, 2, 3, 3), (2, 3), 1, 0.5),
    "3x3 dilated, stride 2": ((1, 4, 11, 12), 5, (3, 3), (2, 2), (2, 1, 3, 3), (2, 3), 1, 0.5),
    "3x3 unread rows": ((1, 2, 12, 12), 3, (3, 3), (2, 3), (0, 0, 0, 0), (1, 1), 1, 0.3),
    "2x3 groups": ((3, 6, 9, 8), 4, (2, 3), (3, 2), (1, 0, 1, 2), (2, 1), 2, 0.3),
    "depthwise": ((1, 5, 7, 7), 10, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 5, 0.4),
    "7x7 stride 2": ((1, 3, 15, 14), 4, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1, 0.7),
    "1x7": ((1, 3, 5, 9), 4, (1, 7), (1, 1), (0, 0, 3, 3), (1, 1), 1, 0.5),
    "kernel over the image": ((1, 3, 2, 2), 4, (5, 5), (1, 1), (3, 2, 2, 3), (1, 1), 1, 0.5),
    "all kept": ((1, 4, 6, 6), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.0),
    "nothing kept": ((1, 4, 6, 6), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1.0),
    "mostly empty rows": ((1, 4, 6, 6), 40, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.98),
    "long rows": ((1, 90, 3, 3), 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.2),
    "many tiles": ((9, 3, 17, 16), 20, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0.4),
    "no images": ((0, 3, 4, 4), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.4),
}  # fmt: skip


def integers(generator, dtype, *size):
    return torch.randint(-3, 4, size, generator=generator).to(dtype).to(DEVICE)


def unwritten(like, *size):
    return torch.full(size or like.shape, NAN, dtype=like.dtype, device=like.device)


def same(actual, expected):
    """``expected`` is float64: the kernels sum in float32, exactly for these numbers, and round once."""
    if INTERPRETED and actual.dtype == torch.bfloat16:
        # Triton's interpreter cuts the lower half off instead of rounding to nearest, as a GPU does.
        expected = (expected.float().view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(actual, expected.to(actual.dtype)), (actual.double() - expected).abs().max()


def exact(op, *args):
    """The reference in float64, on the CPU."""
    to = lambda t: t.cpu().double() if torch.is_tensor(t) and t.is_floating_point() else t  # noqa: E731
    return op(*(to(a).cpu() if torch.is_tensor(a) else a for a in args)).to(DEVICE)


def check_convolution(dtype, size, out_channels, kernel, stride, padding, dilation, groups, sparsity, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = integers(g, dtype, *size)
    mask = torch.rand(out_channels, size[1] // groups, *kernel, generator=g) >= sparsity
    pattern = [t.to(DEVICE) for t in pattern_from_mask(mask, groups)]
    values, bias = integers(g, dtype, pattern[1].numel()), integers(g, dtype, out_channels)
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    shape = _ops.output_size(size, out_channels, *geometry[:4])
    dy, residual = (integers(g, dtype, *shape) for _ in range(2))

    y = unwritten(x, *shape)
    kernels.conv2d(y, x, values, *pattern[:2], bias, *geometry)
    expected = exact(reference.conv2d, x, values, *pattern[:2], bias, *geometry)
    same(y, expected)
    y = unwritten(x, *shape)
    kernels.conv2d(y, x, values, *pattern[:2], bias, *geometry, residual=residual, relu=True)
    same(y, (expected + residual).relu())
    y = unwritten(x, *shape)
    kernels.conv2d(y, x, values, *pattern[:2], None, *geometry)
    same(y, expected - bias.double()[:, None, None])

    dx = unwritten(x)
    kernels.conv2d_input_grad(dx, dy, values, *pattern[2:], *geometry)
    same(dx, exact(reference.conv2d_input_grad, dy, values, *pattern[2:], x.shape, *geometry))
    dw = unwritten(values)
    kernels.conv2d_values_grad(dw, dy, x, *pattern[:2], *geometry)
    same(dw, exact(reference.conv2d_values_grad, dy, x, *pattern[:2], *geometry))
    db = unwritten(bias)
    kernels.bias_grad(db, dy)
    same(db, exact(reference.bias_grad, dy))


@runs
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_match_the_reference(name):
    check_convolution(torch.float32, *CONVOLUTIONS[name])


@runs
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["1x1", "1x1 odd", "3x3 stride 2", "2x3 groups", "many tiles"])
def test_half_precision_rounds_once(name, dtype):
    check_convolution(dtype, *CONVOLUTIONS[name])


@runs
@pytest.mark.parametrize("panel", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES[1:2] if INTERPRETED else DTYPES[1:])  # it multiplies bfloat16 as if integers
@pytest.mark.parametrize(
    "name", ["1x1", "1x1 odd", "1x1 stride 2", "1x1 padded", "3x3", "3x3 stride 1, 2", "7x7 stride 2", "nothing kept"]
    + ["mostly empty rows", "one of all", "many tiles", "no images"]
)  # fmt: skip
def test_condensed_panels_match_the_reference(name, dtype, panel):
    size, out_channels, kernel, stride, padding, dilation, groups, sparsity = CONVOLUTIONS[name]
    check_condensed(dtype, panel, size, out_channels, kernel, stride, padding, dilation, groups, sparsity)


@runs
def test_condensed_panels_stay_in_their_group():
    geometry = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 2)
    check_condensed(torch.float16, 16, (2, 6, 5, 5), 64, *geometry, 0.6)
    with pytest.raises(NotImplementedError, match="no multiple of the panel"):
        check_condensed(torch.float16, 16, (2, 6, 5, 5), 48, *geometry, 0.6)


@runs
def test_dispatch_runs_the_panels_that_tuning_chose(monkeypatch):
    """sparsekit.gpu condenses a mask once, packs the values of every call, and notices indices that were written."""
    size, out_channels, kernel, stride, padding, dilation, groups, sparsity = CONVOLUTIONS["3x3 stride 2"]
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(out_channels, size[1], *kernel, generator=g) >= sparsity]
    masks.append(masks[0].flip(1))  # as many weights in every row
    x, bias = integers(g, torch.float16, *size), integers(g, torch.float16, out_channels)
    crow, col, *_ = (t.to(DEVICE) for t in pattern_from_mask(masks[0]))
    y = unwritten(x, *_ops.output_size(size, out_channels, *geometry[:4]))
    residual = integers(g, torch.float16, *y.shape)
    panels = gpu.Variant("triton", panel=16)
    key = ("conv2d", *gpu._key(y, x, col, geometry), "triton")
    monkeypatch.setitem(gpu.measured, key, {panels: 1e-6, gpu.Variant("triton"): 2e-6})
    packed = []
    monkeypatch.setattr(kernels, "pack", lambda *a, pack=kernels.pack: packed.append(a) or pack(*a))
    for mask in (masks[0], masks[0], masks[1]):
        col.copy_(pattern_from_mask(mask).col_indices) if mask is masks[1] else None
        values = integers(g, torch.float16, col.numel())
        with gpu.use_backend("triton"), gpu.watch() as calls:
            gpu.conv2d(y.fill_(NAN), x, values, crow, col, bias, *geometry, residual=residual, relu=True)
        assert calls == [("conv2d", "triton panels of 16")]
        same(y, (exact(reference.conv2d, x, values, crow, col, bias, *geometry) + residual).relu())
    assert len(packed) == 2


def check_condensed(dtype, panel, size, out_channels, kernel, stride, padding, dilation, groups, sparsity):
    g = torch.Generator().manual_seed(0)
    x, bias = integers(g, dtype, *size), integers(g, dtype, out_channels)
    mask = torch.rand(out_channels, size[1] // groups, *kernel, generator=g) >= sparsity
    crow, col, *_ = (t.to(DEVICE) for t in pattern_from_mask(mask, groups))
    values = integers(g, dtype, col.numel())
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    residual = integers(g, dtype, *_ops.output_size(size, out_channels, *geometry[:4]))
    pattern = kernels.pack(crow, col, out_channels, panel)
    packed = kernels.pack_values(pattern, values)
    expected = exact(reference.conv2d, x, values, crow, col, bias, *geometry)
    y = unwritten(residual)
    kernels.condensed_conv2d(y, x, pattern, packed, bias, *geometry)
    same(y, expected)
    kernels.condensed_conv2d(y.fill_(NAN), x, pattern, packed, bias, *geometry, residual=residual, relu=True)
    same(y, (expected + residual).relu())


@runs
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    channels=st.sampled_from([(1, 1, 1), (3, 5, 1), (4, 6, 2), (17, 9, 1), (6, 6, 6)]),
    size=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(2, 4)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_any_convolution_matches_the_reference(
    seed, batch, channels, size, kernel, stride, padding, dilation, sparsity
):  # fmt: skip
    c, k, groups = channels
    check_convolution(
        torch.float32, (batch, c, *size), k, kernel, stride, padding, dilation, groups, sparsity, seed
    )  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_rounding_is_no_worse_than_pytorchs(kernel, dtype):
    """At most twice the error of PyTorch's dense operations in the same dtype, both against float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 6, 6, generator=g).to(dtype)
    pattern = pattern_from_mask(torch.rand(16, 40, kernel, kernel, generator=g) > 0.5)
    values = torch.randn(pattern.nnz, generator=g).to(dtype)
    dy = torch.randn(2, 16, 6, 6, generator=g).to(dtype)
    geometry = ([kernel] * 2, [1, 1], [kernel // 2] * 4, [1, 1], 1)
    calls = {
        "conv2d": (x, values, *pattern[:2], None, *geometry),
        "conv2d_input_grad": (dy, values, *pattern[2:], *geometry),
        "conv2d_values_grad": (dy, x, *pattern[:2], *geometry),
    }
    for name, args in calls.items():
        like = dy if name == "conv2d" else x if name == "conv2d_input_grad" else values
        out = unwritten(like).to(DEVICE)
        getattr(kernels, name)(out, *(a.to(DEVICE) if torch.is_tensor(a) else a for a in args))
        if name == "conv2d_input_grad":
            args = (*args[:5], x.shape, *args[5:])
        op = getattr(reference, name)
        expected = op(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args))
        ours, theirs = ((t.double().cpu() - expected).abs().max() for t in (out, op(*args)))
        # See same(): what is cut off is up to twice what is rounded off.
        limit = 4 if INTERPRETED and dtype == torch.bfloat16 else 2
        assert ours <= limit * theirs, (name, float(ours), float(theirs))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "in_features", "out_features", "sparsity"),
    [(1, 1, 1, 0.0), (1, 300, 13, 0.5), (5, 100, 64, 0.8), (16, 9, 7, 0.3), (17, 57, 33, 0.8), (64, 40, 24, 0.9)]
    + [(0, 5, 7, 0.5), (3, 5, 7, 1.0), (20, 5, 7, 1.0), (300, 5, 3, 0.1)],
)  # fmt: skip
def test_linear_matches_the_reference(batch, in_features, out_features, sparsity, dtype):
    g = torch.Generator().manual_seed(0)
    x, dy = integers(g, dtype, batch, in_features), integers(g, dtype, batch, out_features)
    mask = torch.rand(out_features, in_features, generator=g) >= sparsity
    pattern = [t.to(DEVICE) for t in pattern_from_mask(mask)]
    values, bias = integers(g, dtype, pattern[1].numel()), integers(g, dtype, out_features)
    y, dx, dw, db = (unwritten(t) for t in (dy, x, values, bias))
    kernels.linear(y, x, values, *pattern[:2], bias)
    same(y, exact(reference.linear, x, values, *pattern[:2], bias))
    kernels.linear_input_grad(dx, dy, values, *pattern[2:])
    same(dx, exact(reference.linear_input_grad, dy, values, *pattern[2:]))
    kernels.linear_values_grad(dw, dy, x, *pattern[:2])
    same(dw, exact(reference.linear_values_grad, dy, x, *pattern[:2]))
    kernels.bias_grad(db, dy)
    same(db, exact(reference.bias_grad, dy))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compress_and_decompress_match_the_reference(layout, dtype):
    g = torch.Generator().manual_seed(0)
    for size in ((1, 1, 1, 1), (5, 3, 3, 3), (7, 400, 1, 1), (3, 16, 5, 2), (5, 7)):
        weight = integers(g, dtype, *size)
        weight = weight.contiguous(memory_format=layout) if len(size) == 4 else weight
        crow, col, *_ = (t.to(DEVICE) for t in pattern_from_mask(torch.rand(size, generator=g) > 0.7))
        values = torch.full((col.numel(),), NAN, dtype=dtype, device=DEVICE)
        kernels.compress(values, weight, crow, col)
        assert torch.equal(values, reference.compress(weight, crow, col))
        dense = torch.full_like(weight, NAN)
        kernels.decompress(dense, values, crow, col)
        assert torch.equal(dense, reference.decompress(values, crow, col, size, False))


@runs
def test_a_split_over_several_tiles_adds_them_up(monkeypatch):
    sddmm = sys.modules["sparsekit.kernels.sddmm"]
    monkeypatch.setattr(sddmm, "split_tiles", lambda pixels, nnz, per_tile: (-(-pixels // per_tile), 3))
    check_convolution(torch.float32, (9, 3, 13, 16), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.5)


@runs
def test_long_sums_are_split_and_added_in_order():
    g = torch.Generator().manual_seed(0)
    dy = integers(g, torch.float16, 700, 3)
    db = unwritten(dy, 3)
    kernels.bias_grad(db, dy)
    same(db, exact(reference.bias_grad, dy))


@runs
def test_unaligned_arrays_are_read_element_by_element():
    """A vector of indices or values must not be read where the array does not start on 16 bytes."""
    g = torch.Generator().manual_seed(0)
    crow, col, *_ = (t.to(DEVICE) for t in pattern_from_mask(torch.rand(5, 9, 1, 1, generator=g) > 0.3))
    x, values = integers(g, torch.float32, 2, 9, 4, 4), integers(g, torch.float32, col.numel())
    shifted = [torch.cat([t.new_zeros(1), t])[1:] for t in (values, col)]
    assert all(t.data_ptr() % 16 for t in shifted)
    y, geometry = unwritten(x, 2, 5, 4, 4), ([1, 1], [1, 1], [0] * 4, [1, 1], 1)
    kernels.conv2d(y, x, shifted[0], crow, shifted[1], None, *geometry)
    same(y, exact(reference.conv2d, x, values, crow, col, None, *geometry))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_capture_the_kernels_and_repeat_their_bits():
    g = torch.Generator().manual_seed(0)
    pattern = [t.cuda() for t in pattern_from_mask(torch.rand(96, 64, 3, 3, generator=g) > 0.9)]
    x, dy = torch.randn(8, 64, 28, 28, generator=g).cuda(), torch.randn(8, 96, 28, 28, generator=g).cuda()
    values = torch.randn(pattern[1].numel(), generator=g).cuda()
    geometry = ([3, 3], [1, 1], [1] * 4, [1, 1], 1)

    def step():
        y, dx, dw, db = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(values), dy.new_empty(96)
        kernels.conv2d(y, x, values, *pattern[:2], None, *geometry)
        kernels.conv2d_input_grad(dx, dy, values, *pattern[2:], *geometry)
        kernels.conv2d_values_grad(dw, dy, x, *pattern[:2], *geometry)
        kernels.bias_grad(db, dy)
        return y, dx, dw, db

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
def test_autotuning_changes_no_result():
    tuning = sys.modules["sparsekit.kernels.tuning"]
    before = len(tuning._chosen)
    kernels.set_autotune(True)
    try:
        for _ in range(2):
            check_convolution(torch.float32, *CONVOLUTIONS["1x1"])
    finally:
        kernels.set_autotune(False)
    assert len(tuning._chosen) == before + 3


def test_importing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import sparsekit.kernels as k\n"
        "ok, reason = k.available(); assert not ok and 'pip install triton' in reason\n"
        "try: k.conv2d\n"
        "except ImportError as e: assert 'conv2d needs Triton' in str(e)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- ahead of time -------------------------------------------------------------------------------------------------

# target: bytes of shared memory (LDS) that a program may use
TARGETS = {("cuda", 80): 163 << 10, ("cuda", 90): 227 << 10, ("cuda", 100): 227 << 10, ("hip", "gfx942"): 64 << 10}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


def launches():
    """What the public functions launch for layers of ResNet-50, batch 32: (kernel's module, name, arguments, options)."""
    from triton.runtime.jit import JITFunction

    found = []

    def record(self, *args, grid, warmup, **options):
        names = [p.name for p in self.params]
        bound = dict(zip(names, args)) | {k: v for k, v in options.items() if k in names}
        bound = {k: v.dtype if torch.is_tensor(v) else v for k, v in bound.items()}
        rest = {k: v for k, v in options.items() if k not in names}
        found.append((self.fn.__module__, self.fn.__name__, bound, rest))

    def convolution(dtype, channels, out_channels, size, kernel, stride=1):
        new = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
        geometry = ([kernel] * 2, [stride] * 2, [kernel // 2] * 4, [1, 1], 1)
        x, y = new(32, channels, size, size), new(32, out_channels, size // stride, size // stride)
        nnz = channels * out_channels * kernel * kernel // 10
        values, col = new(nnz), new(nnz, dtype=torch.int32)
        crow, t_crow = (new(n + 1, dtype=torch.int32) for n in (out_channels, channels))
        kernels.conv2d(y, x, values, crow, col, y[0, :, 0, 0], *geometry, residual=y, relu=True)
        kernels.conv2d_input_grad(x, y, values, t_crow, col, col, *geometry)
        kernels.conv2d_values_grad(values, y, x, crow, col, *geometry)
        kernels.bias_grad(y[0, :, 0, 0], y)
        if dtype != torch.float32:
            for panel in gpu.PANELS:
                pattern = kernels.CondensedPattern(crow, col, col, out_channels, panel)
                kernels.condensed_conv2d(y, x, pattern, new(nnz, panel), None, *geometry)
        if kernel == 1:
            weight = new(out_channels, channels)
            kernels.compress(values, weight, crow, col)
            kernels.decompress(weight, values, crow, col)
            for batch in (1, 16, 256):
                x, y = new(batch, channels), new(batch, out_channels)
                kernels.linear(y, x, values, crow, col, y[0])
                kernels.linear_values_grad(values, y, x, crow, col)

    run, JITFunction.run = JITFunction.run, record
    try:
        convolution(torch.float32, 64, 256, 56, 1)
        convolution(torch.float32, 2048, 512, 7, 1)
        convolution(torch.float32, 64, 64, 56, 3)
        convolution(torch.float32, 512, 512, 14, 3, stride=2)
        convolution(torch.float16, 256, 1024, 14, 1)
        convolution(torch.bfloat16, 256, 256, 14, 3)
    finally:
        JITFunction.run = run
    return found


def kernel_of(module, name):
    return getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name)


def signature(kernel, bound):
    """Triton's own specialisation: pointers and multiples of 16 are known to be aligned, ones are constants."""
    types, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = bound[p.name]
        if p.is_constexpr or value is None or (value == 1 and not p.do_not_specialize):
            types[p.name], constants[(i,)] = "constexpr", value
        else:
            types[p.name] = POINTERS.get(value, "i32")
            if types[p.name] != "i32" or (value % 16 == 0 and not p.do_not_specialize):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_one(job):
    """Registers, spilled bytes (or registers, for AMD) and shared memory of one kernel for one target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, module, name, bound, options = job
    kernel = kernel_of(module, name)
    types, constants, attributes = signature(kernel, bound)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget(*target, 64 if target[0] == "hip" else 32), options=options)
    if target[0] == "hip":
        found = [
            int(re.search(rf"\.{k}:\s+(\d+)", binary.asm["amdgcn"])[1]) for k in ("vgpr_count", "vgpr_spill_count")
        ]
        return *found, binary.metadata.shared
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], text=True, capture_output=True, check=True).stdout
    return *(int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK")), binary.metadata.shared


@compiles
def test_dispatch_reads_nothing_back_to_the_host(monkeypatch):
    """What CUDA graphs need: tensors without numbers, which cannot be read, are enough to launch every kernel."""
    from triton.runtime.jit import JITFunction

    launched = set()
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.add(self.fn.__name__))
    monkeypatch.setattr(gpu, "lacks", lambda: {"cuda": "not here"})
    new = lambda *size, dtype=torch.float16: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
    x, y, values, bias = new(4, 16, 9, 9), new(4, 24, 9, 9), new(64), new(24)
    crow, t_crow, col = (new(n, dtype=torch.int32) for n in (25, 17, 64))
    geometry = ([3, 3], [1, 1], [1] * 4, [1, 1], 1)
    with gpu.watch() as calls:
        gpu.conv2d(y, x, values, crow, col, bias, *geometry, residual=y, relu=True)
        gpu.conv2d_input_grad(x, y, values, t_crow, col, col, *geometry)
        gpu.conv2d_values_grad(values, y, x, crow, col, *geometry)
        for batch in (4, 64):
            inputs, outputs = new(batch, 16), new(batch, 24)
            gpu.linear(outputs, inputs, values, crow, col, bias)
            gpu.linear_input_grad(inputs, outputs, values, t_crow, col, col)
            gpu.linear_values_grad(values, outputs, inputs, crow, col)
        gpu.compress(values, new(24, 16, 3, 3), crow, col)
        gpu.decompress(new(24, 16, 3, 3), values, crow, col)
    assert {variant for _, variant in calls} == {"triton"} and len(calls) == 9
    assert launched == {
        "conv2d_kernel", "conv2d_values_grad_kernel", "copy_kept_kernel", "decode_kernel", "linear_kernel",
        "linear_values_grad_kernel", "sum_columns_kernel",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="meta"):
        col[0].item()


@compiles
def test_kernels_compile_and_fit_their_target():
    # Numbers matter as far as Triton specialises on them.
    unique = {
        (name, repr(signature(kernel_of(module, name), bound)), repr(options)): (module, name, bound, options)
        for module, name, bound, options in launches()
    }
    jobs = [(target, *launch) for launch in unique.values() for target in TARGETS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job, (registers, spilled, shared) in zip(jobs, pool.map(compile_one, jobs, chunksize=4)):
            target = job[0]
            assert registers <= 255 or target[0] == "hip", job
            assert spilled == 0, (registers, spilled, job)
            assert shared <= TARGETS[target], (shared, job)
