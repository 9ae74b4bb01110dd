"""compress_ and decompress_: the same training on a Parameter of kept weights."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

import sparsekit as sk


def network(seed=0, backend="sparse"):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    sk.sparsify_(sk.pruning.magnitude_(model, 0.7, "uniform"))
    for module in model.modules():
        if isinstance(module, sk.nn.SparseModule):
            module.backend = backend
    return model


def batches(count=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, 5, 5, generator=g), torch.randint(5, (6,), generator=g)) for _ in range(count)]


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss  # whose graph lives on, as in a loop that prints it


def assert_same_weights(a, b):
    a, b = sk.dense_state_dict(a), sk.dense_state_dict(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_on_dense_weights(optimizer, backend):
    dense, compressed = network(backend=backend), network(backend=backend)
    sk.compress_(compressed)
    for model in (dense, compressed):
        train(model, OPTIMIZERS[optimizer](model.parameters()), batches(5))
    assert_same_weights(dense, compressed)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
def test_a_fused_update_is_the_plain_one(optimizer, options):
    models = [sk.compress_(network()) for _ in range(2)]
    optimizers = [
        optimizer(m.parameters(), **options, fused=fused, foreach=False) for m, fused in zip(models, (True, False))
    ]
    assert {p.dim() for p in models[0].parameters()} == {1}
    for model, o in zip(models, optimizers):
        train(model, o, batches(5))
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        states = [{k: v for k, v in o.state[p].items() if v is not None} for o, p in zip(optimizers, (a, b))]
        assert states[0].keys() == states[1].keys() and len(states[0]) == (1 if optimizer is torch.optim.SGD else 3)
        for name in states[0]:
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(models[0][0].values, network()[0].weight[network()[0].weight_mask])


def test_a_run_goes_on_through_both_conversions():
    plain, moved = network(), network()
    optimizers = [OPTIMIZERS["adamw"](m.parameters()) for m in (plain, moved)]
    for step in range(4):
        if step in (1, 3):
            (sk.compress_ if step == 1 else sk.decompress_)(moved, optimizers[1])
        moved[0].weight  # noqa: B018  a copy, which changes nothing
        for model, optimizer in zip((plain, moved), optimizers):
            train(model, optimizer, batches(2))
    assert [type(m) for m in moved] == [type(m) for m in plain]
    assert list(moved.state_dict()) == list(plain.state_dict())
    for a, b in zip(plain.state_dict().values(), moved.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    states = [o.state_dict()["state"] for o in optimizers]
    for number, state in states[0].items():
        torch.testing.assert_close(state, states[1][number], rtol=1e-4, atol=1e-6)


def test_what_it_takes():
    layer = nn.Conv2d(64, 64, 3, bias=False)
    dense = 3 * 4 * layer.weight.numel()
    sk.sparsify_(sk.pruning.magnitude_(layer, 0.95))
    sk.compress_(layer)
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    layer(torch.randn(1, 64, 4, 4)).sum().backward()
    optimizer.step()
    tensors = [layer.values, layer.values.grad, *layer.buffers(), *optimizer.state[layer.values].values()]
    assert sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t)) <= 0.11 * dense
    assert all(t.dim() == 1 for t in tensors if torch.is_tensor(t))


def test_looks_like_a_sparse_layer():
    plain, model = network(), sk.compress_(network())
    assert isinstance(model[0], sk.nn.SparseConv2d) and isinstance(model[4], nn.Linear)
    assert [n for n, _ in model.named_parameters()] == ["0.values", "0.bias", "2.values", "4.values", "4.bias"]
    for a, b in zip(plain, model):
        if isinstance(a, sk.nn.SparseModule):
            assert torch.equal(a.weight, b.weight) and torch.equal(a.weight_mask, b.weight_mask)
            assert a.sparsity == b.sparsity and str(a.extra_repr()) == str(b.extra_repr())
            assert torch.equal(a.to_dense().weight, b.to_dense().weight)
    assert sk.sparsity(plain) == sk.sparsity(model)
    assert sk.compress_(model)[0] is model[0]
    rows = sk.explain(model, batches()[0][0], train=True)
    assert [r.name for r in rows] == ["0", "2", "4"]


def test_copies_and_pickles():
    model = sk.compress_(network())
    x = batches()[0][0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert other[0].values is not model[0].values
    assert copy.deepcopy(model).double()[0]._col_indices.dtype == torch.int32


def test_state_dicts_load_both_ways():
    dense, compressed = network(1), sk.compress_(network(2))
    assert list(compressed[0].state_dict()) == ["values", "bias", "crow_indices", "col_indices", "size"]
    x = batches()[0][0]
    for source in (dense, compressed, sk.compress_(network(3))):
        for target in (network(4), sk.compress_(network(5)), network(6, backend="dense")):
            target.load_state_dict(source.state_dict())
            torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)
    plain = nn.Sequential(*(m.to_dense() if isinstance(m, sk.nn.SparseModule) else m for m in dense))
    fresh = sk.compress_(network(7))
    fresh[0].infer_mask = fresh[2].infer_mask = fresh[4].infer_mask = True
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), plain(x), rtol=1e-4, atol=1e-5)
    plain.load_state_dict(sk.dense_state_dict(compressed))


def test_damaged_state_is_refused():
    layer = sk.compress_(sk.nn.SparseLinear.from_dense(nn.Linear(4, 4), torch.eye(4, dtype=torch.bool)))
    for name, value, message in (
        ("col_indices", torch.tensor([0, 1, 2, 9], dtype=torch.int32), r"col_indices must lie in \[0, 4\)"),
        (
            "crow_indices",
            torch.tensor([0, 4], dtype=torch.int32),
            r"values must be a weight of \(4, 4\), got 4 in 1 rows",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict({**layer.state_dict(), name: value})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\[3, 3\]"):
        layer.load_state_dict(nn.Linear(3, 3, bias=False).state_dict() | {"bias": torch.zeros(4)})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_change(optimizer):
    dense, compressed = network(), network()
    sk.compress_(compressed)
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in (dense, compressed)]
    for step, sparsity in enumerate((0.5, 0.9)):
        mask = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(step)) > sparsity
        for model, o in zip((dense, compressed), optimizers):
            loss = train(model, o, batches(2))
            model[0].zero_grad() if step else None
            sk.set_mask_(model[0], mask, o)
            loss = train(model, o, batches(2))
            assert loss.isfinite()
        assert torch.equal(compressed[0].weight_mask, mask)
        torch.testing.assert_close(dense[0].weight, compressed[0].weight, rtol=1e-4, atol=1e-6)
    states = [o.state_dict()["state"][0] for o in optimizers]
    for name, value in states[0].items():
        if torch.is_tensor(value) and value.dim():
            torch.testing.assert_close(value, compressed[0].weight_mask * 0 + _dense(compressed[0], states[1][name]))


def _dense(layer, values):
    return sk._ops.decompress(values, layer.pattern, layer.dense_size)


def test_gmp_prunes_it():
    model = sk.compress_(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = sk.pruning.GMP(model, optimizer, sparsity=0.9, end=2, interval=1, distribution="uniform")
    for _ in range(4):
        loss = train(model, optimizer, batches(1))
        pruner.step()
    assert loss.isfinite()
    pruner.finalize()
    assert sk.sparsity(model)["0"] == pytest.approx(0.9, abs=0.01)


def test_tied_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    sk.sparsify_(sk.pruning.magnitude_(model, 0.75))
    sk.compress_(model)
    assert model[0].values is model[1].values
    sk.set_mask_(model[0], torch.eye(8, dtype=torch.bool))
    assert model[1].sparsity == 0.875 and torch.equal(model[0].weight, model[1].weight)
    sk.decompress_(model)
    assert model[0].weight is model[1].weight
    model = nn.Sequential(sk.nn.SparseLinear.from_dense(nn.Linear(8, 8)), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="must not tie sparse weights to plain Linear layers, but ties 1"):
        sk.compress_(model)


def test_checkpoints(tmp_path):
    model = sk.compress_(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, batches())
    sk.io.save_checkpoint(tmp_path / "c", model, optimizer)
    for other in (sk.compress_(network(1)), network(1)):
        theirs = OPTIMIZERS["sgd"](other.parameters())
        sk.io.load_checkpoint(tmp_path / "c", other, theirs)
        for m, o in ((model, optimizer), (other, theirs)):
            train(m, o, batches(2))
        assert_same_weights(model, other)
        sk.io.load_checkpoint(tmp_path / "c", model, optimizer)
    # And what was saved with dense weights goes on compressed.
    sk.io.save_checkpoint(tmp_path / "d", other, theirs)
    sk.io.load_checkpoint(tmp_path / "d", model, optimizer)
    assert torch.equal(model[0].weight, other[0].weight)
    assert optimizer.state[model[0].values]["momentum_buffer"].shape == model[0].values.shape


def test_compiles_whole_and_becomes_an_engine():
    model = sk.compress_(network())
    x, y = batches()[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    grad = model[0].values.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(grad, model[0].values.grad)
    model.eval()
    torch.testing.assert_close(sk.compile(model, x, autotune=False)(x), model(x), rtol=1e-4, atol=1e-5)


def test_is_made_by_compress_only():
    with pytest.raises(TypeError, match="CompressedLinear is made by sparsekit.compress_"):
        sk.nn.CompressedLinear(4, 4)


def test_what_is_loaded_may_keep_another_number_of_weights_while_a_graph_lives():
    model, other = sk.compress_(network()), sk.compress_(network(1))
    sk.set_mask_(other[0], torch.rand(8, 4, 3, 3) > 0.5)
    x, y = batches()[0]
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    model.load_state_dict(other.state_dict())
    F.cross_entropy(model(x), y).backward()
    assert model[0].values.grad.shape == model[0].values.shape == other[0].values.shape
    assert loss.requires_grad


def test_another_shape_is_a_size_mismatch():
    small, large = (sk.compress_(sk.sparsify_(nn.Linear(n, 8), min_sparsity=0)) for n in (4, 6))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        large.load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        sk.nn.SparseLinear(6, 8).load_state_dict(small.state_dict())


def test_parameters_alone_load_into_the_same_structure():
    model, other = sk.compress_(network()), sk.compress_(network())
    for parameter in model.parameters():
        parameter.data.add_(1)
    other.load_state_dict(dict(model.named_parameters()), strict=False)
    assert_same_weights(model, other)
    with pytest.raises(RuntimeError, match='Missing key.*"0.crow_indices"'):
        other.load_state_dict(dict(model.named_parameters()))


def test_states_of_torch_prune_load():
    conv = nn.Conv2d(8, 16, 3)
    prune.l1_unstructured(conv, "weight", 0.8)
    layer = sk.compress_(sk.nn.SparseConv2d(8, 16, 3))
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.weight, conv.weight)


def test_layers_are_counted_once_each():
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(20)))
    sk.compress_(sk.sparsify_(sk.pruning.magnitude_(model, 0.5, "uniform")))
    model[1].values = model[0].values
    assert len(sk.sparsity(model)) == 19


def test_weights_are_drawn_anew():
    layer = sk.compress_(sk.nn.SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), torch.rand(4, 4, 3, 3) > 0.5))
    mask, values, bias = layer.weight_mask, layer.values.clone(), layer.bias.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight_mask, mask) and not (layer.values == values).any() and (layer.bias != bias).any()


def test_what_cannot_be_compressed_is_left_whole():
    class Own(sk.nn.SparseLinear):
        pass

    tied = nn.Sequential(sk.nn.SparseLinear(8, 8), Own(8, 8))
    tied[1].weight = tied[0].weight
    differ = nn.Sequential(*(sk.nn.SparseLinear.from_dense(nn.Linear(8, 8), torch.rand(8, 8) > 0.5) for _ in range(2)))
    differ[1].weight = differ[0].weight
    for model, message in (
        (tied, "must not tie sparse weights to sparse Own layers, but ties 1"),
        (differ, "masks differ"),
        (sk.nn.SparseLinear(8, 8, device="meta"), "on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.compress_(model)
        assert not any(isinstance(m, sk.nn.CompressedModule) for m in model.modules())


def test_moves_through_the_meta_device():
    model = sk.compress_(network())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, expected = batches()[0][0], model(batches()[0][0])
    model.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(model(x), expected)


def test_densify_takes_the_optimizer_along():
    model = sk.compress_(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, batches())
    sk.densify_(model, optimizer)
    before = model[0].weight.clone()
    train(model, optimizer, batches())
    assert type(model[0]) is nn.Conv2d and (model[0].weight != before).any()


def test_wrapped_for_checkpointing(tmp_path):
    for form in (network(), sk.compress_(network())):
        plain = sk.dense_state_dict(form)
        form[0] = checkpoint_wrapper(form[0])
        assert sk.dense_state_dict(form).keys() == plain.keys()
        sk.io.save_checkpoint(tmp_path / "c", form)
        other = network(1)
        sk.io.load_checkpoint(tmp_path / "c", other)
        assert_same_weights(form, other)


def test_a_weight_that_is_no_parameter_disturbs_nobody():
    layer = parametrizations.weight_norm(sk.nn.SparseLinear(8, 8))
    layer(torch.randn(2, 8)).sum().backward()
    pruned = sk.nn.SparseLinear(8, 8)
    prune.random_unstructured(pruned, "weight", 0.5)
    assert pruned(torch.randn(2, 8)).requires_grad
    for change in (lambda: sk.compress_(pruned), lambda: sk.set_mask_(layer, torch.ones(8, 8, dtype=torch.bool))):
        with pytest.raises(ValueError, match="weight of this .* must be a Parameter; remove the parametrization"):
            change()
    other = sk.compress_(network())
    sk.set_mask_(other[0], other[0].weight_mask.roll(1))
