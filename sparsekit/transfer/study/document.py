"""The study document: which checkpoints go to which tasks, how, and where the results are; from YAML."""

from __future__ import annotations

import itertools
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

MODES = ("linear", "full")
EXECUTORS = ("local", "slurm")


@dataclass(frozen=True)
class Upstream:
    """A checkpoint to transfer.

    Attributes:
        method: how it was pruned; ``"dense"`` is what the others are compared with.
        sparsity: that it aims at, a fraction of zeros.
        checkpoint: a file, or with a colon what :func:`sparsekit.transfer.upstream.load` knows by name.
        arch: of a file whose names do not say it, see :func:`sparsekit.transfer.upstream.load`.
        published: the method whose published figures stand beside ours; None: the one of the same name.
    """

    method: str
    sparsity: float
    checkpoint: str
    arch: str | None = None
    published: str | None = None

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")

    @property
    def title(self) -> str:
        return self.method if not self.sparsity else f"{self.method} {100 * self.sparsity:g} %"

    @property
    def is_dense(self) -> bool:
        return self.method == "dense"


@dataclass(frozen=True)
class Schedule:
    """How long a head, or a model, is trained.

    Attributes:
        epochs, lr, batch_size: of SGD; the protocol's but for the epochs' number.
    """

    epochs: int = 150
    lr: float = 0.01
    batch_size: int = 64

    def __post_init__(self):
        for name, kind in (("epochs", int), ("lr", (int, float)), ("batch_size", int)):
            value = getattr(self, name)
            if not isinstance(value, kind) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")


@dataclass(frozen=True)
class TaskEntry:
    """A task, perhaps with fewer training images.

    Attributes:
        name: for :func:`sparsekit.transfer.tasks.load`.
        images: to train on, drawn at random, the same for everybody; None: all.
        linear, full: what differs for this task from the study's schedules, such as ``{"lr": 0.01}``.
        published: its name in the published tables; None: the same.
    """

    name: str
    images: int | None = None
    linear: dict = field(default_factory=dict, hash=False)
    full: dict = field(default_factory=dict, hash=False)
    published: str | None = None

    def __post_init__(self):
        if self.images is not None and self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")


