"""Our own checkpoints: one safetensors file, sparse tensors compressed, written atomically.

Version 1. Tensors are named ``model/<name in the state dict>`` and ``optimizer/<parameter number>/<state name>``; those of
the user's extra ``extra/<number>``. The weight of a sparse layer, and optimizer state of its shape, is stored as
``…:values`` ``[nnz]``; its structure as ``model/<layer>.weight:crow_indices`` and ``:col_indices`` (int32, see
:mod:`sparsekit.formats`). The file's metadata holds ``format`` = ``sparsekit``, ``version``, and under ``json`` the shapes,
the optimizer's groups and the user's extra.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import _ops
from ..convert import sparsify_, state_prefix
from ..formats import Pattern, mask_from_pattern, pattern_from_mask, validate_csr
from ..nn import CompressedModule, SparseModule
from ..nn.sparse import COMPRESSED_KEYS

VERSION = 1


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: name to tensor, weights dense, with the masks of sparse layers.
        masks: ``{layer name: bool mask}`` of the sparse layers.
        optimizer: the optimizer's state dict, or None.
        extra: what the caller stored: JSON types and tensors.
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let ``write(name)`` make a file, and give it the name ``path`` only when it is complete and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a model, and what is needed to go on training it, to one file; a crash leaves the old file.

    Args:
        path: where; folders are made.
        model: sparse layers are stored compressed.
        optimizer: whose state to store too.
        extra: anything JSON can hold, and tensors: epoch, accuracy, a pruner's state dict …

    Raises:
        TypeError: ``extra`` or the optimizer's groups hold what JSON cannot.

    Example:
        >>> import os, tempfile, torch, sparsekit as sk
        >>> model = sk.sparsify_(sk.pruning.magnitude_(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.9))
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> sk.io.save_checkpoint(path, model, extra={"epoch": 3})
        >>> sk.io.load_checkpoint(path, torch.nn.Sequential(torch.nn.Linear(64, 64))).extra
        {'epoch': 3}
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"shapes": {}, "extra": _take_tensors(extra or {}, tensors)}
    layers = dict(_named_sparse(model))
    by_parameter = {id(layer.stored): (key, layer) for key, layer in reversed(layers.items())}

    def put_sparse(key: str, tensor: Tensor, layer: SparseModule) -> None:
        """Store the weight of a layer, or a tensor that goes with it."""
        tensor, pattern = tensor.detach().cpu(), Pattern(*(t.cpu() for t in layer.pattern))
        header["shapes"][key] = list(layer.weight_mask.shape)
        tensors[f"{key}:values"] = tensor.clone() if tensor.dim() == 1 else _ops.compress(tensor, pattern)

    for key, layer in layers.items():
        put_sparse(key, layer.stored, layer)
        tensors[f"{key}:crow_indices"] = layer.pattern.crow_indices.cpu().clone()
        tensors[f"{key}:col_indices"] = layer.pattern.col_indices.cpu().clone()
    stored = {
        f"{key.removesuffix('weight')}{name}" for key in layers for name in ("weight", "weight_mask", *COMPRESSED_KEYS)
    }
    for name, tensor in model.state_dict().items():
        if f"model/{name}" not in stored:
            tensors[f"model/{name}"] = tensor.detach().cpu().contiguous().clone()
    if optimizer is not None:
        weight_of = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        state = optimizer.state_dict()
        scalars: dict[str, dict] = {}
        structures: dict[str, str] = {}
        for number, values in state["state"].items():
            parameter = weight_of[number]
            for key, value in values.items():
                full = f"optimizer/{number}/{key}"
                if torch.is_tensor(value) and value.shape == parameter.shape and id(parameter) in by_parameter:
                    structures[full], layer = by_parameter[id(parameter)]
                    put_sparse(full, value, layer)
                elif torch.is_tensor(value):
                    tensors[full] = value.detach().cpu().contiguous().clone()
                else:
                    scalars.setdefault(str(number), {})[key] = value
        header["optimizer"] = {"groups": state["param_groups"], "scalars": scalars, "structures": structures}
    metadata = {"format": "sparsekit", "version": str(VERSION), "json": json.dumps(header)}
    write_atomically(path, lambda name: save_file(tensors, name, metadata))


_TENSOR = "sparsekit tensor"


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved to ``tensors``, and their names in their place."""
    if torch.is_tensor(value):
        name = f"extra/{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _take_tensors(item, tensors) for key, item in value.items()}
    return [_take_tensors(item, tensors) for item in value] if isinstance(value, (list, tuple)) else value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`_take_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    return [_put_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def _named_sparse(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The sparse layers of a model, and under which name a file holds their weights."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseModule):
            yield f"model/{state_prefix(name)}weight", module


def load_checkpoint(
    path: str | os.PathLike, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote, and load it into a model and an optimizer.

    Args:
        path: the file.
        model: loaded strictly, in place; layers that are sparse in the file become sparse.
        optimizer: its state is loaded too.

    Returns:
        The :class:`Checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not one of our files, a newer version, damaged, or without the optimizer that was asked for.
        RuntimeError: names or shapes do not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            header = json.loads(metadata["json"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"path must be a sparsekit checkpoint, got {path}, which is damaged: {error}") from error
    if optimizer is not None and "optimizer" not in header:
        raise ValueError(f"{path} holds no optimizer state")

    structures: dict[str, Pattern] = {}
    state, masks = {}, {}
    for key, size in header["shapes"].items():
        if key.startswith("model/"):
            structures[key] = _structure(path, tensors, key, size)
    for key in tensors:
        base, _, kind = key.rpartition(":")
        if not key.startswith("model/") or kind in ("crow_indices", "col_indices"):
            continue
        if kind == "values" and base in structures:
            name = base[len("model/") :]
            state[name] = _dense(tensors[key], structures[base], header["shapes"][base])
            layer = name[: -len("weight")]
            masks[layer.rstrip(".")] = state[f"{layer}weight_mask"] = mask_from_pattern(
                structures[base], state[name].shape
            )
        else:
            state[key[len("model/") :]] = tensors[key]
    saved = _optimizer_state(header, tensors, structures, _compressed(model, optimizer, header))
    if model is not None:
        sparsify_(model, filter_fn=lambda name, _: name in masks, min_sparsity=0)
        model.load_state_dict(state)
    if optimizer is not None:
        optimizer.load_state_dict(saved)
    return Checkpoint(state, masks, saved, _put_tensors(header["extra"], tensors))


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != "sparsekit":
        raise ValueError(f"path must be a sparsekit checkpoint, got {path}, whose format is {metadata.get('format')!r}")
    if int(metadata["version"]) > VERSION:
        raise ValueError(f"{path} is of version {metadata['version']}; this sparsekit reads up to {VERSION}")


def _structure(path: Path, tensors: dict[str, Tensor], key: str, size: list[int]) -> Pattern:
    crow, col = tensors[f"{key}:crow_indices"], tensors[f"{key}:col_indices"]
    columns = torch.Size(size[1:]).numel()
    try:
        validate_csr(crow, col, columns)
        if crow.numel() != size[0] + 1 or tensors[f"{key}:values"].shape != col.shape:
            raise ValueError(f"sizes do not fit {size}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {key}: {error}") from error
    mask = mask_from_pattern(Pattern(crow, col, crow, col, col), size)
    return pattern_from_mask(mask)


def _dense(values: Tensor, pattern: Pattern, size: list[int]) -> Tensor:
    return _ops.decompress(values, pattern, size)


def _compressed(model: nn.Module | None, optimizer: torch.optim.Optimizer | None, header: dict) -> set[str]:
    """The tensors of an optimizer's state that go to compressed layers, by the model or else by the optimizer."""
    structures = header.get("optimizer", {}).get("structures", {})
    if model is not None:
        layers = {key for key, layer in _named_sparse(model) if isinstance(layer, CompressedModule)}
        return {full for full, key in structures.items() if key in layers}
    parameters = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    flat = {str(number) for number, parameter in enumerate(parameters) if parameter.dim() == 1}
    return {full for full in structures if full.split("/")[1] in flat}


def _optimizer_state(
    header: dict, tensors: dict[str, Tensor], structures: dict[str, Pattern], compressed: set[str]
) -> dict | None:
    """The state dict in a file: dense but for ``compressed``."""
    if "optimizer" not in header:
        return None
    saved = header["optimizer"]
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in saved["scalars"].items()}
    for key, tensor in tensors.items():
        if not key.startswith("optimizer/"):
            continue
        base = key.removesuffix(":values")
        _, number, name = base.split("/", 2)
        if base in saved["structures"] and base not in compressed:
            tensor = _dense(tensor, structures[saved["structures"][base]], header["shapes"][base])
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, "param_groups": saved["groups"]}
