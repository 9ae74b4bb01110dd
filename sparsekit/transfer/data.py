"""Task: labelled images with a metric. Small ones live in memory as uint8 tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """Labelled images, and how they are scored.

    Attributes:
        name: for people and files.
        classes: number of labels.
        metric: ``"top1"`` or ``"mean_per_class"``.
        train_images, test_images: uint8 ``[n, channels, h, w]``.
        train_labels, test_labels: int64 ``[n]``.
        flip: whether a mirrored image keeps its label, for augmentation.
        source: where it came from, and its licence.
        labels: what the classes are called, or ().
    """

    name: str
    classes: int
    metric: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    flip: bool = False
    source: str = ""
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        if self.metric not in ("top1", "mean_per_class"):
            raise ValueError(f"metric must be 'top1' or 'mean_per_class', got {self.metric!r}")
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dim() != 4 or images.dtype != torch.uint8:
                raise ValueError(
                    f"{split}_images must be uint8 [n, channels, h, w], got {images.dtype} {tuple(images.shape)}"
                )
            if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
                raise ValueError(
                    f"{split}_labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}"
                )
            if len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
                raise ValueError(f"{split}_labels must lie in [0, {self.classes}), got up to {int(labels.max())}")

    def first(self, images: int) -> Task:
        """The task with only the first so many training images."""
        fields = {**vars(self), "train_images": self.train_images[:images], "train_labels": self.train_labels[:images]}
        return Task(**fields)


def data_folder() -> Path:
    """Where data is kept: ``$SPARSEKIT_DATA``, else ``~/.cache/sparsekit``."""
    return Path(os.environ.get("SPARSEKIT_DATA") or Path.home() / ".cache" / "sparsekit")
