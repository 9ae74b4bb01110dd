"""Real photographs that packages carry, as ImageNet models take them: twenty with labels, and some 250 without."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from .fetch import fetch_wheel, unpack_debian

SIZE = 224
FOOLBOX = "foolbox-3.3.4-py3-none-any.whl", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"
# One of each pair of views, nothing grey, no charts.
_OPENCV = (
    "data/aero1", "data/aero3", "data/aloeL", "data/apple", "data/baboon", "data/board", "data/building",
    "data/butterfly", "data/chicky_512", "data/ela_original", "data/fruits", "data/graf1", "data/home", "data/left",
    "data/leuvenA", "data/licenseplate_motion", "data/messi5", "data/orange", "data/rubberwhale1", "data/smarties",
    "data/squirrel_cls", "data/stuff", "dnn_superres/butterfly", "hfs/data/000", "hfs/data/001", "hfs/data/002",
    "reg/home", "text/scenetext01", "text/scenetext02", "text/scenetext03", "text/scenetext04", "text/scenetext05",
    "text/scenetext06", "alphamat/input_images/plant",
)  # fmt: skip
_STAMPS = ("animals", "food", "hobbies", "household", "medical", "military", "plants", "sports", "vehicles")
_STAMP_SIZE = 128
# What :func:`digest` says of the photographs above, as the packages of Debian 12 have them.
SHA256 = "c4aa85e0e298ac04a8f9c79cfece494d8b4bab2a7859a658da1e96261d57ab7c"


def labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """The ImageNet photographs in PyPI's ``foolbox``, fetched into ``folder`` if they are not there.

    Returns:
        Images, uint8 ``[20, 3, 224, 224]``, and their classes, int64 ``[20]``.

    Raises:
        RuntimeError, ValueError: see :func:`~sparsekit.transfer.fetch.fetch_wheel`.
    """
    with zipfile.ZipFile(fetch_wheel(*FOOLBOX, folder)) as wheel:
        # imagenet_<number>_<class>.jpg
        names = sorted(name for name in wheel.namelist() if name.startswith("foolbox/data/imagenet_"))
        images = torch.stack([centre(_opaque(Image.open(io.BytesIO(wheel.read(name))))) for name in names])
    return images, torch.tensor([int(Path(name).stem.split("_")[-1]) for name in names])


def unlabelled(folder: Path) -> list[Path]:
    """Photographs in Debian's ``opencv-doc`` (34 scenes) and ``tuxpaint-stamps-default`` (cut out), fetched if need be.

    Returns:
        Their files, in ``folder``.

    Raises:
        RuntimeError: they cannot be had, or are not those that the study has used.
    """
    kept = folder / "photographs"
    if not kept.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            chosen = Path(scratch) / "photographs"
            for package, select in (("opencv-doc", _scenes), ("tuxpaint-stamps-default", _stamps)):
                own = Path(scratch) / package
                own.mkdir()
                for path, name in select(unpack_debian(package, own) / "usr" / "share"):
                    target = chosen / package / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            chosen.rename(kept)
    paths = sorted(path for path in kept.rglob("*") if path.is_file())
    if digest(paths) != SHA256:
        raise RuntimeError(
            f"{kept} must hold the photographs of Debian 12's opencv-doc and tuxpaint-stamps-default, but holds others; "
            "remove it to have them fetched, or give a folder of your own photographs"
        )
    return paths


def _scenes(share: Path) -> list[tuple[Path, str]]:
    examples = share / "doc" / "opencv-doc" / "examples"
    found = [path for name in _OPENCV for path in examples.glob(f"{name}.*")]
    return [(path, path.relative_to(examples).as_posix()) for path in found if path.suffix in (".jpg", ".png")]


def _stamps(share: Path) -> list[tuple[Path, str]]:
    stamps = share / "tuxpaint" / "stamps"
    found = [path for kind in _STAMPS for path in stamps.glob(f"{kind}/**/*.png")]
    drawn = re.compile("cartoon|_mirror|toys")
    return [
        (path, path.relative_to(stamps).as_posix())
        for path in found
        if not drawn.search(str(path)) and max(Image.open(path).size) >= _STAMP_SIZE
    ]


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 of what the files hold, in their order."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def split(paths: Sequence[Path], by_word: bool = True) -> tuple[list[Path], list[Path]]:
    """Two thirds and one third of the photographs; ``by_word``: names with the same first word, as frog-1, stay together."""
    names = [((by_word and re.match(r"[^\W\d_]+", path.stem)) or [path.stem])[0].lower() for path in paths]
    held_out = set(sorted(set(names))[::3])
    parts = [[path for path, name in zip(paths, names) if (name in held_out) is held] for held in (False, True)]
    return parts[0], parts[1]


def read(path: Path) -> Image.Image:
    """A photograph in RGB; one that is cut out in the middle of a white square."""
    return _opaque(Image.open(path))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return square


def centre(image: Image.Image) -> Tensor:
    """The middle of a photograph whose shorter side is made 256: uint8 ``[3, 224, 224]``."""
    image = vision.resize(image, [256], vision.InterpolationMode.BICUBIC)
    return vision.pil_to_tensor(vision.center_crop(image, [SIZE, SIZE]))


def crops(images: Sequence[Image.Image], count: int, seed: int = 0) -> Tensor:
    """``count`` random crops, half of them mirrored, of all images in turn: uint8 ``[count, 3, 224, 224]``."""
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, (0.35, 1.0), interpolation=vision.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.cat([torch.randperm(len(images)) for _ in range(-(-count // len(images)))])[:count]
        return torch.stack([vision.pil_to_tensor(augment(images[i])) for i in order.tolist()])


def normalize(images: Tensor) -> Tensor:
    """uint8 -> what :class:`~sparsekit.transfer.models.EfficientNetLite0` takes."""
    return (images.float() - 127) / 128
