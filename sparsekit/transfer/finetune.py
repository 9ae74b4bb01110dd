"""Training loops of the study (arXiv 2111.13445, section 3): upstream, linear and full finetuning."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

from ..engine import compile
from ..io import load_checkpoint, save_checkpoint
from ..pruning import Pruner, recalibrate_batchnorm_
from .models import head_name, replace_head_
from .tasks import Task

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
    """uint8 ``[n, c, h, w]`` -> float ``[n, channels, size, size]``, about zero mean and unit variance."""
    if images.shape[-2:] != (size, size):
        images = vision.resize(images, [size, size], antialias=True)
    if images.shape[1] != channels:
        images = images.expand(-1, channels, -1, -1)
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


def batches(
    task: Task, size: int, channels: int, batch_size: int, augmented: bool, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches; order and augmentation follow from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(task.train_labels), generator=generator)
    for part in order.split(batch_size):
        # BatchNorm cannot train on one image.
        if len(part) == 1 and len(order) > 1:
            continue
        images = prepare(task.train_images[part], size, channels)
        yield (augment(images, task.flip, generator) if augmented else images), task.train_labels[part]


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
    pruner: Callable[[nn.Module, torch.optim.Optimizer, int], Pruner] | None = None,
    checkpoint: str | os.PathLike | None = None,
    description: str = "training",
) -> Result:
    """Train ``model`` in place with SGD, on its device; sparse layers keep their masks unless a pruner changes them.

    The order of images and their augmentation follow from the seed and the epoch, so that a run that is stopped and
    started again from its checkpoint ends with the same weights.

    Args:
        model: classifies ``[n, channels, size, size]``.
        task: what to train on.
        epochs, lr, batch_size, momentum, weight_decay: of SGD.
        seed: of order and augmentation.
        schedule: ``"steps"``: lr × 0.1 after 1/3 and 2/3 of the epochs, the protocol's; ``"cosine"``: to zero, by epoch,
            with one epoch of warm-up.
        label_smoothing: of the cross entropy, in [0, 1).
        size: images are resized to this height and width.
        augmented: random crops and, if the task allows it, flips.
        pruner: called with (model, optimizer, optimizer steps per epoch); makes the pruner that prunes while training. It is
            finalized at the end, and BatchNorm recalibrated where the method wants it.
        checkpoint: a file, written after every epoch, and read first if it is there.
        description: for the progress bar.

    Returns:
        The :class:`Result`.

    Raises:
        ValueError: ``schedule`` is unknown, or ``epochs`` is not positive.
    """
    if schedule not in ("steps", "cosine"):
        raise ValueError(f"schedule must be 'steps' or 'cosine', got {schedule!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    device = _device(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr, momentum, weight_decay=weight_decay
    )
    steps = -(-len(task.train_labels) // batch_size)
    if len(task.train_labels) % batch_size == 1 and steps > 1:
        steps -= 1
    pruning = pruner(model, optimizer, steps) if pruner else None
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
            for images, labels in batches(task, size, channels, batch_size, augmented, seed, epoch):
                images, labels = images.to(device), labels.to(device)
                optimizer.zero_grad()

                def loss(images=images, labels=labels):
                    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

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
            history.append(
                {
                    "epoch": epoch,
                    "loss": float(torch.stack(losses).mean()),
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": time.perf_counter() - start,
                }
            )
            if checkpoint is not None:
                extra = {"history": history, "pruner": pruning.state_dict() if pruning else None}
                save_checkpoint(checkpoint, model, optimizer, extra)
    if pruning:
        pruning.finalize()
        if pruning.needs_recalibration:
            shown = task.train_images[: 32 * batch_size].split(batch_size)
            recalibrate_batchnorm_(model, [prepare(images, size, channels) for images in shown])
    accuracy = evaluate(model, task, size=size)
    return Result(accuracy, history, sum(h["seconds"] for h in history), model.eval())


def _factor(schedule: str, epoch: int, epochs: int) -> float:
    if schedule == "steps":
        return 0.1 ** sum(epoch >= milestone for milestone in milestones_for(epochs))
    if epoch == 0 and epochs > 2:
        return 0.5
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs)).item())


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, *, size: int = 28, batch_size: int = 128) -> float:
    """Accuracy on the test images, by the task's metric.

    Args:
        model: classifies ``[n, channels, size, size]``; runs in eval mode, and keeps the mode it had.
        task: which images.
        size: images are resized to this height and width.
        batch_size: images at a time.

    Returns:
        A fraction in [0, 1].
    """
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    device, mode = _device(model), model.training
    model.eval()
    try:
        shown = (prepare(part, size, channels).to(device) for part in task.test_images.split(batch_size))
        predicted = [model(images).argmax(1) for images in shown]
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
    checkpoint: str | os.PathLike | None = None,
) -> Result:
    """Full finetuning: a new dense head, and every weight that the mask keeps; masks stay fixed.

    Args:
        model: an upstream model that ends in an ``nn.Linear``; it is not changed.
        task, epochs, lr, seed, batch_size, size, checkpoint: see :func:`train`.

    Returns:
        The :class:`Result`, with the finetuned copy.
    """
    model = _with_new_head(model, task.classes, seed)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return train(
        model, task, epochs=epochs, lr=lr, seed=seed, batch_size=batch_size, size=size, checkpoint=checkpoint,
        description=f"full finetuning on {task.name}",
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
    on_the_fly: bool = False,
    checkpoint: str | os.PathLike | None = None,
) -> Result:
    """Linear finetuning: a new dense head on the features of the frozen backbone, which runs as an engine on the CPU.

    Args:
        model: an upstream model that ends in an ``nn.Linear``; it is not changed.
        task, epochs, lr, seed, batch_size, size: see :func:`train`.
        on_the_fly: run the backbone on augmented images in every epoch; else once, on plain ones.
        checkpoint: a file for the head, written after every epoch, and read first if it is there.

    Where :func:`sparsekit.compile` cannot capture the backbone, it runs as it is, with a warning.

    Returns:
        The :class:`Result`, with a copy that has the new head.
    """
    model = _with_new_head(model, task.classes, seed)
    head = replace_head_(model, nn.Identity())
    model.eval()
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    device = _device(head)
    optimizer = torch.optim.SGD(head.parameters(), lr, 0.9, weight_decay=5e-4)
    start = time.perf_counter()
    backbone = _engine(model, torch.zeros(batch_size, channels, size, size)) if device.type == "cpu" else model
    stored = None
    if not on_the_fly:
        with torch.no_grad():
            shown = (prepare(part, size, channels).to(device) for part in task.train_images.split(128))
            stored = torch.cat([backbone(images) for images in shown])
    history: list[dict[str, float]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = load_checkpoint(checkpoint, head, optimizer).extra["history"]
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"linear finetuning on {task.name}", total=epochs, completed=len(history))
        for epoch in range(len(history), epochs):
            began, losses = time.perf_counter(), []
            for group in optimizer.param_groups:
                group["lr"] = lr * _factor("steps", epoch, epochs)
            for features, labels in _features(backbone, task, size, channels, batch_size, seed, epoch, stored, device):
                optimizer.zero_grad()
                loss = F.cross_entropy(head(features), labels.to(device))
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
    return Result(evaluate(model, task, size=size), history, seconds, model)


def _engine(backbone: nn.Module, example: Tensor) -> nn.Module:
    """The backbone as an engine; by the cost table, so that a run that is stopped goes on with the same features."""
    try:
        return compile(backbone, example, autotune=False)
    except ValueError as error:
        logger.warning("the backbone runs without an engine: %s", error)
        return backbone


def _features(
    backbone, task, size, channels, batch_size, seed, epoch, stored, device
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (features, labels): the stored ones in random order, or fresh ones of augmented images."""
    if stored is not None:
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        for part in order.split(batch_size):
            yield stored[part], task.train_labels[part]
        return
    for images, labels in batches(task, size, channels, batch_size, True, seed, epoch):
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