@dataclass(frozen=True)
class Work:
    """Who runs the cells.

    Attributes:
        executor: ``"local"``: processes on this machine; ``"slurm"``: jobs.
        workers: processes or jobs at a time; each takes one cell after the other. 0: this process.
        threads: of each, which results depend on.
        attempts: at a cell that fails, in one run.
        processes, nodes: of a cell of full finetuning, through torchrun, ``processes`` on each; several nodes need SLURM.
        gpus: of a node, one for each process; 0: none is used.
        hours: that a job may take.
        slurm: what else submitit passes on: ``{"slurm_partition": "cpu"}``.
    """

    executor: str = "local"
    workers: int = 2
    threads: int = 1
    attempts: int = 2
    processes: int = 1
    nodes: int = 1
    gpus: int = 0
    hours: float = 24
    slurm: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")
        for name, least in (
            ("workers", 0),
            ("threads", 1),
            ("attempts", 1),
            ("processes", 1),
            ("nodes", 1),
            ("gpus", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.nodes > 1 and self.executor != "slurm":
            raise ValueError(f"nodes must be 1 without executor: slurm, got {self.nodes}")
        if self.gpus not in (0, self.processes):
            raise ValueError(f"gpus must be 0 or processes, {self.processes}, got {self.gpus}")


@dataclass(frozen=True)
class Timing:
    """How models are timed.

    Attributes:
        batch: images at a time.
        runs: alternating runs of every model.
        threads: 0 for PyTorch's own choice.
        compiled: whether ``torch.compile`` is one of the dense ways; it takes a minute to compile a large model.
    """

    batch: int = 64
    runs: int = 15
    threads: int = 0
    compiled: bool = True

    def __post_init__(self):
        for name, least in (("batch", 1), ("runs", 1), ("threads", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Study:
    """A grid: every upstream model on every task, in every mode, with every seed.

    Attributes:
        title: of the report.
        out: folder of the results.
        upstreams, tasks, modes, seeds: the grid.
        linear, full: the schedules.
        size: height and width that images are resized to.
        note: what a reader of the report must know.
        architecture: whose published figures stand beside ours: ``"resnet50"`` or ``"mobilenetv1"``.
        work: who runs it.
        timing: of the models, apart from training them.
    """

    title: str
    out: Path
    upstreams: tuple[Upstream, ...]
    tasks: tuple[TaskEntry, ...]
    modes: tuple[str, ...] = MODES
    seeds: tuple[int, ...] = (0, 1, 2)
    linear: Schedule = Schedule()
    full: Schedule = Schedule(lr=0.001)
    size: int = 28
    note: str = ""
    architecture: str = "resnet50"
    work: Work = Work()
    timing: Timing = Timing()

    def __post_init__(self):
        for name in ("upstreams", "tasks", "modes", "seeds"):
            entries = [getattr(e, "title", getattr(e, "name", e)) for e in getattr(self, name)]
            if not entries:
                raise ValueError(f"{name} must list at least one, got none")
            twice = [a for a, b in itertools.combinations(entries, 2) if a == b]
            if twice:
                raise ValueError(f"{name} must differ, got {twice[0]!r} twice")
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"modes must be of {', '.join(MODES)}, got {mode!r}")

    def schedule(self, task: TaskEntry, mode: str) -> Schedule:
        """The schedule of a mode, with what differs for a task."""
        return Schedule(**{**vars(getattr(self, mode)), **getattr(task, mode)})


def load(path: str | Path) -> Study:
    """Read a study document.

    Args:
        path: a YAML file; relative paths in it start at its folder.

    Returns:
        The :class:`Study`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, or a key is missing, unknown, or has a value that cannot be.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a study document must be a file, got {path}, which does not exist")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    folder = path.resolve().parent

    def many(cls, key: str, entries: Any) -> tuple:
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {key} must be a list, got {entries!r}")
        return tuple(_make(cls, entry, f"{path}: {key}[{i}]") for i, entry in enumerate(entries))

    def from_folder(checkpoint: str) -> str:
        return checkpoint if ":" in checkpoint else str((folder / checkpoint).resolve())

    document = dict(document) if isinstance(document, dict) else document
    _check_keys(Study, document, str(path))
    if not isinstance(document["out"], str):
        raise ValueError(f"{path}: out must be a folder, got {document['out']!r}")
    document["out"] = (folder / document["out"]).resolve()
    document["upstreams"] = tuple(
        Upstream(u.method, u.sparsity, from_folder(u.checkpoint), u.arch, u.published)
        for u in many(Upstream, "upstreams", document["upstreams"])
    )
    document["tasks"] = many(TaskEntry, "tasks", document["tasks"])
    for key, cls in (("linear", Schedule), ("full", Schedule), ("work", Work), ("timing", Timing)):
        if key in document:
            document[key] = _make(cls, document[key], f"{path}: {key}")
    for key in ("modes", "seeds"):
        if key in document:
            if not isinstance(document[key], list):
                raise ValueError(f"{path}: {key} must be a list, got {document[key]!r}")
            document[key] = tuple(document[key])
    study = _make(Study, document, str(path))
    for task in study.tasks:
        for mode in MODES:
            _make(Schedule, {**vars(getattr(study, mode)), **getattr(task, mode)}, f"{path}: {mode} of {task.name}")
    return study


def _check_keys(cls, value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold keys and values, got {value!r}")
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    for key in value:
        if key not in known:
            raise ValueError(f"{where} must have keys of {', '.join(known)}, got {key!r}")
    for key, is_required in known.items():
        if is_required and key not in value:
            raise ValueError(f"{where} must have a {key!r}, which is missing")


def _make(cls, value: Any, where: str):
    """A dataclass of the entries of a document; errors say where."""
    _check_keys(cls, value, where)
    try:
        return cls(**value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
