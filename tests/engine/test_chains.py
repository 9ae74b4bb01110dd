"""Chains compute what their steps compute, in any geometry, and refuse what they cannot hold."""

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk
from sparsekit import _ops
from sparsekit.dispatch import WITH_TILES, ChainWork
from sparsekit.engine import chains, files, tuning
from sparsekit.engine.engine import MOST_SIZES
from sparsekit.engine.plan import Layer, Lent
from sparsekit.engine.schedule import BLOCKINGS, MOST_IMAGES, Schedule

from .common import assert_as_good, own_cache, schedule_of  # noqa: F401

pytestmark = pytest.mark.skipif(sk.backend() == "reference", reason="chains need the C++ kernels")
ISAS = [isa for isa in sk.available_backends() if isa != "reference"]


def chained(model, x):
    """An engine whose convolutions all run in chains, as far as that is possible."""
    engine = sk.compile(model.eval(), x, autotune=False)
    convs = {n for n, s in enumerate(engine.plan.steps) if isinstance(s, Layer) and s.kind == "conv2d"}
    schedule = schedule_of(engine)
    schedule.join(chains.find(engine.plan, schedule.sizes, convs))
    return engine


def chains_of(engine):
    return schedule_of(engine).chains


def assert_equals(engine, model, x):
    with torch.no_grad():
        ours, theirs = engine(x), model.double()(x.double())
        model.float()
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, theirs))):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().nan_to_num(0, 0, 0).max() + 1))


def assert_values_come_back(engine):
    """What chains say of the values of their weights is true; the names of layers of which they know none."""
    unknown = []
    for chain in chains_of(engine):
        for number in schedule_of(engine).layers.keys() & set(chain.numbers):
            weight = engine.plan.steps[number].weight
            values, crow, col, _ = engine.plan.non_zeros(weight)
            known = chain.values(number, crow, col)
            assert known is None or torch.equal(known, values)
            unknown += [engine.plan.steps[number].name] * (known is None)
    return unknown


def prune(model, sparsity):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= torch.rand_like(module.weight) >= sparsity
    return model


def let_dense_cost(seconds, monkeypatch):
    """Of every layer in a chain."""
    monkeypatch.setattr("sparsekit.dispatch.CHAIN_DENSE", seconds)
    monkeypatch.setattr("sparsekit.dispatch.CHAIN_TILES", ChainWork(seconds, seconds, seconds, seconds))


def known_of(key):
    """What tuning might have measured: sparse layers are faster, and their work is cut as it should be."""
    return dict.fromkeys(BLOCKINGS, 1.0) if key.startswith("blocking-") else {"sparse": 0.5, "dense": 1.0}


AFTER = (nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid())


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels, gate, keepdim):
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1), gate
        self.keepdim = keepdim

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True) if self.keepdim else F.adaptive_avg_pool2d(x, 1)
        gate = self.gate(self.up(F.silu(self.down(mean))))
        return gate * x if self.keepdim else x * gate


class Joined(nn.Module):
    """Three things about one tensor, added or next to each other."""

    def __init__(self, channels, how):
        super().__init__()
        self.norm, self.conv, self.how = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1), how
        with torch.no_grad():
            for t in (self.norm.weight, self.norm.bias, self.norm.running_mean):
                t.normal_()

    def forward(self, x):
        x = self.conv(x)
        y, z = F.hardswish(self.norm(x)), F.silu(x)
        if self.how == "sum":
            return F.relu6(y + z) + x
        n, c, h, w = x.shape
        joined = torch.cat([y, x, z, y], 1)
        if self.how == "concat":
            return joined
        shuffled = joined.view(n, 4, c, h, w).transpose(1, 2).contiguous().view(n, 4 * c, h, w)
        first, second = shuffled.chunk(2, 1)
        return torch.cat([second, first, second[:, :1]], 1)


