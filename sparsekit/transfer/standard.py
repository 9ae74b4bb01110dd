"""The study's twelve tasks (arXiv 2111.13445, table 1), from where torchvision keeps them.

Names and labels are read by torchvision's data sets, but for Birdsnap, which has none, SUN397, whose official split it does
not know, and the splits of Caltech's. What is there is counted, and read once, before anything is trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.datasets as sets

from ..io import write_atomically
from . import own
from .data import LazyImages, Stats, Task
from .fetch import check_room

# What a loader gives of a part: images (paths, or arrays), labels.
Part = tuple[Sequence[Any], Sequence[int]]
SEED = 0


@dataclass(frozen=True)
class Standard:
    """One of the twelve.

    Attributes:
        title: of the data set.
        classes, train, test: their numbers.
        metric: the study's.
        stats: mean and standard deviation of its channels, from the study's code.
        where: is looked for, below the folder of data.
        how: to get it.
        parts: gives the parts for training and for testing; called with the folder of data, and whether to download.
        gigabytes: of the archives that torchvision downloads, about; 0 where it cannot.
    """

    title: str
    classes: int
    train: int
    test: int
    metric: str
    stats: Stats
    where: str
    how: str
    parts: Callable[[Path, bool], tuple[Part, Part]]
    gigabytes: float = 0


def load(name: str, root: Path, *, download: bool = False, skip_corrupt: bool = False) -> Task:
    """One of :data:`STANDARD`.

    Args:
        name: which.
        root: the folder of data.
        download: whether to fetch it, where torchvision can.
        skip_corrupt: leave out images that cannot be read, with a warning.

    Raises:
        RuntimeError: it is not there, or not whole; the message says where it was looked for, and how to get it.
        ValueError: images cannot be read, which are then named.
    """
    standard = STANDARD[name]
    if download and not standard.gigabytes:
        raise RuntimeError(f"{standard.title} cannot be downloaded from here. {standard.how}")
    if download:
        root.mkdir(parents=True, exist_ok=True)
        # The archives stay beside what is in them.
        check_room(root, 0 if (root / standard.where).exists() else int(2e9 * standard.gigabytes), standard.title)
    try:
        if not download and not (root / standard.where).is_dir():
            raise FileNotFoundError("there is no such folder")
        parts = standard.parts(root, download)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise RuntimeError(
            f"{standard.title} is not there, or not whole: {error}. {_looked_for(name, root)}"
        ) from error
    fields = []
    for (items, labels), expected, what in zip(parts, (standard.train, standard.test), ("train", "test")):
        missing = [item for item in items if isinstance(item, Path) and not item.is_file()]
        if missing:
            raise RuntimeError(
                f"{standard.title} is not whole: {len(missing)} of {len(items)} images to {what} on are missing, such as "
                f"{missing[0]}. {_looked_for(name, root)}"
            )
        found = len(set(labels))
        if len(items) != expected or found != standard.classes:
            raise RuntimeError(
                f"{standard.title} must have {expected} images of {standard.classes} classes to {what} on, got "
                f"{len(items)} of {found}. {_looked_for(name, root)}"
            )
        fields += [LazyImages(items), torch.tensor(labels, dtype=torch.int64)]
    for i in (0, 2):
        if isinstance(fields[i].items[0], Path):
            kept = _readable(name, root, ("train", "test")[i // 2], fields[i], skip_corrupt)
            fields[i], fields[i + 1] = fields[i][kept], fields[i + 1][kept]
    return Task(
        name, standard.classes, standard.metric, *fields, flip=True, source=standard.title,
        mean=standard.stats[0], std=standard.stats[1],
    )  # fmt: skip


def _looked_for(name: str, root: Path) -> str:
    standard = STANDARD[name]
    fetch = f" `sparsekit tasks fetch {name}` downloads it." if standard.gigabytes else ""
    return f"It was looked for in {root / standard.where}. {standard.how}{fetch}"


def _readable(name: str, root: Path, part: str, images: LazyImages, skip_corrupt: bool) -> list[int]:
    """As :func:`own.readable`, but that all can be read is written down, and not tried again for the same files."""
    state = {"images": len(images), "bytes": sum(images.items[i].stat().st_size for i in images.indices)}
    known = root / "checked" / f"{name}-{part}.json"
    if known.is_file() and json.loads(known.read_text()) == state:
        return list(range(len(images)))
    kept = own.readable(name, images, skip_corrupt)
    if len(kept) == len(images):
        write_atomically(known, lambda target: Path(target).write_text(json.dumps(state)))
    return kept


def _labelled(data: Any) -> Part:
    """Paths and labels of a data set of torchvision that takes a loader, here one that reads nothing."""
    paths, labels = zip(*(data[i] for i in range(len(data)))) if len(data) else ((), ())
    return [Path(path) for path in paths], list(labels)


def _joined(*parts: Part) -> Part:
    return [item for items, _ in parts for item in items], [label for _, labels in parts for label in labels]


def _sun397(root: Path, download: bool) -> tuple[Part, Part]:
    folder = root / "SUN397"
    if download:
        sets.SUN397(root, download=True)
    classes = [line.strip() for line in (folder / "ClassName.txt").read_text().split("\n") if line.strip()]
    number = {name: i for i, name in enumerate(classes)}
    parts = []
    for file in ("Training_01.txt", "Testing_01.txt"):
        found = [
            path for path in (folder / file, folder / "Partitions" / file, root / "Partitions" / file) if path.is_file()
        ]
        if not found:
            raise FileNotFoundError(f"there is no {file}, a file of the official splits (Partitions.zip)")
        lines = [line.strip() for line in found[0].read_text().splitlines() if line.strip()]
        parts.append(
            ([folder / line.lstrip("/") for line in lines], [number[line.rpartition("/")[0]] for line in lines])
        )
    return parts[0], parts[1]


def _aircraft(root: Path, download: bool) -> tuple[Part, Part]:
    train, test = (sets.FGVCAircraft(root, part, download=download, loader=Path) for part in ("trainval", "test"))
    return _labelled(train), _labelled(test)


def _birdsnap(root: Path, download: bool) -> tuple[Part, Part]:
    train, test = (sets.ImageFolder(root / "birdsnap" / part, loader=Path) for part in ("train", "test"))
    if train.classes != test.classes:
        raise ValueError(f"train and test must have the same classes, got {len(train.classes)} and {len(test.classes)}")
    return _labelled(train), _labelled(test)


def _caltech(data: Any, folder: Path, file: str, per_class: int) -> tuple[Part, Part]:
    """``per_class`` images of every class are for training, chosen once by :data:`SEED`."""
    paths = [
        folder / data.categories[label] / file.format(label + 1, number) for label, number in zip(data.y, data.index)
    ]
    chosen = own.split(data.y, lambda images: max(images - per_class, 0), SEED)
    train, test = (([paths[i] for i in part], [data.y[i] for i in part]) for part in chosen)
    return train, test


def _caltech101(root: Path, download: bool) -> tuple[Part, Part]:
    data = sets.Caltech101(root, download=download)
    return _caltech(data, root / "caltech101" / "101_ObjectCategories", "image_{1:04d}.jpg", 30)


def _caltech256(root: Path, download: bool) -> tuple[Part, Part]:
    data = sets.Caltech256(root, download=download)
    return _caltech(data, root / "caltech256" / "256_ObjectCategories", "{0:03d}_{1:04d}.jpg", 60)


def _cars(root: Path, download: bool) -> tuple[Part, Part]:
    train, test = (sets.StanfordCars(root, part, loader=Path) for part in ("train", "test"))
    return _labelled(train), _labelled(test)


def _cifar(kind: type, root: Path, download: bool) -> tuple[Part, Part]:
    train, test = (kind(root, train=part, download=download) for part in (True, False))
    return (train.data, train.targets), (test.data, test.targets)


def _dtd(root: Path, download: bool) -> tuple[Part, Part]:
    train, val, test = (
        _labelled(sets.DTD(root, part, partition=1, download=download, loader=Path))
        for part in ("train", "val", "test")
    )
    return _joined(train, val), test


def _flowers(root: Path, download: bool) -> tuple[Part, Part]:
    train, val, test = (
        _labelled(sets.Flowers102(root, part, download=download, loader=Path)) for part in ("train", "val", "test")
    )
    return _joined(train, val), test


def _food101(root: Path, download: bool) -> tuple[Part, Part]:
    train, test = (sets.Food101(root, part, download=download, loader=Path) for part in ("train", "test"))
    return _labelled(train), _labelled(test)


def _pets(root: Path, download: bool) -> tuple[Part, Part]:
    # It takes no loader.
    train, test = (sets.OxfordIIITPet(root, part, download=download) for part in ("trainval", "test"))
    return (train._images, train._labels), (test._images, test._labels)


STANDARD = {
    "sun397": Standard(
        "SUN397", 397, 19_850, 19_850, "top1", ((0.4772, 0.4566, 0.4168), (0.2556, 0.2520, 0.2720)), "SUN397",
        "Unpack SUN397.tar.gz there, and the official splits, Partitions.zip, into its folder Partitions.", _sun397, 37,
    ),
    "aircraft": Standard(
        "FGVC Aircraft", 100, 6_667, 3_333, "mean_per_class", ((0.4892, 0.5159, 0.5356), (0.2275, 0.2200, 0.2476)),
        "fgvc-aircraft-2013b", "Unpack fgvc-aircraft-2013b.tar.gz there.", _aircraft, 2.8,
    ),
    "birdsnap": Standard(
        "Birdsnap", 500, 32_677, 8_171, "top1", ((0.4856, 0.4948, 0.4486), (0.2233, 0.2213, 0.2586)), "birdsnap",
        "Its authors give a script that collects the images; put them into train/<class> and test/<class>.", _birdsnap,
    ),
    "caltech101": Standard(
        "Caltech-101", 101, 3_030, 5_647, "mean_per_class", ((0.5413, 0.5063, 0.4693), (0.3115, 0.3090, 0.3183)),
        "caltech101/101_ObjectCategories", "Unpack 101_ObjectCategories.tar.gz there.", _caltech101, 0.14,
    ),
    "caltech256": Standard(
        "Caltech-256", 257, 15_420, 15_187, "mean_per_class", ((0.5438, 0.5141, 0.4821), (0.3077, 0.3044, 0.3163)),
        "caltech256/256_ObjectCategories", "Unpack 256_ObjectCategories.tar there.", _caltech256, 1.2,
    ),
    "cars": Standard(
        "Stanford Cars", 196, 8_144, 8_041, "top1", ((0.4513, 0.4354, 0.4358), (0.2900, 0.2880, 0.2951)), "stanford_cars",
        "Put cars_train, cars_test, devkit and cars_test_annos_withlabels.mat there.", _cars,
    ),
    "cifar10": Standard(
        "CIFAR-10", 10, 50_000, 10_000, "top1", ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar-10-batches-py", "Unpack cifar-10-python.tar.gz there.", lambda *to: _cifar(sets.CIFAR10, *to), 0.17,
    ),
    "cifar100": Standard(
        "CIFAR-100", 100, 50_000, 10_000, "top1", ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "cifar-100-python", "Unpack cifar-100-python.tar.gz there.", lambda *to: _cifar(sets.CIFAR100, *to), 0.17,
    ),
    "dtd": Standard(
        "DTD, split 1", 47, 3_760, 1_880, "top1", ((0.5322, 0.4734, 0.4251), (0.2642, 0.2530, 0.2613)), "dtd/dtd",
        "Unpack dtd-r1.0.1.tar.gz there.", _dtd, 0.6,
    ),
    "flowers": Standard(
        "Oxford Flowers-102", 102, 2_040, 6_149, "mean_per_class", ((0.5133, 0.4148, 0.3383), (0.2959, 0.2502, 0.2900)),
        "flowers-102", "Put jpg, imagelabels.mat and setid.mat there.", _flowers, 0.35,
    ),
    "food101": Standard(
        "Food-101", 101, 75_750, 25_250, "top1", ((0.5566, 0.4378, 0.3193), (0.2589, 0.2622, 0.2630)), "food-101",
        "Unpack food-101.tar.gz there.", _food101, 5,
    ),
    "pets": Standard(
        "Oxford-IIIT Pets", 37, 3_680, 3_669, "mean_per_class", ((0.4807, 0.4432, 0.3949), (0.2598, 0.2537, 0.2597)),
        "oxford-iiit-pet", "Unpack images.tar.gz and annotations.tar.gz there.", _pets, 0.8,
    ),
}  # fmt: skip
