"""torchvision's blocks, with BatchNorm, the sum with a residual and ReLU at once; imported only where torchvision is.

Blocks keep their class's name, parameters and modules, so that checkpoints and ``isinstance`` see what they know. Where
somebody listens to a module that would be left out, by a hook, they run as torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import misc

from .norm import BatchNorm2d, Normed, Sequential, chain, is_plain_norm, is_plain_relu, is_watched, normed
from .pool import MaxPool2d


class BasicBlock(resnet.BasicBlock):
    """torchvision's block of two 3 x 3 convolutions; ``[n, c, h, w]`` to ``[n, c', h', w']``."""

    def forward(self, x: Tensor) -> Tensor:
        if not _can_fuse(self):
            return super().forward(x)
        return _run(self, x, [self.conv1, self.conv2], [self.bn1, self.bn2])


class Bottleneck(resnet.Bottleneck):
    """torchvision's block of 1 x 1, 3 x 3 and 1 x 1 convolutions; ``[n, c, h, w]`` to ``[n, c', h', w']``."""

    def forward(self, x: Tensor) -> Tensor:
        if not _can_fuse(self):
            return super().forward(x)
        return _run(self, x, [self.conv1, self.conv2, self.conv3], [self.bn1, self.bn2, self.bn3])


class ResNet(resnet.ResNet):
    """torchvision's ResNet, for BatchNorm, ReLU and pooling of its stem; ``[n, 3, h, w]`` to ``[n, classes]``."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        if not _can_fuse(self):
            return super()._forward_impl(x)
        x, pool = self.conv1(x), self.maxpool
        is_plain = type(pool) is MaxPool2d and not is_watched(pool)
        x = self.bn1.pooled(x, pool) if is_plain else pool(self.bn1(x, relu=True))
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


def _run(block: nn.Module, x: Tensor, convs: list[nn.Module], norms: list[BatchNorm2d]) -> Tensor:
    """A residual block: all of it in one go where that can be, else layer by layer."""
    out = _run_whole(block.downsample, x, convs, norms)
    if out is not None:
        return out
    out, x = normed(convs[0], norms[0], x, relu=True, fork=True)
    shortcut = x if block.downsample is None else block.downsample(x)
    for conv, norm in zip(convs[1:-1], norms[1:-1]):
        out = normed(conv, norm, out, relu=True)
    return normed(convs[-1], norms[-1], out, shortcut, relu=True)


def _run_whole(
    downsample: nn.Module | None, x: Tensor, convs: list[nn.Module], norms: list[BatchNorm2d]
) -> Tensor | None:
    layers = []
    if downsample is not None:
        parts = list(downsample) if type(downsample) is Sequential and not is_watched(downsample) else []
        if len(parts) != 2 or not is_plain_norm(parts[1]):
            return None
        # First, so that its gradient comes last: it has pixels to add for a few of the block's input only.
        layers.append(Normed(*parts, relu=False))
    shortcut = len(layers)  # as a source: the downsample's result, or the input
    sources = [0, *range(shortcut + 1, shortcut + len(convs))]
    layers += [Normed(conv, norm, relu=True, input=s) for conv, norm, s in zip(convs, norms, sources)]
    layers[-1] = layers[-1]._replace(residual=shortcut)
    return chain([x], layers)


def _can_fuse(block: nn.Module) -> bool:
    norms = [module for name, module in block.named_children() if name.startswith("bn")]
    return (
        is_plain_relu(block.relu)
        and all(type(norm) is BatchNorm2d for norm in norms)
        and not any(map(is_watched, norms))
    )