@st.composite
def networks(draw):
    """A stack of convolutions of any geometry, with what may stand between them, and an input for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels, size = draw(st.integers(1, 20)), [draw(st.integers(1, 40)) for _ in range(2)]
    batch = draw(st.integers(1, 5))
    x = torch.randn(batch, channels, *size)
    layers = []
    for _ in range(draw(st.integers(2, 5))):
        between = draw(st.integers(0, 8))
        if between == 0 and min(size) >= 2:
            kernel, stride, ceil = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.booleans())
            layers.append(nn.MaxPool2d(kernel, stride, ceil_mode=ceil))
        elif between == 1 and min(size) >= 2:
            kernel, stride, ceil = draw(st.integers(2, 3)), draw(st.integers(1, 3)), draw(st.booleans())
            layers.append(nn.AvgPool2d(kernel, stride, draw(st.integers(0, 1)), ceil, draw(st.booleans())))
            if min(size) + 2 * layers[-1].padding < kernel:
                layers.pop()
        elif between == 2:
            layers.append(Gated(channels, draw(st.sampled_from((nn.Sigmoid(), nn.Hardsigmoid()))), draw(st.booleans())))
        elif between == 3 and channels < 30:
            layers.append(Joined(channels, draw(st.sampled_from(("sum", "concat", "shuffle")))))
            channels = {"sum": channels, "concat": 4 * channels, "shuffle": 4 * channels + 1}[layers[-1].how]
        else:
            kernel = [draw(st.sampled_from((1, 1, 3, 3, 5))) for _ in size]
            stride = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in size]
            dilation = [draw(st.sampled_from((1, 1, 2))) for _ in size]
            reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
            padding = [
                draw(st.integers(max(0, (r + 1 - s + 1) // 2), r // 2 + 1)) if s < r + 1 else draw(st.integers(0, r))
                for r, s in zip(reach, size)
            ]
            groups = draw(st.sampled_from((1, 1, channels)))
            out = groups * draw(st.integers(1, 3)) if groups > 1 else draw(st.integers(1, 24))
            layers.append(nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())))
            channels = out
            layers.append(draw(st.sampled_from(AFTER)))
        with torch.no_grad():
            size = list(nn.Sequential(*layers).eval()(x).shape[2:])
    if draw(st.booleans()):
        layers.append(nn.AdaptiveAvgPool2d(1))
    model = prune(nn.Sequential(*layers), draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))))
    return model, x


@settings(deadline=None, max_examples=40)
@given(networks(), st.sampled_from(ISAS))
def test_any_geometry(network, isa):
    model, x = network
    before = sk.backend()
    try:
        _ops.set_isa(isa)
        engine = chained(model, x)
        assert_equals(engine, model, x)
        assert_values_come_back(engine)
    finally:
        _ops.set_isa(before)


class Block(nn.Module):
    """As in a ResNet: the shortcut is a convolution, or the input itself."""

    def __init__(self, channels, width, stride, kernel=3):
        super().__init__()
        out = 4 * width
        self.a, self.c = nn.Conv2d(channels, width, 1), nn.Conv2d(width, out, 1)
        self.b = nn.Conv2d(width, width, kernel, stride, kernel // 2)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 or channels != out else nn.Identity()

    def forward(self, x):
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))) + self.shortcut(x))


# Widths whose planes get rows of whole lines (14, 28), of which not all is computed (56, 72), of half a line
# more (7), or neither (20).
@pytest.mark.parametrize("size", [7, 14, 20, 28, 56, 72])
@pytest.mark.parametrize("isa", ISAS)
def test_residual_blocks(size, isa):
    torch.manual_seed(0)
    blocks = [Block(24, 8, 1), Block(32, 8, 1), Block(32, 12, 2), Block(48, 12, 1, kernel=5)]
    model = prune(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)), 0.7).eval()
    x = torch.randn(3, 24, size, size)
    before = sk.backend()
    try:
        _ops.set_isa(isa)
        engine = chained(model, x)
        (chain,) = chains_of(engine)
        assert chain.numbers == list(range(chain.numbers[0], chain.numbers[0] + len(chain.numbers)))
        assert not assert_values_come_back(engine)
        for batch in (1, 2, 3, 5):
            x = torch.randn(batch, 24, size, size)
            assert_equals(engine, model, x)
            assert_equals(engine, model, x.contiguous(memory_format=torch.channels_last))
    finally:
        _ops.set_isa(before)


@pytest.mark.parametrize("isa", ISAS)
def test_chains_for_one_image_take_any_number(isa, tmp_path):
    torch.manual_seed(0)
    model = prune(nn.Sequential(Block(24, 8, 1), Block(32, 16, 1), nn.Conv2d(64, 8, 3, 2, 1)), 0.7).eval()
    x = torch.randn(5, 24, 14, 14)
    with sk.use_isa(isa):
        engine = chained(model, x[:1])
        assert chains_of(engine) and schedule_of(engine).single and not schedule_of(chained(model, x)).single
        engine.save(tmp_path / "engine")
        loaded = sk.load(tmp_path / "engine")
        assert schedule_of(loaded).single
        for batch in (1, 2, 3, 5):
            assert_equals(engine, model, x[:batch])
            assert torch.equal(loaded(x[:batch]), engine(x[:batch]))


class Mixed(nn.Module):
    """Tensors that taps read, and tensors that none does, side by side: ``how`` says where the two meet."""

    def __init__(self, channels, how):
        super().__init__()
        self.a, self.d = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.b, self.c = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.how = how

    def forward(self, x):
        x = F.relu(self.a(x))  # from the layout of its input to that of the next, if they differ
        y = F.relu(self.b(x))
        if self.how == "taps added":
            return F.relu(self.c(y) + x)
        if self.how == "own lanes added":
            return F.relu(self.d(y) + x)
        if self.how == "sum of both":
            return self.b(y) + self.d(F.silu(x))
        if self.how == "lane by lane":
            return F.silu(self.d(y)) + self.c(x)
        if self.how == "next to each other":
            return torch.cat([self.d(y), self.c(y)], 1)[:, 20:60]
        return self.d(y)


MEETINGS = ("apart", "taps added", "own lanes added", "sum of both", "lane by lane", "next to each other")


# Planes with registers of one, two and three rows, and with runs of two and four rows.
@pytest.mark.parametrize("size", [(14, 14), (9, 13), (12, 9), (8, 20), (6, 56), (8, 28)])
@pytest.mark.parametrize("how", MEETINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_zeros_between_rows_are_there_for_those_that_need_them(size, how, isa):
    torch.manual_seed(0)
    sparse = prune(nn.Sequential(Mixed(40, how), nn.Conv2d(40, 40, 1), Mixed(40, "apart"), nn.Conv2d(40, 7, 1)), 0.8)
    last = [nn.MaxPool2d(3, 1, 1), nn.Conv2d(7, 8, 1, 2), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*sparse, *last).eval()
    x = torch.randn(3, 40, *size)
    with sk.use_isa(isa):
        engine = chained(model, x)
        assert chains_of(engine)
        engine(torch.full_like(x, torch.nan))  # stays in memory that the next images use
        assert_equals(engine, model, x)


ENDS = {
    "mean": [nn.AdaptiveAvgPool2d(1)],
    "as they are": [],
    "every other row": [nn.Conv2d(48, 6, 1, 2), nn.ReLU()],
    "every other row for taps": [nn.Conv2d(48, 6, 1, 2), nn.Conv2d(6, 5, 3, padding=1)],
    "every third row": [nn.Conv2d(48, 6, 1, 3)],
    "pooled": [nn.MaxPool2d(3, 2, 1)],
}


@pytest.mark.parametrize("size", [(112, 112), (16, 112), (56, 56), (16, 56)])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_zeros_between_them(size, end, isa):
    """Several to a run: from a pool, to strides of two that read every other one, and to whoever wants them apart."""
    torch.manual_seed(0)
    blocks = [Block(24, 8, 1), Block(32, 8, 1), Block(32, 12, 2), Block(48, 12, 1)]
    model = prune(nn.Sequential(nn.MaxPool2d(2), *blocks, *ENDS[end]), 0.7).eval()
    threads = torch.get_num_threads()
    with sk.use_isa(isa):
        for batch in (1, 3):
            x = torch.randn(batch, 24, *size)
            engine = chained(model, x)
            assert chains_of(engine)
            engine(torch.full_like(x, torch.nan))  # stays in memory that the next images use
            assert_equals(engine, model, x)
            assert not assert_values_come_back(engine)
            try:
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    for schedule_of(engine).share in (False, True):
                        results.append(engine(x))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("isa", ISAS)
def test_pixels_outside_of_the_image_for_rows_without_zeros(isa):
    torch.manual_seed(0)
    model = [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 8, 1)]
    model, x = prune(nn.Sequential(*model), 0.7).eval(), torch.randn(3, 8, 54, 54)
    with sk.use_isa(isa):
        engine = chained(model, x)
        assert chains_of(engine)
        assert_equals(engine, model, x)


class OddSum(nn.Module):
    """A pointwise layer of a tensor that no tap reads beyond, and one that begins outside of its image."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.r = nn.Conv2d(8, 16, 3, 2, 2), nn.Conv2d(16, 16, 1), nn.Conv2d(8, 16, 1, 2, 1)

    def forward(self, x):
        return F.relu(self.q(F.relu(self.a(x))) + self.r(x))


