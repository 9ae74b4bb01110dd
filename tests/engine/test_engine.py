"""Engines compute what the model computes, whatever it is made of, and say so when they cannot."""

import copy
import itertools
import json
import math
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk
from sparsekit.engine import files, tuning
from sparsekit.engine.engine import MOST_SIZES
from sparsekit.engine.plan import Call, Compressed, Layer, Lent

from .common import assert_as_good, own_cache, run_all, schedule_of  # noqa: F401

torchvision = pytest.importorskip("torchvision")

# name, sparsity, image size (as small as the model takes), batch: every sparsity and batch meets several models
MODELS = [
    ("alexnet", 0.9, (63, 63), 2),
    ("convnext_tiny", 0.5, (64, 64), 1),
    ("densenet121", 0.9, (64, 96), 2),
    ("efficientnet_b0", 0.9, (64, 64), 3),
    ("efficientnet_v2_s", 0.0, (64, 64), 1),
    ("googlenet", 0.9, (65, 65), 2),
    ("inception_v3", 0.9, (75, 75), 2),
    ("mnasnet0_5", 0.5, (64, 64), 7),
    ("mnasnet1_0", 1.0, (64, 64), 2),
    ("mobilenet_v2", 0.9, (96, 64), 3),
    ("mobilenet_v3_large", 0.5, (64, 64), 2),
    ("mobilenet_v3_small", 0.9, (64, 64), 16),
    ("regnet_x_400mf", 0.9, (64, 64), 3),
    ("regnet_y_400mf", 0.5, (64, 64), 1),
    ("resnet18", 0.0, (64, 64), 3),
    ("resnet18", 0.5, (225, 225), 1),
    ("resnet34", 0.9, (64, 64), 7),
    ("resnet50", 0.9, (64, 64), 16),
    ("resnet50", 1.0, (64, 64), 2),
    ("resnet101", 0.9, (64, 64), 1),
    ("resnext50_32x4d", 0.9, (64, 64), 2),
    ("shufflenet_v2_x0_5", 0.5, (64, 64), 7),
    ("shufflenet_v2_x1_0", 0.9, (64, 64), 2),
    ("squeezenet1_0", 0.9, (65, 65), 3),
    ("squeezenet1_1", 1.0, (65, 65), 1),
    ("vgg11", 0.5, (32, 32), 2),
    ("vgg11_bn", 0.9, (32, 48), 3),
    ("wide_resnet50_2", 0.9, (64, 64), 1),
]


