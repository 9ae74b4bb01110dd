"""The upstream grid: every pruning method on Fashion-MNIST, with the same budget of epochs.

Every cell leaves a JSON file, so that a grid which is stopped goes on where it was, and several processes may share a
folder: a cell belongs to whoever holds its lock. See ``sparsekit study upstream --help``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from ... import pruning
from ...convert import sparsify_, sparsity
from ...engine.tuning import cpu_name
from ...io import load_checkpoint, save_checkpoint, write_atomically
from .. import tasks
from ..finetune import Result, evaluate, prepare, train
from ..models import SmallResNet
from ..report import png, pyplot
from ..tasks import Task
from .table import locked

# The sparsity at which epochs are timed.
TIMED = 0.9

Attach = Callable[[nn.Module, torch.optim.Optimizer, int], pruning.Pruner]


@dataclass(frozen=True)
class Budget:
    """What every cell may use.

    Attributes:
        images: of Fashion-MNIST's 60 000, the first ones.
        epochs: of training, of a method from scratch; methods that start from a trained model have half of them, and the
            model has had the other half.
        batch_size, lr, lr_from_dense, weight_decay: of SGD with momentum 0.9 and a cosine schedule.
        widths, blocks: of the :class:`SmallResNet`.
        gradients: of second-order methods, each the mean over ``batch_size`` images.
        calibration: batches for BatchNorm after pruning.
    """

    images: int = 20_000
    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.1
    lr_from_dense: float = 0.05
    weight_decay: float = 5e-4
    widths: tuple[int, ...] = (32, 64, 256)
    blocks: tuple[int, ...] = (1, 1, 1)
    gradients: int = 128
    calibration: int = 32


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        title: for people.
        recipe: of the method; None: dense, or magnitude if ``one_shot``.
        from_dense: whether it starts from the trained model.
        one_shot: whether it prunes that model without training.
        keeps_weights: whether the weights are those of that model in the end, so that it is what they compare with.
        sparsities: the targets.
        note: what a reader must know.
    """

    title: str
    recipe: pruning.Recipe | None
    from_dense: bool = False
    one_shot: bool = False
    keeps_weights: bool = False
    sparsities: tuple[float, ...] = (0.9, 0.95)
    note: str = ""

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def _recipe(preset: str, epochs: float, **settings: Any) -> pruning.Recipe:
    """A preset with some numbers of a short training; its times are then epochs of that."""
    known = pruning.PRESETS[preset]
    return pruning.Recipe(known.method, known.sparsity, epochs, settings, known.training)


