"""A user's own task: a folder of images, a CSV file, or a data set object of torchvision or Hugging Face."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from .data import IMAGENET, LazyImages, Stats, Task

logger = logging.getLogger("sparsekit")


def from_folder(
    folder: str | Path, *, name: str | None = None, metric: str = "top1", classes: int | None = None,
    test: float = 0.2, seed: int = 0, skip_corrupt: bool = False, stats: Stats = IMAGENET,
) -> Task:  # fmt: skip
    """A task of ``folder/train/<class>/*.jpg`` and ``folder/test/<class>/*.jpg`` (or ``val``), or of ``folder/<class>/``.

    Args:
        folder: where.
        name: of the task; None for the folder's.
        metric: ``"top1"`` or ``"mean_per_class"``.
        classes: how many there must be; None for any number.
        test: where there is one folder, the share of every class's images that is for testing, chosen by ``seed``.
        seed: of that choice.
        skip_corrupt: leave out images that cannot be read, with a warning, instead of refusing them.
        stats: mean and standard deviation of the channels.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: classes are not as many as ``classes``, differ between training and testing, or have too few images; or
            images cannot be read, which are then named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must hold folders of images, got {folder}, which does not exist")
    testing = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    if (folder / "train").is_dir() and testing:
        parts = [_labelled(folder / "train"), _labelled(testing)]
    else:
        rows = _labelled(folder)
        train, held_out = split([label for _, label in rows], _share(test), seed)
        parts = [[rows[i] for i in train], [rows[i] for i in held_out]]
    return _task(name or folder.name, parts, metric, classes, skip_corrupt, stats, f"the folder {folder}")


def from_csv(
    path: str | Path, *, image: str = "image", label: str = "label", part: str = "split", folder: str | Path | None = None,
    name: str | None = None, metric: str = "top1", classes: int | None = None, test: float = 0.2, seed: int = 0,
    skip_corrupt: bool = False, stats: Stats = IMAGENET,
) -> Task:  # fmt: skip
    """A task of a CSV file with a header.

    Args:
        path: the file.
        image, label: columns: a path, and a class's name.
        part: a column that says ``train``, or ``test`` or ``val``; if there is none, images are chosen as in
            :func:`from_folder`.
        folder: what paths are relative to; None for the file's folder.
        name, metric, classes, test, seed, skip_corrupt, stats: see :func:`from_folder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column or an image is missing; or see :func:`from_folder`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a CSV file, got {path}, which does not exist")
    folder = Path(folder) if folder is not None else path.parent
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {image, label} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} must have the columns {image} and {label}, got {', '.join(reader.fieldnames or ())}"
            )
        lines = list(reader)
    rows = [(folder / line[image], line[label]) for line in lines]
    if lines and part in lines[0]:
        known = {"train": 0, "test": 1, "val": 1}
        parts: list[list[tuple[Any, Hashable]]] = [[], []]
        for number, (line, row) in enumerate(zip(lines, rows), 2):
            if line[part] not in known:
                raise ValueError(f"{path}, line {number}: {part} must be train, test or val, got {line[part]!r}")
            parts[known[line[part]]].append(row)
    else:
        train, held_out = split([own for _, own in rows], _share(test), seed)
        parts = [[rows[i] for i in train], [rows[i] for i in held_out]]
    return _task(name or path.stem, parts, metric, classes, skip_corrupt, stats, f"the file {path}")


def from_dataset(
    train: Any, test: Any, *, image: str = "image", label: str = "label", name: str = "own", metric: str = "top1",
    classes: int | None = None, skip_corrupt: bool = False, stats: Stats = IMAGENET,
) -> Task:  # fmt: skip
    """A task of two data set objects: torchvision's, without transforms, or any that give (image, label); Hugging Face's.

    Args:
        train, test: with ``len`` and integer indices, which give (image, label), or a dict.
        image, label: keys of that dict.
        name, metric, classes, skip_corrupt, stats: see :func:`from_folder`.

    Raises:
        TypeError: an object gives neither.
        ValueError: see :func:`from_folder`.

    Example:
        >>> import numpy as np
        >>> from sparsekit.transfer import tasks
        >>> rows = [(np.zeros((8, 8, 3), np.uint8), i % 2) for i in range(6)]
        >>> tasks.from_dataset(rows[:4], rows[4:]).classes
        2
    """
    parts = []
    for data in (train, test):
        if len(data) and not isinstance(first := data[0], (tuple, list, dict)):
            raise TypeError(f"train and test must give (image, label) or a dict, got {type(first).__name__}")
        keys = (image, label) if len(data) and isinstance(data[0], dict) else (0, 1)
        parts.append([(_Cell(data, i, keys[0]), own) for i, own in enumerate(_labels(data, keys[1]))])
    task = _task(name, parts, metric, classes, skip_corrupt, stats, "data set objects")
    # What Hugging Face and torchvision call them.
    features = getattr(train, "features", None)
    titles = (
        getattr(features.get(label), "names", None) if isinstance(features, dict) else getattr(train, "classes", None)
    )
    return replace(task, labels=tuple(titles)) if titles and len(titles) == task.classes else task


class _Cell:
    """One image of a data set, to be read."""

    def __init__(self, data: Any, index: int, key: str | int):
        self.data, self.index, self.key = data, index, key

    def __call__(self) -> Any:
        return self.data[self.index][self.key]

    def __str__(self) -> str:
        return f"image {self.index} of {type(self.data).__name__}"


def _labels(data: Any, key: str | int) -> list[Hashable]:
    # Without reading images, where the object allows it.
    if isinstance(key, str) and hasattr(data, "column_names"):
        return list(data[key])
    for attribute in ("targets", "_labels", "labels"):
        if key == 1 and len(getattr(data, attribute, ())) == len(data):
            return [label.item() if isinstance(label, Tensor) else label for label in getattr(data, attribute)]
    return [data[i][key] for i in range(len(data))]


def _labelled(folder: Path) -> list[tuple[Path, str]]:
    """The images in the folders of a folder, and these folders' names."""
    rows = [
        (path, own.name) for own in sorted(folder.iterdir()) if own.is_dir()
        for path in sorted(own.rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS
    ]  # fmt: skip
    if not rows:
        raise FileNotFoundError(f"{folder} must hold one folder of images for every class, but holds none with images")
    empty = {own.name for own in folder.iterdir() if own.is_dir()} - {label for _, label in rows}
    if empty:
        raise ValueError(f"{folder} has classes without images: {', '.join(sorted(empty))}")
    return rows


def _share(test: float) -> Callable[[int], int]:
    if not 0 < test < 1:
        raise ValueError(f"test must lie between 0 and 1, got {test}")
    return lambda images: max(round(test * images), 1)


def split(labels: Sequence[Hashable], testing: Callable[[int], int], seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images for training and for testing.

    Args:
        labels: of all images.
        testing: how many of a class's images are for testing, given how many there are.
        seed: of the choice.
    """
    by_class: dict[Hashable, list[int]] = {}
    for number, label in enumerate(labels):
        by_class.setdefault(label, []).append(number)
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for numbers in by_class.values():
        shuffled = [numbers[i] for i in torch.randperm(len(numbers), generator=generator)]
        count = testing(len(numbers))
        held_out += shuffled[:count]
        train += shuffled[count:]
    return sorted(train), sorted(held_out)


def _task(name, parts, metric, classes, skip_corrupt, stats, source) -> Task:
    names = sorted({label for part in parts for _, label in part}, key=lambda label: (str(type(label)), label))
    for part, other, what in ((0, 1, "train"), (1, 0, "test")):
        lacking = {label for _, label in parts[other]} - {label for _, label in parts[part]}
        if lacking or not parts[part]:
            shown = ", ".join(str(label) for label in sorted(lacking, key=str)[:5])
            raise ValueError(f"{name} has nothing to {what} on for {len(lacking)} of {len(names)} classes: {shown}")
    if classes is not None and len(names) != classes:
        raise ValueError(f"{name} must have {classes} classes, got {len(names)}")
    fields = []
    for part in parts:
        images = LazyImages([item for item, _ in part])
        kept = readable(name, images, skip_corrupt)
        fields += [images[kept], torch.tensor([names.index(part[i][1]) for i in kept], dtype=torch.int64)]
    return Task(
        name, len(names), metric, *fields, flip=True, source=source, labels=tuple(str(label) for label in names),
        mean=tuple(stats[0]), std=tuple(stats[1]),
    )  # fmt: skip


def readable(name: str, images: LazyImages, skip_corrupt: bool) -> list[int]:
    """The numbers of the images that can be read; all of them are read for that.

    Raises:
        ValueError: some cannot, and ``skip_corrupt`` is False; they are named.
    """
    broken = images.broken()
    if broken:
        shown = "\n  ".join(f"{images.name(index)}: {error}" for index, error in list(broken.items())[:10])
        more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
        message = f"{name}: {len(broken)} of {len(images)} images cannot be read:\n  {shown}{more}"
        if not skip_corrupt:
            raise ValueError(f"{message}\nMend them, or leave them out with skip_corrupt=True (--skip-corrupt)")
        logger.warning("%s\nthey are left out", message)
    return [index for index in range(len(images)) if index not in broken]