def pruned(model, sparsity, size, seed=0):
    """``model`` pruned, and BatchNorm calibrated so that its outputs are not degenerate."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    if sparsity == 1:
        with torch.no_grad():
            for module in list(model.modules())[4:]:
                if isinstance(module, nn.Conv2d) and module.groups == 1:
                    module.weight.zero_()
                    break
    elif sparsity > 0:
        sk.pruning.magnitude_(model, sparsity=sparsity, distribution="uniform")
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        sk.pruning.recalibrate_batchnorm_(model, [torch.randn(8, 3, *size) for _ in range(2)])
    return model.eval()


@pytest.mark.parametrize("name, sparsity, size, batch", MODELS)
def test_equals_eager(name, sparsity, size, batch):
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    model = pruned(getattr(torchvision.models, name)(weights=None, num_classes=10, **extra), sparsity, size)
    x = torch.randn(batch, 3, *size)
    engine = sk.compile(model, x, autotune=False)
    assert_as_good(engine, model, x)
    run_all(engine, "sparse")
    assert_as_good(engine, model, x)
    assert_as_good(engine, model, torch.randn(batch + 1, 3, *size))


def small_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    return pruned(model, 0.9, (16, 16))


def test_batchnorm_and_relu_are_fused():
    engine = sk.compile(small_net(), torch.randn(2, 3, 16, 16), autotune=False)
    layers = [step for step in engine.plan.steps if isinstance(step, Layer)]
    assert [layer.fused for layer in layers] == [["BatchNorm", "ReLU"], ["BatchNorm", "ReLU6"], []]
    assert not any(isinstance(step, Call) and "norm" in step.target for step in engine.plan.steps)


class Residuals(nn.Module):
    """Additions in every position that a layer could take in, or must not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(16, 16, k, padding=k // 2) for k in (1, 3, 1))
        self.scale = nn.Parameter(torch.randn(16, 1, 1))

    def forward(self, x):
        y = F.relu(self.a(x) + x)
        z = self.b(y) + self.c(y)  # two layers meet: one of them is the other's residual
        w = self.a(z)
        v = w + w  # not a residual of itself
        u = self.b(v) + self.scale  # broadcast: not a residual
        t = self.c(u)
        return F.relu(torch.add(t, u, alpha=2)), t  # t is needed outside: nothing may be fused into it


@pytest.mark.parametrize("backend", ["sparse", "dense", "dense without oneDNN"])
def test_residuals(backend, monkeypatch):
    if backend == "dense without oneDNN":
        monkeypatch.setattr("sparsekit.engine.layers.FUSED_DENSE", False)
        backend = "dense"
    torch.manual_seed(0)
    model = Residuals().eval()
    sk.pruning.magnitude_(model, sparsity=0.8, distribution="uniform")
    for size, layout in (((7, 9), torch.contiguous_format), ((16, 16), torch.channels_last)):
        x = torch.randn(3, 16, *size).contiguous(memory_format=layout)
        engine = sk.compile(model, x, autotune=False)
        run_all(engine, backend)
        with torch.no_grad():
            for ours, theirs in zip(engine(x), model(x)):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_dense_layers_of_any_geometry(channels):
    torch.manual_seed(0)
    for kernel, stride, padding, size in itertools.product(
        ((1, 2), (3, 3), (5, 3)), ((1, 1), (1, 3), (2, 1), (2, 2)), ((0, 1), (2, 2)), ((5, 4), (9, 3), (1, 1))
    ):
        if size[0] + 2 * padding[0] < kernel[0]:
            continue
        model, x = nn.Conv2d(channels, 24, kernel, stride, padding).eval(), torch.randn(3, channels, *size)
        engine = sk.compile(model, x, autotune=False)
        run_all(engine, "dense")
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_pass_through():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 4, 8, 8)
    x[0, :, 2, 3], x[0, 1, 5, 5] = float("nan"), float("inf")
    engine = sk.compile(model, x, autotune=False)
    run_all(engine, "sparse")
    with torch.no_grad():
        assert torch.equal(engine(x).isnan(), model(x).isnan())


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 3, "stride": 3, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 3, "dilation": 2, "padding": 1},
        {"kernel_size": 5, "stride": 1, "padding": 2},
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("isa", [isa for isa in sk.available_backends() if isa != "reference"])
def test_max_pool(arguments, layout, isa):
    for size in ((2, 19, 13, 21), (1, 3, 40, 33), (3, 16, 7, 7), (1, 1, 5, 6)):
        x = torch.randn(size)
        x.view(-1)[::37] = float("nan")
        x = x.contiguous(memory_format=layout)
        model = nn.MaxPool2d(**arguments)
        with sk.use_isa(isa):
            engine = sk.compile(model.eval(), x, autotune=False)
            torch.testing.assert_close(engine(x), model(x), rtol=0, atol=0, equal_nan=True)


def test_any_batch_and_part_of_it():
    model = small_net()
    engine = sk.compile(model, torch.randn(4, 3, 16, 16), autotune=False)
    assert engine.plan.batched
    for part in (None, 1, 3):
        schedule_of(engine).part = part
        for batch in (1, 2, 3, 7, 33):
            assert_as_good(engine, model, torch.randn(batch, 3, 16, 16))
    with torch.no_grad():
        assert engine(torch.randn(0, 3, 16, 16)).shape == (0, 10)


