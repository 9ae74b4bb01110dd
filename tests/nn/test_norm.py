"""BatchNorm2d and the residual blocks that sparsify_ puts in compute what PyTorch's do."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.nn.norm import normed

torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
from torchvision.models import resnet

from sparsekit.nn import blocks
from sparsekit.transfer.models import MobileNetV1


def pair(**arguments):
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(6, **arguments)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = sk.nn.BatchNorm2d(6, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.4}],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_is_pytorchs(arguments, layout):
    ours, theirs = pair(**arguments)
    for _ in range(3):
        x = torch.randn(4, 6, 7, 5).to(memory_format=layout)
        torch.testing.assert_close(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_fused_is_its_parts():
    ours, theirs = pair()
    for x in (torch.randn(4, 6, 7, 5), torch.randn(4, 6, 7, 5, dtype=torch.float64), torch.randn(2, 6, 1, 3)):
        ours, theirs = ours.to(x.dtype), theirs.to(x.dtype)
        residual = torch.randn_like(x)
        torch.testing.assert_close(ours(x, residual, relu=True), F.relu(theirs(x) + residual))
        torch.testing.assert_close(ours(x, relu=True), F.relu(theirs(x)))
    with pytest.raises(ValueError, match=r"residual must be \(2, 6, 1, 3\)"):
        ours(x, residual[:1])


def test_what_pytorch_refuses_is_refused():
    ours, _ = pair()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(torch.randn(1, 6, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="6"):
        ours(torch.randn(2, 5, 3, 3))


@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_pooled_is_its_parts(arguments):
    ours, theirs = pair(**arguments)
    pools = sk.nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)
    for step in range(3):
        x = torch.randn(3, 6, 9, 12)
        if step == 2:  # what is not pooled in one go
            x = x.to(memory_format=torch.channels_last)
        results = []
        for norm, pool in zip((ours, theirs), pools):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = norm.pooled(leaf, pool) if norm is ours else pool(F.relu(norm(leaf)))
            (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
            results.append([out, leaf.grad, *(p.grad for p in norm.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours.pooled(x, pools[0].eval()), pools[1](F.relu(theirs(x))))
    with pytest.raises(ValueError, match="expected 4D input"):
        ours.train().pooled(torch.randn(2, 6), pools[0].train())
    with pytest.raises(RuntimeError, match="pad should be"):
        ours.pooled(torch.randn(2, 6, 8, 8), sk.nn.MaxPool2d(2, padding=2))


def test_nothing_is_differentiated_that_needs_no_gradient():
    ours, _ = pair()
    ours.requires_grad_(False)
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.weight.grad is None
    assert not ours(x.detach()).requires_grad


def sparse_conv(**arguments):
    conv = nn.Conv2d(8, 6, 3, padding=1, bias=False, **arguments)
    conv = sk.nn.SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) > 0.7)
    conv.backend = "sparse"
    return conv


@pytest.fixture
def joint(monkeypatch):
    """Counts the calls that do both layers at once, forward and backward."""
    if sk.backend() == "reference":
        pytest.skip("installed without C++ kernels")
    calls = []
    for name in ("conv2d_batch_norms", "conv2d_batch_norms_grads"):
        original = getattr(torch.ops.sparsekit_cpu, name)
        monkeypatch.setattr(
            torch.ops.sparsekit_cpu, name, lambda *a, original=original, name=name: (calls.append(name), original(*a))
        )
    return calls


@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.4}],
)
@pytest.mark.parametrize(("residual", "relu", "fork"), [(True, True, True), (False, True, False), (True, False, True)])
def test_with_its_convolution_it_is_its_parts(joint, arguments, residual, relu, fork):
    both, _ = pair(**arguments)
    conv = sparse_conv()
    apart = copy.deepcopy((conv, both))
    for step in range(2):
        inputs = [torch.randn(3, 8, 5, 7), torch.randn(3, 6, 5, 7) if residual else None]
        results = []
        for c, n in ((conv, both), apart):
            x, shortcut = (t if t is None else t.clone().requires_grad_() for t in inputs)
            before = len(joint)
            if c is conv:
                out = normed(c, n, x, shortcut, relu=relu, fork=fork)
                out, again = out if fork else (out, x)
                assert len(joint) == before + 1
            else:
                out, again = n(c(x), shortcut, relu=relu), x
            ((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() + (again * again).sum()).backward()
            leaves = [x, *([shortcut] if residual else []), *c.parameters(), *n.parameters()]
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        assert joint.count("conv2d_batch_norms_grads") == step + 1
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        for key, value in apart[1].state_dict().items():
            torch.testing.assert_close(both.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_with_its_convolution_only_where_that_can_be(joint):
    norm, _ = pair()
    x = torch.randn(3, 8, 5, 7, requires_grad=True)
    conv = sparse_conv()
    frozen, watched, dense = (sparse_conv() for _ in range(3))
    reflecting = sparse_conv(padding_mode="reflect")
    frozen.requires_grad_(False)
    watched.register_forward_hook(lambda *_: None)
    dense.backend = "dense"
    cases = [
        (frozen, norm, x), (watched, norm, x), (dense, norm, x), (reflecting, norm, x), (conv, norm, x.detach()),
        (conv, norm, x.to(memory_format=torch.channels_last)), (conv, copy.deepcopy(norm).eval(), x),
        (copy.deepcopy(conv).double(), copy.deepcopy(norm).double(), x.double()),
    ]  # fmt: skip
    for c, n, images in cases:
        expected = copy.deepcopy(n)(copy.deepcopy(c)(images), relu=True)
        torch.testing.assert_close(normed(c, n, images, relu=True), expected)
    with torch.no_grad():
        normed(conv, norm, x)
    with torch.autocast("cpu", torch.bfloat16):
        normed(conv, norm, x)
    for bad, message in ((torch.randn(2, 5, 3, 3), "input must be"), (torch.randn(2, 8), "input must be")):
        with pytest.raises(ValueError, match=message):
            normed(conv, norm, bad.requires_grad_())
    with pytest.raises(ValueError, match="residual must be"):
        normed(conv, norm, x, torch.randn(1, 6, 5, 7))
    with pytest.raises(ValueError, match="more than 1 value"):
        normed(conv, norm, torch.randn(1, 8, 1, 1, requires_grad=True))
    assert not joint
    normed(conv, norm, x)
    assert joint


def test_with_its_convolution_no_double_backward():
    norm, _ = pair()
    x = torch.randn(3, 8, 5, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(normed(sparse_conv(), norm, x, relu=True).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


BLOCKS = {
    "basic": lambda: resnet.BasicBlock(8, 8),
    "bottleneck": lambda: resnet.Bottleneck(16, 4),
    "downsampled basic": lambda: resnet.BasicBlock(8, 16, 2, downsampled(8, 16)),
    "downsampled bottleneck": lambda: resnet.Bottleneck(8, 4, 2, downsampled(8, 16)),
}


def downsampled(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))


def sparse_block(make):
    """A block of sparse layers whose statistics and weights are not those of a fresh one."""
    torch.manual_seed(1)
    block = sk.sparsify_(sk.pruning.magnitude_(nn.Sequential(make()), 0.6, "uniform"))[0]
    for module in block.modules():
        if isinstance(module, sk.nn.SparseConv2d):
            module.backend = "sparse"
        if isinstance(module, sk.nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return block


def step_of(block, x, whole, monkeypatch):
    """Output, and gradients of images and parameters, of a block that does all at once, or as torchvision does it."""
    x = x.clone().requires_grad_()
    with monkeypatch.context() as m:
        if not whole:
            m.setattr(blocks, "_can_fuse", lambda block: False)
        out = block.train()(x)
    out.mul(torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_a_block_is_one_call_each_way(joint, monkeypatch, make, compress):
    block = sparse_block(make)
    if compress:
        sk.compress_(nn.Sequential(block))
    apart = copy.deepcopy(block)
    for _ in range(2):
        x = torch.randn(3, 16 if make is BLOCKS["bottleneck"] else 8, 8, 8)
        joint.clear()
        found = step_of(block, x, True, monkeypatch)
        assert joint == ["conv2d_batch_norms", "conv2d_batch_norms_grads"]
        for ours, theirs in zip(found, step_of(apart, x, False, monkeypatch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for key, value in apart.state_dict().items():
            torch.testing.assert_close(block.state_dict()[key], value, rtol=1e-5, atol=1e-5)


def test_a_block_is_one_call_only_where_that_can_be(joint, monkeypatch):
    x = torch.randn(3, 8, 8, 8)

    def freeze(block):
        block.conv2.requires_grad_(False)

    def watch(block):
        block.downsample[0].register_forward_hook(lambda *_: None)

    def watch_shortcut(block):
        block.downsample.register_forward_hook(lambda *_: None)

    def fix_statistics(block):
        block.bn2.train = lambda mode: block.bn2
        block.bn2.training = False

    def densify(block):
        block.conv3.backend = "dense"

    def bias(block):
        block.conv2.bias = nn.Parameter(torch.zeros(4))

    def pool_shortcut(block):
        block.downsample = sk.nn.Sequential(nn.AvgPool2d(2), *block.downsample)
        block.downsample[1].stride = (1, 1)

    for change in (freeze, watch, watch_shortcut, fix_statistics, densify, bias, pool_shortcut):
        block = sparse_block(BLOCKS["downsampled bottleneck"])
        change(block)
        apart = copy.deepcopy(block)
        joint.clear()
        found = step_of(block, x, True, monkeypatch)
        assert len(joint) != 2, change
        for ours, theirs in zip(found, step_of(apart, x, False, monkeypatch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_a_graph_of_a_blocks_gradients(make):
    """The gradients are there, one by one or many at once; theirs are not."""
    block = sparse_block(make).train()
    x = torch.randn(3, 16 if make is BLOCKS["bottleneck"] else 8, 8, 8, requires_grad=True)
    leaves = [x, *block.parameters()]
    out = block(x)
    expected = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    found = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if sk.backend() != "reference":
        with pytest.raises(NotImplementedError, match="double backward"):
            found[0].sum().backward(retain_graph=True)
    directions = torch.randn(2, *out.shape)
    many = torch.autograd.grad(out, leaves, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for ours, theirs in zip(many, torch.autograd.grad(out, leaves, direction, retain_graph=True)):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["resnet18", "resnet50"])
def models(request):
    """A pruned ResNet, and the same with modules of ours."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(request.param, weights=None, num_classes=5)
    sk.pruning.magnitude_(theirs, sparsity=0.9, distribution="uniform", exclude=["conv1", "fc"])
    ours = sk.sparsify_(copy.deepcopy(theirs))
    return ours, theirs