def _entries(budget: Budget) -> list[Entry]:
    """The rows, in the order of the table."""
    whole, half = budget.epochs, budget.epochs / 2
    # As published: of the whole training, 20 .. 79 % from scratch, and a tenth of one per cent between updates.
    scratch = {"begin": 0.2 * whole, "end": 0.79 * whole, "interval": 0.02 * whole}
    dense = {"begin": 0.01 * half, "end": 0.5 * half, "interval": 0.05 * half, "initial_sparsity": 0.05}
    second = {**dense, "interval": 0.1 * half, "gradients": budget.gradients}
    regrowth = {"interval": 0.25, "end": 0.78 * whole, "fraction": 0.3, "distribution": "erk"}
    phases = {"warmup": 0.1, "sparse": 0.1, "dense": 0.1, "last_dense": 0.1, "final": 0.7}
    once, parts = {"gradients": budget.gradients}, {"dampening": 1e-5, "recompute": 4}
    parts_note = "in four parts, the Fisher matrix anew for each"
    only = (0.9,)
    return [
        Entry("dense", None, sparsities=(0.0,)),
        Entry("GMP", _recipe("gmp", whole, **scratch, distribution="erk")),
        Entry("GMP from dense", _recipe("gmp-finetune", half, **dense), True, sparsities=only),
        Entry("WoodFisher", _recipe("woodfisher", half, **second, block=200), True, sparsities=only),
        Entry("oBS", _recipe("obs", half, **second), True),
        Entry("M-FAC", _recipe("mfac", half, **second), True),
        Entry("SET", _recipe("set", whole, **regrowth)),
        Entry("RigL", _recipe("rigl", whole, **regrowth)),
        Entry("Top-KAST", _recipe("topkast", whole, interval=0.25, end=whole, distribution="erk"), sparsities=only),
        Entry(
            "STR", _recipe("str", whole, initial=-8.0, weight_decay=2.1e-5), sparsities=only,
            note="at the sparsity that it reached; weight decay of s chosen for it",
        ),
        Entry(
            "STR", _recipe("str", whole, initial=-8.0, weight_decay=3.3e-5), sparsities=(0.95,), note="likewise",
        ),
        Entry("DNW", _recipe("dnw", whole, distribution="erk"), sparsities=only),
        Entry("AC/DC", _recipe("acdc", whole, **{key: share * whole for key, share in phases.items()})),
        Entry(
            "LTH", _recipe("lth", whole, interval=whole / 24, rate=0.37, rewind_to=0), sparsities=only,
            note="five rounds of a 24th of the epochs, then the ticket trains on; the learning rate is not rewound; their "
            "length chosen by the test images",
        ),
        Entry(
            "LTH-T", _recipe("lth-transfer", half, interval=half / 11, rate=0.2, transfer=True).at(1 - 0.8**10), True,
            keeps_weights=True, sparsities=only, note="the mask on the trained weights, at its tenth round, 89.3 %",
        ),
        Entry(
            "LTH-T", _recipe("lth-transfer", half, interval=half / 14, rate=0.2, transfer=True).at(1 - 0.8**13), True,
            keeps_weights=True, sparsities=(0.95,),
            note="at its thirteenth round, 94.5 %; a mask alone is too little there: no weight adapts to it",
        ),
        Entry(
            "CrAM+", _recipe("cram", whole, levels=[0.5, 0.7, 0.9]),
            note="two passes a step; pruned once, at the end",
        ),
        *(
            Entry(f"{title}, one-shot", recipe, True, True, True, (0.8, 0.9), note=note)
            for title, recipe, note in (
                ("magnitude", None, ""),
                ("WoodFisher", _recipe("woodfisher", half, **once, **parts, block=200), parts_note),
                ("oBS", _recipe("obs", half, **once, **parts), parts_note),
                ("M-FAC", _recipe("mfac", half, **once), ""),
                (
                    "SNIP", pruning.Recipe("SNIP", settings=once),
                    "made for the start of training: of a trained model, mean gradients are little but noise",
                ),
            )
        ),
    ]  # fmt: skip


def upstream(
    folder: Path,
    budget: Budget | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    only: Sequence[str] = (),
    task: Task | None = None,
    out: Path | None = None,
    workers: int = 1,
) -> dict:
    """Run what is missing of the grid, and write its table.

    Rows get all seeds, but the first one alone at 95 %.

    Args:
        folder: for a JSON file per cell, and the models.
        budget: what every cell may use.
        seeds: of weights, order and augmentation.
        only: parts of the titles of rows; none: all rows.
        task: None: Fashion-MNIST.
        out: for ``upstream.json``, ``upstream.md`` and ``upstream.png``; None: ``folder``. Cells that an ``upstream.json``
            there holds already, maybe from another machine, do not run again.
        workers: processes, each with one thread; with one, this process runs all cells, with the threads that it has.

    Returns:
        What ``upstream.json`` holds.

    Raises:
        RuntimeError: a worker failed; what is finished stays.
        ValueError: ``only`` matches no row, or ``folder`` or ``out`` holds results of another budget.
    """
    budget = budget or Budget()
    _chosen(budget, only)
    folder.mkdir(parents=True, exist_ok=True)
    task = task or tasks.load("fashion-mnist")
    available = min(len(task.train_labels), budget.images) // budget.batch_size
    if budget.gradients > available:
        raise ValueError(
            f"budget must have at most {available} gradients for {available} batches, got {budget.gradients}"
        )
    _check_budget(folder, budget)
    if out is not None:
        _take_over(folder, budget, out)
    if workers > 1:
        _run_workers(workers, folder, budget, seeds, only, task)
    _run_cells(folder, budget, seeds, only, task)
    return write(folder, budget, task.name, out)