@pytest.mark.parametrize("isa", ISAS)
def test_a_sum_with_pixels_outside_of_the_image(isa):
    torch.manual_seed(0)
    model, x = prune(OddSum(), 0.5).eval(), torch.randn(3, 8, 54, 54)
    with sk.use_isa(isa):
        engine = chained(model, x)
        assert chains_of(engine)
        assert_equals(engine, model, x)


@pytest.mark.parametrize("size", [(16, 14), (32, 28), (8, 56)])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_two_phases_read_for_one_image(size, isa):
    """Where every other row of a packed source begins in the middle of a line, taps read odd rows from two places."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1)]
    model, x = prune(nn.Sequential(*layers), 0.8).eval(), torch.randn(1, 8, *size)
    with sk.use_isa(isa):
        engine = chained(model, x)
        assert chains_of(engine) and schedule_of(engine).single
        engine(torch.full_like(x, torch.nan))  # stays in memory that the next images use
        assert_equals(engine, model, x)


@pytest.mark.parametrize("blocking", BLOCKINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_blockings(blocking, isa):
    """However the work is cut: in rows and planes, packed and not, with one block of channels and with several."""
    torch.manual_seed(0)
    model = prune(nn.Sequential(Block(400, 40, 1), Block(160, 24, 2), Block(96, 24, 1)), 0.8).eval()
    for size in (14, 28, 56):
        x = torch.randn(2, 400, size, size)
        with sk.use_isa(isa):
            engine = chained(model, x)
            schedule = schedule_of(engine)
            (chain,) = schedule.chains
            schedule._items = schedule._items_of([chain.numbers], dict.fromkeys(schedule.layers, blocking))
            assert schedule.chains[0] is not chain
            assert_equals(engine, model, x)


def test_blockings_change_what_is_packed_at_once():
    """Of a source with a stride that is too large to be packed as a whole: blocks, and those of short strips are larger.
    Who writes the tensor may write its packed source, as a whole."""

    def floats(stride, blocking):
        model = prune(nn.Sequential(nn.Conv2d(16, 256, 1), nn.Conv2d(256, 8, 3, stride, 1)), 0.8)
        schedule = schedule_of(chained(model, torch.randn(1, 16, 56, 56)))
        (chain,) = schedule.chains
        ((made, *_),) = schedule._items_of([chain.numbers], dict.fromkeys(schedule.layers, blocking))
        return _ops.program_floats(made.number)

    half, own, twice = (floats(3, b) for b in ("half the channels", "as its sizes ask for", "twice the channels"))
    assert half < own < twice
    assert floats(3, "other strips") != own
    assert floats(2, "half the channels") == floats(2, "as its sizes ask for") == floats(2, "twice the channels")


@pytest.mark.parametrize("size", [(56, 56), (28, 28), (14, 14), (13, 14), (16, 14), (55, 63), (9, 38)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (5, 4), (1, 1)])
@pytest.mark.parametrize("isa", ISAS)
def test_strides_of_two(size, kernel, isa):
    """Whoever computes the tensor writes even and odd columns apart, if the convolution has a use for both."""
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    strided = nn.Conv2d(70, 9, kernel, 2, padding)
    model = prune(nn.Sequential(nn.Conv2d(500, 70, 1), nn.ReLU6(), strided, nn.Conv2d(9, 12, 3, 1, 1)), 0.8).eval()
    with sk.use_isa(isa):
        for batch in (1, 3):
            x = torch.randn(batch, 500, *size)
            engine = chained(model, x)
            assert chains_of(engine)
            engine(torch.full_like(x, torch.nan))  # stays in memory that the next images use
            assert_equals(engine, model, x)


def test_tuning_compares_layers_on_few_images(monkeypatch):
    model, x, seen = prune(Block(16, 8, 1), 0.8).eval(), torch.randn(9, 16, 28, 28), []
    measure = Schedule._measure_layers

    def note(schedule, inputs, *args):
        seen.append(len(inputs[0]))
        measure(schedule, inputs, *args)

    monkeypatch.setattr(Schedule, "_measure_layers", note)
    assert_equals(sk.compile(model, x), model, x)
    assert seen == [MOST_IMAGES]


def test_seconds_of_layers():
    model = prune(nn.Sequential(Block(32, 16, 2), Block(64, 16, 1)), 0.8).eval()
    x = torch.randn(5, 32, 28, 28)
    engine = chained(model, x)
    (chain,) = chains_of(engine)
    for share in (False, True):
        seconds = {}
        start = time.perf_counter()
        plain, timed = chain.run([x], share), chain.run([x], share, seconds)
        spent = time.perf_counter() - start
        assert torch.equal(plain[0], timed[0])
        assert seconds.keys() == schedule_of(engine).layers.keys() & set(chain.numbers)
        # The shortcut's convolution is a part of the one that it is added to.
        assert sorted(s > 0 for s in seconds.values()) == [False] + 6 * [True]
        assert sum(seconds.values()) < spent * torch.get_num_threads()


@pytest.mark.parametrize("faster", [False, True])
def test_tuning_cuts_the_work_of_layers_as_is_fastest(faster, tmp_path, monkeypatch):
    other, x = "twice the channels", torch.randn(4, 16, 28, 28)
    times = {"sparse": 0.5, "chained": 0.1, "cut": 0.5 if faster else 1.0}
    made, add = [], _ops.program_conv2d

    def seconds(cache, key, ways, limit=None):
        for run in ways.values():
            run()
        return {way: times.get(way, 1.0) for way in ways}

    def known(cache, key):
        return known_of(key) | ({other: 0.5} if key.startswith("blocking-") and "-9-" in key else {})

    def conv2d(*args, blocking, **kwargs):
        made.append(blocking)
        add(*args, blocking=blocking, **kwargs)

    monkeypatch.setattr(tuning.Cache, "seconds", seconds)
    monkeypatch.setattr(tuning.Cache, "known", known)
    monkeypatch.setattr(_ops, "program_conv2d", conv2d)
    engine = sk.compile(prune(Block(16, 8, 1), 0.8).eval(), x)
    schedule = schedule_of(engine)
    three = [n for n, layer in schedule.layers.items() if layer.size[2:] == (3, 3)]  # "-9-" in the keys of these alone
    assert len(three) == 1 and schedule.blockings == (dict.fromkeys(three, other) if faster else {})
    assert [other in layer.reason for layer in engine.explain(x)].count(True) == faster
    engine.save(tmp_path / "engine")
    made.clear()
    loaded = sk.load(tmp_path / "engine")
    assert [blocking.channels for blocking in made] == [1.0, 2.0 if faster else 1.0, 1.0, 1.0]
    assert schedule_of(loaded).saved() == schedule.saved()
    assert torch.equal(loaded(x), engine(x))
    for number, way in ((three[0], "in some way"), (99, other), (schedule.chains[0].numbers[-1] + 1, other)):
        choices = engine._choices()
        choices["schedules"][0][1]["blockings"] = {number: way}
        files.write(tmp_path / "engine", engine.plan, choices)
        with pytest.raises(ValueError, match="path must be an engine's file"):
            sk.load(tmp_path / "engine")
    assert not schedule_of(engine.decide_(x)).blockings


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(14, 14), (30, 22), (56, 56), (112, 20)])
def test_layers_without_zeros(size, isa, monkeypatch):
    """In rows and planes, packed and not, with more than one block of channels, beside sparse layers and added to them."""
    let_dense_cost(0.0, monkeypatch)
    first = [nn.Conv2d(3, 13, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(13, 32, 3, padding=1), nn.ReLU6()]
    last = [nn.Conv2d(64, 300, 1), nn.Conv2d(300, 7, (1, 3), padding=(0, 1))]
    model = nn.Sequential(*first, Block(32, 16, 1), Block(64, 16, 2), *last).eval()
    prune(model[6], 0.8)
    x = torch.randn(2, 3, *size)
    with sk.use_isa(isa):
        engine = chained(model, x)
        (chain,) = chains_of(engine)
        layers = [number for number in chain.numbers if isinstance(engine.plan.steps[number], Layer)]
        dense = [schedule_of(engine)._dense_in_chain(number) for number in layers]
        # Without tiles, what is pruned stays sparse at any cost.
        assert isa in WITH_TILES or dense.count(False) == sum(isinstance(m, nn.Conv2d) for m in model[6].modules()) == 4
        assert dense.count(True) >= 8
        assert_equals(engine, model, x)
        kernels = {report.kernel for report in engine.explain(x) if report.backend == "dense"}
    assert kernels == {isa}


WIDE = [  # kernel, stride, padding, dilation, channels in and out, size
    ((7, 7), (2, 2), (3, 3), (1, 1), 3, 64, (40, 224)),
    ((7, 7), (2, 2), (3, 3), (1, 1), 3, 25, (33, 97)),
    ((11, 11), (4, 4), (2, 2), (1, 1), 3, 30, (63, 160)),
    ((5, 6), (1, 1), (2, 2), (1, 1), 4, 7, (19, 45)),
    ((3, 3), (1, 1), (1, 0), (2, 1), 8, 1, (12, 35)),
    ((7, 9), (1, 3), (0, 1), (1, 1), 3, 50, (13, 110)),
    ((2, 6), (2, 2), (1, 3), (3, 1), 8, 6, (9, 80)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel, stride, padding, dilation, channels, out, size", WIDE)
def test_wide_dense_layers(kernel, stride, padding, dilation, channels, out, size, isa, monkeypatch):
    """They save products: first in a chain and within it, with max pooling behind, whatever its input's strides are."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, kernel, stride, padding, dilation)
    last = [nn.ReLU6(), prune(nn.Conv2d(out, 12, 1), 0.9)]
    first = [nn.Conv2d(channels, channels, 1), nn.Hardtanh(-1, 2)]
    pool = nn.MaxPool2d(2, 1 + stride[0] % 2)
    x = torch.randn(3, channels, *size)
    with sk.use_isa(isa):
        for layers in ([conv, *last], [*first, conv, *last], [conv, pool, *last], [*first, conv, pool, *last]):
            model, floats = nn.Sequential(*layers).eval(), []
            for cost in (0.0, 1.0):  # of dense layers
                let_dense_cost(cost, monkeypatch)
                engine = chained(model, x)
                (chain,) = chains_of(engine)
                floats.append(_ops.program_floats(chain.number))
                assert_equals(engine, model, x)
                assert_equals(engine, model, x.contiguous(memory_format=torch.channels_last))
            # Others pack all of their input, perhaps to where pooling writes later.
            assert floats[0] < floats[1] or min(stride) == 1 or pool in layers


