"""The ops as PyTorch sees them: schema, fake, autograd, compile, and what bad input gets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit import _ops
from sparsekit.formats import pattern_from_mask

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def conv_case(dtype=torch.float32, groups=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 6, 5, generator=g, dtype=dtype)
    pattern = pattern_from_mask(torch.rand(6, 4 // groups, 3, 3, generator=g) > 0.6, groups)
    values = torch.randn(pattern.nnz, generator=g, dtype=dtype)
    bias = torch.randn(6, generator=g, dtype=dtype)
    return x, values, pattern, bias, ([3, 3], [2, 1], [1, 0, 1, 2], [1, 1], groups)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_conv2d(layout, dtype):
    x, values, pattern, bias, geometry = conv_case(dtype)
    # None: neither NCHW nor channels_last.
    x = x.transpose(2, 3).contiguous().transpose(2, 3) if layout is None else x.contiguous(memory_format=layout)
    y = torch.ops.sparsekit.conv2d(x, values, *pattern, bias, *geometry)
    dy = torch.randn_like(y)
    grads = [t.detach().clone().requires_grad_() for t in (x, values, bias)]
    checks = {
        "conv2d": (grads[0], grads[1], *pattern, grads[2], *geometry),
        "conv2d_input_grad": (dy, values, *pattern[2:], list(x.shape), *geometry),
        "conv2d_values_grad": (dy, x, *pattern[:2], *geometry),
        "conv2d_grads": (dy, x, values, *pattern, torch.randn_like(x) if dtype == torch.float32 else None, *geometry),
        "conv2d_weight_grad": (dy, x, *geometry),
        "bias_grad": (dy,),
    }
    for name, args in checks.items():
        torch.library.opcheck(getattr(torch.ops.sparsekit, name).default, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_linear_and_compress(dtype):
    pattern = pattern_from_mask(torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) > 0.5)
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=dtype, requires_grad=True)
    bias = torch.randn(7, dtype=dtype, requires_grad=True)
    checks = {
        "linear": (x, values, *pattern, bias),
        "linear_input_grad": (torch.randn(3, 7, dtype=dtype), values.detach(), *pattern[2:]),
        "linear_values_grad": (torch.randn(3, 7, dtype=dtype), x.detach(), *pattern[:2]),
        "compress": (weight, *pattern[:2]),
        "decompress": (values, *pattern[:2], [7, 5], False),
    }
    for name, args in checks.items():
        torch.library.opcheck(getattr(torch.ops.sparsekit, name).default, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_conv2d(groups):
    x, values, pattern, bias, geometry = conv_case(torch.float64, groups)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    assert torch.autograd.gradcheck(
        lambda x, values, bias: torch.ops.sparsekit.conv2d(x, values, *pattern, bias, *geometry), leaves
    )


def test_gradcheck_linear_and_compress():
    pattern = pattern_from_mask(torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.5)
    x, weight, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 6), (4, 6), (4,)))
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.ops.sparsekit.linear(x, _ops.compress(w, pattern), *pattern, b), (x, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda w: _ops.decompress(_ops.compress(w, pattern), pattern, (4, 6)), (weight,))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(0, 3),
    channels=st.sampled_from([(1, 1, 1), (3, 5, 1), (4, 6, 2), (17, 9, 1), (8, 8, 8)]),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 3),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_gradients_match_a_masked_dense_convolution(seed, batch, channels, size, kernel, stride, sparsity):
    c, k, groups = channels
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, c, *size, generator=g, requires_grad=True)
    weight = torch.randn(k, c // groups, kernel, kernel, generator=g, requires_grad=True)
    mask = torch.rand(weight.shape, generator=g) >= sparsity
    bias = torch.randn(k, generator=g, requires_grad=True)
    pattern = pattern_from_mask(mask, groups)
    y = _ops.conv2d(
        x, _ops.compress(weight, pattern), pattern, bias,
        kernel_size=(kernel,) * 2, stride=(stride,) * 2, padding=(1,) * 4, groups=groups,
    )  # fmt: skip
    expected = torch.nn.functional.conv2d(x, weight * mask, bias, stride, 1, 1, groups)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(y.shape, generator=g)
    ours, theirs = (torch.autograd.grad(out, (x, weight, bias), dy) for out in (y, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_the_dense_weight_gradient_is_pytorchs():
    x, values, pattern, bias, geometry = conv_case()
    y = torch.ops.sparsekit.conv2d(x, values, *pattern, bias, *geometry)
    grad = torch.ops.sparsekit.conv2d_weight_grad(torch.ones_like(y), x, *geometry)
    kept = torch.ops.sparsekit.conv2d_values_grad(torch.ones_like(y), x, *pattern[:2], *geometry)
    torch.testing.assert_close(_ops.compress(grad, pattern), kept, rtol=1e-5, atol=1e-5)


def leaves_of(x, values, bias):
    return [t.detach().clone().requires_grad_() for t in (x, values, bias)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_calls_past_the_dispatcher_are_the_ops(layout):
    x, values, pattern, bias, geometry = conv_case()
    x = x.contiguous(memory_format=layout)
    results = []
    for op in (_ops.call.conv2d, torch.ops.sparsekit.conv2d):
        leaves = leaves_of(x, values, bias)
        y = op(leaves[0], leaves[1], *pattern, leaves[2], *geometry)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*results))
    with pytest.raises(NotImplementedError, match="double backward"):
        y = _ops.call.conv2d(leaves[0], leaves[1], *pattern, leaves[2], *geometry)
        torch.autograd.grad(y.sum(), leaves[0], create_graph=True)[0].sum().backward()


def test_calls_are_seen_by_whoever_traces_them():
    x, values, pattern, bias, geometry = conv_case()
    expected = torch.ops.sparsekit.conv2d(x, values, *pattern, bias, *geometry)

    def call(x, values, bias):
        return _ops.call.conv2d(x, values, *pattern, bias, *geometry)

    graph = torch.fx.experimental.proxy_tensor.make_fx(call)(x, values, bias)
    assert torch.ops.sparsekit.conv2d.default in {node.target for node in graph.graph.nodes}
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = call(mode.from_tensor(x), values, bias)
    assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == expected.shape
    # A view that is stored with the opposite sign.
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(call(negative, values, bias), expected)


@pytest.mark.parametrize("used", ["both", "output", "input"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_fork_adds_the_gradients(used, frozen):
    for stride, layout in ((1, torch.contiguous_format), (1, torch.channels_last), (2, torch.contiguous_format)):
        x, values, pattern, _, _ = conv_case()
        results = []
        for fork in (False, True):
            x_leaf = x.contiguous(memory_format=layout).detach().requires_grad_()
            leaf = values.detach().clone().requires_grad_(not frozen)
            outs = _ops.conv2d(
                x_leaf * 1, leaf, pattern, kernel_size=(3, 3), stride=(stride,) * 2, padding=(1,) * 4, fork=fork
            )
            y, again = outs if fork else (outs, x_leaf)
            losses = {"output": y.square().sum(), "input": again.sin().sum()}
            loss = losses.get(used, sum(losses.values()))
            wanted = [x_leaf] if frozen or used == "input" else [x_leaf, leaf]
            results.append(torch.autograd.grad(loss, wanted))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_compiles_without_graph_breaks():
    x, values, pattern, bias, geometry = conv_case()

    def loss(x, values, bias):
        return torch.ops.sparsekit.conv2d(x, values, *pattern, bias, *geometry).relu().sum()

    leaves = [t.requires_grad_() for t in (x, values, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 5, 6, 5)}, ValueError, r"input must be \[n, 4, h, w\]"),
        ({"input": torch.randn(4, 4)}, ValueError, r"input must be .*got \(4, 4\)"),
        ({"input": torch.ones(2, 4, 6, 5, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"input": torch.randn(2, 4, 6, 5, dtype=torch.float64)}, TypeError, "same dtype"),
        ({"input": torch.randn(2, 4, 1, 1)}, ValueError, "smaller than the kernel"),
        ({"values": torch.randn(3)}, ValueError, r"values must be \["),
        ({"bias": torch.randn(5)}, ValueError, r"bias must be \[6\], got \(5,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, values, pattern, bias, _ = conv_case()
    arguments = {"input": x, "values": values, "pattern": pattern, "bias": bias, **change}
    with pytest.raises(error, match=message):
        _ops.conv2d(**arguments, kernel_size=(3, 3))


def test_linear_names_bad_input():
    pattern = pattern_from_mask(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"input must be \[\.\.\., 3\], got \(2, 4\)"):
        _ops.linear(torch.randn(2, 4), torch.randn(6), pattern)