def test_any_image_size():
    model = small_net()
    engine = sk.compile(model, torch.randn(4, 3, 16, 16), autotune=False)
    for size in ((16, 16), (20, 24), (9, 31), (16, 16)):
        assert_as_good(engine, model, torch.randn(3, 3, *size))
    first = engine._schedules[((3, 16, 16),)]
    assert len(engine._schedules) == 3
    engine(torch.randn(2, 3, 16, 16))
    assert engine._schedules[((3, 16, 16),)] is first and first.plan is engine.plan
    engine.autotune_(torch.randn(2, 3, 20, 24))
    assert len(engine._schedules) == 3
    for n in range(12):  # it does not grow without end
        engine(torch.randn(1, 3, 16 + n, 16))
    assert len(engine._schedules) == MOST_SIZES


class Sized(nn.Module):
    """Tracing turns what this computes from sizes into numbers."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 8, 3), kind

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        if self.kind == "view":
            return x.view(n, c // 2, 2 * h, w).transpose(2, 3)
        if self.kind == "pool":
            return F.avg_pool2d(x, x.shape[2:])
        if self.kind == "interpolate":
            return F.interpolate(x, (h // 2, w // 2), mode="bilinear")
        if self.kind == "number":
            return x * (h * w) ** -0.5
        return x.clamp(0, 1 / h)


@pytest.mark.parametrize("kind", ["view", "pool", "interpolate", "number", "clamp"])
def test_models_that_depend_on_the_size_are_captured_again(kind, tmp_path):
    torch.manual_seed(0)
    model = Sized(kind).eval()
    engine = sk.compile(model, torch.randn(2, 3, 16, 16), autotune=False)
    assert engine.plan.inputs == [("float32", [None, 3, 16, 16])]
    engine.save(tmp_path / "net.sk")
    for _ in range(2):
        for size in ((16, 16), (12, 20), (10, 10)):
            assert_as_good(engine, model, torch.randn(3, 3, *size))
    assert len({id(schedule.plan) for schedule in engine._schedules.values()}) == 3
    # A file has the plan of one size.
    loaded = sk.load(tmp_path / "net.sk")
    assert_as_good(loaded, model, torch.randn(3, 3, 16, 16))
    with pytest.raises(ValueError, match="nx3x16x16, got 2x3x12x20"):
        loaded(torch.randn(2, 3, 12, 20))


def test_shuffled_channels_do_not_depend_on_the_size():
    model = pruned(torchvision.models.shufflenet_v2_x0_5(num_classes=10), 0.8, (64, 64))
    engine = sk.compile(model, torch.randn(2, 3, 64, 64), autotune=False)
    for size in ((64, 64), (96, 70)):
        assert_as_good(engine, model, torch.randn(3, 3, *size))
    assert all(schedule.plan is engine.plan for schedule in engine._schedules.values())


def test_saved_sizes(tmp_path):
    engine = sk.compile(small_net(), torch.randn(4, 3, 16, 16), autotune=False)
    engine(torch.randn(1, 3, 20, 24))
    engine.save(tmp_path / "net.sk")
    loaded = sk.load(tmp_path / "net.sk")
    assert loaded._schedules.keys() == engine._schedules.keys() == {((3, 16, 16),), ((3, 20, 24),)}
    for size in ((16, 16), (20, 24), (30, 8)):
        x = torch.randn(2, 3, *size)
        assert torch.equal(loaded(x), engine(x))


class InPlace(nn.Module):
    """Writes into tensors that others look at."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(4, 4, 1), kind
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "later":
            z = y + 1
            y.relu_().mul_(2)
            return z + y
        if self.kind == "view before":
            v = y.flatten(1)
            y.add_(1)
            return v
        if self.kind == "view after":
            y.add_(1)
            v = y.flatten(1)
            y.mul_(2)
            return v + y.flatten(1)
        if self.kind == "part":
            y[:, 1] = 0
            return y
        if self.kind == "dropout":
            z = F.dropout(y, 0.5, self.training)
            z.relu_()
            return y + z
        z = y.contiguous()
        z += self.shift
        return y


