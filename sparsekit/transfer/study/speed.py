"""Timing a study's models, apart from training them: one after the other, while no cell runs on this machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ... import _ops, bench
from ...engine.tuning import cpu_name
from .document import Study, Upstream
from .run import load_model
from .table import checkpoint_digest, digest, locked, machine_lock, read, write


def time_models(study: Study) -> dict[str, Any]:
    """Time inference, and a step of linear and of full finetuning, of every sparse model against its dense twin.

    Models of one architecture take turns in one process, with the fastest dense PyTorch among them; see
    :func:`sparsekit.bench.measure`. Each kind of step of each architecture is kept, and not timed again.

    Args:
        study: the document.

    Returns:
        What ``speed.json`` holds: CPU, threads, and ``groups``: for every architecture, kind to what ``measure`` gave.

    Raises:
        RuntimeError: cells are running on this machine.
    """
    with locked(machine_lock()) as alone:
        if not alone:
            raise RuntimeError("timing needs this machine for itself, but cells of a study are running on it")
        if study.timing.threads:
            torch.set_num_threads(study.timing.threads)
        bench.keep_freed_memory()
        groups = [_time(study, group) for group in _architectures(study)]
    speed = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "isa": _ops.backend(), "groups": groups}
    write(study.out / "speed.json", speed)
    return speed


def _architectures(study: Study) -> list[list[Upstream]]:
    """The sparse upstream models, those with the same tensors together."""
    groups: dict[str, list[Upstream]] = {}
    for upstream in study.upstreams:
        if not upstream.is_dense:
            weights = {name: list(p.shape) for name, p in load_model(upstream).named_parameters()}
            groups.setdefault(digest(weights), []).append(upstream)
    return list(groups.values())


def _time(study: Study, group: list[Upstream]) -> dict[str, Any]:
    models = {upstream.title: load_model(upstream) for upstream in group}
    channels = next(m.in_channels for m in next(iter(models.values())).modules() if isinstance(m, nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(study.timing.batch, channels, study.size, study.size, generator=generator)
    measured = {}
    for kind in bench.KINDS:
        config = {
            "kind": kind, "timing": vars(study.timing), "size": study.size, "cpu": cpu_name(),
            "threads": torch.get_num_threads(), "isa": _ops.backend(),
            "checkpoints": {upstream.title: checkpoint_digest(upstream) for upstream in group},
        }  # fmt: skip
        path = study.out / "speed" / f"{digest(config)}.json"
        measured[kind] = read(path) or bench.measure(
            models, images, kind, runs=study.timing.runs, compiled=study.timing.compiled
        )
        write(path, measured[kind])
    return measured