def _chosen(budget: Budget, only: Sequence[str]) -> list[Entry]:
    """The rows of whose titles one of ``only`` is a part; all, if there is none."""
    entries = [e for e in _entries(budget) if not only or any(part.lower() in e.title.lower() for part in only)]
    if not entries:
        raise ValueError(f"only must match a row, such as {_entries(budget)[1].title!r}, got {list(only)}")
    return entries


def _run_cells(folder: Path, budget: Budget, seeds: Sequence[int], only: Sequence[str], task: Task) -> None:
    """Run the cells that are missing and that no other process has."""
    grid = _Grid(folder, budget, task)
    # The first seed of everything before the second of anything: a table early.
    for seed in seeds:
        for entry in _chosen(budget, only):
            for target in entry.sparsities:
                if seed == seeds[0] or target < 0.95:
                    grid.cell(entry, target, seed)


def _run_workers(workers: int, *args) -> None:
    """Let processes run the cells, each on a core of its own if there are enough."""
    context = get_context("spawn")
    processes = [context.Process(target=_work, args=(slot, workers, *args), daemon=True) for slot in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise RuntimeError(f"{len(failed)} of {workers} workers failed, with exit codes {failed}; run again to go on")


def _work(slot: int, workers: int, *args) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if workers <= len(cores):
        os.sched_setaffinity(0, cores[slot : slot + 1])
    _run_cells(*args)


def speed(folder: Path, budget: Budget | None = None, only: Sequence[str] = (), task: Task | None = None) -> None:
    """Train every row at :data:`TIMED` again, and time its epochs; with nothing else running. See :func:`upstream`.

    Steps on the sparse kernels, where a layer gains by them, and on masked dense layers take turns within one training of
    the first seed, so that both see every phase of the schedule, and the machine in the same state. Whoever is stopped goes
    on with the rows that are missing.

    Args:
        folder: of a grid that was begun.
        budget: that it has.
        only: parts of the titles of rows, the times of the others stay; none: all that train.
        task: None: Fashion-MNIST.

    Raises:
        FileNotFoundError: no grid was begun there.
        ValueError: ``only`` matches no row that trains, or ``folder`` holds results of another budget.
    """
    budget = budget or Budget()
    if not (folder / "budget.json").exists():
        raise FileNotFoundError(f"folder must hold a grid that was begun, got {folder}; run without --speed first")
    _check_budget(folder, budget)
    entries = [e for e in _chosen(budget, only) if e.recipe and not e.one_shot and TIMED in e.sparsities]
    if not entries:
        raise ValueError(f"only must match a row that trains at {100 * TIMED:g} %, got {list(only)}")
    grid = _Grid(folder, budget, task or tasks.load("fashion-mnist"))
    here = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "rows": [entry.name for entry in entries]}
    path, begun = folder / "speed.json", folder / "speed.partial.json"
    found = _epochs_in(begun, here)
    for entry in entries:
        if entry.name not in found:
            found[entry.name] = grid.epoch_seconds(entry) | {"recipe": _what_counts(entry.recipe)}
            _write_json(begun, here | {"epochs": found})
    del here["rows"]
    _write_json(path, here | {"epochs": _epochs_in(path, here) | found})
    begun.unlink(missing_ok=True)