@pytest.mark.parametrize("kind", ["later", "view before", "view after", "part", "dropout", "contiguous"])
def test_writing_in_place(kind):
    torch.manual_seed(0)
    model, x = InPlace(kind).eval(), torch.randn(2, 4, 5, 6)
    engine = sk.compile(model, x, autotune=False)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_model_that_writes_its_input_or_buffers_is_refused():
    class Writes(nn.Module):
        def __init__(self, what):
            super().__init__()
            self.what = what
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            (x if self.what == "input" else self.count).add_(1)
            return x + self.count

    for what in ("input", "buffer"):
        with pytest.raises(ValueError, match="must not change"):
            sk.compile(Writes(what).eval(), torch.randn(2, 3))


class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_images_that_meet_are_not_run_in_parts():
    x = torch.randn(4, 3, 8, 8)
    engine = sk.compile(nn.Sequential(nn.Conv2d(3, 3, 1), Mixes()).eval(), x)
    assert not engine.plan.batched and schedule_of(engine).part is None


def for_some_numbers_of_threads(engine, x):
    """What the engine gives."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(engine(x))
    finally:
        torch.set_num_threads(threads)
    return results


@pytest.mark.skipif(sk.backend() == "reference", reason="PyTorch does not promise it")
def test_same_for_any_number_of_threads():
    engine = sk.compile(small_net(), torch.randn(4, 3, 16, 16), autotune=False)
    run_all(engine, "sparse")
    first, *others = for_some_numbers_of_threads(engine, torch.randn(5, 3, 16, 16))
    assert all(torch.equal(first, other) for other in others)


class Biased(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 12)), nn.Parameter(bias)

    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("bias", [torch.tensor(0.5), torch.randn(5, 2)[:, 0]])
def test_any_bias_of_a_linear_layer(bias, backend):
    model, x = Biased(bias), torch.randn(3, 3, 2, 2)
    engine = sk.compile(model.eval(), x, autotune=False)
    run_all(engine, backend)
    assert_as_good(engine, model, x)


@pytest.mark.skipif(sk.backend() == "reference", reason="PyTorch does not promise it")
@pytest.mark.parametrize("batch", [1, 3, 16, 64, 128])
def test_dense_classifiers_are_the_same_for_any_number_of_threads(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 700, 1), nn.Flatten(), nn.Linear(700, 1000)).eval()
    engine = sk.compile(model, torch.randn(2, 40, 3, 3), autotune=False)
    x = torch.randn(batch, 40, 3, 3)
    first, *others = for_some_numbers_of_threads(engine, x)
    assert all(torch.equal(first, other) for other in others)
    assert_as_good(engine, model, x)


@pytest.mark.skipif(sk.backend() == "reference", reason="PyTorch does not promise it")
@pytest.mark.parametrize("features", [(1536, 384), (384, 1536), (3072, 768), (1024, 64), (768, 100), (1200, 256)])
@pytest.mark.parametrize("vectors", [129, 300, 800])
def test_dense_layers_of_many_vectors_are_the_same_for_any_number_of_threads(features, vectors):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*features)).eval()
    x = torch.randn(1, vectors, features[0])
    engine = sk.compile(model, x, autotune=False)
    first, *others = for_some_numbers_of_threads(engine, x)
    assert all(torch.equal(first, other) for other in others)
    assert_as_good(engine, model, x)


@pytest.mark.skipif(sk.backend() == "reference", reason="PyTorch does not promise it")
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_convolutions_are_the_same_for_any_number_of_threads(batch):
    """Also where those of F.conv2d are not: many channels, and few pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(512, 128, 1), nn.ReLU(), nn.Conv2d(128, 40, 3, padding=1)).eval()
    x = torch.randn(batch, 512, 14, 14)
    engine = sk.compile(model, x, autotune=False)
    run_all(engine, "dense")
    first, *others = for_some_numbers_of_threads(engine, x)
    assert all(torch.equal(first, other) for other in others)
    assert_as_good(engine, model, x)


