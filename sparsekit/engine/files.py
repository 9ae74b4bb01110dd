"""An engine in one safetensors file: the plan as JSON in its metadata, weights compressed.

A weight with zeros is stored as ``<name>:values`` ``[nnz]``, ``:crow_indices`` and ``:col_indices``, the
other tensors under their names. A file can name ATen ops of a plan and nothing else: no code is in it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..formats import validate_csr
from ..io.checkpoint import write_atomically
from .chains import check as check_chain
from .plan import ACTIVATIONS, Call, Compressed, Const, Layer, Plan, Ref, resolve
from .schedule import BLOCKINGS

FORMAT = "sparsekit.engine"
VERSION = 5
DIMENSIONS = {"conv2d": 4, "linear": 2}  # of weights


def write(path: str | os.PathLike, plan: Plan, choices: dict) -> None:
    """Write a plan, and what was chosen for its layers.

    Raises:
        ValueError: the plan holds what a file cannot, such as an op that is not PyTorch's own.
    """
    weights = {step.weight for step in plan.steps if isinstance(step, Layer)}
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    known, compressed = plan.contents()
    for name, tensor in known.items():
        if name in weights and (tensor == 0).any():
            compressed[name] = Compressed.of(tensor)
        else:
            tensors[name] = tensor.contiguous().clone()
    for name, weight in compressed.items():
        shapes[name] = list(weight.size)
        tensors |= {f"{name}:{part}": getattr(weight, part) for part in ("values", "crow_indices", "col_indices")}
    for step in plan.steps:
        if isinstance(step, Call):
            _check_target(step.target)
    header = {
        "steps": [
            {"call": _encode(vars(step))} if isinstance(step, Call) else {"layer": _encode(vars(step))}
            for step in plan.steps
        ],
        "inputs": plan.inputs,
        "outputs": _encode(plan.outputs),
        "output_spec": plan.output_spec,
        "slots": plan.slots,
        "batched": plan.batched,
        "per_image": plan.per_image,
        "shapes": shapes,
        "choices": choices,
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "json": json.dumps(header)}
    write_atomically(path, lambda name: save_file(tensors, name, metadata))


def read(path: str | os.PathLike) -> tuple[Plan, dict]:
    """The plan and the choices in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an engine's file, damaged, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an engine's file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            if int(metadata["version"]) != VERSION:
                raise ValueError(f"it is of version {metadata['version']}; this sparsekit reads version {VERSION}")
            header = json.loads(metadata["json"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        plan = _plan(header, tensors)
        torch.utils._pytree.treespec_loads(plan.output_spec)
        return plan, _checked(header["choices"], plan)
    except (SafetensorError, NotImplementedError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"path must be an engine's file, got {path}: {error}") from error


def _plan(header: dict, tensors: dict[str, Tensor]) -> Plan:
    compressed = {}
    for name, size in header["shapes"].items():
        values = tensors.pop(f"{name}:values")
        crow, col = tensors.pop(f"{name}:crow_indices"), tensors.pop(f"{name}:col_indices")
        validate_csr(crow, col, torch.Size(size[1:]).numel())
        if crow.numel() != size[0] + 1 or values.shape != col.shape:
            raise ValueError(f"the sizes of {name} do not fit {size}")
        if not values.is_floating_point():
            raise ValueError(f"the values of {name} are {values.dtype}")
        compressed[name] = Compressed(values, crow, col, torch.Size(size))
    steps: list[Call | Layer] = []
    for item in header["steps"]:
        if "call" in item:
            step = Call(**_decode(item["call"]))
            _check_target(step.target)
            resolve(step.target)
        else:
            step = Layer(**_decode(item["layer"]))
            if step.kind not in DIMENSIONS:
                raise ValueError(f"there are no layers of kind {step.kind!r}")
            if step.activation is not None and step.activation not in ACTIVATIONS.values():
                raise ValueError(f"there is no activation {step.activation!r}")
        steps.append(step)
    inputs = [(dtype, list(shape)) for dtype, shape in header["inputs"]]
    per_image = [int(slot) for slot in header["per_image"]]
    outputs = _decode(header["outputs"])
    plan = Plan(
        steps,
        {name: tensor.clone() for name, tensor in tensors.items()},  # the file itself is let go with the last weight
        inputs,
        outputs,
        header["output_spec"],
        header["slots"],
        header["batched"],
        per_image,
        compressed,
    )
    _check_names(plan)
    for step in steps:
        if isinstance(step, Layer) and len(size := plan.size_of(step.weight)) != DIMENSIONS[step.kind]:
            raise ValueError(
                f"a {step.kind} has a weight of {DIMENSIONS[step.kind]} dimensions, {step.name} of {list(size)}"
            )
    return plan


def _check_target(target: str) -> None:
    if not target.startswith(("aten.", "operator.")):
        raise ValueError(f"an engine's file can hold PyTorch's own ops only, not {target}")
    if target.startswith("aten."):
        schema = resolve(target)._schema
        if schema.is_mutable or not schema.arguments:
            raise ValueError(f"an engine's file cannot hold {target}, which does more than compute a result")


def _check_names(plan: Plan) -> None:
    """That every slot is written before it is read, and every tensor is there."""
    written = set(range(len(plan.inputs)))

    def check(value) -> None:
        if isinstance(value, Ref) and value.slot not in written:
            raise ValueError(f"slot {value.slot} is read before it is written")
        if isinstance(value, Const) and value.name not in plan.tensors and value.name not in plan.compressed:
            raise ValueError(f"there is no tensor {value.name!r}")
        if isinstance(value, (list, dict)) and not isinstance(value, (Ref, Const)):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)

    for step in plan.steps:
        if isinstance(step, Layer):
            check([step.input, step.residual, Const(step.weight)] + ([Const(step.bias)] if step.bias else []))
        else:
            check([step.args, step.kwargs])
        if not 0 <= step.out < plan.slots:
            raise ValueError(f"slot {step.out} does not exist")
        written.add(step.out)
    check(plan.outputs)
    check([Ref(slot) for slot in plan.per_image])


def _checked(choices: dict, plan: Plan) -> dict:
    """Schedules that cover every layer of the plan."""
    schedules = []
    for key, saved in choices["schedules"]:
        for i, step in enumerate(plan.steps):
            if isinstance(step, Layer) and saved["layers"][str(i)][0] not in ("sparse", "dense"):
                raise ValueError(f"layer {step.name} runs {saved['layers'][str(i)][0]!r}")
        if not (saved["part"] is None or saved["part"] > 0):
            raise ValueError(f"part is {saved['part']}")
        for name in ("share", "single"):
            if not isinstance(saved[name], bool):
                raise ValueError(f"{name} is {saved[name]}")
        for number, name in saved["blockings"].items():
            if not isinstance(plan.steps[int(number)], Layer) or name not in BLOCKINGS:
                raise ValueError(f"step {number} is cut by {name!r}")
        sizes = {int(slot): [int(n) for n in size] for slot, size in saved["sizes"].items()}
        chains = [[int(number) for number in numbers] for numbers in saved["chains"]]
        for numbers in chains:
            check_chain(plan, sizes, numbers)
        if len({number for numbers in chains for number in numbers}) < sum(map(len, chains)):
            raise ValueError("a step is in two chains")
        size = [[int(n) for n in size] for size in key]
        schedules.append([size, {**saved, "sizes": sizes, "chains": chains}])
    return {"machine": choices["machine"], "schedules": schedules}


_SPECIAL = {
    torch.dtype: "dtype",
    torch.memory_format: "memory_format",
    torch.layout: "layout",
}


def _encode(value) -> Any:
    """JSON of a step's arguments."""
    if isinstance(value, Ref):
        return {"slot": value.slot}
    if isinstance(value, Const):
        return {"tensor": value.name}
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if type(value) in _SPECIAL:
        return {_SPECIAL[type(value)]: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"an engine's file cannot hold {value!r}")


def _decode(value) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "slot":
        return Ref(int(content))
    if kind == "tensor":
        return Const(str(content))
    if kind == "dict":
        return {key: _decode(item) for key, item in content.items()}
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content, None)
    if kind in _SPECIAL.values() and _SPECIAL.get(type(found)) == kind:
        return found
    raise ValueError(f"{value!r} is not an argument")
