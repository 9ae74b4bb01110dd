"""The engine: a plan, and a schedule for every size of inputs that it has met."""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor, nn

from ..profile import Explanation
from . import files, tuning
from .capture import capture, snapshot
from .plan import Plan, lower
from .schedule import Schedule

# Sizes of inputs that an engine keeps schedules for.
MOST_SIZES = 8


def compile(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], autotune: bool = True) -> Engine:
    """Make an inference engine of a pruned model: fused, on the sparse kernels where they are faster.

    The engine is a snapshot: later changes of ``model`` do not reach it. What it does not know runs in PyTorch, op by
    op. It takes any batch size, and any image size that the model takes: at the first call with another than that of
    ``example_inputs`` it chooses anew, by the cost table (:meth:`Engine.autotune_` measures).

    NaN and Inf pass through kept weights, though an Inf may come out as NaN; a pruned weight times Inf, which PyTorch's
    dense kernels turn into NaN, mostly adds nothing.

    Args:
        model: any module in eval mode, on the CPU; it is not changed.
        example_inputs: what ``model`` is called with, ``[n, channels, h, w]`` for a CNN: a tensor, or a tuple of them.
            Take the batch that matters: one image makes an engine for one at a time, which threads share.
        autotune: measure every layer, sparse against dense and, in a chain, cut into other blocks of channels and strips
            of pixels, which part of the batch to run at a time, and whether threads share images, instead of following
            the cost table. Measurements are kept on disk
            (:mod:`sparsekit.engine.tuning`). With False the same model gives the same plan. One plan gives bit-identical
            results for any number of threads, but for steps that run in PyTorch as they are where PyTorch's do not.

    Returns:
        An :class:`Engine`.

    Raises:
        ValueError: the model is in training mode, not on the CPU, or cannot be captured as one graph.
        TypeError: ``example_inputs`` holds something other than tensors.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU()).eval()
        >>> fast = sk.compile(sk.pruning.magnitude_(model, sparsity=0.9), torch.randn(2, 3, 8, 8), autotune=False)
        >>> fast(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 64, 6, 6])
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _check_model(model, inputs)
    source = snapshot(model)
    plan = lower(capture(source, inputs))
    # Only where other sizes make another plan.
    fixed = any(shape[:1] != [None] or None not in shape[1:] for _, shape in plan.inputs)
    engine = Engine(plan, source if fixed else None)
    return engine.autotune_(*inputs) if autotune else engine.decide_(*inputs)


def load(path: str | os.PathLike) -> Engine:
    """Read an engine that :meth:`Engine.save` wrote; it needs neither the model nor its code.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an engine's file, damaged, or of another version.
    """
    plan, choices = files.read(path)
    engine = Engine(plan)
    try:
        engine._restore(choices)
    except RuntimeError as error:
        raise ValueError(f"path must be an engine's file, got {path}: {error}") from error
    return engine


def _check_model(model: nn.Module, inputs: tuple) -> None:
    for i, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"example_inputs must be tensors, got {type(tensor).__name__} at position {i}")
        if tensor.device.type != "cpu":
            raise ValueError(f"example_inputs must be on the CPU, got {tensor.device} at position {i}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        name = next(name for name, module in model.named_modules() if module.training)
        raise ValueError(f"model must be in eval mode (model.eval()), but {name or 'it'} is in training mode")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"model must be on the CPU, but {name} is on {tensor.device}")


class Engine(nn.Module):
    """What :func:`sparsekit.compile` returns: call it like the model. For inference; several threads may call it at once.

    Attributes:
        plan: the steps, see :mod:`sparsekit.engine.plan`.
    """

    def __init__(self, plan: Plan, source: nn.Module | None = None):
        """``source`` is what the plan was captured from, to capture again for other sizes than the plan is good for."""
        super().__init__()
        self.eval()
        self.plan = plan
        self._source = [source]  # in a list, for it is no submodule
        self._schedules: dict[tuple, Schedule] = {}
        self._lock = threading.Lock()

    def forward(self, *inputs: Tensor):
        """As the model's. Raises TypeError or ValueError if the inputs are not like those it was compiled for."""
        self._check_inputs(inputs)
        with torch.no_grad():
            schedule = self._schedule_for(inputs)
            outputs = schedule.run(inputs)
        return torch.utils._pytree.tree_unflatten(outputs, schedule.spec)

    def accepts(self, *inputs: Tensor) -> bool:
        """Whether it was compiled for inputs like these."""
        try:
            self._check_inputs(inputs)
        except (TypeError, ValueError):
            return False
        return True

    def _check_inputs(self, inputs: tuple) -> None:
        if len(inputs) != len(self.plan.inputs):
            raise TypeError(f"the engine takes {len(self.plan.inputs)} inputs, got {len(inputs)}")
        for i, (tensor, (dtype, shape)) in enumerate(zip(inputs, self.plan.inputs)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"input {i} must be a tensor, got {type(tensor).__name__}")
            if tensor.device.type != "cpu":
                raise ValueError(f"input {i} must be on the CPU, got {tensor.device}")
            if str(tensor.dtype) != f"torch.{dtype}":
                raise TypeError(f"input {i} must be {dtype}, got {str(tensor.dtype).removeprefix('torch.')}")
            if tensor.dim() != len(shape) or not (self._source[0] is not None or _fits(tensor, shape)):
                wanted = "x".join("n" if s is None else str(s) for s in shape)
                raise ValueError(
                    f"input {i} must have the shape that the engine was compiled for, {wanted}, got "
                    f"{'x'.join(map(str, tensor.shape))}; compile the model again for other sizes"
                )

    def _schedule_for(self, inputs: tuple[Tensor, ...]) -> Schedule:
        key = self._sizes(inputs)
        if (schedule := self._schedules.get(key)) is None:
            with self._lock:
                if (schedule := self._schedules.get(key)) is None:
                    schedule = Schedule(self._plan_for(inputs))
                    if all(t.numel() for t in inputs):  # nothing can be chosen for no images
                        schedule.decide(inputs)
                        schedule.tidy()
                        self._keep(key, schedule)
        return schedule

    def _plan_for(self, inputs: tuple[Tensor, ...]) -> Plan:
        """The engine's own plan, unless it was made for another size."""
        if all(_fits(tensor, shape) for tensor, (_, shape) in zip(inputs, self.plan.inputs)):
            return self.plan
        known = (s.plan for s in self._schedules.values())
        return next((p for p in known if all(map(_fits, inputs, (shape for _, shape in p.inputs)))), None) or lower(
            capture(self._source[0], inputs)
        )

    def _sizes(self, inputs: tuple[Tensor, ...]) -> tuple:
        """What schedules are kept by: everything but the batch, and that too where the model depends on it."""
        shapes = (shape for _, shape in self.plan.inputs)
        return tuple(tuple(t.shape[shape[:1] == [None] :]) for t, shape in zip(inputs, shapes))

    def _keep(self, key: tuple, schedule: Schedule) -> None:
        kept = {**self._schedules, key: schedule}
        self._schedules = dict(list(kept.items())[-MOST_SIZES:])

    def decide_(self, *inputs: Tensor) -> Engine:
        """Choose what runs sparse by the cost table (:mod:`sparsekit.dispatch`), for inputs of this size. Returns self."""
        return self._choose(inputs, Schedule.decide)

    def autotune_(self, *inputs: Tensor) -> Engine:
        """Measure, and choose per layer what is faster and how it is cut, and how much of the batch to run at a time.

        Returns self.

        Args:
            inputs: as for a call; the batch size that matters. What is chosen holds for inputs of this size.
        """
        return self._choose(inputs, Schedule.tune)

    def _choose(self, inputs: tuple[Tensor, ...], choose) -> Engine:
        self._check_inputs(inputs)
        with torch.no_grad(), self._lock:
            schedule = Schedule(self._plan_for(inputs))
            choose(schedule, inputs)
            schedule.tidy()
            self._keep(self._sizes(inputs), schedule)
        return self

    def explain(self, *inputs: Tensor) -> Explanation:
        """Per layer: shape, sparsity, what runs, why, and expected and measured time against dense.

        Times are those of layers by themselves; in a chain they take less.

        Args:
            inputs: as for a call; layers are measured on what they get here.

        Returns:
            A list of :class:`sparsekit.profile.LayerReport` in the order of execution; ``print`` shows a table.
        """
        self._check_inputs(inputs)
        with torch.no_grad():
            return self._schedule_for(inputs).explain(inputs)

    def save(self, path: str | os.PathLike) -> None:
        """Write the engine to one safetensors file, weights compressed, atomically; :func:`sparsekit.load` reads it.

        Where the model depends on the image size, the file holds it for the size that it was compiled for only.
        """
        files.write(path, self.plan, self._choices())

    def _choices(self) -> dict:
        own = [(key, schedule) for key, schedule in self._schedules.items() if schedule.plan is self.plan]
        return {"machine": tuning.machine(), "schedules": [[key, schedule.saved()] for key, schedule in own]}

    def _restore(self, choices: dict) -> None:
        # Another machine decides anew, by its own cost table.
        if choices["machine"] == tuning.machine():
            for key, saved in choices["schedules"]:
                schedule = Schedule(self.plan)
                schedule.restore(saved)
                schedule.tidy()
                self._keep(tuple(map(tuple, key)), schedule)

    def extra_repr(self) -> str:
        sizes = ", ".join("x".join(map(str, size)) for key in self._schedules for size in key)
        return f"{len(self.plan.steps)} steps, scheduled for {sizes or 'no size yet'}"

    def __deepcopy__(self, memo):
        copy = Engine(self.plan, self._source[0])
        copy._restore(self._choices())
        return copy

    def __reduce__(self):
        raise TypeError("an engine cannot be pickled; use engine.save(path) and sparsekit.load(path)")


def _fits(tensor: Tensor, shape: list[int | None]) -> bool:
    return all(size in (None, actual) for size, actual in zip(shape, tensor.shape))
