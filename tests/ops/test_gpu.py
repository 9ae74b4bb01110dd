"""Every backend for GPUs against the reference, and what PyTorch users do on GPUs. Needs one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit import _ops, gpu, reference
from sparsekit.formats import pattern_from_mask

from .fuzz import NAN, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BACKENDS = [name for name in gpu.backends() if name != "reference"] if torch.cuda.is_available() else []
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
CASES = 200


def draw(generator, *size):
    """Integers, whose sums of products are exact in float32 in any order."""
    return torch.randint(-3, 4, size, generator=generator).float()


def same(actual, expected, context):
    """Equal after the one rounding to the output's dtype."""
    assert torch.equal(actual.cpu(), expected.to(actual.dtype)), context


@backends
@dtypes
def test_convolutions_match_the_reference(backend, dtype, monkeypatch):
    tested = 0
    for seed in range(CASES):
        case = Case.random(seed)
        taps = math.prod(case.kernel)
        if backend == "cuda" and taps > gpu.CUDA_TAPS:
            continue
        monkeypatch.setattr(gpu, "TILINGS", (gpu.TILINGS[seed % len(gpu.TILINGS)],))
        g = torch.Generator().manual_seed(seed)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        x = draw(g, case.batch, case.in_channels, *case.size).contiguous(memory_format=layout)
        shape = (case.out_channels, case.in_channels // case.groups, *case.kernel)
        pattern = pattern_from_mask(torch.rand(shape, generator=g) >= case.sparsity, case.groups)
        values, bias = draw(g, pattern.nnz), draw(g, case.out_channels) if case.bias else None
        geometry = (list(case.kernel), list(case.stride), list(case.padding), list(case.dilation), case.groups)
        y = torch.full(_ops.output_size(x.shape, case.out_channels, *geometry[:4]), NAN)
        dy = draw(g, *y.shape).contiguous(memory_format=layout)
        residual = draw(g, *y.shape)
        expected = reference.conv2d(x, values, *pattern[:2], bias, *geometry)
        expected_dx = reference.conv2d_input_grad(dy, values, *pattern[2:], x.shape, *geometry)
        expected_dw = reference.conv2d_values_grad(dy, x, *pattern[:2], *geometry)

        def on_gpu(t):
            return t if t is None else t.to("cuda", dtype if t.is_floating_point() else t.dtype)

        x, values, bias, dy, residual, *pattern = map(on_gpu, (x, values, bias, dy, residual, *pattern))
        y, dx = (on_gpu(torch.full(t.shape, NAN)).contiguous(memory_format=layout) for t in (y, x))
        dw = torch.full_like(values, NAN)
        with gpu.use_backend(backend):
            gpu.conv2d(y, x, values, *pattern[:2], bias, *geometry)
            gpu.conv2d_input_grad(dx, dy, values, *pattern[2:], *geometry)
            gpu.conv2d_values_grad(dw, dy, x, *pattern[:2], *geometry)
            same(y, expected, f"conv2d of Case.random({seed}) {case}")
            same(dx, expected_dx, f"conv2d_input_grad of Case.random({seed}) {case}")
            same(dw, expected_dw, f"conv2d_values_grad of Case.random({seed}) {case}")
            gpu.conv2d(y, x, values, *pattern[:2], bias, *geometry, residual=residual, relu=True)
            same(y, (expected + residual.float().cpu()).relu(), f"epilogue of Case.random({seed}) {case}")
        tested += 1
    assert tested > CASES // 2


@backends
@dtypes
def test_linear_matches_the_reference(backend, dtype):
    g = torch.Generator().manual_seed(0)
    for batch in (1, 3, 16, 65, 130):
        for out_features, in_features in ((1, 1), (7, 13), (64, 100), (130, 257), (1000, 2048)):
            pattern = pattern_from_mask(torch.rand(out_features, in_features, generator=g) > 0.8)
            values, bias = draw(g, pattern.nnz), draw(g, out_features)
            x, dy = draw(g, batch, in_features), draw(g, batch, out_features)
            expected = (
                reference.linear(x, values, *pattern[:2], bias),
                reference.linear_input_grad(dy, values, *pattern[2:]),
                reference.linear_values_grad(dy, x, *pattern[:2]),
            )
            x, dy, values, bias = (t.to("cuda", dtype) for t in (x, dy, values, bias))
            pattern = [t.cuda() for t in pattern]
            y, dx, dw = (torch.full_like(t, NAN) for t in (dy, x, values))
            with gpu.use_backend(backend):
                gpu.linear(y, x, values, *pattern[:2], bias)
                gpu.linear_input_grad(dx, dy, values, *pattern[2:])
                gpu.linear_values_grad(dw, dy, x, *pattern[:2])
            for actual, wanted in zip((y, dx, dw), expected):
                same(actual, wanted, f"{batch} x {in_features} -> {out_features}")


@backends
@dtypes
@pytest.mark.parametrize("channels_last", [False, True])
def test_compress_and_decompress_match_the_reference(backend, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with gpu.use_backend(backend):
        for size in ((1, 1, 1, 1), (5, 3, 3, 3), (64, 17, 1, 1), (33, 16, 5, 2), (300, 700, 1, 1)):
            weight = torch.randn(size, device="cuda", dtype=dtype).contiguous(memory_format=layout)
            mask = torch.rand(size, device="cuda") > 0.7
            pattern = pattern_from_mask(mask)
            values = _ops.compress(weight, pattern)
            assert torch.equal(values, reference.compress(weight, *pattern[:2]))
            assert torch.equal(_ops.decompress(values, pattern, size, channels_last), weight * mask)


def sparse_and_dense(channels_last=False):
    torch.manual_seed(0)
    dense = torch.nn.Sequential(
        torch.nn.Conv2d(16, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 32, 3, stride=2, padding=1),
        torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 1, bias=False), torch.nn.Flatten(), torch.nn.Linear(64 * 49, 10),
    ).cuda()  # fmt: skip
    sk.pruning.magnitude_(dense, sparsity=0.9, distribution="uniform")
    sparse = sk.sparsify_(copy.deepcopy(dense))
    for module in sparse.modules():
        if hasattr(module, "weight_mask"):
            module.backend = "sparse"
    x = torch.randn(4, 16, 14, 14, device="cuda")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return sparse, dense, x


def gradients(model, x, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cuda", **autocast, enabled=bool(autocast)):
        loss = F.cross_entropy(model(x).float(), torch.arange(len(x), device="cuda") % 10)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, [x, *parameters])
    masks = [getattr(m, "weight_mask", None) for m in model.modules()]
    return loss, grads, masks


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@backends
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_training_step_matches_dense(backend, channels_last):
    sparse, dense, x = sparse_and_dense(channels_last)
    with gpu.use_backend(backend):
        loss, grads, _ = gradients(sparse, x)
    expected_loss, expected, _ = gradients(dense, x)
    torch.testing.assert_close(loss, expected_loss)
    for (name, parameter), actual, wanted in zip(
        [("input", None), *sparse.named_parameters()], grads, expected, strict=True
    ):
        mask = (
            getattr(sparse.get_submodule(name.rpartition(".")[0]), "weight_mask", None)
            if parameter is not None
            else None
        )
        wanted = wanted * mask if mask is not None and name.endswith("weight") else wanted
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_has_denses_dtype_and_is_as_exact(backend, dtype):
    sparse, dense, x = sparse_and_dense()
    exact = dense.double()(x.double())
    dense.float()
    with gpu.use_backend(backend), torch.autocast("cuda", dtype=dtype):
        actual, wanted = sparse(x), dense(x)
    assert actual.dtype == wanted.dtype == dtype
    error, dense_error = ((t.double() - exact).abs().max() for t in (actual, wanted))
    assert error <= 2 * dense_error
    with gpu.use_backend(backend):
        _, grads, _ = gradients(sparse, x, dtype=dtype)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


@backends
def test_runs_in_a_cuda_graph(backend):
    sparse, _, x = sparse_and_dense()
    sparse.requires_grad_(False)
    with gpu.use_backend(backend):
        expected = sparse(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sparse(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sparse(x)
        x2 = torch.randn_like(x)
        wanted = sparse(x2)
        x.copy_(x2)
        graph.replay()
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert not torch.equal(out, expected)


@backends
def test_compiles_to_one_graph(backend):
    sparse, _, x = sparse_and_dense()
    with gpu.use_backend(backend):
        expected, expected_grads, _ = gradients(sparse, x)
        loss, grads, _ = gradients(torch.compile(sparse, fullgraph=True), x)
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@backends
def test_results_are_bit_identical_from_run_to_run(backend):
    sparse, _, x = sparse_and_dense()
    with gpu.use_backend(backend):
        first, second = (gradients(sparse, x)[1] for _ in range(2))
    names = ["input", *(name for name, _ in sparse.named_parameters())]
    for name, a, b in zip(names, first, second):
        if "6" not in name:  # the linear layer's neighbours are PyTorch's, which promise less
            assert torch.equal(a, b), name


@backends
def test_the_stream_of_the_caller_is_used(backend):
    sparse, _, x = sparse_and_dense()
    with gpu.use_backend(backend), torch.no_grad():
        expected = sparse(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = x * 1.0
            out = sparse(late)
        stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_tuning_remembers_the_fastest_variant():
    sparse, _, x = sparse_and_dense()
    gpu.measured.clear()
    expected = sparse(x)
    with gpu.tuning():
        out = sparse(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(gpu.measured) == 4
    for seconds in gpu.measured.values():
        assert list(seconds.values()) == sorted(seconds.values()) and min(seconds.values()) > 0
    gpu.measured.clear()


@pytest.mark.parametrize("fused", [False, True])
def test_fused_optimizers_train_compressed_values(fused):
    sparse, _, x = sparse_and_dense()
    optimizer = torch.optim.SGD(sk.compress_(sparse).parameters(), lr=0.05, momentum=0.9, fused=fused)
    before = [p.numel() for p in sparse.parameters()]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(x), torch.arange(len(x), device="cuda"))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and [p.numel() for p in sparse.parameters()] == before


@pytest.mark.parametrize("loop", ["linear_finetune", "full_finetune"])
def test_transfer_loops_run_where_the_model_is(loop):
    pytest.importorskip("torchvision", exc_type=ImportError)
    from sparsekit.transfer.models import SmallResNet

    g = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (64, 1, 28, 28), generator=g, dtype=torch.uint8), torch.arange(64) % 4
    task = sk.transfer.tasks.Task("random", 4, "top1", images, labels, images, labels)
    model = sk.sparsify_(sk.pruning.magnitude_(SmallResNet((8, 16), (1, 1)), 0.8)).cuda()
    result = getattr(sk.transfer, loop)(model, task, epochs=2, batch_size=16)
    assert 0 <= result.accuracy <= 1 and all(math.isfinite(epoch["loss"]) for epoch in result.history)
    assert {t.device.type for t in result.model.parameters()} == {"cuda"}
