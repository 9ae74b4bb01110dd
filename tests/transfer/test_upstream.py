import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision", exc_type=ImportError)

import torchvision
from safetensors.torch import save_file
from torchvision.models.resnet import Bottleneck
from torchvision.transforms.v2 import InterpolationMode

import sparsekit as sk
from sparsekit.transfer import upstream
from sparsekit.transfer.models import EfficientNetLite0, MobileNetV1, SmallResNet

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 2]).view(2, 1, 1, 1)


def settled(model, sparsity=0.8):
    """Pruned at random, with statistics of BatchNorm as of trained models: outputs depend on every weight and the input."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            # Nine weights of a depthwise layer are few.
            if getattr(module, "groups", 1) == 1:
                with torch.no_grad():
                    module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return sk.pruning.recalibrate_batchnorm_(model, [IMAGES]).eval()


def bottlenecks(stem=None, **settings):
    """A ResNet of torchvision with one bottleneck a stage."""
    return torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=8, **settings)


def conv_norm(inputs, outputs, kernel, stride=1, padding=0, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs)


class Named(nn.Module):
    """A convolution with BatchNorm called ``conv`` and ``bn``."""

    def __init__(self, *settings, relu=True, **more):
        super().__init__()
        self.conv, self.bn = conv_norm(*settings, **more)
        self.relu = relu

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x.relu() if self.relu else x


class RiglBlock(nn.Module):
    def __init__(self, inputs, width, outputs, stride):
        super().__init__()
        self.shortcut = Named(inputs, outputs, 1, stride, relu=False)
        self.conv1, self.conv2 = Named(inputs, width, 1), Named(width, width, 3, stride, 1)
        self.conv3 = Named(width, outputs, 1, relu=False)

    def forward(self, x):
        return (self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x)).relu()


class RiglResNet(nn.Module):
    """The names and the padding of the study's ``resnet50_rigl``, with one block a stage."""

    def __init__(self):
        super().__init__()
        self.initial_conv = Named(3, 64, 7, 2, 3)
        inputs = 64
        for stage in range(4):
            width, outputs = 8 * 2**stage, 256 * 2**stage
            layer = nn.Module()
            layer.block = nn.Sequential(RiglBlock(inputs, width, outputs, 2 if stage else 1))
            self.add_module(f"layer{stage + 1}", layer)
            inputs = outputs
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        x = F.max_pool2d(F.pad(self.initial_conv(x), (0, 1, 0, 1)), 3, 2)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}").block(x)
        return self.fc(x.mean((2, 3)))


BLOCKS = [(int(out * 0.25), stride) for out, stride in MobileNetV1.BLOCKS]


def depthwise(inputs, outputs, stride):
    return nn.Sequential(
        *conv_norm(inputs, inputs, 3, stride, 1, inputs), nn.ReLU(), *conv_norm(inputs, outputs, 1), nn.ReLU()
    )


class StrMobileNet(nn.Module):
    """The names of STR's MobileNetV1 and the study's: a head that is a convolution, or a linear layer."""

    def __init__(self, conv_head):
        super().__init__()
        widths = [8, *(out for out, _ in BLOCKS)]
        blocks = [depthwise(widths[i], out, stride) for i, (out, stride) in enumerate(BLOCKS)]
        self.model = nn.Sequential(nn.Sequential(*conv_norm(3, 8, 3, 2, 1), nn.ReLU()), *blocks)
        self.fc = nn.Conv2d(256, 10, 1, bias=False) if conv_head else nn.Linear(256, 10)

    def forward(self, x):
        x = self.model(x).mean((2, 3), keepdim=True)
        return self.fc(x if isinstance(self.fc, nn.Conv2d) else x.flatten(1)).flatten(1)


class AmcMobileNet(nn.Module):
    """Structured pruning leaves it ``removed`` channels less after the first convolution, one less after the next, …"""

    def __init__(self, removed=0):
        super().__init__()
        widths = [count - max(removed - i, 0) for i, count in enumerate([8, *(out for out, _ in BLOCKS)])]
        self.conv1 = nn.Sequential(*conv_norm(3, widths[0], 3, 2, 1), nn.ReLU())
        self.features = nn.Sequential(
            *(depthwise(widths[i], widths[i + 1], stride) for i, (_, stride) in enumerate(BLOCKS))
        )
        self.classifier = nn.Sequential(nn.Linear(widths[-1], 10))

    def forward(self, x):
        return self.classifier(self.features(self.conv1(x)).mean((2, 3)))


class SparsemlMobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.input = Named(3, 8, 3, 2, 1)
        sections, block, inputs = [], 0, 8
        for count in (1, 2, 2, 6, 2):
            section = []
            for out, stride in BLOCKS[block : block + count]:
                separable = nn.Sequential()
                separable.add_module("depth", Named(inputs, inputs, 3, stride, 1, groups=inputs))
                separable.add_module("point", Named(inputs, out, 1))
                section.append(separable)
                inputs = out
            sections.append(nn.Sequential(*section))
            block += count
        self.sections = nn.Sequential(*sections)
        self.classifier = nn.Module()
        self.classifier.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        return self.classifier.fc(self.sections(self.input(x)).mean((2, 3)))


class SparsemlBlock(nn.Module):
    def __init__(self, inputs, width, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, width, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3, stride, 1)
        self.conv3, self.bn3 = conv_norm(width, outputs, 1)
        self.identity = Named(inputs, outputs, 1, stride, relu=False)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.identity(x)).relu()


class SparsemlResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.input = Named(3, 64, 7, 2, 3)
        sections, inputs = [], 64
        for stage in range(4):
            sections.append(nn.Sequential(SparsemlBlock(inputs, 8 * 2**stage, 256 * 2**stage, 2 if stage else 1)))
            inputs = 256 * 2**stage
        self.sections = nn.Sequential(*sections)
        self.classifier = nn.Module()
        self.classifier.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        return self.classifier.fc(self.sections(F.max_pool2d(self.input(x), 3, 2, 1)).mean((2, 3)))


