"""What pruning has done to a model: sparsity, work and speed, layer by layer."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..profile import Explanation, explain


class PruningReport:
    """What :func:`report` found; ``print`` shows a table.

    Attributes:
        layers: the :class:`~sparsekit.profile.LayerReport` of every layer that ran.
        sparsity: fraction of zeros over their weights.
        macs: multiply-adds of the dense layers.
        kept_macs: those of weights that are not zero.
        expected_speedup: by the cost table: time of the dense layers over that of what runs.
        measured_speedup: the same, as measured.
    """

    def __init__(self, layers: Explanation):
        self.layers = layers
        weights = sum(layer.weights for layer in layers)
        self.sparsity = sum(layer.sparsity * layer.weights for layer in layers) / max(weights, 1)
        self.macs = sum(layer.macs for layer in layers)
        self.kept_macs = round(sum(layer.macs * (1 - layer.sparsity) for layer in layers))
        self.expected_speedup = _ratio((layer.expected_dense, layer.expected_sparse, layer.backend) for layer in layers)
        self.measured_speedup = _ratio((layer.measured_dense, layer.measured_sparse, layer.backend) for layer in layers)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [7])
        lines = [f"{'layer':<{width}}  sparsity      weights  dense MMAC   kept MMAC  runs    expected  measured"]
        rows = [
            (r.name, r.sparsity, r.weights, r.macs, r.macs * (1 - r.sparsity), r.backend, *_speedups(r))
            for r in self.layers
        ]
        weights = sum(layer.weights for layer in self.layers)
        rows.append(
            (
                "overall",
                self.sparsity,
                weights,
                self.macs,
                self.kept_macs,
                "",
                self.expected_speedup,
                self.measured_speedup,
            )
        )
        for name, sparsity, size, macs, kept, backend, expected, measured in rows:
            lines.append(
                f"{name:<{width}}  {sparsity:8.4f}  {size:11,d}  {macs / 1e6:10.2f}  {kept / 1e6:10.2f}  {backend:<6}  "
                f"{_times(expected)}  {_times(measured)}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The figures as JSON can hold them."""
        totals = {
            name: _number(getattr(self, name))
            for name in ("sparsity", "macs", "kept_macs", "expected_speedup", "measured_speedup")
        }
        layers = [{key: _number(value) for key, value in layer._asdict().items()} for layer in self.layers]
        return {**totals, "layers": layers}


def report(model: nn.Module, example_inputs: Tensor | tuple, train: bool = False) -> PruningReport:
    """Per layer and overall: sparsity, multiply-adds, expected and measured speed-up over PyTorch's dense layers.

    Args:
        model: any module, pruned or not; it is as before afterwards.
        example_inputs: what ``model`` is called with: a tensor, or a tuple of arguments.
        train: time forward and backward instead of forward.

    Returns:
        A :class:`PruningReport`; it counts Conv2d and Linear layers alone, as modules: :func:`sparsekit.compile` is
        faster.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
        >>> _ = sk.sparsify_(sk.pruning.magnitude_(model, sparsity=0.75))
        >>> found = sk.pruning.report(model, torch.randn(8, 64))
        >>> found.sparsity, found.macs, found.kept_macs
        (0.75, 32768, 8192)
    """
    return PruningReport(explain(model, example_inputs, train))


def _ratio(times) -> float:
    """Dense seconds over those of what runs, of (dense, sparse, backend); a layer without an estimate counts as dense."""
    dense = runs = 0.0
    for all_dense, sparse, backend in times:
        if not math.isnan(all_dense):
            dense += all_dense
            runs += sparse if backend == "sparse" and not math.isnan(sparse) else all_dense
    return dense / runs if runs else math.nan


def _speedups(layer) -> tuple[float, float]:
    return (
        _ratio([(layer.expected_dense, layer.expected_sparse, layer.backend)]),
        _ratio([(layer.measured_dense, layer.measured_sparse, layer.backend)]),
    )


def _times(ratio: float) -> str:
    return "       –" if math.isnan(ratio) else f"{ratio:7.2f}x"


def _number(value):
    return None if isinstance(value, float) and math.isnan(value) else value
