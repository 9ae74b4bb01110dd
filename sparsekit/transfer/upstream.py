"""Upstream models: torchvision's, timm's, and checkpoints in the formats that pruned ImageNet models are published in.

A file may be ours, a plain state dict (a pickle that ``torch.load(weights_only=True)`` reads, or safetensors), that of the
study arXiv 2111.13445, whose layers are wrapped (``conv1._layer.weight``, ``conv1._weight_mask``), STR's, with thresholds
still to be applied (``conv1.sparseThreshold``), or SparseML's. Names of other code are turned into torchvision's, or into
those of our :class:`~sparsekit.transfer.models.MobileNetV1`; masks that a file does not hold are what is exactly zero.
"""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode

from ..convert import SparsityReport, set_mask_, sparsify_, sparsity
from ..io import load_checkpoint
from ..nn import SparseModule
from .models import EfficientNetLite0, MobileNetV1, SmallResNet, efficientnet_lite_state, head_name

logger = logging.getLogger("sparsekit")

# Layers with a smaller fraction of zeros count as dense: single weights are zero by chance.
FEWEST_ZEROS = 1e-3
# A file whose prunable layers together have fewer is a dense model.
DENSE = 0.01


@dataclass
class Upstream:
    """A model to transfer.

    Attributes:
        model: in eval mode; its pruned layers are sparse ones with fixed masks.
        name: its architecture.
        source: the file, ``torchvision:…`` or ``timm:…``.
        format: what the file's names and masks were, for people.
        interpolation: with which images were resized in training: bicubic where weights come from TensorFlow.
    """

    model: nn.Module
    name: str
    source: str
    format: str
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    @property
    def sparsity(self) -> SparsityReport:
        """Of every prunable layer."""
        return sparsity(self.model)

    def __str__(self) -> str:
        report = self.sparsity
        pruned = [fraction for fraction in report.values() if fraction >= FEWEST_ZEROS]
        spread = f" ({min(pruned):.1%} to {max(pruned):.1%})" if pruned else ""
        return (
            f"{self.name} from {self.source}: {self.format}; {len(pruned)} of {len(report)} layers are pruned{spread}, "
            f"{report.overall:.2%} of all weights; {self.interpolation.value}"
        )


def load(
    spec: str | Path,
    arch: str | nn.Module | None = None,
    *,
    dense: bool = False,
    pretrained: bool = True,
) -> Upstream:
    """Load an upstream model, with its mask.

    Args:
        spec: ``"torchvision:resnet50"`` or ``"torchvision:resnet50@IMAGENET1K_V1"``, ``"timm:resnet50.a1_in1k"`` (needs the
            extra ``timm``), or a file.
        arch: what a file is of, where its names do not say it: a name of :func:`architectures`, of torchvision,
            ``timm:NAME``, or a model, which is copied.
        dense: whether a file may hold a dense model, which would be trained dense.
        pretrained: of torchvision and timm: False for random weights.

    Returns:
        The model. What its masks were inferred from is logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another architecture, or dense; or ``spec`` or ``arch`` is unknown.
        RuntimeError: weights cannot be downloaded, or timm is not there.

    Example:
        >>> import sparsekit.transfer
        >>> upstream = sparsekit.transfer.upstream.load("torchvision:resnet18", pretrained=False)
        >>> print(upstream)
        resnet18 from torchvision:resnet18: random weights; 0 of 21 layers are pruned, 0.00% of all weights; bilinear
    """
    library, _, name = str(spec).partition(":")
    if library == "torchvision" and name:
        return _torchvision(name, pretrained)
    if library == "timm" and name:
        return _timm(name, pretrained)
    return _file(Path(spec), arch, dense)


def architectures() -> list[str]:
    """The names that ``arch`` may have beside torchvision's and timm's."""
    return sorted(_ARCHITECTURES)