def assert_same(loaded, reference):
    with torch.no_grad():
        expected = reference(IMAGES)
        torch.testing.assert_close(loaded.model(IMAGES), expected, atol=1e-4, rtol=1e-4)
    # The input matters.
    assert (expected[0] - expected[1]).abs().max() > 0.01
    weights = [m.weight.flatten() for m in reference.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    zeros = float((torch.cat(weights) == 0).float().mean())
    assert loaded.sparsity.overall == pytest.approx(zeros, abs=1e-5) and not loaded.model.training


def wrapped(model, masks=True):
    """The study's format: every layer within ``_layer``, beside its masks."""
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    state = {}
    for key, value in model.state_dict().items():
        layer, _, last = key.rpartition(".")
        state[f"{layer}._layer.{last}" if layer in layers else key] = value
        if layer in layers and masks:
            state[f"{layer}._{last}_mask"] = (value != 0).float() if last == "weight" else torch.ones_like(value)
    return state


def test_the_studys_wrapped_checkpoints(tmp_path, caplog):
    model = settled(bottlenecks())
    state = wrapped(model)
    # Weights outside of the mask do not count, and a kept weight may be zero.
    mask = state["layer1.0.conv2._weight_mask"]
    weight = state["layer1.0.conv2._layer.weight"] = torch.where(
        mask == 0, torch.tensor(7.0), model.layer1[0].conv2.weight
    )
    kept = tuple(mask.nonzero()[0])
    weight[kept] = 0
    with torch.no_grad():
        model.layer1[0].conv2.weight[kept] = 0
    content = {"epoch": 99, "model_config": {"arch": "resnet50", "dataset": "imagenet"}, "model_state_dict": state}
    torch.save(content, tmp_path / "best.ckpt")
    with caplog.at_level(logging.INFO, "sparsekit"):
        loaded = upstream.load(tmp_path / "best.ckpt", bottlenecks())
    assert_same(loaded, model)
    assert torch.equal(loaded.model.layer1[0].conv2.weight_mask, mask.bool())
    assert "18 masks from the file; 18 of 18 layers are pruned" in caplog.text and "bilinear" in caplog.text


def test_masks_of_ones_do_not_make_a_model_dense(tmp_path, caplog):
    model = settled(bottlenecks())
    state = wrapped(model)
    state = {
        f"module.{key}": torch.ones_like(value) if key.endswith("_mask") else value for key, value in state.items()
    }
    torch.save({"model_state_dict": state}, tmp_path / "ones.ckpt")
    loaded = upstream.load(tmp_path / "ones.ckpt", bottlenecks())
    assert_same(loaded, model)
    assert "18 masks from exact zeros; 18 of 18 layers are pruned" in caplog.text
    assert torch.equal(loaded.model.conv1.weight_mask, model.conv1.weight != 0)


def test_rigl_has_tensorflows_padding_and_bicubic_images(tmp_path):
    model = settled(RiglResNet())
    torch.save({"model_state_dict": wrapped(model)}, tmp_path / "rigl.ckpt")
    arch = bottlenecks()
    arch.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
    loaded = upstream.load(tmp_path / "rigl.ckpt", arch)
    assert_same(loaded, model)
    assert loaded.interpolation is InterpolationMode.BICUBIC and "RigL's names" in str(loaded)


def test_a_whole_resnet50_of_rigl_is_recognized():
    with torch.device("meta"):
        state = torchvision.models.resnet50(num_classes=10).state_dict()
    assert upstream._recognize("file", state, "RigL's") == "resnet50_rigl"
    assert upstream._recognize("file", state, "") == "resnet50"
    pool = upstream._build("resnet50_rigl", state).maxpool
    assert torch.equal(pool(IMAGES.relu()), F.max_pool2d(F.pad(IMAGES.relu(), (0, 1, 0, 1)), 3, 2))


def test_mobilenets_of_str_the_study_and_amc(tmp_path):
    for model in (StrMobileNet(True), StrMobileNet(False), AmcMobileNet(), AmcMobileNet(removed=4)):
        model = settled(model)
        torch.save({"model_state_dict": wrapped(model)}, tmp_path / "wrapped.ckpt")
        torch.save(model.state_dict(), tmp_path / "plain.pth")
        for name in ("wrapped.ckpt", "plain.pth"):
            loaded = upstream.load(tmp_path / name)
            assert loaded.name == "mobilenet_v1" and loaded.interpolation is InterpolationMode.BILINEAR
            assert_same(loaded, model)
        tensorflow = upstream.load(tmp_path / "plain.pth", "mobilenet_rigl")
        assert tensorflow.interpolation is InterpolationMode.BICUBIC
        assert not torch.allclose(tensorflow.model(IMAGES), model(IMAGES), atol=1e-2)


def test_tensorflows_padding_by_hand():
    dense = settled(MobileNetV1(0.25, classes=10, padding="tensorflow"))
    first = dense.features[0]
    expected = F.conv2d(F.pad(IMAGES, (0, 1, 0, 1)), first[0].weight, stride=2)
    torch.testing.assert_close(first(IMAGES), first[1](expected).relu())
    before = dense(IMAGES)
    sparse = sk.sparsify_(dense, min_sparsity=0)
    torch.testing.assert_close(sparse(IMAGES), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        engine = sk.compile(sparse, IMAGES, autotune=False)
        torch.testing.assert_close(engine(IMAGES), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="padding must be 'torch' or 'tensorflow', got 'same'"):
        MobileNetV1(padding="same")


def test_strs_thresholds_are_applied(tmp_path):
    model = settled(bottlenecks(), 0)
    model.fc = nn.Conv2d(2048, 10, 1, bias=False)
    state = dict(model.state_dict())
    expected = {}
    for key in [key for key in state if state[key].dim() == 4]:
        threshold = state[key].abs().flatten().quantile(0.8)
        state[f"{key.removesuffix('.weight')}.sparseThreshold"] = torch.logit(threshold).reshape(1, 1)
        expected[key] = (state[key].abs() - threshold).relu() * state[key].sign()
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "str.pth"
    )
    loaded = upstream.load(tmp_path / "str.pth", bottlenecks())
    torch.testing.assert_close(loaded.model.layer2[0].conv2.weight, expected["layer2.0.conv2.weight"])
    torch.testing.assert_close(loaded.model.fc.weight, expected["fc.weight"].flatten(1))
    assert loaded.sparsity.overall == pytest.approx(0.8, abs=0.01) and not loaded.model.fc.bias.any()


def test_sparsemls_checkpoints(tmp_path):
    resnet, mobilenet = settled(SparsemlResNet()), settled(SparsemlMobileNet())
    for model, arch in ((resnet, bottlenecks()), (mobilenet, None)):
        content = {"epoch": 9, "recipe": "modifiers: []", "arch_key": "x", "state_dict": model.state_dict()}
        torch.save(content, tmp_path / "model.pth")
        loaded = upstream.load(tmp_path / "model.pth", arch)
        assert_same(loaded, model)
        assert "SparseML's names" in str(loaded)


def test_our_checkpoints_and_plain_safetensors(tmp_path):
    small = settled(SmallResNet((8, 16), (1, 2), 3, 7))
    sparse = sk.sparsify_(copy.deepcopy(small), min_sparsity=0)
    sk.io.save_checkpoint(tmp_path / "ours.safetensors", sparse)
    save_file(small.state_dict(), tmp_path / "plain.safetensors")
    for name in ("ours", "plain"):
        loaded = upstream.load(tmp_path / f"{name}.safetensors")
        assert loaded.name == "small_resnet" and type(loaded.model.conv1) is sk.nn.SparseConv2d
        assert_same(loaded, small)
    lite = settled(EfficientNetLite0(0.25, 10))
    torch.save(lite.state_dict(), tmp_path / "lite.pth")
    assert_same(upstream.load(tmp_path / "lite.pth"), lite)


def test_torchvisions_names_are_recognized_whatever_the_head(tmp_path):
    model = settled(torchvision.models.resnet18(num_classes=7))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    loaded = upstream.load(tmp_path / "model.pth")
    assert loaded.name == "resnet18" and loaded.model.fc.out_features == 7
    assert_same(loaded, model)


def test_dense_models_must_be_asked_for(tmp_path):
    model = settled(MobileNetV1(0.25, classes=10), 0)
    torch.save(model.state_dict(), tmp_path / "dense.pth")
    with pytest.raises(
        ValueError, match=r"would be trained dense: it holds no mask, and 0\.00% of its weights are zero"
    ):
        upstream.load(tmp_path / "dense.pth")
    loaded = upstream.load(tmp_path / "dense.pth", dense=True)
    assert type(loaded.model.features[0][0]) is nn.Conv2d
    assert_same(loaded, model)


def test_another_architecture_is_refused(tmp_path):
    torch.save(settled(MobileNetV1(0.25)).state_dict(), tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match=r"does not hold a resnet18: \d+ of its 122 tensors are missing, such as conv1"
    ):
        upstream.load(tmp_path / "model.pth", "resnet18")
    with pytest.raises(
        ValueError, match=r"have other shapes, such as features\.0\.0\.weight, \(8, 3, 3, 3\) instead of"
    ):
        upstream.load(tmp_path / "model.pth", MobileNetV1(0.5))
    with pytest.raises(ValueError, match="arch must be one of efficientnet_lite0, .*, got 'lenet'"):
        upstream.load(tmp_path / "model.pth", "lenet")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="is of no architecture that is known here; its tensors are a.weight"):
        upstream.load(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="is not of mobilenet_v1: it has no 'features"):
        upstream.load(tmp_path / "odd.pth", "mobilenet_v1")


