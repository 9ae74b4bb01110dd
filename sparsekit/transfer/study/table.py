"""The run table: a folder for every cell, named by the hash of what its result depends on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io import write_atomically
from .document import Study, TaskEntry, Upstream

# Part of every hash: raised when the same settings come to mean something else.
VERSION = 1


def digest(config: Any) -> str:
    """Sixteen hexadecimal digits that stand for JSON types, or for the content of a file."""
    content = config.read_bytes() if isinstance(config, Path) else json.dumps(config, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One training: an upstream model on a task, in a mode, with a seed.

    Attributes:
        upstream, task, mode, seed: which.
        config: all that the result depends on, JSON types.
        folder: of what it leaves.
    """

    upstream: Upstream
    task: TaskEntry
    mode: str
    seed: int
    config: dict
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.upstream.title}, {self.task.name}, {self.mode}, seed {self.seed}"

    @property
    def partial(self) -> Path:
        """Where training that was stopped goes on."""
        return self.folder / "partial.safetensors"

    def result(self) -> dict | None:
        """What the finished cell left; None: it is not finished."""
        return read(self.folder / "result.json")

    def failure(self) -> dict | None:
        """What it failed with last: attempts, error, traceback; None: it did not."""
        return read(self.folder / "failure.json")


def read(path: Path) -> dict | None:
    """The JSON in a file; None: no such file, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write(path: Path, content: Any, indent: int | None = None) -> None:
    """JSON into a file, atomically."""
    text = json.dumps(content, indent=indent) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text))


def cells(study: Study) -> list[Cell]:
    """All cells, linear ones first, since they take seconds; full ones by seed, so that a whole table is there early.

    Raises:
        FileNotFoundError: a checkpoint is not there.
    """
    checkpoints = {upstream: checkpoint_digest(upstream) for upstream in study.upstreams}

    def cell(upstream: Upstream, task: TaskEntry, mode: str, seed: int) -> Cell:
        config = {
            "version": VERSION, "checkpoint": checkpoints[upstream], "task": task.name, "images": task.images,
            "size": study.size, "mode": mode, "seed": seed, "schedule": vars(study.schedule(task, mode)),
            "threads": study.work.threads,
        }  # fmt: skip
        ranks = study.work.processes * study.work.nodes
        if mode == "full" and ranks > 1:
            config["ranks"] = ranks
        return Cell(upstream, task, mode, seed, config, study.out / "cells" / digest(config))

    linear = [(u, t, "linear", s) for u in study.upstreams for t in study.tasks for s in study.seeds]
    full = [(u, t, "full", s) for s in study.seeds for u in study.upstreams for t in study.tasks]
    return [cell(*which) for which in linear + full if which[2] in study.modes]


def checkpoint_digest(upstream: Upstream) -> str:
    if ":" in upstream.checkpoint:
        return upstream.checkpoint
    path = Path(upstream.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{upstream.title}: its checkpoint {path} is not there")
    return digest(path)


def units(table: list[Cell]) -> list[list[Cell]]:
    """What a worker takes at once: the seeds of a linear cell, which share features, and every full cell alone."""
    together: dict[str, list[Cell]] = {}
    for cell in table:
        shared = features_path(cell).name if cell.mode == "linear" else cell.folder.name
        together.setdefault(shared, []).append(cell)
    return list(together.values())


def features_path(cell: Cell) -> Path:
    """Where the features of a linear cell are, which do not depend on seed and schedule."""
    config = {key: value for key, value in cell.config.items() if key not in ("seed", "schedule", "mode")}
    return cell.folder.parent.parent / "features" / f"{digest(config)}.safetensors"


@contextlib.contextmanager
def locked(path: Path, wait: bool = False, shared: bool = False) -> Iterator[bool]:
    """Hold a lock that the system takes back from a process that dies; yields whether it was to be had.

    Args:
        path: of the lock; its folder is made.
        wait: until it is to be had.
        shared: others may share it; else nobody else has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def unit_lock(study: Study, unit: list[Cell]) -> Path:
    return study.out / "locks" / unit[0].folder.name


def worker_lock(study: Study, slot: int) -> Path:
    return study.out / "locks" / f"worker-{slot}"


def machine_lock() -> Path:
    """What the cells of all studies on this machine share, and timing has for itself."""
    return Path(tempfile.gettempdir()) / f"sparsekit-{os.getuid()}.lock"


def status(study: Study) -> dict[str, Any]:
    """Where a study stands.

    Returns:
        JSON types: how many cells there are and are ``finished``; titles of those ``running``; ``failed``: title to error;
        ``rows``: for every upstream model, finished seeds by "task, mode".
    """
    table = cells(study)
    done = {id(cell): cell.result() is not None for cell in table}
    running: list[str] = []
    for unit in units(table):
        waiting = [cell for cell in unit if not done[id(cell)]]
        if waiting:
            with locked(unit_lock(study, unit)) as free:
                running += [] if free else [waiting[0].title]
    failed = {cell.title: cell.failure() for cell in table if not done[id(cell)]}
    rows: dict[str, dict[str, int]] = {}
    for cell in table:
        row = rows.setdefault(cell.upstream.title, {})
        key = f"{cell.task.name}, {cell.mode}"
        row[key] = row.get(key, 0) + done[id(cell)]
    return {
        "cells": len(table),
        "finished": sum(done.values()),
        "running": running,
        "failed": {title: failure["error"] for title, failure in failed.items() if failure},
        "seeds": len(study.seeds),
        "rows": rows,
    }
