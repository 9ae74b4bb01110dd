"""What a training loop does around a model: the same with sparse layers as with masked dense ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint_sequential

import sparsekit as sk

BasicBlock = pytest.importorskip("torchvision.models.resnet", exc_type=ImportError).BasicBlock
FORMS = ("sparse", "compressed")


def pair(form, seed=0):
    """A small residual network with sparse layers, and the dense one with the same zeros."""
    torch.manual_seed(seed)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 8),
        BasicBlock(8, 16, 2, shortcut), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    sk.pruning.magnitude_(dense, 0.7, "uniform", exclude=["7"])
    sparse = sk.sparsify_(copy.deepcopy(dense))
    for module in sparse.modules():
        if isinstance(module, sk.nn.SparseModule):
            module.backend = "sparse"
    return (sk.compress_(sparse) if form == "compressed" else sparse), dense


def batch(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=g), torch.randint(5, (n,), generator=g)


def masks(dense):
    return {n: (p != 0) if p.dim() == 4 else torch.ones_like(p, dtype=torch.bool) for n, p in dense.named_parameters()}


def gradients(sparse):
    """By the dense model's names."""
    found = {}
    for name, module in sparse.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.grad is None:
                continue
            grad, full = parameter.grad, f"{name}.{key}"
            if key == "values":
                grad = sk._ops.decompress(grad, module.pattern, module.dense_size)
                full = f"{name}.weight"
            found[full] = grad
    return found


def assert_same_gradients(sparse, dense, kept, rtol=1e-3, atol=1e-4):
    ours = gradients(sparse)
    expected = {name: p.grad * kept[name] for name, p in dense.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("form", FORMS)
def test_gradients_accumulate_and_are_clipped(form):
    sparse, dense = pair(form)
    kept = masks(dense)
    for model in (sparse, dense):
        for seed in range(3):
            x, y = batch(seed=seed)
            F.cross_entropy(model(x), y).backward()
    assert_same_gradients(sparse, dense, kept)
    for name, parameter in dense.named_parameters():
        parameter.grad.mul_(kept[name])
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.1) for model in (sparse, dense)]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-5)
    assert_same_gradients(sparse, dense, kept)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations(form, reentrant):
    sparse, _ = pair(form)
    again = copy.deepcopy(sparse)
    x, y = batch()
    # BatchNorm would count a batch twice.
    for model in (sparse, again):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
    F.cross_entropy(sparse(x), y).backward()
    x = x.clone().requires_grad_()
    F.cross_entropy(checkpoint_sequential(again, 2, x, use_reentrant=reentrant), y).backward()
    for a, b in zip(sparse.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.skipif(sk.backend() == "reference", reason="installed without C++ kernels")
@pytest.mark.parametrize("form", FORMS)
def test_frozen_layers_get_no_gradient_and_cost_none(form, monkeypatch):
    sparse, _ = pair(form)
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(name.startswith(("4.conv2", "7")))
    calls = []
    for op in ("conv2d_input_grad", "conv2d_values_grad", "conv2d_grads"):
        original = getattr(torch.ops.sparsekit_cpu, op)
        monkeypatch.setattr(
            torch.ops.sparsekit_cpu, op, lambda *a, op=op, original=original: (calls.append(op), original(*a))
        )
    x, y = batch()
    F.cross_entropy(sparse(x), y).backward()
    assert {n.split(".")[0] for n in gradients(sparse)} == {"4", "7"}
    assert calls == ["conv2d_values_grad"]


@pytest.mark.parametrize("form", FORMS)
def test_functional_call(form):
    sparse, _ = pair(form)
    sparse.eval()
    x, _ = batch()
    doubled = {name: 2 * p.detach() for name, p in sparse.named_parameters()}
    out = torch.func.functional_call(sparse, doubled, (x,))
    for parameter in sparse.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(out, sparse(x))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_trains_as_dense(form):
    sparse, dense = pair(form)
    kept = masks(dense)
    exact = copy.deepcopy(dense).double()
    x, y = batch()
    F.cross_entropy(exact(x.double()), y).backward()
    for model in (sparse, dense):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
    ours = gradients(sparse)
    for name, parameter in exact.named_parameters():
        assert ours[name].dtype == torch.float32
        expected = parameter.grad.float() * kept[name]
        scale = expected.abs().max()
        off = (ours[name] - expected).abs().max() / scale
        theirs = ((dense.get_parameter(name).grad - expected) * kept[name]).abs().max() / scale
        assert off <= 3 * theirs + 0.05, name


@pytest.mark.parametrize("form", FORMS)
def test_double_backward_says_that_there_is_none(form):
    sparse, _ = pair(form)
    x, y = batch()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(sparse(x), y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step_is_the_eager_one(form):
    eager, _ = pair(form)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, y = batch()
    for model, forward in ((eager, eager), (compiled, run)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()
    for a, b in zip(eager.state_dict().values(), compiled.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_few_graphs_serve_every_size(form):
    eager, _ = pair(form)
    for module in eager.modules():
        if isinstance(module, sk.nn.SparseModule):
            module.backend = "auto"
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for n, h, w in ((6, 12, 12), (3, 12, 12), (7, 12, 12), (7, 16, 20), (4, 24, 12), (5, 32, 28)):
        x, y = torch.randn(n, 3, h, w), torch.randint(5, (n,))
        for model, forward in ((eager, eager), (compiled, run)):
            model.zero_grad()
            F.cross_entropy(forward(x), y).backward()
        for a, b in zip(eager.parameters(), compiled.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    for a, b in zip(eager.state_dict().values(), compiled.state_dict().values()):
        torch.testing.assert_close(a, b)
    # One for the first size, one for any batch, one for any image.
    assert counter.frame_count == 3


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_of_masked_dense_training(form):
    sparse, dense = pair(form)
    kept = {name: mask.float() for name, mask in masks(dense).items()}
    losses = []
    for model in (sparse, dense):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        losses.append([])
        for step in range(20):
            x, y = batch(16, seed=step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for name, parameter in dense.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(kept[name])
            optimizer.step()
            losses[-1].append(loss.item())
    ours, theirs = torch.tensor(losses)
    assert (ours - theirs).abs().div(theirs)[:10].max() < 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