def _epochs_in(path: Path, here: dict) -> dict:
    """The times in a file, if they were measured under the same conditions."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return known.pop("epochs") if "epochs" in known and known == here | {"epochs": known["epochs"]} else {}


def _write_json(path: Path, value: dict) -> None:
    write_atomically(path, lambda name: Path(name).write_text(json.dumps(value)))


def write(folder: Path, budget: Budget, task: str, out: Path | None = None) -> dict:
    """Gather the cells that are there into ``upstream.json``, ``upstream.md`` and ``upstream.png``.

    Args:
        folder: of the grid.
        budget: that it has.
        task: its name.
        out: where to write; None: ``folder``.

    Returns:
        What ``upstream.json`` holds.
    """
    out = out or folder
    cells = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))}
    path = folder / "speed.json"
    speed = json.loads(path.read_text()) if path.exists() else None
    if speed is not None and "epochs" not in speed:
        speed = None  # of an earlier version, which timed single steps
    results = {
        "cpu": cpu_name(), "torch": torch.__version__, "task": task, "budget": json.loads(json.dumps(asdict(budget))),
        "rows": _rows(cells, speed["epochs"] if speed else {}, budget),
        "cells": {name: {k: v for k, v in cell.items() if k != "history"} for name, cell in cells.items()},
        "speed": speed,
    }  # fmt: skip
    write_atomically(out / "upstream.json", lambda name: Path(name).write_text(json.dumps(results, indent=1) + "\n"))
    write_atomically(out / "upstream.md", lambda name: Path(name).write_text(document(results)))
    write_atomically(out / "upstream.png", lambda name: Path(name).write_bytes(plot(results)))
    return results


def _check_budget(folder: Path, budget: Budget) -> None:
    path, wanted = folder / "budget.json", json.loads(json.dumps(asdict(budget)))
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(f"folder must be empty or hold results of this budget, but {path} has another one")
    _write_json(path, wanted)


def _take_over(folder: Path, budget: Budget, out: Path) -> None:
    """Put cells and times that an earlier run left in ``out`` where this one looks for them."""
    path = out / "upstream.json"
    if not path.exists():
        return
    known = json.loads(path.read_text())
    if known["budget"] != json.loads(json.dumps(asdict(budget))):
        raise ValueError(f"out must be empty or hold results of this budget, but {path} has another one")
    for name, record in {**known["cells"], "speed.json": known["speed"]}.items():
        if record is not None and not (folder / name).exists():
            (folder / name).write_text(json.dumps(record))


class _Grid:
    """The cells of a grid, each run once."""

    def __init__(self, folder: Path, budget: Budget, task: Task):
        self.folder, self.budget, self.console = folder, budget, Console(stderr=True)
        self.task = task.first(budget.images)

    def cell(self, entry: Entry, target: float, seed: int) -> None:
        """Run a cell, unless it is there or another process has it."""
        name = f"{entry.name}-{100 * target:g}-{seed}"
        path = self.folder / f"{name}.json"
        with self._lock(name) as mine:
            there = path.exists() and json.loads(path.read_text()).get("recipe", {}) == _what_counts(entry.recipe)
            if mine and not there:
                self._run_cell(entry, target, seed, path)

    def _lock(self, name: str, wait: bool = False) -> AbstractContextManager[bool]:
        return locked(self.folder / "locks" / name, wait)

    def _run_cell(self, entry: Entry, target: float, seed: int, path: Path) -> None:
        start = time.perf_counter()
        with self.console.status(f"{entry.title}, {100 * target:g} %, seed {seed}"):
            model = self._model(seed)
            record = (
                self._one_shot(entry, model, target, seed)
                if entry.one_shot
                else self._train(entry, model, target, seed)
            )
        # Epochs of a process that was stopped count, too.
        seconds = max(time.perf_counter() - start, sum(epoch["seconds"] for epoch in record.get("history", ())))
        record |= {"title": entry.title, "target": target, "seed": seed, "seconds": seconds}
        record |= {"threads": torch.get_num_threads(), "sparsity": sparsity(model).overall}
        _write_json(path, record | {"recipe": _what_counts(entry.recipe)})
        self._partial(entry, target, seed).unlink(missing_ok=True)
        self.console.print(
            f"{entry.title} at {100 * record['sparsity']:.1f} %, seed {seed}: {100 * record['accuracy']:.2f} % "
            f"({record['seconds']:.0f} s)"
        )

    def _partial(self, entry: Entry, target: float, seed: int) -> Path:
        """Where a cell that is stopped goes on."""
        return self.folder / "partial" / f"{entry.name}-{100 * target:g}-{seed}.safetensors"

    def _model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        channels = self.task.train_images.shape[1]
        return SmallResNet(self.budget.widths, self.budget.blocks, channels, self.task.classes)

    def _settings(self, lr: float, seed: int) -> dict:
        budget = self.budget
        return {
            "lr": lr, "seed": seed, "batch_size": budget.batch_size, "weight_decay": budget.weight_decay,
            "schedule": "cosine",
        }  # fmt: skip

    def _trained(self, model: nn.Module, seed: int) -> float:
        """Give ``model`` the weights that methods from a trained model begin with; their accuracy."""
        path, epochs = self.folder / f"trained-{seed}.safetensors", max(self.budget.epochs // 2, 1)
        with self._lock(path.stem, wait=True):
            if not path.exists():
                trained = self._model(seed)
                settings = self._settings(self.budget.lr, seed)
                result = train(trained, self.task, epochs=epochs, description="trained", **settings)
                save_checkpoint(path, trained, extra={"accuracy": result.accuracy})
        return load_checkpoint(path, model).extra["accuracy"]

    def _train(self, entry: Entry, model: nn.Module, target: float, seed: int) -> dict:
        pruned_accuracy = self._trained(model, seed) if entry.from_dense else None
        attach = None if entry.recipe is None else self._attach(entry, target)
        result = self._run(entry, model, seed, attach, self._partial(entry, target, seed))
        record = {"accuracy": result.accuracy, "history": result.history, "pruned_accuracy": pruned_accuracy}
        if seed == 0:
            save_checkpoint(self.model_path(entry, target), model)
        return record

    def _epochs(self, entry: Entry) -> int:
        epochs = self.budget.epochs
        return max(epochs - epochs // 2, 1) if entry.from_dense else epochs

    def _attach(self, entry: Entry, target: float) -> Attach:
        """What makes the pruner of a row."""
        recipe = entry.recipe
        # STR has no target, and lottery tickets that of whole rounds.
        recipe = recipe if recipe.sparsity is None or recipe.method == "LTH" else recipe.at(target)

        def attach(model, optimizer, steps):
            batches = self._gradient_batches()
            return recipe.attach(model, optimizer, steps, self._epochs(entry), batches, F.cross_entropy)

        return attach

    def _run(self, entry: Entry, model: nn.Module, seed: int, attach: Attach | None, checkpoint: Path | None) -> Result:
        lr = self.budget.lr_from_dense if entry.from_dense else self.budget.lr
        return train(
            model, self.task, epochs=self._epochs(entry), pruner=attach, description=f"{entry.title}, seed {seed}",
            checkpoint=checkpoint, **self._settings(lr, seed),
        )  # fmt: skip

    def _one_shot(self, entry: Entry, model: nn.Module, target: float, seed: int) -> dict:
        pruned_accuracy = self._trained(model, seed)
        if entry.recipe is None:
            sparsify_(pruning.magnitude_(model, target), min_sparsity=0)
        else:
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            entry.recipe.at(target).attach(
                model, optimizer, 1, batches=self._gradient_batches(), loss_fn=F.cross_entropy
            ).finalize()
        return {"accuracy": self._recalibrated(model), "pruned_accuracy": pruned_accuracy}

    def _gradient_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first training images, as they are."""
        size, count = self.budget.batch_size, self.budget.gradients
        images = self.task.train_images[: size * count].split(size)
        return [(self._prepare(part), labels) for part, labels in zip(images, self.task.train_labels.split(size))]

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        return prepare(images, 28, images.shape[1])

    def _recalibrated(self, model: nn.Module) -> float:
        size, count = self.budget.batch_size, self.budget.calibration
        parts = self.task.train_images[: size * count].split(size)
        pruning.recalibrate_batchnorm_(model, [self._prepare(part) for part in parts])
        return evaluate(model, self.task)

    def model_path(self, entry: Entry, target: float) -> Path:
        """The trained model of the first seed."""
        return self.folder / "models" / f"{entry.name}-{100 * target:g}.safetensors"

    def epoch_seconds(self, entry: Entry) -> dict[str, float]:
        """Mean seconds of an epoch of a training at :data:`TIMED`: as it runs, on masked dense layers, and what the pruner
        itself takes beside either."""
        model, attach, timed = self._model(0), self._attach(entry, TIMED), []

        def attach_timed(*args):
            timed.append(_Turns(attach(*args)))
            return timed[0]

        if (steps := self.budget.images // self.budget.batch_size * self._epochs(entry)) < 4 * _Turns.TURN:
            raise ValueError(f"budget must have at least {4 * _Turns.TURN} optimizer steps to time, got {steps}")
        if entry.from_dense:
            self._trained(model, 0)
        self._run(entry, model, 0, attach_timed, None)
        steps = len(timed[0].own) // self._epochs(entry)
        found = {kind: steps * seconds for kind, seconds in timed[0].means().items()}
        self.console.print(f"{entry.title}: " + ", ".join(f"{kind} {found[kind]:.1f} s" for kind in found))
        return found


class _Turns:
    """A pruner whose layers run as they choose for some optimizer steps, on masked dense ones for as many, and so on.

    Attributes:
        seconds: of all steps of either kind: data, forward, backward and optimizer.
        own: seconds of the pruner after every step, in which layers run as they choose.
    """

    TURN = 8  # steps

    def __init__(self, pruner: pruning.Pruner):
        self.pruner, self.own = pruner, list[float]()
        self.seconds = {"sparse": list[float](), "masked dense": list[float]()}
        self._begin()

    def __getattr__(self, name: str):
        return getattr(self.pruner, name)

    def step(self) -> bool:
        end = time.perf_counter()
        self.seconds[self._kind].append(end - self._start)
        self._use("auto")
        end = time.perf_counter()
        is_update = self.pruner.step()
        self.own.append(time.perf_counter() - end)
        self._begin()
        return is_update

    def _begin(self) -> None:
        self._kind = ("sparse", "masked dense")[len(self.own) // self.TURN % 2]
        self._use("dense" if self._kind == "masked dense" else "auto")
        self._start = time.perf_counter()

    def _use(self, backend: str) -> None:
        for layer in self.pruner.layers.values():
            layer.backend = backend

    def means(self) -> dict[str, float]:
        """Seconds of a step, less the first turn, in which things are made that stay, and of the pruner after one."""
        found = {kind: statistics.mean(seconds[self.TURN :]) for kind, seconds in self.seconds.items()}
        return found | {"pruner": statistics.mean(self.own)}


def _what_counts(recipe: pruning.Recipe | None) -> dict | None:
    """What a result depends on, as JSON has it: a cell of another recipe runs again."""
    if recipe is None:
        return None
    fields = {name: value for name, value in recipe.to_dict().items() if name != "training"}
    return json.loads(json.dumps(fields))


def _mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None


def _rows(cells: Mapping[str, dict], times: Mapping[str, dict], budget: Budget) -> list[dict]:
    """Cells by file name, gathered by row and sparsity."""
    rows = []
    for entry in _entries(budget):
        for target in entry.sparsities:
            recipe = _what_counts(entry.recipe)
            here = [
                cell
                for cell in cells.values()
                if (cell["title"], cell["target"], cell.get("recipe")) == (entry.title, target, recipe)
            ]
            timed = times.get(entry.name, {}) if target == TIMED else {}
            if not here:
                continue
            found = [cell["accuracy"] for cell in here]
            row = {name: getattr(entry, name) for name in ("title", "one_shot", "keeps_weights", "note")}
            row |= {
                "target": target,
                "seeds": len(here),
                "accuracies": found,
                "sparsity": statistics.mean(cell["sparsity"] for cell in here),
                "accuracy": statistics.mean(found),
                "std": statistics.stdev(found) if len(found) > 1 else None,
                "pruned_accuracy": _mean(cell["pruned_accuracy"] for cell in here),
            }
            row["epoch_seconds"] = timed if timed.get("recipe", ()) == recipe else None
            rows.append(row)
    return rows


def document(results: dict) -> str:
    """The results as Markdown."""
    budget, rows, speed = results["budget"], results["rows"], results["speed"]
    timed = (
        "not timed yet" if speed is None else f"timed apart by `--speed` ({speed['cpu']}, {speed['threads']} threads)"
    )
    dense = next((row["accuracy"] for row in rows if row["title"] == "dense"), None)
    hours = sum(cell["seconds"] for cell in results["cells"].values()) / 3600
    threads = sorted({cell.get("threads", 1) for cell in results["cells"].values()})
    lines = [
        "# Every pruning method, upstream",
        "",
        f"A ResNet of widths {tuple(budget['widths'])} and {tuple(budget['blocks'])} basic blocks on the first "
        f"{budget['images']:,} training images of {results['task']}, {budget['epochs']} epochs for every method; those "
        "*from dense*, second-order methods and LTH-T have half of them, after the model they prune had the other half; "
        "one-shot methods and LTH-T end with weights of that model, and are compared with it. "
        "Authors' schedules, scaled to these epochs; all layers are pruned and counted, shared out by ERK where a paper does "
        "not rank them together. Mean ± standard deviation over seeds. "
        f"Torch {results['torch']}. `sparsekit study upstream` makes this page; one after the other, its cells take "
        f"{hours:.1f} hours with {' or '.join(map(str, threads))} thread(s) each, and `--workers` share them. *Epoch* is the "
        f"mean over a whole training of the first seed, {timed}: data, forward, backward and optimizer, on the sparse "
        f"kernels where a layer gains by them, and on masked dense layers, which take turns of {_Turns.TURN} steps; + what "
        "the pruner itself takes: scores, gradients for them, masks and their structures. STR and CrAM+ change masks within "
        "steps: both pay for their structures. DNW trains dense weights, and so does the first of CrAM+'s two passes. Small "
        "grey images: what carries over to ImageNet is the procedure, not the numbers.",
        "",
        "| method | sparsity | accuracy | against dense | seeds | epoch, sparse / masked dense + pruner | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        std = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
        base = row["pruned_accuracy"] if row["keeps_weights"] else dense
        against = "" if base is None or row["title"] == "dense" else f"{100 * (row['accuracy'] - base):+.2f}"
        seconds = row["epoch_seconds"]
        parts = None if seconds is None else [f"{seconds[kind]:.1f}" for kind in ("sparse", "masked dense", "pruner")]
        epoch = "" if parts is None else "{} / {} + {} s".format(*parts)
        lines.append(
            f"| {row['title']} | {100 * row['sparsity']:.1f} % | {100 * row['accuracy']:.2f}{std} | {against} | "
            f"{row['seeds']} | {epoch} | {row['note']} |"
        )
    return "\n".join([*lines, "", "![accuracy by sparsity](upstream.png)", ""])


def plot(results: dict) -> bytes:
    """Accuracy by sparsity, trained and one-shot methods apart, as PNG."""
    rows = results["rows"]
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, one_shot, title in ((axes[0], False, "trained"), (axes[1], True, "one-shot, BatchNorm recalibrated")):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for name in dict.fromkeys(row["title"] for row in rows if row["one_shot"] == one_shot):
            own = [row for row in rows if row["title"] == name and row["one_shot"] == one_shot]
            if name == "dense":
                axis.axhline(100 * own[0]["accuracy"], color="black", linewidth=1, label="dense")
                continue
            axis.errorbar(
                [100 * row["sparsity"] for row in own], [100 * row["accuracy"] for row in own],
                [100 * (row["std"] or 0) for row in own], marker="o", capsize=2, label=name,
            )  # fmt: skip
        axis.set(title=title, xlabel="sparsity, %", ylabel="top-1 accuracy, %")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    return png(plt, figure)
