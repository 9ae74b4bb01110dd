"""SparseConv2d and SparseLinear behave as nn.Conv2d and nn.Linear with a masked weight."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

import sparsekit as sk
from sparsekit.dispatch import shape_of, tuned_key

CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": (1, 5), "padding": "valid"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "groups": 8, "stride": (1, 2)},
    {"kernel_size": 7, "stride": 4, "padding": 3, "dilation": (1, 2)},
]


def masked_pair(seed=0, sparsity=0.7, **arguments):
    """A sparse convolution and the dense one with the same zeros."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(8, 16, **arguments)
    mask = torch.rand_like(conv.weight) > sparsity
    sparse = sk.nn.SparseConv2d.from_dense(conv, mask)
    sparse.backend = "sparse"
    with torch.no_grad():
        conv.weight.mul_(mask)
    return sparse, conv


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("arguments", CONVS, ids=str)
def test_convolutions_match_dense(arguments, layout):
    sparse, conv = masked_pair(**arguments)
    for shape in ((2, 8, 15, 17), (1, 8, 14, 14), (0, 8, 15, 15)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [module(x) for module, x in zip((sparse, conv), xs)]
        torch.testing.assert_close(ys[0], ys[1], rtol=1e-4, atol=1e-5)
        if shape[0] > 1:
            assert ys[0].is_contiguous(memory_format=layout)
        dy = torch.randn_like(ys[1])
        for y in ys:
            y.backward(dy)
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sparse.weight.grad, conv.weight.grad * sparse.weight_mask, rtol=1e-4, atol=1e-3)
        if conv.bias is not None:
            torch.testing.assert_close(sparse.bias.grad, conv.bias.grad, rtol=1e-4, atol=1e-3)
        sparse.zero_grad(), conv.zero_grad()


