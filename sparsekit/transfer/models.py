"""Models for small images, and the head that transfer exchanges."""

from __future__ import annotations

from collections.abc import Sequence

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

    Shape:
        - input: ``[n, in_channels, h, w]``
        - output: ``[n, classes]``

    Example:
        >>> import torch
        >>> from sparsekit.transfer.models import MobileNetV1
        >>> MobileNetV1(width=0.25)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    # Channels and stride of every depthwise separable convolution.
    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, width: float = 1.0, in_channels: int = 3, classes: int = 1000):
        super().__init__()
        channels = int(32 * width)
        layers = [Conv2dNormActivation(in_channels, channels, 3, 2)]
        for out, stride in self.BLOCKS:
            out = int(out * width)
            layers.append(Conv2dNormActivation(channels, channels, 3, stride, groups=channels))
            layers.append(Conv2dNormActivation(channels, out, 1))
            channels = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


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
