import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import reference
from sparsekit.formats import mask_from_pattern, pattern_from_mask, validate_csr


def test_a_pattern_by_hand():
    mask = torch.tensor([[[[1, 0]], [[0, 1]]], [[[0, 0]], [[1, 1]]]], dtype=torch.bool)  # 2 x 2 x 1 x 2
    pattern = pattern_from_mask(mask)
    assert [t.tolist() for t in pattern] == [[0, 2, 4], [0, 3, 2, 3], [0, 1, 4], [0, 1, 2, 3], [0, 1, 2, 3]]


@given(seed=st.integers(0, 1000), rows=st.integers(1, 9), cols=st.integers(1, 9), groups=st.integers(1, 3))
def test_patterns_round_trip(seed, rows, cols, groups):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows * groups, cols, 2, 3, generator=g) > 0.5
    pattern = pattern_from_mask(mask, groups)
    assert torch.equal(mask_from_pattern(pattern, mask.shape), mask)
    validate_csr(pattern.crow_indices, pattern.col_indices, cols * 6)
    validate_csr(pattern.t_crow_indices, pattern.t_col_indices, rows * 6)
    # The permutation finds the same weights from the other side.
    weight = torch.randn(mask.shape, generator=g)
    values = weight[mask][pattern.t_permutation.long()]
    transposed = weight.view(groups, rows, cols, 6).transpose(1, 2).reshape(groups * cols, -1)
    mask_t = mask.view(groups, rows, cols, 6).transpose(1, 2).reshape(groups * cols, -1)
    assert torch.equal(values, transposed[mask_t])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(8, 5, 3, 3), (8, 300, 1, 1), (400, 33), (8, 0, 3, 3), (0, 8, 1, 1), (0, 0)])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.98, 1])
def test_patterns_are_the_references(size, sparsity, groups):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) >= sparsity
    for ours, expected in zip(pattern_from_mask(mask, groups), reference.pattern(mask, groups)):
        assert torch.equal(ours, expected) and ours.dtype == torch.int32
    if len(size) == 4:
        last = mask.contiguous(memory_format=torch.channels_last)
        assert torch.equal(pattern_from_mask(last, groups).t_permutation, reference.pattern(mask, groups)[4])


def test_true_need_not_be_one():
    mask = torch.tensor([[0, 2, 255, 1, 0, 3, 0, 0, 7]], dtype=torch.uint8).view(torch.bool)
    assert pattern_from_mask(mask).col_indices.tolist() == [1, 2, 3, 5, 8]


def test_opcheck_pattern():
    mask = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sparsekit.pattern.default, (mask, 2), test_utils=tests)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 2),), TypeError, "mask must be bool"),
        ((torch.ones(2, dtype=torch.bool),), ValueError, "2 or 4 dimensions"),
        ((torch.ones(3, 2, dtype=torch.bool), 2), ValueError, "groups must divide the 3 rows"),
    ],
)
def test_bad_masks_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pattern_from_mask(*arguments)


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([0, 1], [0, 1], "run from 0 to nnz = 2"),
        ([0, 2, 1, 2], [0, 1], "must not decrease"),
        ([0, 2], [0, 9], r"in \[0, 4\), got \[0, 9\]"),
        ([0, 2], [1, 1], "ascend"),
    ],
)
def test_bad_structures_are_named(crow, col, message):
    with pytest.raises(ValueError, match=message):
        validate_csr(torch.tensor(crow, dtype=torch.int32), torch.tensor(col, dtype=torch.int32), 4)


def test_indices_of_another_type_are_named():
    with pytest.raises(TypeError, match="col_indices must be int32"):
        validate_csr(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0]), 4)
