"""Data-parallel training. Every rank has its masks, which DistributedDataParallel does not send: they must agree."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import nn

from .nn import SparseModule


def check_masks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make sure that all ranks have the same masks; call it on every rank after masks changed.

    Ranks compare a checksum of four bytes a layer. Without a process group there is nothing to compare.

    Args:
        model: with sparse layers, in the same order on every rank.
        group: of the ranks; None: all.

    Raises:
        RuntimeError: masks differ; on every rank.

    Example:
        >>> import torch, sparsekit as sk
        >>> sk.check_masks(torch.nn.Sequential(sk.nn.SparseLinear(8, 8)))
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    sums = torch.tensor([_checksum(layer) for layer in layers.values()], dtype=torch.int64)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    if any(_differ(torch.tensor([len(layers)]).to(device), group)):
        raise RuntimeError(f"ranks must have the same sparse layers, but do not all have {len(layers)}")
    different = [name for name, differs in zip(layers, _differ(sums.to(device), group)) if differs]
    if different:
        raise RuntimeError(f"ranks must have the same masks, but those of {', '.join(different)} differ")


def _differ(numbers: torch.Tensor, group: dist.ProcessGroup | None) -> list[bool]:
    low, high = numbers.clone(), numbers.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    return (low != high).tolist()


def _checksum(layer: SparseModule) -> int:
    pattern, checksum = layer.pattern, 0
    for indices in (pattern.crow_indices, pattern.col_indices):
        checksum = zlib.crc32(indices.cpu().numpy(), checksum)
    return checksum
