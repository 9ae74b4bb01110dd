"""BatchNorm with residual and ReLU: values, every gradient, statistics, and what PyTorch expects of an op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit import _ops

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def case(shape, affine=True, residual=True, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=g, dtype=dtype) + 3
    weight, bias = (torch.randn(shape[1], generator=g, dtype=dtype) if affine else None for _ in range(2))
    other = torch.randn(shape, generator=g, dtype=dtype) if residual else None
    return [t if t is None else t.requires_grad_() for t in (x, weight, bias, other)]


def plain(x, weight, bias, residual, relu, eps):
    """What the op stands for, in PyTorch's own parts."""
    out = F.batch_norm(x, None, None, weight, bias, True, 0.1, eps)
    out = out if residual is None else out + residual
    return out.relu() if relu else out


def all_of(function, tensors, grad):
    """The output and the gradients of whatever is there."""
    leaves = [t.detach().to(grad.dtype).requires_grad_() if t is not None else None for t in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), st.integers(3, 80)),
    affine=st.booleans(), residual=st.booleans(), relu=st.booleans(), isa=st.sampled_from(sk.available_backends()),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients(shape, affine, residual, relu, isa, seed):
    tensors, eps = case(shape, affine, residual, seed=seed), 1e-3
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with sk.use_isa(isa):
        ours = all_of(lambda *t: torch.ops.sparsekit.batch_norm(*t, relu, eps)[0], tensors, grad)
    theirs = all_of(lambda *t: plain(*t, relu, eps), tensors, grad.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-4 * float(b.detach().abs().max() + 1))


@pytest.mark.parametrize("isa", sk.available_backends())
@pytest.mark.parametrize("shape", [(16, 1000, 14, 15), (3, 65, 128, 128)])
def test_results_that_are_written_past_the_caches(shape, isa):
    tensors, eps = case(shape), 1e-3
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with sk.use_isa(isa):
        ours = all_of(lambda *t: torch.ops.sparsekit.batch_norm(*t, True, eps)[0], tensors, grad)
    # What ReLU lets through depends on the rounding of what is next to zero.
    theirs = all_of(lambda *t: plain(*t, True, eps), tensors, grad)
    for a, b in zip(ours, theirs):
        off = (a - b).abs() > 1e-3 * (b.abs() + b.abs().mean())
        assert off.float().mean() < 1e-5


@pytest.mark.parametrize("isa", sk.available_backends()[1:])
@pytest.mark.parametrize("pixels", [1, 4, 5, 8, 9, 15, 16, 17, 24, 100])
def test_bits_are_the_references_and_all_of_them_are_written(pixels, isa):
    x, weight, bias, other = (t.detach() for t in case((2, 3, 1, pixels)))
    out, mean, var, bits = sk.reference.batch_norm(x, weight, bias, other, True, 1e-3)
    found = bits.clone().fill_(0xFF)
    with sk.use_isa(isa):
        torch.ops.sparsekit_cpu.batch_norm(out, mean, var, found, x, weight, bias, other, True, 1e-3)
    assert torch.equal(found, bits)


@pytest.mark.parametrize("isa", sk.available_backends())
def test_statistics(isa):
    x = torch.randn(8, 5, 9, 9, generator=torch.Generator().manual_seed(0))
    x[0] *= 0.01
    x[1:, 0] += 1000  # far from the first image's mean
    x[:, 1] = 3.7
    x[1, 2, 0, 0], x[:, 3, 0, 0] = float("inf"), float("nan")
    with sk.use_isa(isa):
        out, mean, var, _ = torch.ops.sparsekit.batch_norm(x, None, None, None, True, 1e-5)
    for c in (0, 1, 4):
        torch.testing.assert_close(mean[c].double(), x[:, c].double().mean())
        torch.testing.assert_close(var[c].double(), x[:, c].double().var(correction=0), atol=1e-9, rtol=1e-5)
    assert out[1, 2, 0, 0].isnan() and out[:, 3].isnan().all() and var[2:4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(dtype, residual):
    x, weight, bias, other = case((2, 3, 4, 5), residual=residual, dtype=dtype)
    torch.library.opcheck(
        torch.ops.sparsekit.batch_norm.default, (x, weight, bias, other, True, 1e-5), test_utils=OPCHECKS
    )
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    _, mean, var, positive = torch.ops.sparsekit.batch_norm(x, weight, bias, other, True, 1e-5)
    args = (torch.randn_like(x), x, positive if residual else None, weight, bias, mean, var, True, 1e-5)
    torch.library.opcheck(torch.ops.sparsekit.batch_norm_grad.default, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu):
    tensors = case((3, 2, 3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: torch.ops.sparsekit.batch_norm(*t, relu, 1e-3)[0], tensors)
    with pytest.raises(NotImplementedError, match="double backward"):
        out = torch.ops.sparsekit.batch_norm(*tensors, relu, 1e-3)[0].sum()
        torch.autograd.grad(out, tensors[0], create_graph=True)[0].sum().backward()


@pytest.mark.skipif(sk.backend() == "reference", reason="PyTorch's sums depend on the threads")
def test_threads_do_not_matter():
    tensors, grad = case((5, 37, 14, 14)), torch.randn(5, 37, 14, 14)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_of(lambda *t: torch.ops.sparsekit.batch_norm(*t, True, 1e-5)[0], tensors, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.skipif(sk.backend() == "reference", reason="needs the C++ kernels")
def test_sizes_that_do_not_fit_are_named():
    x = torch.randn(2, 3, 4, 4)
    for weight, residual, message in ((torch.ones(4), None, "weight"), (None, torch.ones(2, 3, 4, 5), "residual")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.sparsekit.batch_norm(x, weight, None, residual, True, 1e-5)
    assert _ops.backend() != "reference"
