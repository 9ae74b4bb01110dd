import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsekit as sk


def pruned_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10))
    return sk.pruning.magnitude_(model, 0.8, "uniform", exclude="0")


def test_sparsify_keeps_parameters_hooks_optimizer_and_mode():
    model = pruned_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, calls = list(model.parameters()), []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert sk.sparsify_(model) is model
    assert [type(m).__name__ for m in model] == ["Conv2d", "ReLU", "SparseConv2d", "Flatten", "SparseLinear"]
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert not model[2].training
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2 and optimizer.param_groups[0]["params"][2] is model[2].weight


def test_filters_and_thresholds():
    model = sk.sparsify_(pruned_model(), filter_fn=lambda name, module: name == "4")
    assert type(model[2]) is nn.Conv2d and type(model[4]) is sk.nn.SparseLinear
    assert type(sk.sparsify_(pruned_model(), min_sparsity=0.9)[2]) is nn.Conv2d
    assert type(sk.sparsify_(pruned_model(), min_sparsity=0)[0]) is sk.nn.SparseConv2d
    with pytest.raises(ValueError, match=r"min_sparsity must be in \[0, 1\], got 2"):
        sk.sparsify_(model, min_sparsity=2)


def test_a_layer_itself_and_subclasses():
    layer = nn.Linear(4, 4)
    assert type(sk.sparsify_(layer, min_sparsity=0)) is sk.nn.SparseLinear

    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert type(sk.sparsify_(Own(4, 4), min_sparsity=0)) is Own


def test_tied_weights_stay_tied_through_mask_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    sk.sparsify_(model, min_sparsity=0)
    assert model[0].weight is model[1].weight
    sk.set_mask_(model[0], torch.eye(8, dtype=torch.bool))
    assert model[1].sparsity == model[0].sparsity == 0.875


def test_torch_prune_and_parametrizations_become_permanent():
    model = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8)))
    prune.l1_unstructured(model[0], "weight", 0.75)
    expected = model(x := torch.randn(3, 8))
    original = model[0].weight_orig
    sk.sparsify_(model, min_sparsity=0)
    assert model[0].weight is original and model[0].sparsity == 0.75
    assert list(model[0].state_dict()) == ["weight", "bias", "weight_mask"]
    torch.testing.assert_close(model(x), expected)


def test_the_way_back():
    model = sk.sparsify_(pruned_model())
    state = sk.dense_state_dict(model)
    plain = pruned_model()
    plain.load_state_dict(state)
    assert not any("mask" in name for name in state)
    sk.densify_(model)
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), plain(x))
    sk.sparsify_(model)
    assert type(model[2]) is sk.nn.SparseConv2d


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_set_mask_keeps_gradient_and_optimizer_state_consistent(kind):
    layer = sk.nn.SparseLinear.from_dense(nn.Linear(4, 4), torch.eye(4, dtype=torch.bool))
    optimizer = kind(layer.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    mask = torch.eye(4, dtype=torch.bool)
    mask[0, 0], mask[0, 1] = False, True  # drop one, grow one
    before = {k: v.clone() for k, v in optimizer.state[layer.weight].items() if torch.is_tensor(v)}
    kept = layer.weight[1, 1].item()
    sk.set_mask_(layer, mask, optimizer)
    assert layer.weight[0, 0] == 0 and layer.weight[0, 1] == 0 and layer.weight[1, 1] == kept
    assert layer.weight.grad[0, 0] == 0
    for name, value in optimizer.state[layer.weight].items():
        if torch.is_tensor(value) and value.dim():
            assert value[0, 0] == 0 and value[0, 1] == 0 and value[1, 1] == before[name][1, 1] != 0
    with pytest.raises(TypeError, match="module must be a SparseConv2d or SparseLinear, got Linear"):
        sk.set_mask_(nn.Linear(4, 4), mask)
    with pytest.raises(ValueError, match="mask must have the weight's shape"):
        sk.set_mask_(layer, mask[:2])


def test_keep_zeros_for_optimizers_that_mix_entries():
    class Mixing(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1)

    layer = sk.nn.SparseLinear.from_dense(nn.Linear(4, 4), torch.eye(4, dtype=torch.bool))
    optimizer = Mixing(layer.parameters(), lr=0.1)
    handle = sk.keep_zeros(optimizer)
    optimizer.step()
    assert (layer.weight != 0).equal(torch.eye(4, dtype=torch.bool))
    handle.remove()
    optimizer.step()
    assert layer.weight.all()


def test_sparsity_counts_tied_weights_once_and_prints():
    model = pruned_model()
    report = sk.sparsity(model)
    assert report["2"] == pytest.approx(0.8, abs=1e-3) and report["0"] == 0
    assert report.overall == sum(report.zeros.values()) / sum(report.numel.values())
    assert "overall" in str(report)
    model[2] = model[0]
    assert list(sk.sparsity(model)) == ["0", "4"]


def test_explain_names_kernel_reason_and_times():
    model = sk.sparsify_(pruned_model())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = sk.explain(model, torch.randn(2, 3, 8, 8), train=True)
    assert [r.name for r in rows] == ["0", "2", "4"]
    assert rows[0].backend == "dense" and "plain" in rows[0].reason
    assert all(r.measured_dense > 0 for r in rows) and rows[1].measured_sparse > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters()) and "measured" in str(rows)


def test_autotune_follows_the_measurement():
    model = sk.sparsify_(pruned_model())
    x = torch.randn(2, 3, 8, 8)
    sk.autotune_(model, x)
    for backend, seconds in (("sparse", (1.0, 2.0)), ("dense", (2.0, 1.0))):
        key = next(iter(model[2].tuned))
        model[2].tuned[key] = seconds
        with torch.no_grad():
            row = sk.explain(model, x)[1]
        if sk.backend() != "reference":
            assert (row.backend, row.reason) == (backend, "measured")


def test_ddp_is_told_to_leave_masks_alone():
    model = sk.sparsify_(pruned_model())
    assert "2.weight_mask" in model._ddp_params_and_buffers_to_ignore