def test_many_threads_may_call_it():
    model = small_net()
    engine = sk.compile(model, torch.randn(4, 3, 16, 16), autotune=False)
    batches = [torch.randn(n, 3, 16, 16) for n in (1, 2, 5, 8) * 4]
    expected = [engine(x) for x in batches]
    fresh, results = copy.deepcopy(engine), [None] * len(batches)

    def work(i):
        for _ in range(5):
            results[i] = fresh(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(results, expected):
        torch.testing.assert_close(ours, theirs)


def test_is_a_snapshot_and_leaves_the_model_alone():
    model = sk.sparsify_(small_net())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 16, 16)
    engine = sk.compile(model, x)
    expected = engine(x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert isinstance(model[0], sk.nn.SparseConv2d)
    with torch.no_grad():
        model[0].weight.mul_(3)
    assert torch.equal(engine(x), expected)


def test_autotuning_is_measured_once():
    model, x = small_net(), torch.randn(4, 3, 16, 16)
    first = sk.compile(model, x)
    everything = json.loads(tuning.path().read_text())
    assert list(everything) == [tuning.machine()] and len(everything[tuning.machine()]) >= 2
    assert any("measured" in layer.reason for layer in first.explain(x)) == (sk.backend() != "reference")
    again = sk.compile(model, x)
    assert json.loads(tuning.path().read_text()) == everything
    assert schedule_of(again).choices == schedule_of(first).choices
    keys = everything[tuning.machine()].keys()
    other = {tuning.machine(): {key: {"another way": 1.0} for key in keys}}  # say, of an earlier sparsekit
    for damaged in ("{ not json", "[1]", json.dumps({tuning.machine(): {"a": [1, 2]}}), json.dumps(other)):
        tuning.path().write_text(damaged)
        sk.compile(model, x)
        measured = json.loads(tuning.path().read_text())[tuning.machine()]
        # Whether there are chains, and which parts are timed, depends on what the layers took just now.
        assert all("dense" in measured[key] for key in keys if not key.startswith(("parts-", "share-", "blocking")))


@pytest.mark.skipif(sk.backend() == "reference", reason="there is one way to run a layer without C++ kernels")
def test_the_cost_table_alone_makes_no_dense_layer_sparse(monkeypatch):
    """Without zeros a layer is measured if the table expects sparse kernels to be faster, and only then."""
    model = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, 16, 3)).eval()
    x = torch.randn(2, 8, 16, 16)
    expects = {8: (1.0, 2.0), 1: (2.0, 1.0)}
    measured = {"sparse": 2.0, "dense": 1.0, "alone": 1.0, "chained": 2.0}
    monkeypatch.setattr("sparsekit.dispatch.predict", lambda shape, nnz, train: expects[shape.groups])
    monkeypatch.setattr(
        "sparsekit.engine.tuning.seconds_in_turns", lambda ways, **kwargs: {way: measured.get(way, 1.0) for way in ways}
    )
    engine = sk.compile(model, x)
    depthwise, dense = schedule_of(engine).choices.values()
    assert (depthwise.backend, depthwise.seconds) == ("dense", (2.0, 1.0)) and "measured" in depthwise.reason
    assert (dense.backend, dense.seconds) == ("dense", None)
    torch.testing.assert_close(engine(x), model(x))


def test_explain():
    engine = sk.compile(small_net(), x := torch.randn(2, 3, 16, 16), autotune=False)
    report = engine.explain(x)
    assert [layer.name for layer in report] == ["0", "4", "9"]
    assert report[0].sparsity > 0.85 and report[0].measured_dense > 0
    assert "BatchNorm, ReLU" in str(report) and "32x3x3x3 on 2x3x16x16" in str(report)


def content(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["json"]), {key: (t.dtype, t.tolist()) for key, t in tensors.items()}


def test_weights_that_run_sparse_are_kept_as_non_zeros():
    model, x = small_net(), torch.randn(3, 3, 16, 16)
    engine = sk.compile(model, x, autotune=False)
    schedule = schedule_of(engine)

    def kept() -> tuple[set[str], set[str]]:
        chained = {number for chain in schedule.chains for number in chain.numbers}
        sparse = {n for n in schedule.layers if n in chained or schedule.choices[n].backend == "sparse"}
        names = {n: schedule.layers[n].layer.weight for n in sparse if schedule.layers[n].sparsity > 0.5}
        return set(names.values()), set(engine.plan.compressed)

    wanted, compressed = kept()
    assert wanted and compressed == wanted and not compressed & engine.plan.tensors.keys()
    before = engine(x)
    weights = {name: engine.plan.tensor(name) for name in wanted}  # somebody wants them dense, and has them
    assert not engine.plan.compressed
    engine.explain(x)
    assert kept() == (wanted, wanted)
    assert all(torch.equal(engine.plan.tensor(name), weight) for name, weight in weights.items())
    assert torch.equal(engine(x), before)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 2000), st.sets(st.integers(0, 9999)), st.booleans())
