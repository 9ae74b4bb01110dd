"""Running a study: the check before, the workers, and the cells."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import math
import os
import re
import shutil
import time
import traceback
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ... import _ops
from ..._version import __version__
from ...bench import keep_freed_memory
from ...convert import sparsity
from ...engine.tuning import cpu_name
from ...io import write_atomically
from .. import tasks, upstream
from ..finetune import Features, Result, extract_features, full_finetune, linear_finetune
from ..models import head_name
from ..tasks import Task
from .document import Study, TaskEntry, Upstream, Work
from .ranks import run_ranks
from .table import Cell, cells, features_path, locked, machine_lock, unit_lock, units, worker_lock, write

logger = logging.getLogger("sparsekit")

# How far the zeros of a checkpoint may be from the sparsity that the document says; STR only aims.
SPARSITY_TOLERANCE = 0.05
# A full disk, a quota, a limit on file sizes: no cell that comes after would fare better.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@functools.lru_cache(maxsize=8)
def load_upstream(entry: Upstream) -> upstream.Upstream:
    """An upstream model; a dense one only where the document says so."""
    return upstream.load(entry.checkpoint, entry.arch, dense=entry.is_dense)


def load_model(entry: Upstream) -> nn.Module:
    """An upstream model, in eval mode, not to be changed."""
    return load_upstream(entry).model


@functools.lru_cache(maxsize=8)
def load_task(entry: TaskEntry) -> Task:
    """A task, with as many training images as the document says, drawn with seed 0."""
    task = tasks.load(entry.name)
    if entry.images is None or entry.images >= len(task.train_labels):
        return task
    order = torch.randperm(len(task.train_labels), generator=torch.Generator().manual_seed(0))[: entry.images]
    return replace(task, train_images=task.train_images[order], train_labels=task.train_labels[order])


def check(study: Study) -> dict[str, Any]:
    """Load everything that a study needs, before hours are spent.

    Every upstream model must be there, be a classifier, take the images, and be about as sparse as the document says; every
    task must have images of all its classes; the folder must be writable and have room.

    Args:
        study: the document.

    Returns:
        What a report says about models and tasks; it is in ``facts.json`` of the study's folder, too.

    Raises:
        ValueError: with all that is wrong.
    """
    problems: list[str] = []
    facts: dict[str, Any] = {"upstreams": [], "tasks": []}

    def examine(what: str, entry, look) -> None:
        try:
            facts[what].append(look(entry))
        except Exception as error:
            # Whatever it is, the others are looked at too.
            problems.append(f"{getattr(entry, 'title', None) or entry.name}: {_describe(error)}")

    for entry in study.upstreams:
        examine("upstreams", entry, functools.partial(_upstream_facts, study))
    for entry in study.tasks:
        examine("tasks", entry, _task_facts)
    problems += _folder_problems(study, facts)
    if study.work.workers and not _has_submitit():
        problems.append("work: workers need submitit (pip install 'sparsekit[transfer]'); 0 runs all in this process")
    if problems:
        raise ValueError("the study cannot run:\n  " + "\n  ".join(problems))
    write(study.out / "facts.json", facts)
    return facts


def _describe(error: BaseException) -> str:
    return f"{error}" if isinstance(error, (ValueError, FileNotFoundError)) else f"{type(error).__name__}: {error}"


def _upstream_facts(study: Study, entry: Upstream) -> dict[str, Any]:
    model = load_model(entry)
    head = model.get_submodule(head_name(model))
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        out = model(torch.zeros(2, channels, study.size, study.size))
    if not torch.isfinite(out).all():
        raise ValueError("its outputs are not finite")
    zeros = sparsity(model)
    if abs(zeros.overall - entry.sparsity) > SPARSITY_TOLERANCE:
        raise ValueError(f"must be {100 * entry.sparsity:g} % sparse, but {100 * zeros.overall:.1f} % are zeros")
    return {
        "title": entry.title, "method": entry.method, "published": entry.published or entry.method,
        "target": entry.sparsity, "sparsity": zeros.overall,
        "layers": dict(zeros), "architecture": type(model).__name__, "channels": channels, "features": head.in_features,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def _task_facts(entry: TaskEntry) -> dict[str, Any]:
    task = load_task(entry)
    for split, labels in (("training", task.train_labels), ("test", task.test_labels)):
        missing = sorted(set(range(task.classes)) - set(labels.unique().tolist()))
        if missing:
            raise ValueError(f"has {task.classes} classes, but no {split} images of {missing}")
    # Lazy images are looked at when the task is loaded.
    in_memory = isinstance(task.train_images, torch.Tensor)
    for split, images in (("training", task.train_images), ("test", task.test_images)) if in_memory else ():
        blank = int((images.flatten(1).amin(1) == images.flatten(1).amax(1)).sum())
        if blank > len(images) // 2:
            raise ValueError(f"{blank} of its {len(images)} {split} images are of one colour: the data is damaged")
    return {
        "name": entry.name, "published": entry.published or entry.name,
        "classes": task.classes, "metric": task.metric, "train": len(task.train_labels),
        "test": len(task.test_labels), "image": list(task.train_images.shape[1:]) if in_memory else [], "source": task.source,
    }  # fmt: skip


def _folder_problems(study: Study, facts: dict[str, Any]) -> list[str]:
    """Whether results can be written, and have room: features, and weights with momentum for every worker, twice."""
    try:
        write(study.out / "locks" / "probe", {})
        free = shutil.disk_usage(study.out).free
    except OSError as error:
        return [f"out: nothing can be written to {study.out}: {error}"]
    images = sum(task["train"] + task["test"] for task in facts["tasks"])
    features = 4 * images * max((u["features"] for u in facts["upstreams"]), default=0)
    weights = 4 * max((u["parameters"] for u in facts["upstreams"]), default=0)
    needed = 2 * (features + 3 * weights * max(study.work.workers, 1)) + 16 * 2**20
    if free < needed:
        return [f"out: {study.out} has {free / 2**20:.0f} MB left, and {needed / 2**20:.0f} MB are needed"]
    return []


def _has_submitit() -> bool:
    try:
        import submitit  # noqa: F401
    except ImportError:
        return False
    return True


def run(study: Study, console: Console | None = None) -> dict[str, Any]:
    """Run the cells that are not finished, and gather the results.

    Finished cells are skipped, failed ones tried again. Whatever is killed, the next call goes on: full finetuning from its
    last epoch, with results that are the same to the bit.

    Args:
        study: the document.
        console: for progress; None: stderr.

    Returns:
        What :func:`collect` returns.

    Raises:
        ValueError: :func:`check` found something wrong.
        RuntimeError: cells failed; all others are finished.
    """
    from .collect import collect

    console = console or Console(stderr=True)
    check(study)
    table = cells(study)
    missing = sum(cell.result() is None for cell in table)
    console.print(f"{len(table)} cells, {missing} to run")
    if missing and study.work.workers:
        _run_workers(study, table, min(study.work.workers, len(units(table))), console)
    elif missing:
        work(study, 0)
    results = collect(study)
    if results["failed"]:
        listed = "\n  ".join(f"{title}: {error}" for title, error in results["failed"].items())
        raise RuntimeError(f"{len(results['failed'])} cells failed (study run tries them again):\n  {listed}")
    if results["missing"]:
        raise RuntimeError(f"{results['missing']} cells are not finished; the workers' logs are in {study.out / 'log'}")
    return results


def _run_workers(study: Study, table: list[Cell], workers: int, console: Console) -> None:
    """Let submitit start workers, and wait for them."""
    import submitit

    class Worker:
        """Submitted again when SLURM takes its node away, or its time is over."""

        def __call__(self, slot: int) -> None:
            work(study, slot)

        def checkpoint(self, slot: int) -> submitit.helpers.DelayedSubmission:
            return submitit.helpers.DelayedSubmission(self, slot)

    executor = submitit.AutoExecutor(study.out / "log", cluster=study.work.executor)
    executor.update_parameters(
        name="sparsekit-study", timeout_min=round(60 * study.work.hours), nodes=study.work.nodes, tasks_per_node=1,
        cpus_per_task=study.work.threads * study.work.processes,
        **({"gpus_per_node": study.work.gpus} if study.work.gpus else {}), **study.work.slurm,
    )  # fmt: skip
    # Libraries read it when they are imported, which is before a worker runs.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(study.work.threads)
    try:
        with executor.batch():
            jobs = [executor.submit(Worker(), slot) for slot in range(workers)]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    unfinished = list(table)
    try:
        with Progress(console=console) as progress:
            bar = progress.add_task("cells", total=len(table))
            while True:
                over = all(job.done() for job in jobs)
                unfinished = [cell for cell in unfinished if cell.result() is None]
                progress.update(bar, completed=len(table) - len(unfinished))
                if over:
                    break
                time.sleep(1)
    except BaseException:
        for job in jobs:
            job.cancel(check=False)
        raise
    for job in jobs:
        error = job.exception()
        if error is not None:
            console.print(f"worker {job.job_id}: {str(error).strip().splitlines()[-1]}", markup=False)


def work(study: Study, slot: int) -> None:
    """What a worker does: take one unit after the other that nobody has, until there is none.

    Args:
        study: the document.
        slot: number of the worker; one of an earlier run that is still at work keeps its slot until it is done.

    Raises:
        OSError: there is no space left; what is finished stays.
    """
    if os.environ.get("SLURM_NODEID", "0") != "0":
        # The first node of a job calls the others for every cell.
        return
    with locked(worker_lock(study, slot), wait=True), locked(machine_lock(), wait=True, shared=True):
        torch.set_num_threads(study.work.threads)
        _pin(study, slot)
        keep_freed_memory()
        open_units = units(cells(study))
        for attempt in range(study.work.attempts):
            for unit in open_units:
                if all(cell.result() is not None for cell in unit):
                    continue
                with locked(unit_lock(study, unit)) as mine:
                    if mine:
                        _run_unit(unit, attempt, study.work)


def _pin(study: Study, slot: int) -> None:
    """Give every local worker cores of its own, where there are enough."""
    cores, threads = sorted(os.sched_getaffinity(0)), study.work.threads * study.work.processes
    if study.work.executor == "local" and 0 < study.work.workers * threads <= len(cores):
        os.sched_setaffinity(0, cores[slot * threads : (slot + 1) * threads])


def _run_unit(unit: list[Cell], attempt: int, work: Work) -> None:
    """Run what is not finished of a unit; a cell that fails leaves ``failure.json``."""
    for cell in unit:
        if cell.result() is not None:
            continue
        write(cell.folder / "config.json", {"title": cell.title} | cell.config, indent=1)
        try:
            if cell.config.get("ranks", 1) > 1:
                run_ranks(cell, work)
            else:
                write(cell.folder / "result.json", run_cell(cell))
        except Exception as error:
            if (number := _no_space(error)) is not None:
                raise OSError(number, os.strerror(number), str(cell.folder)) from error
            logger.exception("%s failed", cell.title)
            failure = {"attempts": attempt + 1, "error": _describe(error), "traceback": traceback.format_exc()}
            write(cell.folder / "failure.json", failure, indent=1)
            # It may have failed because of what it went on from.
            cell.partial.unlink(missing_ok=True)
        else:
            cell.partial.unlink(missing_ok=True)
            (cell.folder / "failure.json").unlink(missing_ok=True)
    if unit[0].mode == "linear" and all(cell.result() is not None for cell in unit):
        features_path(unit[0]).unlink(missing_ok=True)


def _no_space(error: Exception) -> int | None:
    """The system's number of an error that says that nothing more can be written, else None."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return number if number in NO_SPACE else None