@pytest.mark.parametrize(
    "of, bad", [("input", torch.nan), ("input", torch.inf), ("input", 2.0**80), ("weight", 2.0**80)]
)
def test_wide_dense_layers_of_what_is_not_finite(of, bad, monkeypatch):
    """No output gets what it does not read, though pairs of outputs are computed together."""
    let_dense_cost(0.0, monkeypatch)
    conv = nn.Conv2d(3, 16, 7, 2, 3)
    model, x = nn.Sequential(conv, nn.Conv2d(16, 16, 1, groups=16)).eval(), torch.randn(2, 3, 60, 96)
    target = conv.weight if of == "weight" else x
    with torch.no_grad():
        for place in ((0, 1, 2, 3), (1, 0, 6, 0), (1, 2, 0, 4)):
            target[place] = bad
        engine = chained(model, x)
        assert chains_of(engine)
        ours, eager = engine(x), model(x)
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert not eager.isfinite().all() or bad == 2.0**80


@st.composite
def layers_in_tiles(draw):
    """A convolution that fills tiles, dense or pruned, what it adds to itself, if anything, and its input."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kernel, stride, dilation = ([draw(st.integers(*few)) for _ in range(2)] for few in ((1, 4), (1, 3), (1, 2)))
    # No more: PyTorch's own kernels may crash where a window lies outside of the image as a whole.
    padding = [draw(st.integers(0, min(2, d * (k - 1)))) for k, d in zip(kernel, dilation)]
    channels, out = draw(st.sampled_from([1, 3, 7, 16, 17, 40, 70])), draw(st.sampled_from([16, 24, 33, 64]))
    conv = nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=draw(st.booleans()))
    size = [draw(st.integers(d * (k - 1) + 1, 40)) for d, k in zip(dilation, kernel)]
    x = torch.randn(draw(st.integers(1, 3)), channels, *size)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    if draw(st.booleans()):
        prune(conv, 0.8)
    return conv, x, draw(st.booleans())


class Added(nn.Module):
    """A convolution plus another of the same input, of which there may be several kinds."""

    def __init__(self, conv, other):
        super().__init__()
        self.conv, self.other = conv, other

    def forward(self, x):
        return F.relu(self.conv(x) + self.other(x))


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no tiles")
@settings(max_examples=80, deadline=None)
@given(drawn=layers_in_tiles())
def test_layers_in_tiles(drawn):
    """As near to float64 as float32 is, in the network's first layer and behind another, alone and in sums."""
    conv, x, adds = drawn
    other = prune(
        nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation), 0.5
    )
    layer = Added(conv, other) if adds else nn.Sequential(conv, nn.ReLU6())
    with pytest.MonkeyPatch.context() as monkeypatch, sk.use_isa("amx"):
        let_dense_cost(0.0, monkeypatch)
        for model in (layer, nn.Sequential(nn.Conv2d(conv.in_channels, conv.in_channels, 1), layer)):
            assume(model(x).std() > 1e-3)
            engine = chained(model, x)
            assert_as_good(engine, model, x)


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no tiles")
@pytest.mark.parametrize("of", ["input", "weight"])
@pytest.mark.parametrize(
    "bad", [torch.nan, torch.inf, -torch.inf, 3.4e38, 2.0**80, 2.0**63.9, 1.9259302e-34, 2.0**-140, 4.58e-41]
)
@pytest.mark.parametrize("channels, kernel, stride", [(3, 5, 2), (32, 3, 1), (32, 1, 2)])
def test_tiles_of_what_is_not_finite(channels, kernel, stride, of, bad, monkeypatch):
    """Numbers that are not a sum of three of fewer bits, among those that are; what is pruned hides them."""
    let_dense_cost(0.0, monkeypatch)
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 32, kernel, stride, kernel // 2).eval()
    x = torch.randn(3, channels, 30, 32)
    model = nn.Sequential(conv, nn.Conv2d(32, 32, 1, groups=32)).eval()
    with torch.no_grad(), sk.use_isa("amx"):
        conv.weight[7, 1] = 0
        clean = chained(model, x)(x)
        (x if of == "input" else conv.weight)[1, 1, 0, 0] = bad
        engine = chained(model, x)
        assert chains_of(engine)
        ours, eager = engine(x), model(x)
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        others = engine(x)
        torch.set_num_threads(threads)
    torch.testing.assert_close(ours[:, 7], clean[:, 7], rtol=1e-4, atol=1e-5)
    kept = [c for c in range(32) if c != 7]
    torch.testing.assert_close(ours[:, kept], eager[:, kept], rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(others, ours, rtol=0, atol=0, equal_nan=True)
    if of == "input":  # rows that do not read it are what they were
        assert torch.equal(ours[0], clean[0]) and torch.equal(ours[1, :, 6:], clean[1, :, 6:])


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no tiles")
def test_tiles_of_products_that_overflow(monkeypatch):
    """They are infinite, as elsewhere, and not the difference of two that are."""
    let_dense_cost(0.0, monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1, groups=32)).eval()
    x = torch.randn(2, 32, 20, 20)
    x[1, 5, 6, 7] = 1.1e30
    with torch.no_grad(), sk.use_isa("amx"):
        model[0].weight *= 1.3e15
        model[1].weight.fill_(1)
        ours, eager = chained(model, x)(x), model(x)
    assert eager.isinf().any() and not eager.isnan().any()
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e10)


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no tiles")
def test_tiles_do_not_read_rows_between_those_of_taps(monkeypatch):
    let_dense_cost(0.0, monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, (1, 11), (2, 1)), nn.Conv2d(16, 16, 1, groups=16)).eval()
    x = torch.randn(2, 3, 9, 26)
    x[:, 0, 1::2] = torch.nan
    with sk.use_isa("amx"):
        engine = chained(model, x)
        assert chains_of(engine)
        assert_equals(engine, model, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["Sigmoid", "SiLU", "Hardsigmoid", "Hardswish", "ReLU", "ReLU6", "Hardtanh"])
