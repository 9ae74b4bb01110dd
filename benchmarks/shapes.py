"""The layers that every kernel benchmark runs: the sparse convolutions of ResNet-50 at 224 x 224."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A convolution and how often the network has it; `size` is the input's height and width."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.in_channels}-{self.out_channels}-k{self.kernel}-s{self.stride}-{self.size}"

    @property
    def macs(self) -> int:
        """Dense multiply-adds for one image."""
        return self.in_channels * self.out_channels * (self.kernel * self.size // self.stride) ** 2


def _resnet50() -> list[Layer]:
    """Every convolution but the first, which stays dense, in the order of the network."""
    layers: dict[tuple, int] = {}

    def add(*shape):
        layers[shape] = layers.get(shape, 0) + 1

    channels, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            add(channels, width, 1, 1, size)
            add(width, width, 3, stride, size)
            if not block:
                add(channels, 4 * width, 1, stride, size)
            size //= stride
            add(width, 4 * width, 1, 1, size)
            channels = 4 * width
    return [Layer(*shape, count) for shape, count in layers.items()]


RESNET50 = _resnet50()
