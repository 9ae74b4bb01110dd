"""Training loops of the study (arXiv 2111.13445, section 3): upstream, linear and full finetuning.

A run that is stopped and started again computes the same bits with one thread. With several, those of PyTorch's dense
kernels whose sums depend on which thread comes first (MKL's small products on some CPUs) differ in the last bit.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from ..distributed import check_masks
from ..engine import compile
from ..io import load_checkpoint, save_checkpoint
from ..pruning import Pruner, recalibrate_batchnorm_
from .data import IMAGENET, LazyImages, Stats, Task, View
from .models import head_name, replace_head_

logger = logging.getLogger("sparsekit")


@dataclass
class Result:
    """What training gave.

    Attributes:
        accuracy: on the test images, by the task's metric, in [0, 1].
        history: one dict per epoch: epoch, loss, lr, seconds.
        seconds: spent in training, evaluation excluded.
        model: the trained model, in eval mode.
    """

    accuracy: float
    history: list[dict[str, float]]
    seconds: float
    model: nn.Module


def prepare(images: Tensor, size: int, channels: int = 1) -> Tensor:
    """uint8 ``[n, c, h, w]`` -> float ``[n, channels, size, size]``, about zero mean and unit variance.

    A model of one channel sees the luma of colour images (ITU-R BT.601), a model of three sees grey ones three times.

    Raises:
        ValueError: other numbers of channels differ.
    """
    if images.shape[-2:] != (size, size):
        images = vision.resize(images, [size, size], antialias=True)
    if (images.shape[1], channels) == (3, 1):
        images = vision.rgb_to_grayscale(images)
    elif images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)
    elif images.shape[1] != channels:
        raise ValueError(f"images must have 1 channel or {channels}, the model's, got {images.shape[1]}")
    return images.float().div_(255).sub_(0.3).div_(0.35)


def augment(images: Tensor, flip: bool, generator: torch.Generator, padding: int = 2) -> Tensor:
    """A random crop of every padded image, and a mirror image of half of them if ``flip``; ``[n, c, h, w]``."""
    n, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4, value=float(images.min()) if n else 0.0)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    columns = left + torch.arange(w)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(h)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def milestones_for(epochs: int) -> tuple[int, int]:
    """The protocol's epochs 50 and 100 of 150, scaled to ``epochs``."""
    return round(epochs / 3), round(epochs * 2 / 3)