def run_cell(cell: Cell, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Train a cell, or what is left of it; in a process group, as one of its ranks.

    Args:
        cell: which.
        device: that full finetuning runs on.

    Returns:
        JSON types: ``outcome``, which is the same on every run; ``made``: where, when, and how long it took.
    """
    start = time.perf_counter()
    loaded, task = load_upstream(cell.upstream), load_task(cell.task)
    settings = {**cell.config["schedule"], "seed": cell.seed, "size": cell.config["size"]}
    settings["interpolation"] = loaded.interpolation
    if cell.mode == "linear":
        result = linear_finetune(loaded.model, task, features=_features(cell, loaded, task), **settings)
    else:
        result = full_finetune(loaded.model.to(device), task, checkpoint=cell.partial, **settings)
    if not all(math.isfinite(epoch["loss"]) for epoch in result.history):
        raise ValueError(f"training diverged: the losses are {[epoch['loss'] for epoch in result.history]}")
    return {
        "title": cell.title,
        "config": cell.config,
        "outcome": {
            "accuracy": result.accuracy,
            "losses": [epoch["loss"] for epoch in result.history],
            "sparsity": sparsity(result.model).overall,
            "weights": _weights_digest(result),
        },
        "made": {
            "seconds": time.perf_counter() - start, "training_seconds": sum(epoch["seconds"] for epoch in result.history),
            "cpu": cpu_name(), "isa": _ops.backend(), "torch": torch.__version__, "sparsekit": __version__,
        },
    }  # fmt: skip


def _features(cell: Cell, loaded: upstream.Upstream, task: Task) -> Features:
    """Those that another seed left, or fresh ones for the others."""
    path = features_path(cell)
    if path.is_file():
        try:
            return Features(**load_file(path))
        except SafetensorError as error:
            logger.warning("%s is damaged and made again: %s", path, error)
    features = extract_features(loaded.model, task, size=cell.config["size"], interpolation=loaded.interpolation)
    write_atomically(path, lambda name: save_file(features._asdict(), name))
    return features


def _weights_digest(result: Result) -> str:
    """Sixteen hexadecimal digits that stand for the trained weights, to tell whether two runs ended alike."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(result.model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