def test_damaged_and_unsafe_files_are_refused(tmp_path):
    model = settled(MobileNetV1(0.25))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pth is damaged or no checkpoint"):
        upstream.load(tmp_path / "half.pth")
    (tmp_path / "text.pth").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match=r"text\.pth (is damaged|cannot be read safely)"):
        upstream.load(tmp_path / "text.pth")
    torch.save(model, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"module\.pth cannot be read safely.*Save the state dict alone"):
        upstream.load(tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        upstream.load(tmp_path / "list.pth")
    model.fc.weight.data[0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"values that are not finite, in 1 tensors, such as fc\.weight"):
        upstream.load(tmp_path / "nan.pth")
    with pytest.raises(
        FileNotFoundError, match=r"torchvision:NAME, timm:NAME or a file, got .*gone, which does not exist"
    ):
        upstream.load(tmp_path / "gone")


def test_torchvision_by_name(monkeypatch):
    loaded = upstream.load("torchvision:mobilenet_v2", pretrained=False)
    assert loaded.name == "mobilenet_v2" and loaded.sparsity.overall < 0.01 and "random weights" in str(loaded)
    with pytest.raises(
        ValueError, match="spec must name a model of torchvision and its weights, got resnet50@IMAGENET9"
    ):
        upstream.load("torchvision:resnet50@IMAGENET9", pretrained=False)

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    with pytest.raises(RuntimeError, match=r"torchvision:resnet18 cannot be had .*put https://.*pth into /nowhere"):
        upstream.load("torchvision:resnet18")


def test_timm_by_name(tmp_path):
    timm = pytest.importorskip("timm")
    loaded = upstream.load("timm:resnet18", pretrained=False)
    assert loaded.interpolation is InterpolationMode.BICUBIC and loaded.model.fc.out_features == 1000
    model = settled(timm.create_model("mobilenetv1_100", num_classes=5))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert_same(upstream.load(tmp_path / "model.pth", "timm:mobilenetv1_100"), model)
    with pytest.raises(ValueError, match="spec must name a model of timm .*, got 'nothing'"):
        upstream.load("timm:nothing")
