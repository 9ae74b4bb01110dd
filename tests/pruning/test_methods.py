"""Every method against a hand-computed case, or against its plain PyTorch definition on dense weights."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit import pruning
from sparsekit.pruning import Constant, Linear, Phases, Rounds
from sparsekit.pruning.fisher import BlockFisher, LowRankFisher, gradients

STEPS_PER_EPOCH = 4


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 5),
    )  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(count, shape=(3, 6, 6), classes=5, batch=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(batch, *shape, generator=g).to(dtype), torch.randint(classes, (batch,), generator=g))
        for _ in range(count)
    ]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **settings})


def run(model, optimizer, pruner, batches):
    for inputs, targets in batches:
        optimizer.zero_grad()
        pruner.backward(lambda inputs=inputs, targets=targets: F.cross_entropy(model(inputs), targets))
        optimizer.step()
        pruner.step()


# --- schedules and scores -------------------------------------------------------------------------------------------


def test_linear_and_constant_by_hand():
    assert [Linear(0.8, 10, 30, 5, 0.2)(s) for s in (0, 10, 15, 30, 40)] == pytest.approx([0.2, 0.2, 0.35, 0.8, 0.8])
    schedule = Constant(0.9, interval=10, end=35)
    assert [s for s in range(60) if schedule.updates_at(s)] == [10, 20, 30]
    assert [schedule.cosine(s, 0.3) for s in (0, 35, 99)] == pytest.approx([0.3, 0, 0])
    assert Constant(0.9, 1, 2).cosine(1, 0.3) == pytest.approx(0.15)


def test_phases_are_the_published_ones():
    phases = Phases.evenly(0.9, warmup=10, sparse=5, dense=5, last_dense=10, final=85)
    assert phases.prune_at == (10, 20, 30, 40, 50, 60, 70, 85)
    assert phases.restore_at == (15, 25, 35, 45, 55, 65, 75)
    assert [phases(s) for s in (0, 10, 14, 15, 19, 20, 75, 84, 85, 100)] == [0, 0.9, 0.9, 0, 0, 0.9, 0, 0, 0.9, 0.9]
    assert phases.end == 85


def test_rounds_by_hand():
    schedule = Rounds(0.5, interval=10, rate=0.2)
    assert [round(schedule(s), 4) for s in (9, 10, 20, 30, 40, 90)] == [0, 0.2, 0.36, 0.488, 0.5, 0.5]
    assert schedule.end == 40 and not schedule.updates_at(50)
    assert Rounds(1 - 0.8**19, interval=1).end == 19


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Phases(0.9, ()), "prune_at must hold"),
        (lambda: Phases(0.9, (10, 5), (7,)), "take turns"),
        (lambda: Phases(0.9, (5, 10), ()), "take turns"),
        (lambda: Rounds(0.9, 1, rate=1.0), r"rate must be in \(0, 1\), got 1.0"),
        (lambda: Constant(0.9, 0, 5), "interval must be at least 1"),
        (lambda: Linear(0.9, 5, 5), "end must be later than begin = 5"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scores_by_hand():
    w, g = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0])
    assert pruning.sensitivity(w, g).tolist() == [1, 3]
    assert pruning.movement(w, g).tolist() == [-1, 3]
    assert pruning.obs_score(w, torch.tensor([0.5, 9.0])).tolist() == [4, 0.5]


def test_er_ignores_kernels():
    scores = {"a": torch.rand(8, 8, 3, 3), "b": torch.rand(16, 16)}
    # Shares (8 + 8) * 9 and 16 + 16 of 100 kept weights.
    assert pruning.er(scores, 1 - 100 / (576 + 256)) == {"a": 82, "b": 18}


def test_global_masks_with_ties_are_exact_and_keep_what_comes_first():
    masks = pruning.best_masks({"a": torch.ones(2, 3), "b": torch.ones(4)}, 0.5)
    assert masks["a"].tolist() == [[True] * 3, [True, True, False]] and not masks["b"].any()


# --- re-growth ------------------------------------------------------------------------------------------------------


def test_regrow_by_hand():
    weight = torch.tensor([5.0, -1.0, 2.0, 0, 0, 0])
    mask = weight != 0
    new = pruning.regrow(weight, mask, torch.tensor([9.0, 0, 9, 3, 1, 7]), share=0.34)
    assert new.tolist() == [True, False, True, False, False, True]
    # What was dropped may come back; no share moves nothing; all may move.
    assert torch.equal(pruning.regrow(weight, mask, torch.tensor([0.0, 9, 0, 1, 1, 1]), 0.34), mask)
    assert torch.equal(pruning.regrow(weight, mask, torch.rand(6), 0.3), mask)
    assert int(pruning.regrow(weight, mask, torch.rand(6), 1.0).sum()) == 3


@pytest.mark.parametrize("method", [pruning.SET, pruning.RigL])
def test_regrowth_keeps_nnz_and_starts_new_weights_at_zero(method):
    model = convnet()
    optimizer = sgd(model)
    pruner = method(model, optimizer, 0.6, interval=3, end=9, fraction=0.5)
    kept = {name: int(layer.weight_mask.sum()) for name, layer in pruner.layers.items()}
    assert sum(kept.values()) == round(0.4 * sum(layer.weight.numel() for layer in pruner.layers.values()))
    moved = 0
    for step, (inputs, targets) in enumerate(data(12), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        before = {n: (layer.weight.detach().clone(), layer.weight_mask.clone()) for n, layer in pruner.layers.items()}
        bias = model[-1].bias.detach().clone()
        optimizer.step()
        is_update = pruner.step()
        assert is_update == (step in (3, 6, 9))
        for name, layer in pruner.layers.items():
            weight, mask = before[name]
            assert int(layer.weight_mask.sum()) == kept[name]
            if not is_update:
                assert torch.equal(layer.weight_mask, mask)
                continue
            stay, new = layer.weight_mask & mask, layer.weight_mask & ~mask
            moved += int(new.sum())
            # The optimizer did nothing, to no parameter; what is new has neither weight nor momentum.
            assert torch.equal(layer.weight[stay], weight[stay]) and torch.equal(model[-1].bias, bias)
            momentum = optimizer.state[layer.weight]["momentum_buffer"]
            assert not layer.weight[new].any() and not momentum[new].any() and momentum[stay].any()
            # What has gone is of the smallest; some of those came back at once.
            share = pruner.schedule.cosine(step, 0.5)
            smallest = weight.abs().masked_fill(~mask, float("inf")).flatten().sort().values
            bound = smallest[int(share * kept[name])]
            assert (weight[mask & ~layer.weight_mask].abs() < bound).all()
    assert moved > 0
    assert pruner.finalize() is model
    assert sk.sparsity(model).overall == pytest.approx(0.6, abs=1e-3)


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model = convnet()
    optimizer = sgd(model)
    pruner = pruning.RigL(model, optimizer, 0.6, interval=1, end=100, fraction=0.4, distribution="uniform")
    (inputs, targets), share = data(1)[0], Constant(0.6, 1, 100).cosine(1, 0.4)
    plain = sk.densify_(copy.deepcopy(model))
    grads = torch.autograd.grad(F.cross_entropy(plain(inputs), targets), [plain[i].weight for i in (0, 3, 7)])
    expected = [
        pruning.regrow(layer.weight, layer.weight_mask, grad.abs(), share)
        for layer, grad in zip(pruner.layers.values(), grads)
    ]
    run(model, optimizer, pruner, [(inputs, targets)])
    for layer, mask in zip(pruner.layers.values(), expected):
        # Nearly equal gradients may be rounded to either order.
        assert int((layer.weight_mask ^ mask).sum()) <= 2


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=(2, 0), groups=4),
    ],
)
def test_the_dense_gradient_of_a_layer(conv):
    layer = sk.nn.SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) > 0.7)
    x = torch.randn(2, 4, 9, 7)
    plain = layer.to_dense()
    out = plain(x)
    dy = torch.randn_like(out)
    out.backward(dy)
    torch.testing.assert_close(layer.dense_weight_grad(x, dy), plain.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense_weight_grad(x[0], dy[0]) + layer.dense_weight_grad(x[1], dy[1]),
                               plain.weight.grad, rtol=1e-4, atol=1e-4)  # fmt: skip


def test_set_draws_the_same_for_the_same_seed():
    masks = []
    for seed in (0, 0, 1):
        model = convnet()
        optimizer = sgd(model)
        pruner = pruning.SET(model, optimizer, 0.6, interval=1, end=9, seed=seed)
        run(model, optimizer, pruner, data(3))
        masks.append(torch.cat([layer.weight_mask.flatten() for layer in pruner.layers.values()]))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_rigl_leaves_alone_what_no_gradient_reaches():
    model = mlp()
    optimizer = sgd(model)
    pruner = pruning.RigL(model, optimizer, 0.5, interval=1, end=10)
    before = pruner.layers["0"].weight_mask.clone()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    run(model, optimizer, pruner, data(1, (6,), 3))
    assert torch.equal(pruner.layers["0"].weight_mask, before)


# --- alternating ----------------------------------------------------------------------------------------------------


def test_acdc_alternates_and_restores_zeros_without_momentum():
    model = convnet()
    optimizer = sgd(model)
    pruner = pruning.ACDC(model, optimizer, Phases(0.8, prune_at=(2, 6), restore_at=(4,)))
    total = sum(layer.weight.numel() for layer in pruner.layers.values())
    for step, batch in enumerate(data(8), 1):
        hidden = {name: ~layer.weight_mask for name, layer in pruner.layers.items()}
        run(model, optimizer, pruner, [batch])
        assert round(pruner.sparsity * total) == (round(0.8 * total) if step in (2, 3, 6, 7, 8) else 0)
        if step == 4:
            for name, layer in pruner.layers.items():
                assert not layer.weight[hidden[name]].any() and layer.weight[~hidden[name]].any()
            assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
        if step == 5:
            assert all(pruner.layers[n].weight[hidden[n]].any() for n in hidden if hidden[n].any())
    assert sk.sparsity(pruner.finalize()).overall == pytest.approx(0.8, abs=1 / total)


@pytest.mark.parametrize("build, shape, classes", [(mlp, (6,), 3), (convnet, (3, 6, 6), 5)])
def test_cram_adds_the_gradient_at_the_pruned_weights(build, shape, classes):
    model = build().double()
    plain = copy.deepcopy(model)
    inputs, targets = data(1, shape, classes, dtype=torch.float64)[0]
    optimizer = sgd(model)
    pruner = pruning.CrAM(model, optimizer, 0.5, rho=0.1, levels=[0.6])
    pruner.backward(lambda: F.cross_entropy(model(inputs), targets))

    names, parameters = zip(*plain.named_parameters())
    first = torch.autograd.grad(F.cross_entropy(plain(inputs), targets), parameters)
    ascended = {name: p.detach() + 0.1 * g for name, p, g in zip(names, parameters, first)}
    weights = [f"{name}.weight" for name in pruner.layers]
    masks = pruning.best_masks({name: ascended[name].abs() for name in weights}, 0.6)
    pruned = copy.deepcopy(plain)
    with torch.no_grad():
        for name, p in pruned.named_parameters():
            p.copy_(ascended[name] * masks.get(name, 1))
    second = torch.autograd.grad(F.cross_entropy(pruned(inputs), targets), list(pruned.parameters()))
    for name, parameter, a, b in zip(names, model.parameters(), first, second):
        torch.testing.assert_close(parameter.grad, a + b * masks.get(name, 1))
    # Statistics are those of the first pass; everything else is where it was.
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n in buffers)
    for ours, theirs in zip(model.parameters(), parameters):
        assert torch.equal(ours, theirs)
    assert pruner.sparsity == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_cram_draws_a_level_for_every_step(seed, monkeypatch):
    drawn = []

    def note(layers, scores, sparsity, distribution):
        drawn.append(sparsity)
        return pruning.prune_masks(layers, scores, sparsity, distribution)

    monkeypatch.setattr("sparsekit.pruning.alternating.prune_masks", note)
    levels, draws = [0.3, 0.5, 0.7], []
    for _ in range(2):
        model = mlp()
        optimizer = sgd(model)
        run(model, optimizer, pruning.CrAM(model, optimizer, 0.5, levels=levels, seed=seed), data(12, (6,), 3))
        draws.append(drawn[:])
        drawn.clear()
    assert draws[0] == draws[1] and set(draws[0]) == set(levels)


def test_cram_wants_both_passes():
    model = mlp()
    optimizer = sgd(model)
    pruner = pruning.CrAM(model, optimizer, 0.5)
    with pytest.raises(RuntimeError, match="pruner.backward"):
        pruner.step()


def test_a_distribution_of_ones_own_shares_out_but_restores_nothing():
    model = mlp()

    def keep(first):
        return lambda scores, sparsity: {"0": first, "2": 3}

    sk.sparsify_(pruning.magnitude_(model, 0.5, keep(10)), min_sparsity=0)
    assert [int(model[i].weight_mask.sum()) for i in (0, 2)] == [10, 3]
    kept = model[0].weight_mask.clone()
    pruning.magnitude_(model, 0.5, keep(4))
    assert int(model[0].weight_mask.sum()) == 4 and not (model[0].weight_mask & ~kept).any()
    with pytest.raises(ValueError, match="must keep 0 to 4 weights of layer '0', those not pruned, got 11"):
        pruning.magnitude_(model, 0.5, keep(11))


# --- hidden weights -------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask):
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_dnw_is_the_straight_through_estimator():
    model, plain = mlp(), mlp()
    optimizer, reference = sgd(model), sgd(plain)
    pruner = pruning.DNW(model, optimizer, 0.5)
    for inputs, targets in data(6, (6,), 3):
        run(model, optimizer, pruner, [(inputs, targets)])
        masks = pruning.best_masks({str(i): plain[i].weight.detach().abs() for i in (0, 2)}, 0.5, "uniform")
        weights = {f"{i}.weight": StraightThrough.apply(plain[i].weight, masks[str(i)]) for i in (0, 2)}
        reference.zero_grad()
        F.cross_entropy(torch.func.functional_call(plain, weights, inputs), targets).backward()
        reference.step()
        for i in (0, 2):
            torch.testing.assert_close(pruner.latent[str(i)], plain[i].weight.detach())
    assert sk.sparsity(pruner.finalize()).overall == 0.5


def test_str_is_its_definition():
    model, plain = mlp(), mlp()
    s = {i: nn.Parameter(torch.tensor(-2.5)) for i in (0, 2)}
    optimizer, reference = sgd(model), sgd(plain)
    reference.add_param_group({"params": list(s.values()), "weight_decay": 0.2})
    pruner = pruning.STR(model, optimizer, initial=-2.5, weight_decay=0.2)
    seen = set()
    for inputs, targets in data(10, (6,), 3):
        run(model, optimizer, pruner, [(inputs, targets)])
        weights = {f"{i}.weight": pruning.soft_threshold(plain[i].weight, s[i]) for i in (0, 2)}
        reference.zero_grad()
        F.cross_entropy(torch.func.functional_call(plain, weights, inputs), targets).backward()
        reference.step()
        for i in (0, 2):
            torch.testing.assert_close(pruner.latent[str(i)], plain[i].weight.detach())
            torch.testing.assert_close(pruner.s[str(i)], s[i])
            shown = pruning.soft_threshold(plain[i].weight, s[i])
            torch.testing.assert_close(model[i].weight, shown)
        seen.add(pruner.sparsity)
    assert len(seen) > 2 and pruner.sparsity > 0.1
    groups = len(optimizer.param_groups)
    model = pruner.finalize()
    assert len(optimizer.param_groups) == groups - 1
    assert all(torch.equal(layer.weight != 0, layer.weight_mask) for layer in pruner.layers.values())


def test_str_gradcheck():
    torch.manual_seed(0)
    weight = torch.randn(20, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pruning.soft_threshold, (weight, s))


def test_topkast_by_hand():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    pruner = pruning.TopKAST(model, optimizer, 0.75, backward_sparsity=0.25, interval=2, end=10)
    assert model[0].weight.tolist() == [[4, 0, 0, 0]]
    assert pruner.layers["0"].weight_mask.tolist() == [[True, True, True, False]]
    inputs = torch.tensor([[1.0, -3.0, 0.0, 5.0]])
    optimizer.zero_grad()
    model(inputs).sum().backward()
    optimizer.step()
    pruner.step()
    # In use: 4 - (1 + 0.1 * 4); explored, four times the decay: 3 - (-3 + 0.4 * 3), 2 - (0 + 0.4 * 2); at rest: 1.
    torch.testing.assert_close(pruner.latent["0"], torch.tensor([[2.6, 4.8, 1.2, 1.0]]))
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[2.6, 0, 0, 0]]))
    optimizer.zero_grad()
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    assert pruner.step()
    assert (model[0].weight != 0).tolist() == [[False, True, False, False]]
    assert sk.sparsity(pruner.finalize()).overall == 0.75


# --- lottery tickets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", [False, True])
def test_lth_rewinds(transfer):
    model = convnet()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = sgd(model)
    pruner = pruning.LTH(model, optimizer, 0.6, interval=2, rate=0.5, transfer=transfer)
    total = sum(layer.weight.numel() for layer in pruner.layers.values())
    for step, batch in enumerate(data(6), 1):
        run(model, optimizer, pruner, [batch])
        expected = [0, 0.5, 0.5, 0.6, 0.6, 0.6][step - 1]
        assert round(pruner.sparsity * total) == round(expected * total)
        if step in (2, 4):
            masks = {f"{name}.weight": layer.weight_mask for name, layer in pruner.layers.items()}
            for name, tensor in sk.dense_state_dict(model).items():
                assert torch.equal(tensor, start[name] * masks[name] if name in masks else start[name]), name
            assert not optimizer.state
    pruner.finalize()
    is_start = torch.equal(model[0].bias, start["0.bias"])
    assert is_start == transfer


def test_lth_rewinds_to_an_early_step():
    model = convnet()
    optimizer = sgd(model)
    pruner = pruning.LTH(model, optimizer, 0.5, interval=4, rate=0.5, rewind_to=2)
    batches = data(4)
    run(model, optimizer, pruner, batches[:2])
    early = copy.deepcopy(model.state_dict())
    run(model, optimizer, pruner, batches[2:])
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01) and not optimizer.state
    for name, now in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in pruner.layers:
            assert torch.equal(now, early[name] * pruner.layers[layer].weight_mask), name
        elif leaf != "weight_mask":
            assert torch.equal(now, early[name]), name
    with pytest.raises(ValueError, match="rewind_to must be earlier than the first round ends, at 4, got 4"):
        pruning.LTH(mlp(), optimizer, 0.5, interval=4, rewind_to=4)


# --- optimizer state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["follow", "zero", "forget", "leave"])
@pytest.mark.parametrize("adam", [False, True])
def test_state_policies_by_hand(policy, adam):
    layer, bystander = sk.nn.SparseLinear(3, 1, bias=False), nn.Parameter(torch.ones(()))
    sk.set_mask_(layer, torch.tensor([[True, True, False]]))
    parameters = [layer.weight, bystander]
    optimizer = torch.optim.Adam(parameters) if adam else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    (layer(torch.tensor([[1.0, 2.0, 4.0]])).sum() + bystander).backward()
    optimizer.step()
    names = ["exp_avg", "exp_avg_sq"] if adam else ["momentum_buffer"]
    before = {name: optimizer.state[layer.weight][name].clone() for name in names}
    assert all(state[0, :2].all() and not state[0, 2] for state in before.values())
    function = pruning.STATE_POLICIES.get(policy, pruning.states.leave)
    function({"fc": layer}, {"fc": torch.tensor([[True, False, True]])}, optimizer)
    assert layer.weight_mask.tolist() == [[True, False, True]] and layer.weight[0, 1:].tolist() == [0, 0]
    if policy == "forget":
        assert not optimizer.state
        return
    for name in names:
        now = optimizer.state[layer.weight][name]
        expected = {"follow": before[name] * torch.tensor([[1.0, 0, 0]]), "leave": before[name], "zero": now * 0}[
            policy
        ]
        assert torch.equal(now, expected)
        assert bool(optimizer.state[bystander][name]) == (policy != "zero")
    assert not adam or optimizer.state[layer.weight]["step"] == optimizer.state[bystander]["step"] == 1


def forget_by_hand(layers, masks, optimizer):
    pruning.STATE_POLICIES["forget"](layers, masks, optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda *a, **k: pruning.GMP(*a, end=4, interval=2, **k),
        lambda *a, **k: pruning.Movement(*a, begin=2, end=4, interval=2, **k),
        lambda *a, **k: pruning.OBS(*a, data(4), F.cross_entropy, gradients=4, dampening=0.1, end=4, interval=2, **k),
        lambda *a, **k: pruning.WoodFisher(*a, data(4), F.cross_entropy, gradients=4, block=9, end=4, interval=2, **k),
        lambda *a, **k: pruning.MFAC(*a, data(4), F.cross_entropy, gradients=4, dampening=0.1, end=4, interval=2, **k),
        lambda *a, **k: pruning.SET(*a, interval=2, end=4, **k),
        lambda *a, **k: pruning.RigL(*a, interval=2, end=4, **k),
        lambda *a, **k: pruning.TopKAST(*a, interval=2, end=4, **k),
        lambda *a, **k: pruning.LTH(*a, interval=2, rate=0.5, **k),
    ],
    ids=["GMP", "Movement", "OBS", "WoodFisher", "MFAC", "SET", "RigL", "TopKAST", "LTH"],
)
@pytest.mark.parametrize("policy", ["follow", "zero", "forget", forget_by_hand])
def test_methods_whose_masks_change_take_every_state_policy(make, policy):
    model = convnet()
    optimizer = sgd(model)
    pruner = make(model, optimizer, 0.6, optimizer_state=policy)
    run(model, optimizer, pruner, data(1))
    bias = model[-1].bias
    was = optimizer.state[bias]["momentum_buffer"].clone()
    run(model, optimizer, pruner, data(1))
    now = optimizer.state.get(bias, {}).get("momentum_buffer")
    if policy == "zero":
        assert not now.any()
    elif policy == "follow":
        assert now.any() and was.any()
    else:
        assert not optimizer.state
    run(model, optimizer, pruner, data(3))
    for layer in pruner.layers.values():
        state = optimizer.state.get(layer.weight, {}).get("momentum_buffer")
        assert state is None or not state[~layer.weight_mask].any()
        assert not layer.weight[~layer.weight_mask].any()
    name = "forget_by_hand" if policy is forget_by_hand else policy
    assert pruner.state_dict()["optimizer_state"] == name


def test_acdc_takes_a_state_policy_for_its_dense_phases():
    model = convnet()
    optimizer = sgd(model)
    phases = Phases(0.8, prune_at=(2, 6), restore_at=(4,))
    pruner = pruning.ACDC(model, optimizer, phases, optimizer_state="follow")
    run(model, optimizer, pruner, data(4))
    assert pruner.sparsity == 0
    assert all(state["momentum_buffer"].any() for state in optimizer.state.values())
    with pytest.raises(ValueError, match=r"optimizer_state must be one of 'follow', .* or a function, got 'leave'"):
        pruning.ACDC(convnet(), optimizer, phases, optimizer_state="leave")
    times = {"warmup": 1, "sparse": 1, "dense": 1, "last_dense": 1, "final": 7}
    recipe = pruning.Recipe("ACDC", 0.8, 8, {**times, "optimizer_state": "forget"})
    model = convnet()
    assert recipe.attach(model, sgd(model), 10).state_dict()["optimizer_state"] == "forget"
    with pytest.raises(ValueError, match="a pruner with optimizer_state = 'follow', got 'forget'"):
        pruner.load_state_dict({**pruner.state_dict(), "optimizer_state": "forget"})
    # What has no name of its own is called by its type, as files hold text.
    model = convnet()
    pruner = pruning.ACDC(model, sgd(model), phases, optimizer_state=functools.partial(forget_by_hand))
    assert pruner.state_dict()["optimizer_state"] == "partial"


# --- second order ---------------------------------------------------------------------------------------------------


def some_gradients(weights, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(w.shape, generator=g, dtype=w.dtype) for n, w in weights.items()} for _ in range(count)]


@pytest.mark.parametrize("block, count", [(4, 3), (7, 20), (100, 9)])
def test_block_fisher_is_the_inverse_of_the_blocks(block, count):
    weights = {"a": torch.zeros(3, 5, dtype=torch.float64), "b": torch.zeros(2, 2, 3, dtype=torch.float64)}
    grads = some_gradients(weights, count)
    fisher = BlockFisher(weights, block, 0.01, count)
    fisher.add(grads[:2])
    fisher.add(grads[2:])
    for name, weight in weights.items():
        stacked = torch.stack([grad[name].flatten() for grad in grads])
        dense = 0.01 * torch.eye(weight.numel(), dtype=torch.float64) + stacked.T @ stacked / count
        x = torch.randn(weight.shape, dtype=torch.float64)
        for begin in range(0, weight.numel(), block):
            part = slice(begin, min(begin + block, weight.numel()))
            inverse = torch.linalg.inv(dense[part, part])
            torch.testing.assert_close(fisher.diagonal(name).flatten()[part], inverse.diagonal())
            torch.testing.assert_close(fisher.solve(name, x).flatten()[part], inverse @ x.flatten()[part])


def test_block_fisher_is_one_sherman_morrison_step_after_the_other():
    weights = {"a": torch.zeros(5, dtype=torch.float64)}
    grads = some_gradients(weights, 6)
    fisher = BlockFisher(weights, 5, 1e-3, 6)
    fisher.add(grads)
    inverse = torch.eye(5, dtype=torch.float64) / 1e-3
    for grad in grads:
        v = inverse @ grad["a"]
        inverse -= torch.outer(v, v) / (6 + grad["a"] @ v)
    torch.testing.assert_close(fisher.inverse["a"][0], inverse)


def test_low_rank_fisher_is_the_inverse():
    weights = {"a": torch.zeros(3, 4, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    grads = some_gradients(weights, 7)
    fisher = LowRankFisher(weights, 0.02, 7)
    fisher.add(grads)
    stacked = torch.stack([torch.cat([grad[name].flatten() for name in weights]) for grad in grads])
    inverse = torch.linalg.inv(0.02 * torch.eye(17, dtype=torch.float64) + stacked.T @ stacked / 7)
    diagonal = torch.cat([fisher.diagonal(name).flatten() for name in weights])
    torch.testing.assert_close(diagonal, inverse.diagonal())
    x = {name: torch.randn_like(weight) for name, weight in weights.items()}
    solved = torch.cat([part.flatten() for part in fisher.solve_all(x).values()])
    torch.testing.assert_close(solved, inverse @ torch.cat([part.flatten() for part in x.values()]))


@pytest.mark.parametrize("method", [pruning.WoodFisher, pruning.OBS, pruning.MFAC])
def test_second_order_pruning_is_its_definition(method):
    model = mlp().double()
    plain = copy.deepcopy(model)
    batches = data(12, (6,), 3, dtype=torch.float64)
    settings = {"gradients": 12, "dampening": 1e-3}
    if method is not pruning.MFAC:
        settings["block"] = 1000
    pruner = method(model, sgd(model), 0.5, batches, F.cross_entropy, **settings)

    def by_definition(plain, alive, sparsity):
        """Weights and mask of an update that starts from weights which are masked by ``alive``."""
        weights = {"0": plain[0].weight, "2": plain[2].weight}
        grads = [torch.cat([g.flatten() for g in grad.values()])
                 for grad in gradients(plain, weights, batches, F.cross_entropy, 12)]  # fmt: skip
        stacked, w = torch.stack(grads) * alive, torch.cat([x.detach().flatten() for x in weights.values()])
        fisher = 1e-3 * torch.eye(len(w), dtype=torch.float64) + stacked.T @ stacked / 12
        if method is not pruning.MFAC:
            fisher = torch.block_diag(fisher[:48, :48], fisher[48:, 48:])
        inverse = torch.linalg.inv(fisher)
        scores = (w**2 / (2 * inverse.diagonal())).masked_fill(~alive, -torch.inf)
        kept = pruning.top_k(scores, len(w) - round(sparsity * len(w)))
        return (w - inverse @ ((w / inverse.diagonal()) * (alive & ~kept))) * kept, kept

    def compare(pruner, expected, kept):
        found = torch.cat([layer.weight.detach().flatten() for layer in pruner.layers.values()])
        torch.testing.assert_close(found, expected)
        assert torch.equal(found != 0, kept)

    expected, kept = by_definition(plain, torch.ones(72, dtype=torch.bool), 0.5)
    compare(pruner, expected, kept)
    assert model.training and pruner.finalize() is model

    # Another update sees masked gradients, and moves weights for those alone that go now; two of them are one with recompute.
    twin = copy.deepcopy(model)
    for sparsity in (0.625, 0.75):
        with torch.no_grad():
            for layer, part in zip((plain[0], plain[2]), expected.split((48, 24))):
                layer.weight.copy_(part.view_as(layer.weight))
        expected, kept = by_definition(plain, kept, sparsity)
        compare(method(model, sgd(model), sparsity, batches, F.cross_entropy, **settings), expected, kept)
    compare(method(twin, sgd(twin), 0.75, batches, F.cross_entropy, recompute=2, **settings), expected, kept)


def test_second_order_pruning_of_pruned_weights_goes_on_from_the_mask():
    model = mlp()
    batches = data(8, (6,), 3)
    optimizer = sgd(model)
    pruner = pruning.OBS(
        model, optimizer, 0.75, batches, F.cross_entropy,
        gradients=8, block=8, dampening=1e-4, begin=1, end=5, interval=2, recompute=2,
    )  # fmt: skip
    masks = []
    for batch in batches:
        run(model, optimizer, pruner, [batch])
        masks.append(torch.cat([layer.weight_mask.flatten() for layer in pruner.layers.values()]))
    assert all((after <= before).all() for before, after in zip(masks, masks[1:]))
    assert sk.sparsity(pruner.finalize()).overall == 0.75


def test_groups_of_layers_give_what_all_at_once_give():
    found = []
    for memory in (1e9, 48 * 8 * 8):
        model = mlp()
        pruner = pruning.OBS(
            model, sgd(model), 0.5, data(8, (6,), 3), F.cross_entropy,
            gradients=8, block=8, dampening=1e-3, memory=memory,
        )  # fmt: skip
        found.append((len(pruner._groups()), torch.cat([layer.weight.flatten() for layer in pruner.layers.values()])))
    assert [count for count, _ in found] == [1, 2]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_second_order_says_what_it_lacks():
    batches = data(4, (6,), 3)

    def prune(method=pruning.OBS, batches=batches, gradients=4, **settings):
        model = mlp()
        method(model, sgd(model), 0.5, batches, F.cross_entropy, gradients=gradients, **settings)

    with pytest.raises(MemoryError, match=r"block = 2000 takes 18,432 bytes for layer '0', but memory = 1,000"):
        prune(pruning.WoodFisher, memory=1000)
    with pytest.raises(MemoryError, match=r"gradients = 4 take 2,304 bytes, but memory = 1,000"):
        prune(pruning.MFAC, memory=1000)
    with pytest.raises(
        MemoryError, match=r"gradients = 9 take 2,988 bytes, but memory = 1,000; choose fewer, or allow"
    ):
        pruning.MFACOptimizer(mlp().parameters(), gradients=9, memory=1000)
    with pytest.raises(ValueError, match="memory must be a number of bytes, at least 0, got -1"):
        prune(memory=-1)
    with pytest.raises(ValueError, match="at least 5 mini-batches, one for every gradient, got 4"):
        prune(gradients=5)
    with pytest.raises(TypeError, match="iterable again and again"):
        prune(batches=iter(batches))
    with pytest.raises(ValueError, match="dampening must be positive, got 0"):
        prune(dampening=0)
    with pytest.raises(ValueError, match="finite losses"):
        prune(batches=[(x * float("nan"), y) for x, y in batches])


def test_mfac_optimizer_is_its_definition():
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = pruning.MFACOptimizer(
        model.parameters(), lr=0.1, gradients=4, dampening=0.05, momentum=0.9, weight_decay=0.01
    )
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    rows, buffer = torch.zeros(4, len(w), dtype=torch.float64), torch.zeros_like(w)
    for step, (inputs, targets) in enumerate(data(7, (6,), 3, dtype=torch.float64)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        g = g + 0.01 * w
        rows[step % 4] = g
        fisher = 0.05 * torch.eye(len(w), dtype=torch.float64) + rows.T @ rows / 4
        buffer = 0.9 * buffer + 0.1 * torch.linalg.solve(fisher, g)
        w = w - 0.1 * buffer
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), w)


def test_mfac_optimizer_copes_with_equal_gradients_and_copies():
    model = nn.Linear(50, 1, bias=False)
    optimizer = pruning.MFACOptimizer(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        (30 * model.weight.sum()).backward()
        optimizer.step()
    assert model.weight.isfinite().all()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(1, 50)
    twin.step()
    assert twin.gradients == optimizer.gradients


def test_mfac_optimizer_leaves_pruned_weights_and_resumes():
    model = sk.sparsify_(pruning.magnitude_(mlp(), 0.5), min_sparsity=0)
    optimizer = pruning.MFACOptimizer(model.parameters(), lr=0.1, gradients=3, dampening=0.1)
    batches = data(6, (6,), 3)

    def steps(model, optimizer, batches):
        for inputs, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    steps(model, optimizer, batches[:4])
    twin = copy.deepcopy(model)
    other = pruning.MFACOptimizer(twin.parameters(), lr=0.1, gradients=3, dampening=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, batches[4:])
    steps(twin, other, batches[4:])
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs)
    for layer in (model[0], model[2]):
        assert torch.equal(layer.weight != 0, layer.weight_mask)


def test_mfac_optimizer_forgets_what_is_pruned_or_cleared():
    torch.manual_seed(0)
    model = sk.sparsify_(pruning.magnitude_(nn.Sequential(nn.Linear(6, 8)), 0.5), min_sparsity=0)
    optimizer = pruning.MFACOptimizer(model.parameters(), lr=0.1, gradients=3, dampening=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()

    def expected_step():
        """Of the state that is there, by the definition."""
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        parameters = list(model.parameters())
        rows = torch.cat([optimizer.state[p]["gradients"] for p in parameters], 1) if optimizer.state else None
        g = torch.cat([p.grad.flatten() for p in parameters])
        rows = torch.zeros(3, len(g)) if rows is None else rows.clone()
        rows[optimizer.state[parameters[0]]["step"] % 3 if optimizer.state else 0] = g
        fisher = 0.1 * torch.eye(len(g)) + rows.T @ rows / 3
        before = torch.cat([p.detach().flatten() for p in parameters])
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in parameters])
        torch.testing.assert_close(after, before - 0.1 * torch.linalg.solve(fisher, g), rtol=1e-4, atol=1e-5)

    for _ in range(4):
        step()
    layer = model[0]
    sk.set_mask_(layer, layer.weight_mask.roll(1, 0), optimizer)
    assert not optimizer.state[layer.weight]["gradients"][:, ~layer.weight_mask.flatten()].any()
    expected_step()
    assert not layer.weight[~layer.weight_mask].any()
    optimizer.state.clear()
    expected_step()


# --- first order ----------------------------------------------------------------------------------------------------


def test_snip_prunes_by_sensitivity():
    model, batches = mlp(), data(3, (6,), 3)
    plain = copy.deepcopy(model)
    pruner = pruning.SNIP(model, sgd(model), 0.5, batches, F.cross_entropy, gradients=3)
    weights = [plain[0].weight, plain[2].weight]
    grads = torch.autograd.grad(sum(F.cross_entropy(plain(x), y) for x, y in batches), weights)
    expected = pruning.best_masks({str(i): (w * g).abs().detach() for i, w, g in zip((0, 2), weights, grads)}, 0.5)
    for name, layer in pruner.layers.items():
        assert torch.equal(layer.weight_mask, expected[name])


def test_movement_adds_up_over_steps():
    model = mlp()
    optimizer = sgd(model)
    pruner = pruning.Movement(model, optimizer, 0.5, begin=3, end=4, initial_sparsity=0.25)
    totals = {"0": 0, "2": 0}
    for inputs, targets in data(3, (6,), 3):
        torch.testing.assert_close(pruner.scores()["0"], torch.as_tensor(totals["0"]).expand(8, 6).to(torch.float32))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        for name in totals:
            layer = pruner.layers[name]
            totals[name] = totals[name] - layer.weight.detach() * layer.weight.grad
        optimizer.step()
        pruner.step()
    expected = pruning.best_masks(totals, 0.25)
    for name, layer in pruner.layers.items():
        assert torch.equal(layer.weight_mask, expected[name])


# --- what holds for all of them -------------------------------------------------------------------------------------

SHORT = {
    "woodfisher": {"gradients": 6, "block": 16}, "obs": {"gradients": 6, "block": 16}, "mfac": {"gradients": 6},
    "str": {"initial": -2.0, "weight_decay": 2.4e-5},
}  # fmt: skip


def attach(name, model, optimizer, epochs=10):
    recipe = pruning.recipe(name)
    recipe = pruning.recipe({**recipe.to_dict(), "settings": {**recipe.settings, **SHORT.get(name, {})}})
    return recipe.attach(model, optimizer, STEPS_PER_EPOCH, epochs, data(6), F.cross_entropy)


@pytest.mark.parametrize("name", pruning.PRESETS)
def test_every_preset_ends_in_a_plainly_sparse_model(name):
    model = convnet()
    optimizer = sgd(model)
    pruner = attach(name, model, optimizer)
    run(model, optimizer, pruner, data(10 * STEPS_PER_EPOCH))
    assert pruner.finalize() is model
    layers = pruner.layers.values()
    total = sum(layer.weight.numel() for layer in layers)
    zeros = sum(int((~layer.weight_mask).sum()) for layer in layers)
    for layer in layers:
        assert not layer.weight[~layer.weight_mask].any()
        momentum = optimizer.state.get(layer.weight, {}).get("momentum_buffer")
        assert momentum is None or not momentum[~layer.weight_mask].any()
    if name == "str":
        assert zeros > 0.1 * total
    else:
        assert zeros == round(0.9 * total)
    before = [layer.weight_mask.clone() for layer in layers]
    for inputs, targets in data(2):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    assert all(torch.equal(layer.weight_mask, mask) for layer, mask in zip(layers, before))
    assert all(not layer.weight[~layer.weight_mask].any() for layer in layers)


@pytest.mark.parametrize("name", pruning.PRESETS)
@pytest.mark.parametrize("stop", [7, 22])
def test_every_method_resumes_where_it_was(name, stop, tmp_path):
    batches = data(26)
    straight = convnet()
    optimizer = sgd(straight)
    pruner = attach(name, straight, optimizer)
    run(straight, optimizer, pruner, batches)

    model = convnet()
    optimizer = sgd(model)
    first = attach(name, model, optimizer)
    run(model, optimizer, first, batches[:stop])
    sk.io.save_checkpoint(tmp_path / "c", model, optimizer, {"pruner": first.state_dict()})
    model = convnet()
    optimizer = sgd(model)
    second = attach(name, model, optimizer)
    second.load_state_dict(sk.io.load_checkpoint(tmp_path / "c", model, optimizer).extra["pruner"])
    run(model, optimizer, second, batches[stop:])
    assert second.steps == pruner.steps
    expected, found = straight.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


def test_resumed_with_another_method_or_other_settings():
    model = mlp()
    optimizer = sgd(model)
    state = pruning.SET(model, optimizer, 0.5).state_dict()
    with pytest.raises(ValueError, match="method = 'RigL', got 'SET'"):
        pruning.RigL(model, optimizer, 0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="fraction = 0.2, got 0.3"):
        pruning.SET(model, optimizer, 0.5, fraction=0.2).load_state_dict(state)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m, o: pruning.RigL(m, o, 1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda m, o: pruning.RigL(m, o, 0.5, fraction=2), r"fraction must be in \[0, 1\], got 2"),
        (lambda m, o: pruning.SET(m, o, 0.5, start="best"), "start must be 'random' or 'magnitude', got 'best'"),
        (lambda m, o: pruning.TopKAST(m, o, 0.5, backward_sparsity=0.6), "at most sparsity = 0.5, got 0.6"),
        (lambda m, o: pruning.CrAM(m, o, 0.5, levels=[]), "levels must hold at least one"),
        (lambda m, o: pruning.CrAM(m, o, 0.5, rho=-1), "rho must be finite and not negative, got -1"),
        (lambda m, o: pruning.Movement(m, o, 0.5, begin=0), "begin must be at least 1"),
        (lambda m, o: pruning.RigL(m, o, 0.5, interval=9, end=5), "end must not be earlier than .* interval = 9, got 5"),
        (lambda m, o: Phases.evenly(0.5, warmup=9, sparse=1, dense=1, last_dense=1, final=5),
         "final must not be earlier than warmup = 9, got 5"),
        (lambda m, o: pruning.magnitude_(m, 0.999), "sparsity must leave a weight of 72, got 0.999"),
        (lambda m, o: pruning.GMP(sk.sparsify_(pruning.magnitude_(m, 0.75)), sgd(m), 0.5, end=4),
         "sparsity must be at least 0.7500, that of the layers already, since GMP restores no weights, got 0.5"),
        (lambda m, o: pruning.prunable_layers(nn.Sequential(m, nn.Linear(0, 4))), "layer '1' has no weights to prune"),
        (lambda m, o: pruning.magnitude_(m, 0.5, lambda scores, sparsity: {"0": 4}),
         r"must return a number for each of \['0', '2'\], got \['0'\]"),
        (lambda m, o: pruning.magnitude_(m, 0.5, lambda scores, sparsity: {"0": 4, "2": 25}),
         "must keep 0 to 24 weights of layer '2', those not pruned, got 25"),
        (lambda m, o: pruning.LTH(sk.compress_(sk.sparsify_(m, min_sparsity=0)), sgd(m), 0.5, interval=2),
         "LTH needs dense weights, but layer '0' is compressed"),
        (lambda m, o: pruning.recipe("obs").attach(m, o, 10), "batches and loss_fn must be given for OBS"),
    ],
)  # fmt: skip
def test_clear_errors(make, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        make(model, sgd(model))


def test_steps_end_with_finalize():
    model = mlp()
    optimizer = sgd(model)
    pruner = pruning.ACDC(model, optimizer, Phases(0.5, (1, 5), (3,)))
    run(model, optimizer, pruner, data(4, (6,), 3))
    assert pruner.finalize() is pruner.finalize() is model and sk.sparsity(model).overall == 0.5
    with pytest.raises(RuntimeError, match="ACDC is finalized"):
        pruner.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda m, o: pruning.DNW(m, o, 0.5),
        lambda m, o: pruning.TopKAST(m, o, 0.5),
        lambda m, o: pruning.SET(m, o, 0.5),
        lambda m, o: pruning.Movement(m, o, 0.5),
    ],
)
def test_gradients_that_come_too_late_are_refused(make):
    model = mlp()
    optimizer = sgd(model)
    make(model, optimizer)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step(lambda: model(torch.randn(2, 6)).sum())


def test_rigl_sums_over_calls_and_over_layers_that_share_a_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(input=torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model = Twice()
    optimizer = sgd(model)
    pruner = pruning.RigL(model, optimizer, 0.5, interval=1, end=100, fraction=0.6, distribution="uniform")
    inputs = torch.randn(8, 6)
    plain = sk.densify_(copy.deepcopy(model))
    (grad,) = torch.autograd.grad(plain(inputs).square().sum(), plain.a.weight)
    (layer,) = pruner.layers.values()
    expected = pruning.regrow(layer.weight, layer.weight_mask, grad.abs(), pruner.schedule.cosine(1, 0.6))
    model(inputs).square().sum().backward()
    optimizer.step()
    pruner.step()
    assert torch.equal(layer.weight_mask, expected)


def test_any_seed_will_do():
    masks = []
    for seed in (20240613, 2**62):
        model = mlp()
        pruner = pruning.SET(model, sgd(model), 0.5, seed=seed)
        masks.append(pruner.layers["0"].weight_mask)
    assert not torch.equal(*masks)


def test_topkast_decays_as_the_optimizer_does():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)
    pruner = pruning.TopKAST(model, optimizer, 0.75, backward_sparsity=0.25, exploration_decay=2.0)
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    expected = torch.tensor([[4 * (1 - 0.001), 3 * (1 - 0.001) ** 2, 2 * (1 - 0.001) ** 2, 1.0]])
    torch.testing.assert_close(pruner.latent["0"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", pruning.PRESETS)
def test_frozen_layers_are_pruned_too(name):
    model = convnet()
    optimizer = sgd(model)
    model[0].weight.requires_grad_(False)
    pruner = attach(name, model, optimizer)
    run(model, optimizer, pruner, data(10 * STEPS_PER_EPOCH))
    pruner.finalize()
    assert name == "str" or pruner.sparsity > 0.85


def test_fisher_survives_large_gradients_and_little_dampening():
    torch.manual_seed(0)
    weights = {"a": torch.zeros(100)}
    shared = torch.randn(100)
    grads = [{"a": 10 * (shared + 0.1 * torch.randn(100))} for _ in range(64)]
    for fisher in (BlockFisher(weights, 50, 1e-7, 64), LowRankFisher(weights, 1e-7, 64)):
        fisher.add(grads)
        assert (fisher.diagonal("a") > 0).all() and fisher.diagonal("a").isfinite().all()


def test_one_group_of_layers_is_held_at_a_time(monkeypatch):
    live, most = [0], [0]

    class Counted(BlockFisher):
        def __init__(self, *args):
            super().__init__(*args)
            live[0] += 1
            most[0] = max(most[0], live[0])

        def __del__(self):
            live[0] -= 1

    monkeypatch.setattr(pruning.second_order, "BlockFisher", Counted)
    model = mlp()
    pruning.OBS(model, sgd(model), 0.5, data(8, (6,), 3), F.cross_entropy, gradients=8, block=8, memory=48 * 8 * 8)
    assert most == [1]


def test_a_terminal_sees_the_gradients_of_every_group_of_layers(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.write", (shown := []).append)
    monkeypatch.setenv("FORCE_COLOR", "1")
    model, batches = mlp(), data(8, (6,), 3)
    pruning.OBS(model, sgd(model), 0.5, batches, F.cross_entropy, gradients=8, block=8, memory=48 * 8 * 8)
    printed = "".join(shown)
    assert (
        all(f"{what}, layers {n}/2" in printed for what in ("gradients", "updates") for n in (1, 2))
        and "100%" in printed
    )


# --- recipes and report ---------------------------------------------------------------------------------------------


def test_recipes_scale_with_epochs_and_steps():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    pruner = pruning.recipe("acdc-95").attach(model, sgd(model), steps_per_epoch=10, epochs=50)
    assert pruner.schedule.prune_at == (50, 100, 150, 200, 250, 300, 350, 425) and pruner.schedule.sparsity == 0.95
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    gmp = pruning.recipe("gmp").to_dict()
    gmp["settings"]["exclude"] = "first_and_last"
    pruner = pruning.recipe(gmp).attach(model, sgd(model), steps_per_epoch=10)
    assert (pruner.schedule.begin, pruner.schedule.end) == (200, 790) and list(pruner.layers) == ["1", "2"]


def test_recipes_in_yaml(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text("method: RigL\nsparsity: 0.8\nepochs: 10\nsettings: {interval: 0.5, end: 8}\n")
    recipe = pruning.recipe(path)
    assert recipe == pruning.Recipe("RigL", 0.8, 10, {"interval": 0.5, "end": 8})
    assert pruning.recipe(recipe.to_dict()) == recipe
    path.write_text("method: RigL\nspeed: 1\n")
    with pytest.raises(ValueError, match="a recipe must have a method, and may have"):
        pruning.recipe(path)
    path.write_text("method: [")
    with pytest.raises(ValueError, match="must hold YAML"):
        pruning.recipe(path)


def test_recipes_for_short_trainings(caplog):
    model = mlp()
    pruner = pruning.recipe("rigl-90").attach(model, sgd(model), steps_per_epoch=100, epochs=1)
    assert pruner.schedule.interval == 20
    model = mlp()
    optimizer = sgd(model)
    pruning.recipe("str").attach(model, optimizer, steps_per_epoch=1000, epochs=10)
    assert optimizer.param_groups[-1]["weight_decay"] == pytest.approx(2.25e-5 * 500400 / 10000)
    with pytest.raises(ValueError, match="sparsity must be None for STR"):
        pruning.recipe("str-95")
    model = mlp()
    pruning.recipe("lth-99").attach(model, sgd(model), steps_per_epoch=10)
    assert "the last update of LTH comes after 2100 steps, but training has 2000" in caplog.text


@pytest.mark.parametrize("source", ["acdc-", "acdc-100", "nothing", "rigl-x"])
def test_unknown_recipes(source):
    with pytest.raises(ValueError, match="source must be one of"):
        pruning.recipe(source)


def test_recipes_refuse_rubbish():
    with pytest.raises(ValueError, match="method must be one of"):
        pruning.Recipe("Best")
    with pytest.raises(ValueError, match="sparsity must be given for GMP"):
        pruning.Recipe("GMP", None)
    with pytest.raises(ValueError, match="epochs must be positive, got 0"):
        pruning.Recipe("GMP", epochs=0)
    with pytest.raises(TypeError, match="end must be a number of epochs, got 'late'"):
        pruning.Recipe("GMP", settings={"end": "late"}).attach(mlp(), None, 10)
    with pytest.raises(ValueError, match="settings must be a dict, got None"):
        pruning.Recipe("GMP", settings=None)
    with pytest.raises(ValueError, match="end must be given where begin"):
        pruning.Recipe("OBS", settings={"begin": 1}).attach(mlp(), None, 10, batches=[], loss_fn=F.cross_entropy)


def test_report_counts_weights_and_work():
    model = sk.sparsify_(pruning.magnitude_(convnet(), 0.8, "uniform"))
    found = pruning.report(model, torch.randn(2, 3, 6, 6))
    assert [layer.name for layer in found.layers] == ["0", "3", "7"]
    assert found.macs == 2 * (36 * 8 * 27 + 9 * 8 * 36 + 8 * 9 * 5)
    assert found.sparsity == pytest.approx(0.8, abs=0.01) and 0.15 < found.kept_macs / found.macs < 0.25
    assert found.measured_speedup > 0 and "overall" in str(found) and found.to_dict()["layers"][0]["name"] == "0"