def test_activations(name, isa):
    """To 2 ulp of the result or of 1 everywhere, NaN and infinity included, for an activation by itself or fused."""
    activation = getattr(nn, name)()
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e30, -100.0, 0.0, 88.0, 1e30, torch.inf, torch.nan])])
    x = x.view(1, 1, 1, -1)
    for between in (nn.Identity(), nn.MaxPool2d(1)):
        model = nn.Sequential(nn.Conv2d(1, 2, 1), between, activation, nn.Conv2d(2, 2, 1)).eval()
        with torch.no_grad():
            for conv in (model[0], model[3]):
                conv.weight.copy_(torch.eye(2)[:, : conv.in_channels, None, None])
                conv.bias.zero_()
            with sk.use_isa(isa):
                engine = chained(model, x)
                assert len(chains_of(engine)) == 1 and len(chains_of(engine)[0].numbers) == len(engine.plan.steps)
                ours = engine(x)[0, 0]
        theirs = activation(x.double())[0, 0].float()
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, rtol=4e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf", "densenet121", "googlenet"]
)
def test_models_are_few_chains(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    extra = {"init_weights": True} if name == "googlenet" else {}
    model = prune(getattr(torchvision.models, name)(num_classes=10, **extra), 0.7)
    sk.pruning.recalibrate_batchnorm_(model, [torch.randn(8, 3, 128, 128)])
    engine = chained(model.eval(), torch.randn(2, 3, 128, 128))
    assert len(chains_of(engine)) <= 2
    assert_as_good(engine, model, torch.randn(3, 3, 128, 128))


@pytest.mark.parametrize("dense_first", [False, True])
def test_same_bits_for_any_number_of_threads(dense_first):
    model = prune(nn.Sequential(Block(16, 8, 1), Block(32, 16, 2), nn.AdaptiveAvgPool2d(1)), 0.8)
    size = (16, 28, 28)
    if dense_first:
        model = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *model)
        size = (3, 70, 112)
    engine, threads = chained(model, torch.randn(2, *size)), torch.get_num_threads()
    assert chains_of(engine)
    try:
        for batch in (1, 2, 5):
            x, results = torch.randn(batch, *size), []
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                for schedule_of(engine).share in (False, True):
                    results.append(engine(x))
                results.append(torch.cat([engine(image) for image in x.split(1)]))
            assert all(torch.equal(results[0], result) for result in results)
    finally:
        torch.set_num_threads(threads)


