"""Every native kernel against the reference on random shapes, on every ISA of this machine."""

import pytest
import torch

import sparsekit as sk
from sparsekit import _ops, reference
from sparsekit.formats import pattern_from_mask

from .fuzz import NAN, Case, check, check_block, check_others

ISAS = [isa for isa in sk.available_backends() if isa != "reference"]
needs_native = pytest.mark.skipif(not ISAS, reason="installed without C++ kernels")
CASES_PER_ISA, LARGE_CASES_PER_ISA, DEPTHWISE_CASES_PER_ISA, BLOCKS_PER_ISA = 400, 24, 100, 100


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_convolutions_match_the_reference(isa):
    with sk.use_isa(isa):
        proves = sum(check(Case.random(seed)) > 0.05 for seed in range(CASES_PER_ISA))
    assert proves > CASES_PER_ISA // 2


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_depthwise_convolutions_match_the_reference(isa):
    with sk.use_isa(isa):
        proves = sum(check(Case.random(seed, depthwise=True)) > 0.05 for seed in range(DEPTHWISE_CASES_PER_ISA))
    assert proves > DEPTHWISE_CASES_PER_ISA // 4


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_structures_pooling_and_normalization_match_the_reference(isa):
    with sk.use_isa(isa):
        for seed in range(CASES_PER_ISA):
            check_others(seed)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_large_convolutions_match_the_reference(isa):
    with sk.use_isa(isa):
        for seed in range(LARGE_CASES_PER_ISA):
            check(Case.random(seed, large=True))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_blocks_match_pytorchs(isa):
    with sk.use_isa(isa):
        for seed in range(BLOCKS_PER_ISA):
            check_block(seed)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(4, 256, 56, 56), (64, 256, 14, 14)], ids=["whole lines", "put together"])
