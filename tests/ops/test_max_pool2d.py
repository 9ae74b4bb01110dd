"""Max pooling that trains: values and gradients as PyTorch's, ties and NaN too, and what PyTorch expects of an op."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 30), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2), padded=st.booleans(), ceil=st.booleans(), ties=st.booleans(),
    isa=st.sampled_from(sk.available_backends()),
)  # fmt: skip
def test_is_pytorchs(size, kernel, stride, dilation, padded, ceil, ties, isa):
    padding = [k // 2 * padded for k in kernel]
    assume(all(s + 2 * p > dilation * (k - 1) for s, p, k in zip(size[2:], padding, kernel)))
    # PyTorch's gradient writes beyond the image where a window's taps all miss it.
    assume(all(hits_a_pixel(s, p, dilation) for s, p in zip(size[2:], padding)))
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, size, generator=g).float() if ties else torch.randn(size, generator=g)
    geometry = ([*kernel], [*stride], padding, [dilation, dilation], ceil)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with sk.use_isa(isa):
        out, _ = torch.ops.sparsekit.max_pool2d(ours, *geometry)
        expected = F.max_pool2d(theirs, *geometry)
        assert torch.equal(out, expected)
        grad = torch.randn(out.shape, generator=g)
        out.backward(grad)
        expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("isa", sk.available_backends()[1:])
def test_a_gradient_that_is_written_past_the_caches(isa):
    x, geometry = torch.randn(4, 64, 113, 112), ([3, 3], [2, 2], [1, 1], [1, 1], False)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with sk.use_isa(isa):
        torch.ops.sparsekit.max_pool2d(ours, *geometry)[0].square().sum().backward()
    F.max_pool2d(theirs, *geometry).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def hits_a_pixel(size, padding, dilation):
    return all(-start % dilation < size for start in range(-padding, 0))


@pytest.mark.parametrize("isa", sk.available_backends()[1:])
def test_windows_without_a_pixel_have_no_gradient(isa):
    x = torch.randn(2, 3, 1, 5, requires_grad=True)
    with sk.use_isa(isa):
        out, taps = torch.ops.sparsekit.max_pool2d(x, [2, 2], [1, 1], [1, 1], [2, 2], False)
        assert out.shape == (2, 3, 1, 5) and (out == -float("inf")).all() and (taps == 255).all()
        out.backward(torch.ones_like(out))
    assert not x.grad.any()


def test_nan_and_inf():
    x = torch.randn(2, 3, 9, 9)
    x[0, 0, 4, 4], x[0, 1], x[0, 2, 0] = float("nan"), -float("inf"), float("inf")
    grads = []
    for pool in (sk.nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)):
        leaf = x.clone().requires_grad_()
        out = pool(leaf)
        out.backward(torch.ones_like(out))
        grads.append((out.detach(), leaf.grad))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_and_gradcheck(dtype):
    x, geometry = torch.randn(2, 3, 7, 6, dtype=dtype), ([3, 2], [2, 2], [1, 0], [1, 1], True)
    torch.library.opcheck(torch.ops.sparsekit.max_pool2d.default, (x.requires_grad_(), *geometry), test_utils=OPCHECKS)
    out, taps = torch.ops.sparsekit.max_pool2d(x, *geometry)
    args = (torch.randn_like(out), taps, x.shape, *geometry)
    torch.library.opcheck(torch.ops.sparsekit.max_pool2d_grad.default, args, test_utils=OPCHECKS)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda t: torch.ops.sparsekit.max_pool2d(t, *geometry)[0], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck_and_gradcheck_behind_a_norm(dtype, affine):
    torch.manual_seed(0)
    x, how = torch.randn(3, 3, 7, 6, dtype=dtype).requires_grad_(), (1e-2, [3, 2], [2, 2], [1, 0], [1, 1], True)
    norm = [torch.randn(3, dtype=dtype).requires_grad_() if affine else None for _ in range(2)]
    op = torch.ops.sparsekit.batch_norm_max_pool2d
    for relu in (True, False):
        torch.library.opcheck(op.default, (x, *norm, relu, *how), test_utils=OPCHECKS)
        out, mean, var, taps = op(x, *norm, relu, *how)
        normed, expected_mean, expected_var, _ = torch.ops.sparsekit.batch_norm(x, *norm, None, relu, 1e-2)
        expected = torch.ops.sparsekit.max_pool2d(normed, *how[1:])
        for ours, theirs in zip((out, mean, var, taps), (expected[0], expected_mean, expected_var, expected[1])):
            torch.testing.assert_close(ours, theirs)
        detached = (t if t is None else t.detach() for t in (x, *norm))
        args = (torch.randn_like(out), taps, *detached, mean, var, relu, *how)
        torch.library.opcheck(torch.ops.sparsekit.batch_norm_max_pool2d_grad.default, args, test_utils=OPCHECKS)
        if dtype == torch.float64:
            leaves = [x, *(t for t in norm if t is not None)]
            assert torch.autograd.gradcheck(lambda *_, relu=relu: op(x, *norm, relu, *how)[0], leaves)
    with pytest.raises(NotImplementedError, match="double backward"):
        (grad,) = torch.autograd.grad(op(x, *norm, True, *how)[0].square().sum(), x, create_graph=True)
        grad.sum().backward()
    with pytest.raises(ValueError, match="at most 255 taps"):
        op(torch.randn(2, 3, 20, 20), None, None, True, 1e-2, [16, 16], [1, 1], [0, 0], [1, 1], False)


@pytest.mark.parametrize(
    "arguments", [{"kernel_size": 2}, {"kernel_size": 3, "stride": (2, 1), "padding": 1, "ceil_mode": True}]
)
def test_module_is_pytorchs(arguments):
    ours, theirs = sk.nn.MaxPool2d(**arguments), nn.MaxPool2d(**arguments)
    x = torch.randn(2, 3, 8, 8)
    for images in (x, x[0], x.double(), x.to(memory_format=torch.channels_last)):
        assert torch.equal(ours(images), theirs(images)) and torch.equal(ours.eval()(images), ours.train()(images))
    with pytest.raises(RuntimeError, match="pad should be"):
        sk.nn.MaxPool2d(2, padding=2)(x)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        sk.nn.MaxPool2d(9)(x)
    both = sk.nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(both[1], F.max_pool2d(x, 2, return_indices=True)[1])


def test_results_may_be_changed_in_place():
    """As after PyTorch's: nothing of them is kept for the gradient."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    ours, x = sk.sparsify_(copy.deepcopy(model), min_sparsity=0), torch.randn(2, 2, 8, 8)
    assert type(ours[1]) is sk.nn.MaxPool2d
    for network in (ours, model):
        network(x).sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, model[0].weight.grad)


def test_what_does_not_fit_is_told():
    x, geometry = torch.randn(2, 3, 16, 17), ([16, 16], [1, 1], [0, 0], [1, 1], False)
    with pytest.raises(ValueError, match="kernel_size must have at most 255 taps"):
        torch.ops.sparsekit.max_pool2d(x, *geometry)
    assert torch.equal(sk.nn.MaxPool2d(16, 1)(x), F.max_pool2d(x, 16, 1))


@pytest.mark.skipif(sk.backend() == "reference", reason="needs the C++ kernels")
@pytest.mark.parametrize("taps", [torch.zeros(2, 3, 4, 3, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)])
def test_taps_that_do_not_fit_are_named(taps):
    with pytest.raises(RuntimeError, match="taps"):
        torch.ops.sparsekit.max_pool2d_grad(
            torch.randn(2, 3, 4, 4), taps, [2, 3, 8, 8], [2, 2], [2, 2], [0, 0], [1, 1], False
        )