def test_weights_come_back_from_gaps(rows, columns, kept, known):
    """Wherever the non-zeros are; a weight is lent to nobody who does not have its values."""
    weight = torch.zeros(rows, columns)
    places = torch.tensor(sorted({place % weight.numel() for place in kept}), dtype=torch.int64)
    weight.view(-1)[places] = torch.arange(1.0, len(places) + 1)
    compressed = Compressed.of(weight)
    lent = Lent.of(compressed, lambda crow, col: known, lambda crow, col: compressed.values)
    if not known:
        assert lent is None
        return
    assert all(map(torch.equal, lent.back()[:3], compressed[:3])) and lent.size == compressed.size
    assert lent.gaps.dtype == torch.uint8 and lent.nnz == compressed.nnz
    assert torch.equal(lent.dense(), weight)


def test_save_and_load(tmp_path):
    model, x = small_net(), torch.randn(3, 3, 16, 16)
    for autotune in (False, True):
        engine = sk.compile(model, x, autotune=autotune)
        engine.save(tmp_path / "net.sk")
        loaded = sk.load(tmp_path / "net.sk")
        assert torch.equal(loaded(x), engine(x))
        assert schedule_of(loaded).saved() == schedule_of(engine).saved()
        # Weights stay compressed until somebody wants one dense; a file of the loaded engine is the same.
        again = sk.load(tmp_path / "net.sk")
        compressed = set(again.plan.compressed)
        assert compressed and not compressed & again.plan.tensors.keys()
        again.save(tmp_path / "again.sk")
        name = min(compressed)
        assert torch.equal(again.plan.tensor(name), engine.plan.tensor(name)) and name not in again.plan.compressed
        again.save(tmp_path / "later.sk")
        for path in ("again.sk", "later.sk"):
            assert content(tmp_path / path) == content(tmp_path / "net.sk")
            assert torch.equal(sk.load(tmp_path / path)(x), engine(x))
    assert (tmp_path / "net.sk").stat().st_size < 4 * sum(p.numel() for p in model.parameters())


def test_a_file_from_another_machine_decides_anew(tmp_path, monkeypatch):
    engine, x = sk.compile(small_net(), torch.randn(3, 3, 16, 16)), torch.randn(2, 3, 16, 16)
    engine.save(tmp_path / "net.sk")
    monkeypatch.setattr(tuning, "machine", lambda: "another")
    loaded = sk.load(tmp_path / "net.sk")
    assert not loaded._schedules
    torch.testing.assert_close(loaded(x), engine(x), rtol=1e-5, atol=1e-5)


