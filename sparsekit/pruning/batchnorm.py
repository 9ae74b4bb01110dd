"""BatchNorm statistics after pruning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate_batchnorm_(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]]
) -> nn.Module:
    """Compute the running mean and variance of every BatchNorm layer anew, in place: pruning has changed its inputs.

    The statistics become the plain average over batches of the batch means and unbiased batch variances. Only the
    BatchNorm layers run in train mode (dropout does not); modes and momentum are as before afterwards. If a batch
    fails, the old statistics come back.

    Args:
        model: any module; without BatchNorm that tracks statistics, it is returned unchanged.
        batches: inputs ``[n, ...]``, or (inputs, targets, …) whose targets are not used, as from a DataLoader. They
            are moved to the device of the model. Batches weigh the same, so their sizes should be equal.

    Returns:
        ``model``.

    Raises:
        TypeError: a batch does not begin with a tensor.
        ValueError: there is no batch.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> _ = sk.pruning.recalibrate_batchnorm_(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([4.]), tensor([5.]))
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    device = norms[0].running_mean.device
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    try:
        for module in modes:
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            # BatchNorm takes None for a cumulative average.
            norm.training, norm.momentum = True, None
        count = 0
        for batch in batches:
            model(_inputs(batch).to(device))
            count += 1
        if not count:
            raise ValueError("batches must hold at least one batch, got none")
    except BaseException:
        for norm, old in zip(norms, statistics):
            for buffer, value in zip(norm.buffers(), old):
                buffer.copy_(value)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    return model


def _inputs(batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(f"batches must hold tensors or (inputs, targets), got a {type(batch).__name__}")
    return inputs