def _torchvision(name: str, pretrained: bool) -> Upstream:
    name, _, chosen = name.partition("@")
    try:
        weights = torchvision.models.get_model_weights(name)[chosen or "DEFAULT"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"spec must name a model of torchvision and its weights, got {name}@{chosen}: {error}"
        ) from error
    try:
        model = torchvision.models.get_model(name, weights=weights if pretrained else None)
    except OSError as error:
        raise RuntimeError(
            f"the weights of torchvision:{name} cannot be had ({error}); put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    interpolation = weights.transforms().interpolation
    return _from_library(model, name, f"torchvision:{name}", f"{weights.name} weights", pretrained, interpolation)


def _timm(name: str, pretrained: bool) -> Upstream:
    try:
        import timm
    except ImportError as error:
        raise RuntimeError(f"timm:{name} needs timm, which cannot be imported: {error}; pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"spec must name a model of timm {timm.__version__}, got {name!r}")
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        # The hub's client raises many kinds.
        raise RuntimeError(f"the weights of timm:{name} cannot be had: {error}") from error
    interpolation = InterpolationMode(timm.data.resolve_model_data_config(model)["interpolation"])
    return _from_library(model, name, f"timm:{name}", "pretrained weights", pretrained, interpolation)


def _from_library(model, name, source, weights, pretrained, interpolation) -> Upstream:
    _sparsify(model, {})
    return Upstream(model.eval(), name, source, weights if pretrained else "random weights", interpolation)


def _file(path: Path, arch: str | nn.Module | None, dense: bool) -> Upstream:
    state, masks, format = _read(path)
    state, masks, dialect = _translate(state, masks)
    if isinstance(arch, nn.Module):
        model, name = copy.deepcopy(arch), type(arch).__name__
    else:
        name = arch or _recognize(path, state, dialect)
        model = _build(name, state)
    _check_fit(path, name, model, state)
    model.load_state_dict(state)
    stored, inferred = _sparsify(model, masks)
    bicubic = dialect == "RigL's" or name == "mobilenet_rigl"
    how = [f"{count} masks from {what}" for count, what in ((stored, "the file"), (inferred, "exact zeros")) if count]
    upstream = Upstream(
        model.eval(), name, str(path), f"{format}{dialect and f' in {dialect} names'}, {' and '.join(how) or 'no masks'}",
        InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR,
    )  # fmt: skip
    if upstream.sparsity.overall < DENSE and not dense:
        raise ValueError(
            f"{path} would be trained dense: it holds no mask, and {upstream.sparsity.overall:.2%} of its weights are zero. "
            "If that is what you want, say dense=True (--dense)"
        )
    logger.log(logging.WARNING if inferred else logging.INFO, "%s", upstream)
    return upstream


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """A file's tensors, masks by the name of the weight, and what kind of file it is."""
    if not path.is_file():
        raise FileNotFoundError(f"spec must be torchvision:NAME, timm:NAME or a file, got {path}, which does not exist")
    if path.suffix == ".safetensors" or _is_safetensors(path):
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read safely: {str(error).splitlines()[0]} Save the state dict alone, "
            "torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    format = "a plain state dict"
    for key in ("model_state_dict", "state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, format = content[key], f"a checkpoint with {key}"
            break
    if not isinstance(content, Mapping) or not any(torch.is_tensor(value) for value in content.values()):
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    state = {key: value for key, value in content.items() if torch.is_tensor(value)}
    # What DataParallel adds.
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return *_unwrap(state), format


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != "sparsekit":
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return *_unwrap(state), "plain safetensors"
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    checkpoint = load_checkpoint(path)
    masks = {f"{layer}.weight" if layer else "weight": mask for layer, mask in checkpoint.masks.items()}
    state = {key: value for key, value in checkpoint.state_dict.items() if not key.endswith("weight_mask")}
    return state, masks, "our checkpoint"


def _unwrap(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights with masks and thresholds applied, and masks by the name of the weight."""
    plain, masks = {}, {}
    for key, value in state.items():
        layer, _, last = key.rpartition(".")
        if last in ("_weight_mask", "weight_mask"):
            masks[f"{layer}.weight"] = value.bool()
        elif last not in ("_bias_mask", "sparseThreshold"):
            plain[key.replace("._layer.", ".")] = value
    for key in [key for key in state if key.endswith(".sparseThreshold")]:
        # STR, arXiv 2002.03231, equation 5.
        name = f"{key.removesuffix('.sparseThreshold')}.weight"
        threshold = torch.sigmoid(state[key]).reshape(-1, *[1] * (plain[name].dim() - 1))
        plain[name] = plain[name].sign() * (plain[name].abs() - threshold).relu()
    for name, mask in masks.items():
        if mask.shape != plain[name].shape:
            raise ValueError(f"the mask of {name} must be {tuple(plain[name].shape)}, got {tuple(mask.shape)}")
        plain[name] = plain[name] * mask
    # Masks of ones that a dense model was wrapped with say nothing.
    return plain, {name: mask for name, mask in masks.items() if not mask.all()}


def _mobilenet(name: str) -> str | None:
    """``model.<i>.<j>``, of the study's MobileNets and STR's: convolution and BatchNorm are 0 and 1, and 3 and 4."""
    if match := re.fullmatch(r"model\.(\d+)\.([0134])\.(.*)", name):
        block, layer, rest = int(match[1]), int(match[2]), match[3]
        return f"features.{max(2 * block - 1, 0) + layer // 3}.{layer % 3}.{rest}"
    return name if name.startswith("fc.") else None


def _amc(name: str) -> str | None:
    if match := re.fullmatch(r"conv1\.([01])\.(.*)", name):
        return f"features.0.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"features\.(\d+)\.([0134])\.(.*)", name):
        block, layer = int(match[1]), int(match[2])
        return f"features.{2 * block + 1 + layer // 3}.{layer % 3}.{match[3]}"
    match = re.fullmatch(r"classifier\.(?:\d+\.)?(weight|bias)", name)
    return f"fc.{match[1]}" if match else None


def _rigl(name: str) -> str | None:
    if match := re.fullmatch(r"initial_conv\.(conv|bn)\.(.*)", name):
        return f"{match[1]}1.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.block\.(\d+)\.conv(\d)\.(conv|bn)\.(.*)", name):
        return f"layer{match[1]}.{match[2]}.{match[4]}{match[3]}.{match[5]}"
    if match := re.fullmatch(r"layer(\d)\.block\.(\d+)\.shortcut\.(conv|bn)\.(.*)", name):
        return f"layer{match[1]}.{match[2]}.downsample.{('conv', 'bn').index(match[3])}.{match[4]}"
    return name if name.startswith("fc.") else None


def _sparseml_resnet(name: str) -> str | None:
    if match := re.fullmatch(r"input\.(conv|bn)\.(.*)", name):
        return f"{match[1]}1.{match[2]}"
    if match := re.fullmatch(r"sections\.(\d+)\.(\d+)\.((?:conv|bn)\d\..*)", name):
        return f"layer{int(match[1]) + 1}.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"sections\.(\d+)\.(\d+)\.identity\.(conv|bn)\.(.*)", name):
        return f"layer{int(match[1]) + 1}.{match[2]}.downsample.{('conv', 'bn').index(match[3])}.{match[4]}"
    match = re.fullmatch(r"classifier\.fc\.(weight|bias)", name)
    return f"fc.{match[1]}" if match else None


# Blocks of MobileNetV1 before every section of SparseML's.
_SECTIONS = (0, 1, 3, 5, 11)


def _sparseml_mobilenet(name: str) -> str | None:
    if match := re.fullmatch(r"input\.(conv|bn)\.(.*)", name):
        return f"features.0.{('conv', 'bn').index(match[1])}.{match[2]}"
    if match := re.fullmatch(r"sections\.([0-4])\.(\d+)\.(depth|point)\.(conv|bn)\.(.*)", name):
        block = _SECTIONS[int(match[1])] + int(match[2])
        layer = 2 * block + 1 + ("depth", "point").index(match[3])
        return f"features.{layer}.{('conv', 'bn').index(match[4])}.{match[5]}"
    match = re.fullmatch(r"classifier\.fc\.(?:1\.)?(weight|bias)", name)
    return f"fc.{match[1]}" if match else None


# Whose names a state dict has, by one that only those have.
_DIALECTS: tuple[tuple[str, str, Callable[[str], str | None]], ...] = (
    ("RigL's", "initial_conv.conv.weight", _rigl),
    ("STR's or the study's", "model.1.3.weight", _mobilenet),
    ("AMC's", "features.0.3.weight", _amc),
    ("SparseML's", "sections.0.0.conv1.weight", _sparseml_resnet),
    ("SparseML's", "sections.0.0.depth.conv.weight", _sparseml_mobilenet),
)


def _translate(state: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """The same tensors under the names of models that we have, and whose names they were, or ""."""
    if "_conv_stem.weight" in state:
        names = dict(zip(state, efficientnet_lite_state({key: torch.tensor(0) for key in state})))
        return _rename(state, names), _rename(masks, names), "efficientnet-lite-pytorch's"
    dialect = ""
    for whose, sign, rename in _DIALECTS:
        if sign in state:
            names = {key: rename(key) for key in state}
            unknown = [key for key, name in names.items() if name is None]
            if unknown:
                raise ValueError(f"{unknown[0]!r} is none of {whose} names, which the checkpoint has else")
            state, masks, dialect = _rename(state, names), _rename(masks, names), whose
    # STR's head is a 1 x 1 convolution without bias.
    if "fc.weight" in state and state["fc.weight"].dim() == 4:
        state["fc.weight"] = state["fc.weight"].flatten(1)
        state.setdefault("fc.bias", torch.zeros(len(state["fc.weight"])))
        if "fc.weight" in masks:
            masks["fc.weight"] = masks["fc.weight"].flatten(1)
        dialect = dialect or "STR's"
    return state, masks, dialect


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names[key]: tensor for key, tensor in tensors.items()}


def _small_resnet(state: Mapping[str, Tensor]) -> nn.Module:
    blocks = sorted(
        (key for key in state if re.fullmatch(r"layers\.\d+\.conv1\.weight", key)),
        key=lambda key: int(key.split(".")[1]),
    )
    widths = [state[key].shape[0] for key in blocks]
    stages = list(dict.fromkeys(widths))
    return SmallResNet(
        stages, [widths.count(width) for width in stages], state["conv1.weight"].shape[1], state["fc.weight"].shape[0]
    )


def _mobilenet_v1(state: Mapping[str, Tensor], padding: str = "torch") -> nn.Module:
    # AMC leaves every layer its own number of channels.
    layers = (0, *range(2, 2 * len(MobileNetV1.BLOCKS) + 1, 2))
    channels = [state[f"features.{layer}.0.weight"].shape[0] for layer in layers]
    return MobileNetV1(
        in_channels=state["features.0.0.weight"].shape[1],
        classes=state["fc.weight"].shape[0],
        padding=padding,
        channels=channels,
    )


def _resnet50_rigl(state: Mapping[str, Tensor]) -> nn.Module:
    model = torchvision.models.resnet50(num_classes=state["fc.weight"].shape[0])
    # TensorFlow's "same" padding for images of even size; behind a ReLU, zeros are as good as nothing.
    model.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
    return model


_ARCHITECTURES: dict[str, Callable[[Mapping[str, Tensor]], nn.Module]] = {
    "small_resnet": _small_resnet,
    "efficientnet_lite0": lambda state: EfficientNetLite0(
        state["stem.0.weight"].shape[0] / 32, state["fc.weight"].shape[0]
    ),
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_rigl": lambda state: _mobilenet_v1(state, "tensorflow"),
    "resnet50_rigl": _resnet50_rigl,
}


def _build(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """A model of an architecture, with as many classes as the tensors have."""
    if name in _ARCHITECTURES:
        try:
            return _ARCHITECTURES[name](state)
        except KeyError as error:
            raise ValueError(f"the checkpoint is not of {name}: it has no {error}") from error
    library, _, timm_name = name.partition(":")
    if library == "timm":
        model = _timm(timm_name, pretrained=False).model
    elif name in torchvision.models.list_models(module=torchvision.models):
        model = torchvision.models.get_model(name, weights=None)
    else:
        raise ValueError(
            f"arch must be one of {', '.join(architectures())}, a name of torchvision, timm:NAME or a model, got {name!r}"
        )
    head = head_name(model)
    classes = state.get(f"{head}.weight")
    if classes is not None and classes.dim() == 2:
        old = model.get_submodule(head)
        parent, _, leaf = head.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(old.in_features, len(classes), old.bias is not None))
    return model


def _recognize(path: Path, state: Mapping[str, Tensor], dialect: str) -> str:
    """The architecture whose tensors a state dict has."""
    for name in _candidates(state):
        if name in _ARCHITECTURES:
            return name
        with torch.device("meta"):
            expected = torchvision.models.get_model(name, weights=None).state_dict()
        head = {key for key in (list(expected)[-2:]) if key in state}
        if expected.keys() == state.keys() and all(
            expected[key].shape == state[key].shape for key in expected.keys() - head
        ):
            # RigL's ResNet-50 pads as TensorFlow does, which no tensor shows.
            return "resnet50_rigl" if (name, dialect) == ("resnet50", "RigL's") else name
    raise ValueError(
        f"{path} is of no architecture that is known here; its tensors are {', '.join(list(state)[:3])}, … "
        f"({len(state)}). Say arch=, one of {', '.join(architectures())}, a name of torchvision, timm:NAME or a model"
    )


def _candidates(state: Mapping[str, Tensor]) -> Iterator[str]:
    if "layers.0.conv1.weight" in state:
        yield "small_resnet"
    elif "stem.0.weight" in state and "blocks.0.depthwise.0.weight" in state:
        yield "efficientnet_lite0"
    elif "features.26.0.weight" in state and "fc.weight" in state:
        yield "mobilenet_v1"
    elif "layer1.0.conv1.weight" in state:
        families = ("resnet", "wide_resnet", "resnext")
        yield from (name for name in torchvision.models.list_models(torchvision.models) if name.startswith(families))
    else:
        families = ("mobilenet", "efficientnet", "densenet", "vgg", "mnasnet", "squeezenet", "shufflenet")
        yield from (name for name in torchvision.models.list_models(torchvision.models) if name.startswith(families))


def _check_fit(path: Path, name: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Nothing, if names and shapes are those of the model."""
    expected = model.state_dict()
    # Masks of sparse layers come from the file's masks or zeros.
    expected = {key: value for key, value in expected.items() if not key.endswith("weight_mask")}
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in expected]
    other = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of its {len(expected)} tensors are missing, such as {missing[0]}")
    if surplus:
        faults.append(f"{len(surplus)} are not of it, such as {surplus[0]}")
    if other:
        shapes = f"{tuple(state[other[0]].shape)} instead of {tuple(expected[other[0]].shape)}"
        faults.append(f"{len(other)} have other shapes, such as {other[0]}, {shapes}")
    if faults:
        raise ValueError(f"{path} does not hold a {name}: {'; '.join(faults)}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {len(broken)} tensors, such as {broken[0]}")


def _sparsify(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Make layers with a mask, or with zeros, sparse; returns how many of each."""
    pruned, stored = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name:
            if f"{name}.weight" in masks:
                pruned[name] = masks[f"{name}.weight"]
                stored += 1
            elif float((module.weight == 0).float().mean()) >= FEWEST_ZEROS:
                pruned[name] = module.weight != 0
    if pruned:
        sparsify_(model, filter_fn=lambda name, _: name in pruned, min_sparsity=0)
        for name, mask in pruned.items():
            layer = model.get_submodule(name)
            # Weights that the mask keeps may be zero.
            if isinstance(layer, SparseModule) and not torch.equal(layer.weight_mask, mask):
                set_mask_(layer, mask)
    return stored, len(pruned) - stored