def rewrite(path, change):
    """Apply ``change`` to the JSON of an engine's file."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["json"])
    tensors = load_file(path)
    change(header, tensors, metadata)
    save_file(tensors, path, {**metadata, "json": json.dumps(header)})


def first(header, kind):
    return next(step[kind]["dict"] for step in header["steps"] if kind in step)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, t, m: m.update(format="other"), "format"),
        (lambda h, t, m: m.update(version="99"), "version 99"),
        (lambda h, t, m: h.pop("steps"), "steps"),
        (lambda h, t, m: h.update(slots=1), "slot"),
        (lambda h, t, m: first(h, "layer").update(input={"slot": 7}), "read before it is written"),
        (lambda h, t, m: first(h, "layer").update(kind="lstm"), "lstm"),
        (lambda h, t, m: first(h, "layer").update(weight="nothing"), "nothing"),
        (lambda h, t, m: first(h, "call").update(target="aten.from_file.default"), "name of an op"),
        (lambda h, t, m: first(h, "call").update(target="os.system.default"), "PyTorch's own ops"),
        (lambda h, t, m: first(h, "call").update(target="aten.relu_.default"), "more than compute"),
        (lambda h, t, m: next(v for k, v in t.items() if k.endswith("col_indices")).fill_(10**6), "col_indices"),
        (lambda h, t, m: t.pop(next(k for k in t if k.endswith("values"))), "values"),
        (lambda h, t, m: t.update({k: v.int() for k, v in t.items() if k.endswith("values")}), "are torch.int32"),
        (lambda h, t, m: next(iter(h["shapes"].values())).insert(0, 7), "do not fit"),
        (lambda h, t, m: h["shapes"].update({k: ["a", 3] for k in h["shapes"]}), "engine's file"),
        (
            lambda h, t, m: h["shapes"].update({k: [s[0], math.prod(s[1:])] for k, s in h["shapes"].items()}),
            "4 dimensions",
        ),
        (lambda h, t, m: h.update(output_spec="[9, {}]"), "engine's file"),
        (lambda h, t, m: m.update(version="1"), "version 1; this sparsekit reads version 5"),
        (lambda h, t, m: h["per_image"].append(99), "slot 99"),
        (lambda h, t, m: h["choices"]["schedules"][0][1].update(part=-1), "part is -1"),
        (lambda h, t, m: h["choices"]["schedules"][0][1].update(share=2), "share is 2"),
        (lambda h, t, m: h["choices"]["schedules"][0][1].update(single=2), "single is 2"),
        (lambda h, t, m: h["choices"]["schedules"][0][1].pop("layers"), "layers"),
        (lambda h, t, m: h["choices"]["schedules"][0][1]["layers"].update({"0": ["fast", "", None]}), "runs 'fast'"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = tmp_path / "net.sk"
    sk.compile(small_net(), torch.randn(3, 3, 16, 16), autotune=False).save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        sk.load(path)


def test_what_is_no_engines_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.sk"):
        sk.load(tmp_path / "none.sk")
    (tmp_path / "text.sk").write_text("hello")
    with pytest.raises(ValueError, match="engine's file"):
        sk.load(tmp_path / "text.sk")
    sk.io.save_checkpoint(tmp_path / "model.safetensors", small_net())
    with pytest.raises(ValueError, match=files.FORMAT):
        sk.load(tmp_path / "model.safetensors")


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_bad_models_and_inputs():
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"eval mode.* 2 is in training"):
        sk.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval().append(nn.Dropout()), x)
    with pytest.raises(ValueError, match="one graph"):
        sk.compile(Branches().eval(), x)
    with pytest.raises(TypeError, match="got list at position 0"):
        sk.compile(nn.ReLU().eval(), [1, 2])
    with pytest.raises(TypeError, match=r"nn\.Module"):
        sk.compile(lambda x: x, x)
    engine = sk.compile(small_net(), x, autotune=False)
    for bad, error, message in (
        ((torch.randn(2, 4, 16, 16),), ValueError, "nx3xnxn, got 2x4x16x16"),
        ((torch.randn(2, 3, 1, 1),), ValueError, "size 2x3x1x1"),
        ((torch.randn(3, 16, 16),), ValueError, "got 3x16x16"),
        ((x.double(),), TypeError, "must be float32, got float64"),
        ((x.to("meta"),), ValueError, "on the CPU, got meta"),
        ((1,), TypeError, "must be a tensor, got int"),
        ((x, x), TypeError, "takes 1 inputs, got 2"),
    ):
        with pytest.raises(error, match=message):
            engine(*bad)
    with pytest.raises(TypeError, match="cannot be pickled"):
        engine.__reduce__()


def test_other_dtypes_run_in_pytorch():
    model, x = small_net().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(sk.compile(model, x)(x), model(x), rtol=1e-9, atol=1e-9)


def test_dynamo_backend_follows_weights_and_sizes(caplog):
    model = small_net()
    fast = torch.compile(model, backend="sparsekit", fullgraph=True)

    def check(*size):
        x = torch.randn(*size)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        check(2, 3, 16, 16)
        model[0].weight.mul_(2)
        model[1].running_mean.add_(1)
        check(2, 3, 16, 16)
        for size in ((5, 3, 16, 16), (7, 3, 16, 16), (6, 3, 20, 24), (1, 3, 16, 16)):
            check(*size)
    assert "in PyTorch" not in caplog.text
    out = fast(torch.randn(2, 3, 16, 16))
    assert out.requires_grad and "gradients" in caplog.text


def test_dynamo_backend_takes_models_that_break_the_graph():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Branches(), nn.Conv2d(8, 8, 3)).eval()
    fast, x = torch.compile(model, backend="sparsekit"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Reuses(nn.Module):
    """Elementwise ops whose first operand could take their result, and some whose must not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = F.avg_pool2d(self.conv(x), 2)
        a = torch.sigmoid(y)  # y is read again
        b = F.hardswish(y) * a  # only now is y free
        c = F.silu(x)  # the input belongs to the caller
        d = F.relu(c.flatten(1))  # a view
        e = F.avg_pool2d(x, 2).mean((2, 3), keepdim=True) * b  # the result is larger
        f = e.mul(2)
        return a, b, c, d, e + f, y.mean((2, 3))