def plain(
    images: Tensor | LazyImages,
    size: int,
    channels: int,
    batch_size: int,
    stats: Stats = IMAGENET,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Iterator[Tensor]:
    """Images as they are tested, float ``[n, channels, size, size]`` at a time; tensors have no use for the last two."""
    if isinstance(images, Tensor):
        for part in images.split(batch_size):
            yield prepare(part, size, channels)
    else:
        yield from images.batches(View(size, channels, stats, interpolation), batch_size)


def batches(
    task: Task,
    size: int,
    channels: int,
    batch_size: int,
    augmented: bool,
    seed: int,
    epoch: int,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches; order and augmentation follow from (seed, epoch) alone."""
    seed = 1_000_003 * seed + epoch
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task.train_labels), generator=generator)
    if isinstance(task.train_images, LazyImages):
        order = order[: max(end for _, end in _parts(len(order), batch_size))]
        view = View(size, channels, (task.mean, task.std), interpolation, augmented, task.flip)
        yield from zip(
            task.train_images.batches(view, batch_size, order, seed), task.train_labels[order].split(batch_size)
        )
        return
    for begin, end in _parts(len(order), batch_size):
        part = order[begin:end]
        images = prepare(task.train_images[part], size, channels)
        yield (augment(images, task.flip, generator) if augmented else images), task.train_labels[part]


def _parts(images: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of every batch; the last is left out where BatchNorm could not train on any rank's share of it."""
    least = 2 * (dist.get_world_size() if dist.is_initialized() else 1)
    for begin in range(0, images, batch_size):
        end = min(begin + batch_size, images)
        if end - begin >= least or begin == 0:
            yield begin, end


def _shares(*arguments) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`batches`, of which every rank gets its share."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for images, labels in batches(*arguments):
        yield images[rank::ranks], labels[rank::ranks]


def train(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "steps",
    label_smoothing: float = 0.0,
    size: int = 28,
    augmented: bool = True,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    pruner: Callable[[nn.Module, torch.optim.Optimizer, int], Pruner] | None = None,
    checkpoint: str | os.PathLike | None = None,
    description: str = "training",
) -> Result:
    """Train ``model`` in place with SGD, on its device; sparse layers keep their masks unless a pruner changes them.

    The order of images and their augmentation follow from the seed and the epoch, so that a run that is stopped and
    started again from its checkpoint ends with the same weights.

    In a process group every rank calls it, and trains on its share of every batch, equal but for one image; BatchNorm sees
    that share, and keeps the statistics of the first rank, which alone writes the checkpoint.

    Args:
        model: classifies ``[n, channels, size, size]``; images go to where it is.
        task: what to train on.
        epochs, lr, batch_size, momentum, weight_decay: of SGD.
        seed: of order and augmentation.
        schedule: ``"steps"``: lr × 0.1 after 1/3 and 2/3 of the epochs, the protocol's; ``"cosine"``: to zero, by epoch,
            with one epoch of warm-up.
        label_smoothing: of the cross entropy, in [0, 1).
        size: images are resized to this height and width.
        augmented: random crops and, if the task allows it, flips.
        interpolation: with which lazy images are resized.
        pruner: called with (model, optimizer, optimizer steps per epoch); makes the pruner that prunes while training. It is
            finalized at the end, and BatchNorm recalibrated where the method wants it.
        checkpoint: a file, written after every epoch, and read first if it is there.
        description: for the progress bar.

    Returns:
        The :class:`Result`.

    Raises:
        ValueError: ``schedule`` is unknown, or ``epochs`` is not positive.
        NotImplementedError: a pruner, in a process group.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if pruner and ranks > 1:
        raise NotImplementedError(f"pruner must be None in a process group, got one of {ranks} ranks")
    if schedule not in ("steps", "cosine"):
        raise ValueError(f"schedule must be 'steps' or 'cosine', got {schedule!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    device = _device(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr, momentum, weight_decay=weight_decay
    )
    steps = sum(1 for _ in _parts(len(task.train_labels), batch_size))
    pruning = pruner(model, optimizer, steps) if pruner else None
    # What the forward pass goes through; gradients are averaged behind it.
    run, is_first = model, True
    if ranks > 1:
        check_masks(model)
        run, is_first = DistributedDataParallel(model), dist.get_rank() == 0
    history: list[dict[str, float]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_checkpoint(checkpoint, model, optimizer).extra
        history = saved["history"]
        if pruning:
            pruning.load_state_dict(saved["pruner"])
    with Progress(transient=True) as progress:
        bar = progress.add_task(description, total=epochs * steps, completed=len(history) * steps)
        for epoch in range(len(history), epochs):
            for group in optimizer.param_groups:
                group["lr"] = lr * _factor(schedule, epoch, epochs)
            start, losses = time.perf_counter(), []
            model.train()
            for images, labels in _shares(task, size, channels, batch_size, augmented, seed, epoch, interpolation):
                images, labels = images.to(device), labels.to(device)
                optimizer.zero_grad()

                def loss(images=images, labels=labels):
                    return F.cross_entropy(run(images), labels, label_smoothing=label_smoothing)

                if pruning:
                    losses.append(pruning.backward(loss))
                else:
                    value = loss()
                    value.backward()
                    losses.append(value.detach())
                optimizer.step()
                if pruning:
                    pruning.step()
                progress.advance(bar)
            mean = torch.stack(losses).mean()
            if ranks > 1:
                dist.all_reduce(mean)
            history.append(
                {
                    "epoch": epoch,
                    "loss": float(mean) / ranks,
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": time.perf_counter() - start,
                }
            )
            if checkpoint is not None and is_first:
                extra = {"history": history, "pruner": pruning.state_dict() if pruning else None}
                save_checkpoint(checkpoint, model, optimizer, extra)
    if ranks > 1:
        for buffer in (b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)):
            dist.broadcast(buffer, 0)
    if pruning:
        pruning.finalize()
        if pruning.needs_recalibration:
            shown = task.train_images[: 32 * batch_size]
            stats = task.mean, task.std
            recalibrate_batchnorm_(model, list(plain(shown, size, channels, batch_size, stats, interpolation)))
    accuracy = evaluate(model, task, size=size, interpolation=interpolation)
    return Result(accuracy, history, sum(h["seconds"] for h in history), model.eval())


def _factor(schedule: str, epoch: int, epochs: int) -> float:
    if schedule == "steps":
        return 0.1 ** sum(epoch >= milestone for milestone in milestones_for(epochs))
    if epoch == 0 and epochs > 2:
        return 0.5
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs)).item())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    *,
    size: int = 28,
    batch_size: int = 128,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    stats: Stats | None = None,
) -> float:
    """Accuracy on the test images, by the task's metric.

    Args:
        model: classifies ``[n, channels, size, size]``; runs in eval mode, and keeps the mode it had.
        task: which images.
        size: images are resized to this height and width.
        batch_size: images at a time.
        interpolation: with which lazy images are resized.
        stats: mean and standard deviation to take out of lazy images; None for the task's.

    Returns:
        A fraction in [0, 1].
    """
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    device, mode = _device(model), model.training
    model.eval()
    try:
        shown = plain(task.test_images, size, channels, batch_size, stats or (task.mean, task.std), interpolation)
        predicted = [model(images.to(device)).argmax(1) for images in shown]
    finally:
        model.train(mode)
    return accuracy(torch.cat(predicted).cpu(), task.test_labels, task.metric)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def accuracy(predicted: Tensor, labels: Tensor, metric: str) -> float:
    """Top-1 accuracy, or the mean over classes of the accuracy within each; ``predicted``, ``labels``: int64 ``[n]``."""
    right = (predicted == labels).float()
    if metric == "top1":
        return float(right.mean())
    return float(torch.stack([right[labels == c].mean() for c in labels.unique()]).mean())


def full_finetune(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 150,
    lr: float = 0.001,
    seed: int = 0,
    batch_size: int = 64,
    size: int = 28,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    checkpoint: str | os.PathLike | None = None,
) -> Result:
    """Full finetuning: a new dense head, and every weight that the mask keeps; masks stay fixed.

    Args:
        model: an upstream model that ends in an ``nn.Linear``; it is not changed.
        task, epochs, lr, seed, batch_size, size, interpolation, checkpoint: see :func:`train`.

    Returns:
        The :class:`Result`, with the finetuned copy.
    """
    model = _with_new_head(model, task.classes, seed)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return train(
        model, task, epochs=epochs, lr=lr, seed=seed, batch_size=batch_size, size=size, interpolation=interpolation,
        checkpoint=checkpoint, description=f"full finetuning on {task.name}",
    )  # fmt: skip


def linear_finetune(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 150,
    lr: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
    size: int = 28,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    on_the_fly: bool = False,
    checkpoint: str | os.PathLike | None = None,
    features: Features | None = None,
) -> Result:
    """Linear finetuning: a new dense head on the features of the frozen backbone, which runs as an engine on the CPU.

    Args:
        model: an upstream model that ends in an ``nn.Linear``; it is not changed.
        task, epochs, lr, seed, batch_size, size, interpolation: see :func:`train`.
        on_the_fly: run the backbone on augmented images in every epoch; else once, on plain ones, out of which, if they are
            lazy, ImageNet's mean and standard deviation are taken instead of the task's, as in the study.
        checkpoint: a file for the head, written after every epoch, and read first if it is there.
        features: of this model and task, to share between seeds; None: extracted here. Not with ``on_the_fly``.

    Where :func:`sparsekit.compile` cannot capture the backbone, it runs as it is, with a warning.

    Returns:
        The :class:`Result`, with a copy that has the new head.

    Raises:
        ValueError: ``features`` are of another number of images, or given with ``on_the_fly``.
    """
    start = time.perf_counter()
    if on_the_fly and features is not None:
        raise ValueError("features must be None with on_the_fly=True, which extracts them from augmented images")
    if features is None and not on_the_fly:
        features = extract_features(model, task, size=size, interpolation=interpolation)
    if features is not None and (len(features.train), len(features.test)) != (
        len(task.train_images),
        len(task.test_images),
    ):
        raise ValueError(
            f"features must be of {len(task.train_images)} and {len(task.test_images)} images, as {task.name} has, got "
            f"{len(features.train)} and {len(features.test)}"
        )
    model = _with_new_head(model, task.classes, seed)
    head = replace_head_(model, nn.Identity())
    model.eval()
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    device = _device(head)
    optimizer = torch.optim.SGD(head.parameters(), lr, 0.9, weight_decay=5e-4)
    backbone = _engine(model, torch.zeros(batch_size, channels, size, size), device) if on_the_fly else None
    stored = None if features is None else features.train
    history: list[dict[str, float]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = load_checkpoint(checkpoint, head, optimizer).extra["history"]
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"linear finetuning on {task.name}", total=epochs, completed=len(history))
        for epoch in range(len(history), epochs):
            began, losses = time.perf_counter(), []
            for group in optimizer.param_groups:
                group["lr"] = lr * _factor("steps", epoch, epochs)
            shown = _features(backbone, task, size, channels, batch_size, seed, epoch, interpolation, stored, device)
            for inputs, labels in shown:
                optimizer.zero_grad()
                loss = F.cross_entropy(head(inputs), labels.to(device))
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            history.append(
                {
                    "epoch": epoch,
                    "loss": float(torch.stack(losses).mean()),
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": time.perf_counter() - began,
                }
            )
            progress.advance(bar)
            if checkpoint is not None:
                save_checkpoint(checkpoint, head, optimizer, {"history": history})
    seconds = time.perf_counter() - start
    _put_head_back(model, head)
    if features is None:
        return Result(evaluate(model, task, size=size, interpolation=interpolation), history, seconds, model.eval())
    with torch.no_grad():
        predicted = head(features.test).argmax(1).cpu()
    return Result(accuracy(predicted, task.test_labels, task.metric), history, seconds, model.eval())


class Features(NamedTuple):
    """What a frozen backbone makes of a task's images, as they are.

    Attributes:
        train, test: float32 ``[n, features]``.
    """

    train: Tensor
    test: Tensor


@torch.no_grad()
def extract_features(
    model: nn.Module,
    task: Task,
    *,
    size: int = 28,
    batch_size: int = 128,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> Features:
    """Run the backbone, as an engine on the CPU, over all images once; out of lazy ones ImageNet's mean is taken.

    Args:
        model: ends in an ``nn.Linear``, which is left out; it is not changed.
        task: which images.
        size: images are resized to this height and width.
        batch_size: images at a time.
        interpolation: of lazy images.

    Returns:
        The :class:`Features`.
    """
    model = copy.deepcopy(model)
    device = _device(replace_head_(model, nn.Identity()))
    model.eval()
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    backbone = _engine(model, torch.zeros(batch_size, channels, size, size), device)

    def features(images):
        shown = plain(images, size, channels, batch_size, IMAGENET, interpolation)
        return torch.cat([backbone(part.to(device)) for part in shown])

    return Features(features(task.train_images), features(task.test_images))


def _engine(backbone: nn.Module, example: Tensor, device: torch.device) -> nn.Module:
    """The backbone as an engine; by the cost table, so that a run that is stopped goes on with the same features."""
    if device.type != "cpu":
        return backbone
    try:
        return compile(backbone, example, autotune=False)
    except ValueError as error:
        logger.warning("the backbone runs without an engine: %s", error)
        return backbone


def _features(
    backbone, task, size, channels, batch_size, seed, epoch, interpolation, stored, device
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (features, labels): the stored ones in random order, or fresh ones of augmented images."""
    if stored is not None:
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        for part in order.split(batch_size):
            yield stored[part], task.train_labels[part]
        return
    for images, labels in batches(task, size, channels, batch_size, True, seed, epoch, interpolation):
        with torch.no_grad():
            features = backbone(images.to(device))
        yield features, labels


def _with_new_head(model: nn.Module, classes: int, seed: int) -> nn.Module:
    """A copy of ``model`` that ends in a fresh linear layer of ``classes`` outputs."""
    model = copy.deepcopy(model)
    old = model.get_submodule(head_name(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        replace_head_(model, nn.Linear(old.in_features, classes).to(old.weight.device))
    return model


def _put_head_back(model: nn.Module, head: nn.Module) -> None:
    """Undo ``replace_head_(model, nn.Identity())``."""
    name = next(name for name, module in reversed(list(model.named_modules())) if type(module) is nn.Identity)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, head)
