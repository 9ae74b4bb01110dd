"""torchvision's blocks, with BatchNorm, the sum with a residual and ReLU at once; imported only where torchvision is.

Blocks keep their class's name, parameters and modules, so that checkpoints and ``isinstance`` see what they know. Where
somebody listens to a module that would be left out, by a hook, they run as torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import misc

from .norm import BatchNorm2d, Sequential, is_plain_relu, is_watched, normed


class BasicBlock(resnet.BasicBlock):
    """torchvision's block of two 3 x 3 convolutions; ``[n, c, h, w]`` to ``[n, c', h', w']``."""

    def forward(self, x: Tensor) -> Tensor:
        if not _can_fuse(self):
            return super().forward(x)
        out, x = normed(self.conv1, self.bn1, x, relu=True, fork=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        return normed(self.conv2, self.bn2, out, shortcut, relu=True)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block of 1 x 1, 3 x 3 and 1 x 1 convolutions; ``[n, c, h, w]`` to ``[n, c', h', w']``."""

    def forward(self, x: Tensor) -> Tensor:
        if not _can_fuse(self):
            return super().forward(x)
        out, x = normed(self.conv1, self.bn1, x, relu=True, fork=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        out = normed(self.conv2, self.bn2, out, relu=True)
        return normed(self.conv3, self.bn3, out, shortcut, relu=True)


class ResNet(resnet.ResNet):
    """torchvision's ResNet, for the BatchNorm and the ReLU of its stem; ``[n, 3, h, w]`` to ``[n, classes]``."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        if not _can_fuse(self):
            return super()._forward_impl(x)
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class Conv2dNormActivation(misc.Conv2dNormActivation):
    """torchvision's convolution with BatchNorm and an activation behind it."""

    forward = Sequential.forward


FUSED = {
    misc.Conv2dNormActivation: Conv2dNormActivation,
    resnet.BasicBlock: BasicBlock,
    resnet.Bottleneck: Bottleneck,
    resnet.ResNet: ResNet,
}


def _can_fuse(block: nn.Module) -> bool:
    norms = [module for name, module in block.named_children() if name.startswith("bn")]
    return (
        is_plain_relu(block.relu)
        and all(type(norm) is BatchNorm2d for norm in norms)
        and not any(map(is_watched, norms))
    )