def test_memory_is_reused_only_where_nobody_looks():
    torch.manual_seed(0)
    model, x = Reuses().eval(), torch.randn(2, 4, 6, 6)
    engine, before = sk.compile(model, x, autotune=False), x.clone()
    functions = [function for *_, function in schedule_of(engine)._items]
    assert any(getattr(function, "__name__", "") == "<lambda>" for function in functions)
    with torch.no_grad():
        for ours, theirs in zip(engine(x), model(x)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)


class Asks(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.conv, self.question = nn.Conv2d(3, 4, 3), question

    def forward(self, x):
        return self.conv(x) * (2 if self.question(x.shape[0]) else 1)


@pytest.mark.parametrize("question", [lambda n: n == 4, lambda n: n > 4, lambda n: n < 5, lambda n: n == 1])
@pytest.mark.parametrize("first", [1, 4, 7])
def test_a_model_that_asks_for_its_batch_is_captured_again(question, first):
    model = Asks(question).eval()
    engine = sk.compile(model, torch.randn(first, 3, 8, 8), autotune=False)
    for batch in (4, 7, 1, 5, 4):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return self.conv(x) + self.conv(y)


def test_inputs_of_one_batch_may_have_any(tmp_path):
    model = Two().eval()
    engine = sk.compile(model, (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)), autotune=False)
    engine.save(tmp_path / "two.sk")
    loaded = sk.load(tmp_path / "two.sk")  # which cannot capture again
    x, y = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, y), model(x, y), rtol=1e-5, atol=1e-6)


def test_inputs_without_dimensions():
    for autotune in (False, True):
        assert sk.compile(Scaled().eval(), torch.tensor(3.0), autotune=autotune)(torch.tensor(4.0)) == 8


class Scaled(nn.Module):
    def forward(self, x):
        return x * 2


# The images end where memory does, so that whoever reads behind them crashes.
AT_THE_END_OF_MEMORY = """
import ctypes, mmap
import torch
import sparsekit as sk

page, size = mmap.PAGESIZE, (3, 3, 27, 1)
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
floats = torch.frombuffer(memoryview(memory)[:page], dtype=torch.float32)
images = floats[-3 * 3 * 27 :].view(3, 27, 1, 3).permute(0, 3, 1, 2).normal_()
model = torch.nn.Conv2d(3, 33, (2, 1), (3, 2), (0, 1), (1, 2)).eval()
engine = sk.compile(model, torch.randn(size), autotune=False)
with torch.no_grad():
    torch.testing.assert_close(engine(images), model.double()(images.double()).float())
print("right")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory as Linux does")
def test_dense_layers_read_nothing_behind_their_images():
    """Windows of padding alone: oneDNN reads behind the image for them."""
    run = subprocess.run([sys.executable, "-c", AT_THE_END_OF_MEMORY], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "right\n"), run.stderr