# Planes that end with a line of the cache, or are cut into other strips where threads share an image.
@pytest.mark.parametrize("size", [(5, 12), (9, 8), (10, 17), (11, 17), (15, 12)])
@pytest.mark.parametrize("isa", ISAS)
def test_images_that_threads_share(size, isa):
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1)]
    model, x, threads = prune(nn.Sequential(*layers), 0.5).eval(), torch.randn(3, 64, *size), torch.get_num_threads()
    with sk.use_isa(isa):
        engine = chained(model, x)
        try:
            torch.set_num_threads(1)
            alone = engine(x)
            torch.set_num_threads(2)
            for _ in range(5):
                assert torch.equal(engine(x), alone)
            assert_equals(engine, model, x)
        finally:
            torch.set_num_threads(threads)


@st.composite
def small_ends(draw):
    """A stack of convolutions whose last planes are so small that two images lie side by side, and its input."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    size, channels = [draw(st.sampled_from((7, 13, 14, 14))) for _ in range(2)], draw(st.integers(1, 20))
    x = torch.randn(draw(st.integers(1, 7)), channels, *size)
    first = draw(st.sampled_from((0, 1, 3)))
    layers = [nn.Conv2d(channels, 16, first, padding=first // 2), nn.ReLU()] if first else []
    how = draw(st.sampled_from((0, 0, 1, 1, 2, 3, 4))) if layers else 0
    if how == 0:
        kernel = draw(st.sampled_from((1, 2, 3, 5)))
        layers += [nn.Conv2d(16 if layers else channels, 24, kernel, 2, kernel // 2), nn.ReLU()]
    elif how == 1:
        layers += [Block(16, 6, 2)]
    elif how == 2:
        layers += [nn.Conv2d(16, 24, 3, 2, 1, groups=8), nn.Hardswish()]
    else:
        layers += [(nn.MaxPool2d if how == 3 else nn.AvgPool2d)(2, ceil_mode=True), nn.Conv2d(16, 24, 1)]
    for _ in range(draw(st.integers(1, 3))):
        layers += draw(
            st.sampled_from(
                (
                    [nn.Conv2d(24, 24, 3, padding=1), nn.ReLU6()],
                    [nn.Conv2d(24, 24, (3, 1), padding=(1, 0), groups=24), nn.SiLU()],
                    [nn.Conv2d(24, 24, 3, padding=2, dilation=2)],
                    [Block(24, 6, 1)],
                    [Joined(24, "sum")],
                    [nn.MaxPool2d(3, 1, 1), nn.Conv2d(24, 24, 3, padding=1)],
                    [nn.AvgPool2d(3, 1, 1), nn.Conv2d(24, 24, 5, padding=2), nn.ReLU()],
                    [Joined(24, "concat"), nn.Conv2d(96, 24, 1)],
                    [Gated(24, nn.Sigmoid(), True), nn.Conv2d(24, 24, 1)],
                )
            )
        )
    ends = ([], [nn.AdaptiveAvgPool2d(1)], [nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 7, 1)], [nn.Conv2d(24, 9, 3, 2, 1)])
    layers += draw(st.sampled_from(ends))
    return prune(nn.Sequential(*layers), draw(st.sampled_from((0.5, 0.9)))), x


@settings(deadline=None, max_examples=60)
@given(small_ends(), st.sampled_from(ISAS))
def test_images_side_by_side(network, isa):
    model, x = network
    threads = torch.get_num_threads()
    with sk.use_isa(isa):
        try:
            engine = chained(model, torch.cat([x, x]))
            assert_equals(engine, model, x)
            each = torch.cat([engine(image) for image in x.split(1)])
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for schedule_of(engine).share in (False, True):
                    assert torch.equal(engine(x), each)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)])
def test_there_are_zeros_beside_the_only_image_of_two(pool):
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), pool, nn.Conv2d(32, 32, 3, padding=1)]
    model, x = prune(nn.Sequential(*layers), 0.9).eval(), torch.randn(3, 8, 14, 14)
    engine = chained(model, x)
    for batch in (1, 2, 3):
        assert_equals(engine, model, x[:batch])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_images_side_by_side_do_not_see_each_other(bad):
    layers = [
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
    ]
    model, x = prune(nn.Sequential(*layers), 0.5).eval(), torch.randn(3, 4, 14, 14)
    engine = chained(model, x)
    clean = engine(x)
    for image in range(3):
        dirty = x.clone()
        dirty[image] = bad
        others = [i for i in range(3) if i != image]
        for _ in range(2):
            assert torch.equal(engine(dirty)[others], clean[others])
        assert torch.equal(engine(x), clean)  # nothing of it is left in the memory that calls share


def test_chains_run_in_parts_of_a_batch():
    model, pixels = prune(Block(16, 8, 1), 0.8), 120 * 120
    engine = chained(model, torch.randn(2, 16, 120, 120))
    part = schedule_of(engine).part
    assert part == max(8 * 224 * 224 // pixels, 4 * torch.get_num_threads())
    assert_as_good(engine, model, torch.randn(part + 1, 16, 120, 120))


def test_chains_run_more_images_where_little_lies_outside():
    model = prune(nn.Sequential(Block(16, 8, 1), nn.AdaptiveAvgPool2d(1)), 0.8)
    x = torch.randn(2, 16, 120, 120)
    engine = chained(model, x)
    assert schedule_of(engine).part == (32 << 20) // (4 * engine(x).shape[1])


@pytest.mark.parametrize("faster", [False, True])
def test_tuning_lets_threads_share_images_where_that_is_faster(faster, tmp_path, monkeypatch):
    times = {"sparse": 0.5, "chained": 0.1, "share": 0.5 if faster else 1.0}

    def seconds(cache, key, ways, limit=None):
        for run in ways.values():
            run()
        return {way: times.get(way, 1.0) for way in ways}

    monkeypatch.setattr(tuning.Cache, "seconds", seconds)
    monkeypatch.setattr(tuning.Cache, "known", lambda cache, key: known_of(key))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.randn(4, 16, 28, 28)
    engine = sk.compile(prune(Block(16, 8, 1), 0.8).eval(), x)
    assert chains_of(engine) and schedule_of(engine).share == faster
    engine.save(tmp_path / "engine")
    loaded = sk.load(tmp_path / "engine")
    assert schedule_of(loaded).share == faster
    assert torch.equal(loaded(x), engine(x))
    assert not schedule_of(engine.decide_(x)).share


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (28, 28), (20, 20)])
def test_an_inf_reaches_those_that_read_it_only(size):
    conv = nn.Conv2d(64, 32, 3, padding=1)
    with torch.no_grad():
        conv.weight *= torch.rand_like(conv.weight) < 0.1
        conv.weight[::2, 0] = 0  # every other channel does not look at it
        conv.weight[::2, 1:5, 1, 1] = 1  # but has something to read
    model, x = nn.Sequential(conv, nn.Conv2d(32, 32, 1, groups=32)).eval(), torch.randn(2, 64, *size)
    engine = chained(model, x)
    x[:, 0, 3, 3] = torch.inf
    assert chains_of(engine)
    out = engine(x)
    assert out[:, ::2].isfinite().all() and not out[:, 1::2].isfinite().all()


def test_many_threads_may_run_a_chain():
    engine = chained(prune(nn.Sequential(Block(16, 8, 1), Block(32, 16, 2)), 0.8), torch.randn(2, 16, 14, 14))
    batches = [torch.randn(n, 16, 14, 14) for n in (1, 2, 3, 4) * 3]
    expected, results = [engine(x) for x in batches], [None] * len(batches)

    def work(i):
        for _ in range(5):
            results[i] = engine(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


class Ends(nn.Module):
    """Values that leave in the middle, enter late, or are used on both sides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True))  # does not depend on y: runs before the chain
        z = self.b(y) + x
        w = self.c(torch.tanh(z * gate))  # tanh runs in PyTorch between two chains
        v = self.d(w) + y
        return v, y, F.adaptive_avg_pool2d(F.max_pool2d(v, 3, 2, 1), 1)