def test_resnets_train_as_torchvisions(models):
    ours, theirs = models
    assert not any(type(m) in (nn.BatchNorm2d, *type(theirs).__mro__[:1]) for m in ours.modules())
    assert isinstance(ours, type(theirs)) and ours.state_dict().keys() >= theirs.state_dict().keys()
    for model in models:
        # Branches that add little: else a pixel that rounding takes across a ReLU changes all gradients before it.
        for block in (block for name, layer in model.named_children() if "layer" in name for block in layer):
            nn.init.constant_(getattr(block, "bn3", block.bn2).weight, 0.05)
    x, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    exact = copy.deepcopy(theirs).double()
    for model, images in ((ours, x), (theirs, x), (exact, x.double())):
        model.train()
        F.cross_entropy(model(images), labels).backward()
    grads = {name: p.grad for name, p in exact.named_parameters()}
    for name, p in ours.named_parameters():
        kept = p != 0 if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool)
        scale = grads[name].abs().max()
        off, their_off = ((m.get_parameter(name).grad - grads[name])[kept].abs().max() / scale for m in (ours, theirs))
        assert off <= 10 * their_off + 1e-4, name
    for key, value in exact.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key].double(), value.double(), rtol=1e-3, atol=1e-4)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_blocks_are_undone_copied_and_pickled(models):
    ours, theirs = models
    x = torch.randn(2, 3, 32, 32)
    expected = ours.eval()(x)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(model.layer1[0]) is type(ours.layer1[0])
        assert torch.equal(model(x), expected)
    sk.densify_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_hooks_are_called(models):
    ours, _ = models
    calls = []
    ours.layer1[0].relu.register_forward_hook(lambda *_: calls.append("relu"))
    ours.layer1[0].bn1.register_forward_hook(lambda *_: calls.append("bn1"))
    ours.train()(torch.randn(2, 3, 32, 32))
    assert calls[:2] == ["bn1", "relu"]