def test_unbatched_inputs():
    sparse, conv = masked_pair(kernel_size=3, padding=1)
    x = torch.randn(8, 9, 9)
    torch.testing.assert_close(sparse(x), conv(x), rtol=1e-4, atol=1e-5)
    linear = nn.Linear(8, 4)
    sparse_linear = sk.nn.SparseLinear.from_dense(linear)
    sparse_linear.backend = "sparse"
    for shape in ((8,), (3, 8), (2, 3, 8), (0, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(sparse_linear(x), linear(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_gradients_outside_the_mask_are_zero_and_optimizers_keep_the_zeros(backend):
    sparse, _ = masked_pair(kernel_size=3, padding=1)
    sparse.backend = backend
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        options = {"momentum": 0.9, "weight_decay": 0.1} if kind is torch.optim.SGD else {"weight_decay": 0.1}
        optimizer = kind(sparse.parameters(), lr=0.01, **options)
        for _ in range(3):
            optimizer.zero_grad()
            sparse(torch.randn(2, 8, 6, 6)).square().mean().backward()
            assert not sparse.weight.grad[~sparse.weight_mask].any()
            optimizer.step()
        assert not sparse.weight[~sparse.weight_mask].any()
        assert sparse.weight[sparse.weight_mask].all()


def test_deepcopy_and_pickle():
    sparse, conv = masked_pair(kernel_size=3)
    x = torch.randn(2, 8, 6, 6)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(buffer, weights_only=False),
    ):
        torch.testing.assert_close(other(x), conv(x), rtol=1e-4, atol=1e-5)
        sk.set_mask_(other, torch.zeros_like(other.weight_mask))
        assert other.sparsity == 1 and sparse.sparsity < 1
        torch.testing.assert_close(sparse(x), conv(x), rtol=1e-4, atol=1e-5)


def test_strict_loading_of_dense_checkpoints_infers_the_mask_and_says_so(caplog):
    _, conv = masked_pair(kernel_size=3)
    fresh = sk.nn.SparseConv2d(8, 16, 3)
    fresh.load_state_dict(conv.state_dict())
    assert torch.equal(fresh.weight_mask, conv.weight != 0)
    assert "mask inferred from the checkpoint's zeros" in caplog.text


def test_a_mask_stays_when_a_checkpoint_brings_none():
    sparse, _ = masked_pair(kernel_size=3)
    before = sparse.weight_mask.clone()
    with pytest.warns(UserWarning, match=r"own mask stays, and drops \d+ non-zero"):
        sparse.load_state_dict(nn.Conv2d(8, 16, 3).state_dict())
    assert torch.equal(sparse.weight_mask, before) and not sparse.weight[~before].any()
    sparse.infer_mask = True
    sparse.load_state_dict(nn.Conv2d(8, 16, 3).state_dict())
    assert sparse.sparsity == 0


def test_own_checkpoints_round_trip():
    sparse, _ = masked_pair(kernel_size=3)
    assert set(sparse.state_dict()) == {"weight", "bias", "weight_mask"}
    fresh = sk.nn.SparseConv2d(8, 16, 3)
    fresh.load_state_dict(sparse.state_dict())
    assert torch.equal(fresh.weight_mask, sparse.weight_mask) and torch.equal(fresh.weight, sparse.weight)


def test_checkpoints_of_torch_prune_load():
    conv = nn.Conv2d(8, 16, 3)
    prune.l1_unstructured(conv, "weight", 0.8)
    fresh = sk.nn.SparseConv2d(8, 16, 3)
    fresh.load_state_dict(conv.state_dict())
    assert torch.equal(fresh.weight_mask, conv.weight_mask.bool())
    assert torch.equal(fresh.weight, conv.weight)


def test_moving_between_dtypes_and_layouts():
    sparse, conv = masked_pair(kernel_size=3)
    x = torch.randn(2, 8, 6, 6)
    double = copy.deepcopy(sparse).double()
    assert double.weight_mask.dtype == torch.bool and double._col_indices.dtype == torch.int32
    torch.testing.assert_close(double(x.double()).float(), conv(x), rtol=1e-4, atol=1e-5)
    last = copy.deepcopy(sparse).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", sk.available_backends())
def test_autocast_gives_dense_dtypes(dtype, isa):
    sparse, conv = masked_pair(kernel_size=3)
    x = torch.randn(2, 8, 6, 6)
    with sk.use_isa(isa), torch.autocast("cpu", dtype):
        y, expected = sparse(x), conv(x)
        y.float().sum().backward()
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert sparse.weight.grad.dtype == torch.float32


def test_compiles_whole():
    sparse, conv = masked_pair(kernel_size=3, padding=1)
    model = nn.Sequential(sparse, nn.BatchNorm2d(16), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(compiled(x), F.relu(model[1](conv(x))), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert not sparse.weight.grad[~sparse.weight_mask].any()


@pytest.mark.parametrize("first, later", [("sparse", "dense"), ("dense", "sparse")])
def test_a_graph_keeps_to_what_it_was_traced_with(first, later):
    conv, _ = masked_pair(kernel_size=3, padding=1)
    linear = sk.nn.SparseLinear.from_dense(nn.Linear(8, 4))
    for module, sizes in ((conv, [(3, 8, 6, 7), (5, 8, 6, 7), (4, 8, 9, 10)]), (linear, [(3, 8), (5, 8), (7, 8)])):
        module.backend = "auto"
        inputs = [torch.randn(size) for size in sizes]
        for x, fastest in zip(inputs, (first, later, later)):
            module.tuned[tuned_key(shape_of(module, x), True, x)] = (1.0, 2.0) if fastest == "sparse" else (2.0, 1.0)
        runs_sparse = [module.runs_sparse(x) for x in inputs]
        if sk.backend() != "reference":
            assert runs_sparse == [fastest == "sparse" for fastest in (first, later, later)]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, dynamic=True, fullgraph=True, backend=counter)
        for x in inputs:
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
        (graph,) = counter.graphs
        assert any(str(node.target).startswith("sparsekit.") for node in graph.graph.nodes) == runs_sparse[0]


def test_constructors_and_repr():
    sparse = sk.nn.SparseConv2d(4, 6, (3, 2), stride=2, padding="valid", groups=2, bias=False, padding_mode="zeros")
    assert isinstance(sparse, nn.Conv2d) and sparse.sparsity == 0 and "sparsity=0.0000" in repr(sparse)
    with pytest.raises(TypeError, match="conv must be an nn.Conv2d, got Linear"):
        sk.nn.SparseConv2d.from_dense(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mask must have the weight's shape"):
        sk.nn.SparseLinear.from_dense(nn.Linear(2, 2), torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        sk.nn.SparseLinear.from_dense(nn.Linear(2, 2), torch.ones(2, 2))


def test_to_dense():
    sparse, conv = masked_pair(kernel_size=3, padding=1, groups=2)
    dense = sparse.to_dense()
    assert type(dense) is nn.Conv2d and torch.equal(dense.weight, conv.weight) and torch.equal(dense.bias, conv.bias)


def test_a_mask_written_in_place_is_noticed():
    sparse, _ = masked_pair(kernel_size=3)
    sparse.weight_mask[0].zero_()
    with pytest.warns(UserWarning, match="set_mask_"):
        y = sparse(torch.zeros(1, 8, 4, 4))
    assert torch.equal(y[0, 0], sparse.bias[0].expand(2, 2)) and not sparse.weight[0].any()


def test_meta_modules_materialise():
    sparse = sk.nn.SparseLinear(4, 4, device="meta")
    assert sparse.extra_repr()
    loaded = sparse.to_empty(device="cpu")
    loaded.load_state_dict(sk.nn.SparseLinear.from_dense(nn.Linear(4, 4), torch.eye(4, dtype=torch.bool)).state_dict())
    assert loaded.sparsity == 0.75
    loaded(torch.randn(2, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (5, 3), "padding": (2, 0), "stride": (1, 2), "dilation": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": 3, "stride": 3},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
@pytest.mark.parametrize("size", [(2, 5, 17, 23), (1, 5, 7, 7), (3, 5, 40, 9), (0, 5, 9, 9)])
def test_depthwise_is_dense(settings, size):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 5, groups=5, **settings)
    ours = sk.nn.DepthwiseConv2d(5, 5, groups=5, **settings)
    ours.load_state_dict(plain.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(size).contiguous(memory_format=layout)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, found = plain(a), ours(b)
        dy = torch.randn_like(expected)
        plain.zero_grad(), ours.zero_grad()
        expected.backward(dy), found.backward(dy)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
        for p, q in zip(ours.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_depthwise_layers_change_class_with_the_model():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=4))
    keys = list(model.state_dict())
    sk.sparsify_(sk.pruning.magnitude_(model, 0.75, exclude=["0", "2"]))
    assert [type(m).__name__ for m in model] == ["DepthwiseConv2d", "SparseConv2d", "Conv2d"]
    assert list(sk.dense_state_dict(model)) == keys
    found = copy.deepcopy(model)(x := torch.randn(2, 4, 9, 9))
    torch.testing.assert_close(found, sk.densify_(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)
    # Pruned later, it becomes sparse like any other.
    sk.sparsify_(sk.pruning.magnitude_(model, 0.8, exclude=["1", "2"]))
    assert type(model[0]) is sk.nn.SparseConv2d
    assert [type(m) for m in sk.densify_(model)] == [nn.Conv2d] * 3
    with pytest.raises(ValueError, match="in_channels, out_channels and groups must be equal"):
        sk.nn.DepthwiseConv2d(4, 8, 3, groups=4)


def test_depthwise_passes_infinities_on_and_does_not_depend_on_threads():
    conv = sk.nn.DepthwiseConv2d(3, 3, 3, stride=2, padding=1, groups=3)
    x = torch.randn(2, 3, 20, 20)
    x[0, 1, 5, 5], x[1, 2, 0, 0] = float("inf"), float("nan")
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, 2, 1, 1, 3)
    assert torch.equal(conv(x).isfinite(), expected.isfinite())
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = conv(a := torch.nan_to_num(x, 0, 0, 0).requires_grad_())
            results.append([y, *torch.autograd.grad(y.square().sum(), [a, conv.weight])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for result in results[1:] for p, q in zip(result, results[0]))