def test_inputs_and_outputs():
    model, x = prune(Ends(), 0.5).eval(), torch.randn(3, 8, 14, 14)
    engine = chained(model, x)
    assert len(chains_of(engine)) == 2
    assert_equals(engine, model, x)
    for tensor in engine(x):
        assert tensor.is_contiguous()


@pytest.mark.parametrize("seed", range(8))
def test_nan_stays_in_its_image_and_where_the_weights_are(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, 2, padding=1)]
    model = prune(nn.Sequential(*layers), 0.5).eval()
    for size in ((14, 14), (7, 7), (5, 9), (6, 28), (5, 72), (4, 56)):
        x = torch.randn(3, 4, *size)
        engine = chained(model, x)
        clean = engine(x)
        x[1, 2, 3, 4], x[1, 0, 0, 0] = float("nan"), float("inf")
        with torch.no_grad():
            dirty, eager = engine(x), model(x)
        assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[2], clean[2])
        # A pruned weight drops 0 x NaN, so ours may be finite where eager is not, never the other way round.
        assert not (dirty.isnan() & eager.isfinite()).any() and dirty[1].isnan().any()
        assert torch.equal(engine(x)[0], clean[0])  # nothing of it is left in the memory that calls share


def test_saved_chains(tmp_path):
    x = torch.randn(2, 16, 14, 14)
    engine = chained(prune(nn.Sequential(Block(16, 8, 1), Block(32, 16, 2)), 0.8), x)
    engine.save(tmp_path / "net.sk")
    loaded = sk.load(tmp_path / "net.sk")
    assert [c.numbers for c in chains_of(loaded)] == [c.numbers for c in chains_of(engine)]
    assert torch.equal(loaded(x), engine(x))
    # Neither the file nor the plan keeps values that a chain has.
    assert loaded.plan.compressed and all(isinstance(weight, Lent) for weight in loaded.plan.compressed.values())


@pytest.mark.parametrize("numbers", [[[99]], [[1, 0]], [[0, 0]], [[]], [[0, 1], [1, 2]], [[0, 2]]])
def test_damaged_chains(tmp_path, numbers):
    engine = chained(prune(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(4))), 0.5), torch.randn(1, 4, 4, 4))
    choices = engine._choices()
    choices["schedules"][0][1]["chains"] = numbers
    files.write(tmp_path / "net.sk", engine.plan, choices)
    with pytest.raises(ValueError, match="path must be an engine's file"):
        sk.load(tmp_path / "net.sk")


def test_links_and_copies_decide():
    """Three layers in a row, the middle one slower in a chain: a link, unless the copies around it cost less."""
    engine = chained(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(6))), torch.randn(1, 4, 4, 4))
    plan, sizes = engine.plan, schedule_of(engine).sizes
    steps = range(6)
    alone = dict.fromkeys(steps, 1.0)
    slow = {n: 1.2 if n == 2 else 0.5 for n in steps}
    assert chains.choose(plan, sizes, alone, slow, lambda slot: 0.2) == [[0, 1, 2, 3, 4, 5]]
    assert chains.choose(plan, sizes, alone, slow, lambda slot: 0.01) == [[0, 1], [3, 4, 5]]
    assert chains.choose(plan, sizes, alone, dict.fromkeys(steps, 0.99), lambda slot: 0.2) == []


@pytest.mark.parametrize("fastest", ["dense", "alone", "chained"])
def test_tuning_runs_what_is_fastest(fastest, monkeypatch):
    """Whichever way was measured to be fastest runs, now and when the answer comes from the cache."""
    model = prune(nn.Sequential(Block(16, 8, 1), Block(32, 16, 2)), 0.9).eval()
    x, asked = torch.randn(2, 16, 28, 28), []

    def seconds(functions, *args, **kwargs):
        for function in functions.values():
            function()
        if "chained" not in functions:
            return {name: 1.0 if name != "sparse" else 0.5 for name in functions}
        asked.append(functions)
        return {name: 0.9 if name == fastest else 1.0 for name in ("dense", "alone", "chained")}

    monkeypatch.setattr("sparsekit.engine.tuning.seconds_in_turns", seconds)
    monkeypatch.setattr("sparsekit.dispatch.CHAIN_COPY", 0)
    for _ in range(2):
        engine = sk.compile(model, x)
        assert bool(chains_of(engine)) == (fastest == "chained")
        assert_equals(engine, model, x)
        backend = "dense" if fastest == "dense" else "sparse"
        assert {choice.backend for choice in schedule_of(engine).choices.values()} == {backend}
    assert len(asked) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_values_of_layers_that_run_dense_are_lent_by_tiles_alone(isa, tmp_path):
    dense, sparse = nn.Conv2d(16, 16, 3, padding=1), prune(nn.Conv2d(16, 16, 3, padding=1), 0.8)
    with sk.use_isa(isa):
        engine = chained(model := nn.Sequential(dense, sparse), x := torch.randn(1, 16, 28, 28))
        assert assert_values_come_back(engine) == ([] if isa in WITH_TILES else ["0"])
        schedule_of(engine).tidy()
    weights = {step.name: step.weight for step in engine.plan.steps}
    assert isinstance(engine.plan.compressed[weights["1"]], Lent)
    assert (weights["0"] in engine.plan.tensors) != (isa in WITH_TILES)
    assert engine.plan.size_of(weights["0"]) == dense.weight.shape
    engine.save(tmp_path / "net.sk")
    saved, _ = sk.load(tmp_path / "net.sk").plan.contents()
    assert torch.equal(saved[weights["0"]], dense.weight)
    assert torch.equal(engine.plan.tensor(weights["0"]), dense.weight)
    assert torch.equal(engine.plan.tensor(weights["1"]), sparse.weight)
    assert_equals(engine, model, x)


