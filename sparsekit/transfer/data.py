"""Tasks: labelled images and a metric. Small images live in memory as uint8 tensors, others are read when needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as vision

# Mean and standard deviation of ImageNet's channels.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Stats = tuple[Sequence[float], Sequence[float]]
# What Pillow raises for files that are no image, cut off, or broken inside.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class LazyImages:
    """Images of any sizes, which are read when they are needed: where a Task has a tensor else.

    Args:
        items: a path, a PIL image, a uint8 array ``[h, w]`` or ``[h, w, channels]``, uint8 tensor ``[channels, h, w]``, or a
            function that returns one of these; any object with ``len`` and integer indices.
        indices: which of them; None for all.

    Indexing with a number gives an RGB image, with a slice, a tensor or a list of numbers another LazyImages.
    """

    def __init__(self, items: Sequence[Any], indices: Sequence[int] | None = None):
        self.items = items
        self.indices = range(len(items)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return LazyImages(self.items, self.indices[index])
        if isinstance(index, (Tensor, list)):
            return LazyImages(self.items, [self.indices[i] for i in torch.as_tensor(index).tolist()])
        try:
            return _open(self.items[self.indices[index]]).convert("RGB")
        except UNREADABLE as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error}") from error

    def name(self, index: int) -> str:
        """Of an image, for people: its path, else its number."""
        item = self.items[self.indices[index]]
        return str(item) if isinstance(item, (str, Path)) or callable(item) else f"image {self.indices[index]}"

    def broken(self) -> dict[int, str]:
        """Read all images, and say which cannot be: number to what is wrong."""

        def check(index: int) -> str | None:
            try:
                image = _open(self.items[self.indices[index]])
                # A JPEG is read whole, but made small.
                image.draft("RGB", (32, 32))
                image.load()
            except UNREADABLE as error:
                return str(error) or type(error).__name__

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {index: error for index, error in enumerate(pool.map(check, range(len(self)))) if error}

    def batches(self, view: View, batch_size: int, order: Tensor | None = None, seed: int = 0) -> Iterator[Tensor]:
        """float ``[n, channels, size, size]`` after float ``[n, …]``, in worker processes if there are many.

        Args:
            view: what is made of an image.
            batch_size: images at a time; the last batch may be smaller.
            order: int64, which images; None for all, as they are.
            seed: of what is random in ``view``, together with the number of the image.
        """
        order = torch.arange(len(self)) if order is None else order
        workers = min(os.cpu_count() or 1, 8) if len(order) > 4 * batch_size else 0
        # With a generator of its own, so that whoever draws random numbers beside gets the same.
        views = _Views(self, view, order, seed)
        yield from DataLoader(views, batch_size, num_workers=workers, generator=torch.Generator())


def _open(item: Any) -> Image.Image:
    if callable(item):
        item = item()
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, (str, Path)):
        return Image.open(item)
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8:
            raise ValueError(
                f"it is a tensor of {item.dtype}, and must be of uint8: leave out the data set's transforms"
            )
        return vision.to_pil_image(item)
    return Image.fromarray(np.asarray(item))


@dataclass(frozen=True)
class View:
    """What a model gets of an image: the middle of it, or, augmented, a random part, mirrored half of the time if ``flip``.

    Attributes:
        size: height and width.
        channels: 1 or 3.
        stats: mean and standard deviation that are taken out.
        interpolation: for resizing.
        augmented: a random part (torchvision's RandomResizedCrop) instead of the middle 7/8 of the shorter side.
        flip: of an augmented one.
    """

    size: int
    channels: int = 3
    stats: Stats = IMAGENET
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    augmented: bool = False
    flip: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        if self.augmented:
            image = RandomResizedCrop(self.size, interpolation=self.interpolation)(image)
            if self.flip and torch.rand(()) < 0.5:
                image = vision.hflip(image)
        else:
            # 256 and 224, as everybody tests on ImageNet.
            image = vision.resize(image, [round(self.size * 8 / 7)], self.interpolation)
            image = vision.center_crop(image, [self.size, self.size])
        pixels = vision.normalize(vision.to_dtype(vision.pil_to_tensor(image), torch.float32, scale=True), *self.stats)
        return pixels if self.channels == 3 else pixels.mean(0, keepdim=True)


class _Views(Dataset):
    def __init__(self, images: LazyImages, view: View, order: Tensor, seed: int):
        self.images, self.view, self.order, self.seed = images, view, order.tolist(), seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Tensor:
        number = self.order[position]
        # The same whichever process reads it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 10_000_019 + number)
            return self.view(self.images[number])


@dataclass(frozen=True)
class Task:
    """Labelled images, and how they are scored.

    Attributes:
        name: for people and files.
        classes: number of labels.
        metric: ``"top1"`` or ``"mean_per_class"``.
        train_images, test_images: uint8 ``[n, channels, h, w]``, or :class:`LazyImages`.
        train_labels, test_labels: int64 ``[n]``.
        flip: whether a mirrored image keeps its label, for augmentation.
        mean, std: of the channels of lazy images in [0, 1]; tensors are shifted and scaled by a constant.
        source: where it came from, and its licence.
        labels: what the classes are called, or ().
    """

    name: str
    classes: int
    metric: str
    train_images: Tensor | LazyImages
    train_labels: Tensor
    test_images: Tensor | LazyImages
    test_labels: Tensor
    flip: bool = False
    source: str = ""
    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    def __post_init__(self):
        if self.metric not in ("top1", "mean_per_class"):
            raise ValueError(f"metric must be 'top1' or 'mean_per_class', got {self.metric!r}")
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if isinstance(images, Tensor) and (images.dim() != 4 or images.dtype != torch.uint8):
                raise ValueError(
                    f"{split}_images must be uint8 [n, channels, h, w], got {images.dtype} {tuple(images.shape)}"
                )
            if labels.shape != (len(images),) or labels.dtype != torch.int64:
                raise ValueError(
                    f"{split}_labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}"
                )
            if len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
                raise ValueError(f"{split}_labels must lie in [0, {self.classes}), got up to {int(labels.max())}")

    def first(self, images: int) -> Task:
        """The task with only the first so many training images."""
        fields = {**vars(self), "train_images": self.train_images[:images], "train_labels": self.train_labels[:images]}
        return Task(**fields)

    @property
    def channels(self) -> int:
        """Of its images."""
        return self.train_images.shape[1] if isinstance(self.train_images, Tensor) else 3


def data_folder() -> Path:
    """Where data is kept: ``$SPARSEKIT_DATA``, else ``~/.cache/sparsekit``."""
    return Path(os.environ.get("SPARSEKIT_DATA") or Path.home() / ".cache" / "sparsekit")
