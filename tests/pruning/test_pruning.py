import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk
from sparsekit.pruning import GMP, Cubic, OneShot, erk, global_, top_k, uniform

INF = float("inf")


def model_of(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))


def test_magnitude_by_hand():
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-4.0, 1.0, 3.0]]))
        model[1].weight.copy_(torch.tensor([[-2.0], [6.0], [5.0]]))
    sk.pruning.magnitude_(model, sparsity=0.5)
    assert model[0].weight.tolist() == [[-4, 0, 0]] and model[1].weight.tolist() == [[0], [6], [5]]


def test_cubic_by_hand():
    schedule = Cubic(0.9, begin=10, end=30, interval=5, initial_sparsity=0.1)
    assert [schedule(s) for s in (0, 10, 20, 30, 99)] == pytest.approx([0.1, 0.1, 0.8, 0.9, 0.9])
    assert [s for s in range(40) if schedule.updates_at(s)] == [10, 15, 20, 25, 30]
    assert [s for s in range(9) if Cubic(0.5, 0, 7, 3).updates_at(s)] == [0, 3, 6, 7]
    assert [OneShot(0.5, 3)(s) for s in (2, 3)] == [0, 0.5]


def test_erk_by_hand():
    # Shapes 10 x 10 (density ~ 20 / 100) and 2 x 2 (density ~ 4 / 4): the small layer saturates, the rest goes to the other.
    scores = {"a": torch.rand(10, 10), "b": torch.rand(2, 2)}
    assert erk(scores, 0.5) == {"a": 48, "b": 4}
    # No layer saturates: 10 kept of 104 in the ratio 20 : 4.
    assert erk(scores, 1 - 10 / 104) == {"a": 8, "b": 2}


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    sparsity=st.floats(0, 0.999),
    levels=st.sampled_from([1, 2, 1000]),
    pruned=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_distributions_meet_the_target_exactly(sizes, sparsity, levels, pruned, seed):
    g = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(levels, s, generator=g).float() for i, s in enumerate(sizes)}
    for score in scores.values():
        score[torch.rand(score.shape, generator=g) < pruned] = -INF
    total = sum(s.numel() for s in scores.values())
    available = {name: int((s > -INF).sum()) for name, s in scores.items()}
    for distribution in (uniform, erk, global_):
        if round(sparsity * total) == total:
            with pytest.raises(ValueError, match="sparsity must leave a weight"):
                distribution(scores, sparsity)
            continue
        counts = distribution(scores, sparsity)
        assert sum(counts.values()) == min(total - round(sparsity * total), sum(available.values()))
        assert all(0 <= counts[name] <= available[name] for name in counts)