def test_lent_values_outlive_their_schedule():
    """An engine that has met many sizes forgets the schedule whose chain holds the values, and not the values."""
    model = prune(nn.Sequential(Block(16, 8, 1)), 0.8).eval()
    engine = chained(model, torch.randn(1, 16, 14, 14))
    schedule_of(engine).tidy()
    assert any(isinstance(weight, Lent) for weight in engine.plan.compressed.values())
    for size in range(3, 5 + MOST_SIZES):
        assert_equals(engine, model, torch.randn(1, 16, size, size))
    assert all(key != ((16, 14, 14),) for key in engine._schedules)
    assert_equals(engine, model, torch.randn(1, 16, 14, 14))


def test_programs_check_what_they_are_given():
    weight = torch.zeros(2), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    geometry = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)

    def program():
        return _ops.add_program([2, 4, 4, 2, 4, 4], [2, 4, 4], [2, 4, 4])

    def conv(number, input=0, out=1, residual=None, values=weight[0], geometry=geometry, **how):
        _ops.program_conv2d(number, input, out, residual, values, *weight[1:], None, 0.0, 1.0, *geometry, **how)

    with pytest.raises(RuntimeError, match="triples"):
        _ops.add_program([1, 2], [], [])
    with pytest.raises(RuntimeError, match="positive"):
        _ops.add_program([1, 2, 0], [], [])
    p = program()
    with pytest.raises(RuntimeError, match="before it is written"):
        conv(p)
    _ops.program_load(p, -1, 0)
    for bad, message in (
        (lambda: _ops.program_load(p, -1, 0), "written twice"),
        (lambda: _ops.program_load(p, -2, 1), "no tensor"),
        (lambda: conv(p, out=7), "no tensor"),
        (lambda: conv(p, input=-9), "no tensor"),
        (lambda: conv(p, residual=1), "before it is written"),
        (lambda: conv(p, values=torch.zeros(3)), "elements"),
        (lambda: conv(p, geometry=([3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1)), "geometry"),
        (lambda: conv(p, geometry=(*geometry[:-1], 2), dense=True), "one group, got 2"),
        (lambda: conv(p, blocking=_ops.Blocking(channels=0.0)), "positive factor, got 0"),
        (lambda: _ops.program_max_pool2d(p, 0, 1, [3, 3], [1, 1], [0, 0], [1, 1]), "geometry"),
        (lambda: _ops.program_mean(p, 0, 1), "one pixel"),
        (lambda: _ops.program_avg_pool2d(p, 0, 1, [2, 2], [1, 1], [0, 0]), "geometry"),
        (lambda: _ops.program_elementwise(p, 0, 1, other=1), "before it is written"),
        (lambda: _ops.program_elementwise(p, 0, 1, gate=0), "one pixel"),
        (lambda: _ops.program_elementwise(p, 0, 1, scale=torch.ones(3)), "scale"),
        (lambda: _ops.program_elementwise(p, -1, 1), "tensors of the program"),
        (lambda: _ops.program_gather(p, [0, 0], [0, 1, 2, 3], 1), "as many as out has"),
        (lambda: _ops.program_gather(p, [0], [0, 2], 1), "got 2"),
        (lambda: _ops.program_gather(p, [-1], [0, 1], 1), "tensors of the program"),
        (lambda: _ops.program_store(p, 0, 3), "output"),
        (lambda: _ops.program_values(p, 1, *weight[1:]), "not finished"),
        (lambda: _ops.program_holds(p, 1, *weight[1:]), "not finished"),
        (lambda: _ops.run_program([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 4, 4)], p), "not finished"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad()
    conv(p)
    _ops.program_store(p, 1, 0)
    _ops.finish_program(p)
    with pytest.raises(RuntimeError, match="finished"):
        conv(p)
    rows, columns = weight[1:]
    assert torch.equal(_ops.program_values(p, 1, rows, columns), weight[0])
    assert _ops.program_holds(p, 1, rows, columns)
    for layer, crow, col in (
        (0, rows, columns),  # no convolution
        (9, rows, columns),
        (1, rows, columns + 1),  # a column that there is not
        (1, torch.tensor([0, 0, 2], dtype=torch.int32), columns),  # rows of other lengths
        (1, torch.tensor([0, 2], dtype=torch.int32), columns),
    ):
        assert _ops.program_values(p, layer, crow, col) is None
        assert not _ops.program_holds(p, layer, crow, col)
    with pytest.raises(RuntimeError, match="crow_indices"):
        _ops.program_values(p, 1, torch.tensor([0, 3, 1], dtype=torch.int32), columns)
    images = [torch.zeros(1, 2, 4, 4)]
    for seconds in (torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(3, 1, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"seconds must be float64 \[3\]"):
            _ops.run_program(images, images, p, seconds=seconds)
    for outputs, inputs in (
        ([], [torch.zeros(1, 2, 4, 4)]),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 4, 5)]),
        ([torch.zeros(2, 2, 4, 4)], [torch.zeros(1, 2, 4, 4)]),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 4, 4, dtype=torch.float64)]),
    ):
        with pytest.raises(RuntimeError):
            _ops.run_program(outputs, inputs, p)
    _ops.remove_program(p)
    with pytest.raises(RuntimeError, match="there is no program"):
        _ops.finish_program(p)


def test_tensors_share_memory():
    """However long a chain is, an image takes two or three of its largest tensors, with the zeros around them."""
    x = torch.randn(1, 32, 28, 28)
    wide = [nn.Conv2d(32, 32, 3, padding=1) for _ in range(6)]
    narrow = [nn.Conv2d(32, 64, 3, 2, padding=1), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(6))]
    model = prune(nn.Sequential(*wide, *narrow), 0.9)
    engine = chained(model, x)
    (chain,) = chains_of(engine)
    rows, pitch = 30, 32
    assert _ops.program_floats(chain.number) < 3 * 32 * rows * pitch
    assert_equals(engine, model, x)
    assert_equals(engine, model, torch.randn(3, 32, 28, 28))  # in memory that holds what others left