def test_sequences_train_as_pytorchs():
    torch.manual_seed(0)
    theirs = MobileNetV1(width=0.25, classes=5)
    depthwise = [f"features.{i}.0" for i in range(1, 27, 2)]
    sk.pruning.magnitude_(theirs, 0.9, "uniform", exclude=["features.0.0", *depthwise, "fc"])
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        # Away from zero: else a pixel that rounding takes across a ReLU changes all gradients before it.
        nn.init.constant_(norm.weight, 0.25)
        norm.bias.data = torch.where(torch.rand(norm.num_features) < 0.7, 1.0, -1.0)
    ours = sk.sparsify_(copy.deepcopy(theirs))
    x, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    called = []
    # A ReLU that somebody listens to is not skipped.
    ours.features[3][2].register_forward_hook(lambda *_: called.append(1))
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    grads = []
    for model in (theirs, ours, compiled):
        F.cross_entropy(model.train()(x), labels).backward()
        grads.append({name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()})
    assert called
    for name, grad in grads[0].items():
        for other in grads[1:]:
            kept = theirs.get_parameter(name) != 0 if grad.dim() > 1 else torch.ones_like(grad, dtype=torch.bool)
            torch.testing.assert_close(other[name][kept], grad[kept], rtol=2e-3, atol=1e-4)
    sk.densify_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def test_a_hook_on_all_modules_sees_all(models):
    ours, _ = models
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        ours.train()(torch.randn(2, 3, 32, 32))
    finally:
        handle.remove()
    assert "ReLU" in seen


def test_a_dense_model_stays_as_it_is():
    model = torchvision.models.resnet18(num_classes=2)
    assert type(sk.sparsify_(model).bn1) is nn.BatchNorm2d and type(model) is torchvision.models.ResNet


def test_compiles_as_one_graph(models):
    ours, _ = models
    x = torch.randn(2, 3, 32, 32)
    ours.train()
    expected = copy.deepcopy(ours)(x)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), expected)