def test_large_blocks_match_pytorchs(isa, size):
    """Tensors too large for the caches are written past them."""
    with sk.use_isa(isa):
        for seed in range(4):
            check_block(seed, size)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "size", [(4, 64, 64), (4, 57, 63), (64, 14, 14)], ids=["streamed", "unaligned", "put together"]
)
def test_large_targets_match_the_reference(isa, size):
    """Targets too large for the caches are written past them, where their rows are aligned or planes fit a tile."""
    g = torch.Generator().manual_seed(0)
    pattern = pattern_from_mask(torch.rand(256, 16, 1, 1, generator=g) > 0.7)
    values = torch.randint(-4, 5, (pattern.nnz,), generator=g).float()
    bias = torch.randint(-4, 5, (256,), generator=g).float()
    batch, *size = size
    x = torch.randint(-4, 5, (batch, 16, *size), generator=g).float()
    geometry = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)
    y = torch.full((batch, 256, *size), NAN)
    assert y.numel() > 3 << 20
    native = torch.ops.sparsekit_cpu
    with sk.use_isa(isa):
        native.conv2d(y, x, values, *pattern[:2], bias, *geometry)
        assert torch.equal(y, reference.conv2d(x, values, *pattern[:2], bias, *geometry))
        # Its transpose, whose gradient is as large, with and without a sum, which may be in place.
        pattern = pattern_from_mask(torch.rand(16, 256, 1, 1, generator=g) > 0.7)
        values = torch.randint(-4, 5, (pattern.nnz,), generator=g).float()
        product = reference.conv2d_input_grad(x, values, *pattern[2:], y.shape, *geometry)
        for other, dx in ((None, torch.full_like(y, NAN)), (y, torch.full_like(y, NAN)), (y, y.clone())):
            added = dx if other is not None and not dx.isnan().any() else other
            native.conv2d_grads(dx, torch.empty_like(values), x, y, values, *pattern, added, *geometry)
            assert torch.equal(dx, product if other is None else product + other)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((113, 112), 1, (2, 2)), ((112, 113), 3, (2, 2)), ((111, 115), 1, (3, 2))]
)
def test_large_gradients_of_strided_convolutions_match_the_reference(isa, size, kernel, stride):
    """Their rows are put together, and written past the caches wherever they begin."""
    g = torch.Generator().manual_seed(0)
    pattern = pattern_from_mask(torch.rand(8, 64, kernel, kernel, generator=g) > 0.9)
    values = torch.randint(-4, 5, (pattern.nnz,), generator=g).float()
    geometry = ([kernel] * 2, list(stride), [kernel // 2] * 4, [1, 1], 1)
    dx = torch.full((4, 64, *size), NAN)
    assert dx.numel() > 3 << 20
    dy = torch.randint(-4, 5, _ops.output_size(dx.shape, 8, *geometry[:4]), generator=g).float()
    with sk.use_isa(isa):
        torch.ops.sparsekit_cpu.conv2d_input_grad(dx, dy, values, *pattern[2:], *geometry)
    assert torch.equal(dx, reference.conv2d_input_grad(dy, values, *pattern[2:], dx.shape, *geometry))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_linear_matches_the_reference(isa):
    g = torch.Generator().manual_seed(0)
    with sk.use_isa(isa):
        for batch in (1, 2, 15, 16, 17, 64, 131):
            for out_features, in_features in ((1, 1), (7, 13), (64, 100), (130, 257)):
                mask = torch.rand(out_features, in_features, generator=g) > 0.8
                pattern = pattern_from_mask(mask)
                values = torch.randint(-4, 5, (pattern.nnz,), generator=g).float()
                x = torch.randint(-4, 5, (batch, in_features), generator=g).float()
                dy = torch.randint(-4, 5, (batch, out_features), generator=g).float()
                bias = torch.randint(-4, 5, (out_features,), generator=g).float()
                y, dx, dw = torch.full_like(dy, NAN), torch.full_like(x, NAN), torch.full_like(values, NAN)
                torch.ops.sparsekit_cpu.linear(y, x, values, *pattern[:2], bias)
                torch.ops.sparsekit_cpu.linear_input_grad(dx, dy, values, *pattern[2:])
                torch.ops.sparsekit_cpu.linear_values_grad(dw, dy, x, *pattern[:2])
                assert torch.equal(y, reference.linear(x, values, *pattern[:2], bias))
                assert torch.equal(dx, reference.linear_input_grad(dy, values, *pattern[2:]))
                assert torch.equal(dw, reference.linear_values_grad(dy, x, *pattern[:2]))


@needs_native
@pytest.mark.parametrize("channels_last", [False, True])
def test_compress_and_decompress_match_the_reference(channels_last):
    g = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for size in ((1, 1, 1, 1), (5, 3, 3, 3), (64, 17, 1, 1), (33, 16, 5, 2)):
        weight = torch.randn(size, generator=g).contiguous(memory_format=layout)
        pattern = pattern_from_mask(torch.rand(size, generator=g) > 0.7)
        values = _ops.compress(weight, pattern)
        assert torch.equal(values, reference.compress(weight, *pattern[:2]))
        dense = _ops.decompress(values, pattern, size, channels_last)
        assert torch.equal(dense, reference.decompress(values, *pattern[:2], size, channels_last))
        assert dense.is_contiguous(memory_format=layout)


@needs_native
@pytest.mark.parametrize(
    "size, kernel, stride", [((5, 48, 19, 23), 3, (2, 1)), ((1, 48, 28, 28), 3, (1, 1)), ((1, 48, 28, 28), 1, (1, 1))]
)
def test_results_are_bit_identical_for_any_number_of_threads(size, kernel, stride):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=g)
    pattern = pattern_from_mask(torch.rand(37, 48, kernel, kernel, generator=g) > 0.8)
    values = torch.randn(pattern.nnz, generator=g)
    geometry = ([kernel] * 2, list(stride), [kernel // 2] * 4, [1, 1], 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y = torch.ops.sparsekit.conv2d(x, values, *pattern, None, *geometry)
            dx = torch.ops.sparsekit.conv2d_input_grad(y, values, *pattern[2:], x.shape, *geometry)
            dw = torch.ops.sparsekit.conv2d_values_grad(y, x, *pattern[:2], *geometry)
            results.append((y, dx, dw, torch.ops.sparsekit.bias_grad(y)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_native
def test_every_isa_can_be_chosen_and_others_are_refused():
    assert sk.available_backends()[:2] == ("reference", "generic")
    with sk.use_isa("generic"):
        assert sk.backend() == "generic"
    with pytest.raises(ValueError, match="isa must be one of .*got 'sse'"):
        sk.set_isa("sse")


@needs_native
def test_kernels_check_what_memory_safety_needs():
    pattern = pattern_from_mask(torch.ones(4, 3, 1, 1, dtype=torch.bool))
    geometry = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)
    x, values = torch.randn(1, 3, 2, 2), torch.randn(12)
    columns = pattern.col_indices.clone()
    columns[0] = 999
    with pytest.raises(RuntimeError):
        torch.ops.sparsekit.conv2d(x, values, pattern[0], columns, *pattern[2:], None, *geometry)
    with pytest.raises(RuntimeError):
        torch.ops.sparsekit.conv2d(x, values[:3], *pattern, None, *geometry)
