"""ResNet-50's sparse convolutions, layer by layer, against PyTorch's dense ones: `python -m benchmarks.layers`.

Forward, input gradient plus masked weight gradient, at uniform sparsity. Dense is PyTorch's own convolution in NCHW and
in channels_last, of which the faster counts, layer by layer; our time is for NCHW tensors in and out, packing included.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import torch.nn.functional as F

import sparsekit as sk
from benchmarks.shapes import RESNET50, Layer
from benchmarks.timing import interleave, keep_freed_memory, median, spread
from sparsekit import _ops
from sparsekit.formats import pattern_from_mask


def _dense(layer: Layer, x, dy, weight):
    """Forward and backward of PyTorch's convolution; the gradients are what autograd would call."""
    padding = layer.kernel // 2

    def forward():
        return F.conv2d(x, weight, None, layer.stride, padding)

    def backward():
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, [layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, False]
        )

    return forward, backward


def measure(layer: Layer, batch: int, sparsities: list[float], runs: int, seed: int = 0) -> dict:
    """Times in seconds of one layer: `{"dense_fwd": .., "dense_bwd": .., "90_fwd": .., "90_dx": .., "90_dw": ..}`."""
    g = torch.Generator().manual_seed(seed)
    out = layer.size // layer.stride
    x = torch.randn(batch, layer.in_channels, layer.size, layer.size, generator=g)
    dy = torch.randn(batch, layer.out_channels, out, out, generator=g)
    weight = torch.randn(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel, generator=g)
    functions = {}
    for name, layout in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        forward, backward = _dense(layer, *(t.contiguous(memory_format=layout) for t in (x, dy, weight)))
        functions[f"dense_{name}_fwd"], functions[f"dense_{name}_bwd"] = forward, backward
    geometry = ([layer.kernel] * 2, [layer.stride] * 2, [layer.kernel // 2] * 4, [1, 1], 1)
    ops = torch.ops.sparsekit
    for sparsity in sparsities:
        pattern = pattern_from_mask(torch.rand(weight.shape, generator=g) >= sparsity)
        values = _ops.compress(weight, pattern)
        key = f"{100 * sparsity:g}"
        functions[f"{key}_fwd"] = lambda v=values, p=pattern: ops.conv2d(x, v, *p, None, *geometry)
        functions[f"{key}_dx"] = lambda v=values, p=pattern: ops.conv2d_input_grad(dy, v, *p[2:], x.shape, *geometry)
        functions[f"{key}_dw"] = lambda p=pattern: ops.conv2d_values_grad(dy, x, *p[:2], *geometry)
    with torch.no_grad():
        times = interleave(functions, runs)
    result = {name: median(t) for name, t in times.items()}
    result["spread"] = max(spread(t) for t in times.values())
    for way in ("fwd", "bwd"):
        result[f"dense_{way}"] = min(result.pop(f"dense_nchw_{way}"), result.pop(f"dense_nhwc_{way}"))
    return result


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--layers", help="only layers whose name contains this")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    keys = [f"{100 * s:g}" for s in args.sparsity]
    print(f"{sk.backend()}, {args.threads} threads, batch {args.batch}; ms of dense, then speed-up over it (fwd/dX/dW)")
    totals: dict[str, float] = {}
    layers = [layer for layer in RESNET50 if not args.layers or args.layers in layer.name]
    rows = {}
    for layer in layers:
        times = rows[layer.name] = measure(layer, args.batch, args.sparsity, args.runs)
        for name, seconds in times.items():
            totals[name] = totals.get(name, 0) + layer.count * seconds
        parts = [f"{layer.name:22s} x{layer.count} {1e3 * times['dense_fwd']:7.2f} {1e3 * times['dense_bwd']:7.2f}"]
        for key in keys:
            fwd, dx, dw = (times[f"{key}_{op}"] for op in ("fwd", "dx", "dw"))
            parts.append(
                f"{key}%: {times['dense_fwd'] / fwd:5.2f} {times['dense_bwd'] / (dx + dw):5.2f}"
                f" ({1e3 * fwd:.2f} {1e3 * dx:.2f} {1e3 * dw:.2f})"
            )
        print("  ".join(parts))
        sys.stdout.flush()
    summary = {}
    for key in keys:
        forward = totals["dense_fwd"] / totals[f"{key}_fwd"]
        backward = totals["dense_bwd"] / (totals[f"{key}_dx"] + totals[f"{key}_dw"])
        summary[key] = {"forward": round(forward, 2), "backward": round(backward, 2)}
        print(f"sum at {key:>4} %: forward {forward:.2f}x, input gradient + masked weight gradient {backward:.2f}x")
    noise = median([times["spread"] for times in rows.values()])
    print(f"noisiest function of a layer: spread {100 * noise:.0f} % (median over layers)")
    record = {
        "batch": args.batch, "threads": args.threads, "isa": sk.backend(), "summary": summary, "spread": noise,
        "layers": rows,
    }  # fmt: skip
    if args.json:
        with open(args.json, "w") as f:
            json.dump(record, f, indent=1)
    return record


if __name__ == "__main__":
    main()