@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=30), data=st.data())
def test_top_k_keeps_the_highest_and_breaks_ties_by_position(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert top_k(torch.tensor(values).float(), count).nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
def test_magnitude_meets_the_target_within_one_weight(distribution):
    model = model_of(16, 33, 7, 10)
    total = sum(layer.weight.numel() for layer in model)
    for sparsity in (0.5, 0.9, 0.97):
        sk.pruning.magnitude_(model, sparsity, distribution)
        assert sum(int((layer.weight == 0).sum()) for layer in model) == round(sparsity * total)


def test_masks_do_not_depend_on_threads_or_layout():
    torch.manual_seed(0)
    scores = torch.randint(0, 50, (64, 32, 3, 3)).float()
    expected = top_k(scores, 5000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(top_k(scores, 5000), expected)
            assert torch.equal(top_k(scores.contiguous(memory_format=torch.channels_last), 5000), expected)
    finally:
        torch.set_num_threads(before)


def train(model, optimizer, pruner, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        pruner.step()


def test_gmp_follows_its_schedule_and_masks_only_shrink():
    model = model_of(16, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = GMP(model, optimizer, sparsity=0.9, begin=2, end=10, interval=2)
    total = 16 * 32 + 32 * 8
    masks = [layer.weight_mask.clone() for layer in pruner.layers.values()]
    for step in range(1, 12):
        train(model, optimizer, pruner, 1)
        if pruner.schedule.updates_at(step):
            assert round(pruner.sparsity * total) == round(pruner.schedule(step) * total)
        now = [layer.weight_mask.clone() for layer in pruner.layers.values()]
        assert all((new <= old).all() for new, old in zip(now, masks))
        masks = now
    assert pruner.finalize() is model
    for layer in pruner.layers.values():
        assert torch.equal(layer.weight != 0, layer.weight_mask)
        momentum = optimizer.state[layer.weight]["momentum_buffer"]
        assert not momentum[~layer.weight_mask].any()


def test_gmp_resumes_to_the_same_masks():
    def start():
        model = model_of(16, 32, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, GMP(model, optimizer, sparsity=0.8, end=8, interval=2)

    whole = start()
    torch.manual_seed(1)
    train(*whole, 4)
    state = [copy.state_dict() for copy in whole]
    state = torch.utils._pytree.tree_map(lambda t: t.clone() if torch.is_tensor(t) else t, state)
    rng = torch.get_rng_state()
    train(*whole, 4)
    resumed = start()
    for part, saved in zip(resumed, state):
        part.load_state_dict(saved)
    torch.set_rng_state(rng)
    train(*resumed, 4)
    for a, b in zip(whole[0].state_dict().values(), resumed[0].state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="state must be of a pruner with schedule"):
        model = model_of(16, 32, 8)
        GMP(model, torch.optim.SGD(model.parameters()), sparsity=0.5, end=8).load_state_dict(state[2])


def test_finalize_before_the_end_reaches_the_target_and_says_so(caplog):
    model = model_of(16, 32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMP(model, optimizer, sparsity=0.75, end=100)
    with caplog.at_level(logging.WARNING):
        pruner.finalize()
    assert pruner.sparsity == 0.75 and "finalized after 0 of 100 steps" in caplog.text


def test_layers_are_excluded_by_name_pattern_class_and_function():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4))
    names = lambda exclude: list(sk.pruning.prunable_layers(model, exclude))  # noqa: E731
    assert names(()) == ["0", "1", "2", "3"]
    assert names("0") == ["1", "2", "3"] and names("[01]") == ["2", "3"]
    assert names(nn.Linear) == ["0", "1"]
    assert names([nn.Conv2d, lambda name, module: name == "2"]) == ["3"]
    assert sk.pruning.first_and_last(model) == ("0", "3")
    with pytest.raises(ValueError, match="'fc', which matches none"):
        names("fc")
    with pytest.raises(ValueError, match="leave a layer to prune"):
        names(nn.Module)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: sk.pruning.magnitude_(m, 1.0), ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda m: sk.pruning.magnitude_(m, "0.9"), TypeError, "sparsity must be a number"),
        (lambda m: sk.pruning.magnitude_(m, 0.9, "layerwise"), ValueError, "distribution must be one of"),
        (lambda m: sk.pruning.magnitude_(nn.ReLU(), 0.9), ValueError, "must have a Conv2d or Linear"),
        (lambda m: Cubic(0.9, 5, 5), ValueError, "end must be later than begin = 5, got 5"),
        (lambda m: Cubic(0.5, 0, 5, 0), ValueError, "interval must be at least 1"),
        (lambda m: Cubic(0.5, 0, 5, 1, 0.6), ValueError, "initial_sparsity must be at most"),
        (lambda m: GMP(m, torch.optim.SGD(model_of(2, 2).parameters())), ValueError, "optimizer must hold the weight"),
        (lambda m: top_k(torch.rand(3), 4), ValueError, r"count must be in \[0, 3\]"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(model_of(16, 8))


def test_nan_weights_are_refused():
    model = model_of(4, 4)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        sk.pruning.magnitude_(model)


def test_recalibration_is_the_average_over_batches_and_restores_modes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    batches = [torch.randn(4, 3, 5, 5) * 3 + 1 for _ in range(4)]
    sk.pruning.recalibrate_batchnorm_(model, batches)
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, means)
    torch.testing.assert_close(model[0].running_var, variances)
    assert not model[0].training and not model[1].training and model[0].momentum == 0.1
    saved = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="at least one batch"):
        sk.pruning.recalibrate_batchnorm_(model, [])
    assert torch.equal(model[0].running_mean, saved)
