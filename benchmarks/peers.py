"""Engines side by side: `make bench-peers`. ResNet-50 at 224 x 224, uniform sparsity, conv1 and fc dense, float32, and
dense engines in bfloat16 and INT8 beside them, marked as such.

Every engine runs in a process of its own (benchmarks/peer_worker.py) on the same weights and images, all with two
threads, in turns of random order; a figure is the median over rounds of a round's median. DeepSparse's licence allows
evaluation: it lives in an environment of its own, and nothing but this benchmark knows of it. Outputs are compared.
Figures go to benchmarks/results/peers, a file for every CPU; a peer that cannot be started is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import sparsekit as sk
from benchmarks import machines
from benchmarks.peer_worker import PEERS
from benchmarks.readme import fill
from benchmarks.timing import median, spread
from sparsekit.job import resnet50

ROOT = machines.ROOT
RESULTS = ROOT / "benchmarks" / "results" / "peers"
OWN_ENVIRONMENT = {
    "deepsparse": ".venv-deepsparse",
    **dict.fromkeys(("onnxruntime", "openvino", "bf16 openvino", "int8 onnxruntime", "int8 openvino"), ".venv-onnx"),
}
OTHER_PRECISIONS = ("bf16 eager", "bf16 openvino", "int8 torch", "int8 onnxruntime", "int8 openvino")
DENSE = ("eager", "channels_last", "inductor", "onnxruntime", "openvino")
RUNS = {1: 10, 16: 5, 64: 3}  # in a turn, whose first is slower: its memory has been idle


def export(level: float, folder: Path) -> str:
    """Write a pruned, calibrated ResNet-50 as a state dict and as ONNX; the common beginning of their names."""
    model = resnet50(level)
    sk.pruning.recalibrate_batchnorm_(model, [torch.randn(8, 3, 224, 224) for _ in range(2)])
    model = sk.densify_(model).eval()
    name = str(folder / f"resnet50-{100 * level:g}")
    torch.save(model.state_dict(), f"{name}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(1, 3, 224, 224),), f"{name}.onnx", opset_version=13, input_names=["x"],
            output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, dynamo=False,
        )  # fmt: skip
    return name


class Peer:
    """A worker that has loaded its model."""

    def __init__(self, name: str, model: str, batch: int):
        python = ROOT / OWN_ENVIRONMENT.get(name, ".venv") / "bin" / "python"
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "NM_DISABLE_ANALYTICS": "True"}
        self._process = subprocess.Popen(
            [str(python), str(ROOT / "benchmarks" / "peer_worker.py"), name, model, str(batch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.output = self._answer()

    def _answer(self) -> list[float]:
        for line in self._process.stdout:
            if line.startswith("["):
                return json.loads(line)
        raise RuntimeError(f"the worker ended with {self._process.wait()}")

    def run(self, runs: int) -> list[float]:
        self._process.stdin.write(f"{runs}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def start(names: list[str], model: str, batch: int) -> dict[str, Peer]:
    """The peers that can be started, with outputs that agree."""
    peers: dict[str, Peer] = {}
    for name in names:
        try:
            peers[name] = Peer(name, model, batch)
        except (OSError, RuntimeError) as error:
            print(f"  {name} is left out: {error}")
    expected = torch.tensor(peers["sparsekit"].output)
    for name, peer in peers.items():
        output = torch.tensor(peer.output)
        if name in OTHER_PRECISIONS:
            alike = torch.cosine_similarity(output - output.mean(), expected - expected.mean(), 0)
            print(f"  {name}: correlation {alike:.3f} with float32")
        else:
            torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-3, msg=f"{name} differs")
    return peers


def measure(names: list[str], model: str, batch: int, rounds: int) -> dict:
    """``{peer: {"milliseconds": an image, "spread": .., "p99": ..}}``."""
    peers = start(names, model, batch)
    times: dict[str, list[float]] = {name: [] for name in peers}
    every: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            time.sleep(0.2)  # for the threads of the one before to go to sleep
            seconds = peers[name].run(RUNS.get(batch, 5))
            times[name].append(median(seconds))
            every[name] += seconds
    for peer in peers.values():
        peer.close()
    return {
        name: {
            "milliseconds": 1e3 * median(t) / batch,
            "spread": spread(t),
            "p99": 1e3 * sorted(every[name])[int(0.99 * (len(every[name]) - 1))] / batch,
        }
        for name, t in times.items()
    }


def table(results: dict) -> str:
    """Milliseconds an image in Markdown, and our time over DeepSparse's and the fastest dense engine's."""
    names = list(dict.fromkeys(name for cell in results["cells"].values() for name in cell))
    lines = [
        f"ResNet-50 at 224 × 224, float32, 2 threads of an {results['cpu']} ({results['isa']}), torch {results['torch']}, "
        f"at commit {results['commit']}; uniform sparsity, conv1 and fc dense. Milliseconds an image, medians of "
        f"{results['rounds']} alternating rounds; dense is the fastest of the dense float32 engines in the row; bf16 and "
        "int8 are dense in other precisions, which change what the model computes. Over DeepSparse below 1 means that "
        "sparsekit is faster. `make bench-peers` makes this table.",
        "",
        "| sparsity, batch | " + " | ".join(names) + " | over DeepSparse | faster than dense |",
        "| --- |" + " ---: |" * (len(names) + 2),
    ]
    for key, cell in results["cells"].items():
        ours = cell["sparsekit"]["milliseconds"]
        row = [f"{cell[n]['milliseconds']:.1f} ± {100 * cell[n]['spread']:.0f} %" if n in cell else "" for n in names]
        theirs = f"{ours / cell['deepsparse']['milliseconds']:.2f}" if "deepsparse" in cell else ""
        dense = [cell[n]["milliseconds"] for n in DENSE if n in cell]
        row += [theirs, f"{min(dense) / ours:.1f}×" if dense else ""]
        lines.append(f"| {key} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def plot(everywhere: list[dict], path: Path) -> None:
    """Milliseconds an image over sparsity: a line for each engine, a row for each machine, a panel for each batch size."""
    from matplotlib.figure import Figure

    batches = sorted({key.split(" %, ")[1] for results in everywhere for key in results["cells"]}, key=int)
    figure = Figure(figsize=(4 * len(batches), 3.6 * len(everywhere)), layout="constrained")
    rows = figure.subplots(len(everywhere), len(batches), sharey="row", squeeze=False)
    for panels, results in zip(rows, everywhere):
        cells = {tuple(key.split(" %, ")): cell for key, cell in results["cells"].items()}
        for panel, batch in zip(panels, batches):
            here = {float(level): cell for (level, b), cell in cells.items() if b == batch}
            lines(panel, here)
            panel.set_visible(bool(here))
            panel.set(title=f"{results['cpu']} ({results['isa']}), batch {batch}", xlabel="sparsity, %", ylim=(0, None))
            panel.title.set_fontsize(9)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("ms an image (dotted: 99th percentile)")
        panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def lines(panel: Any, cells: dict[float, dict]) -> None:
    """A line for each engine over sparsity, and its 99th percentile."""
    for name in dict.fromkeys(name for cell in cells.values() for name in cell):
        levels = [level for level in cells if name in cells[level]]
        style = {"linewidth": 2.5, "color": "black"} if name == "sparsekit" else {}
        values = {which: [cells[level][name][which] for level in levels] for which in ("milliseconds", "p99")}
        (line,) = panel.plot(levels, values["milliseconds"], marker="o", label=name, **style)
        panel.plot(levels, values["p99"], linestyle=":", color=line.get_color())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--keep", action="store_true", help="keep the other cells of the last run: nothing changed since"
    )
    args = parser.parse_args()
    names = ["sparsekit", *(name for name in args.peers if name != "sparsekit")]
    path = machines.file_in(RESULTS)
    results = machines.here() | {"rounds": args.rounds}
    results["cells"] = machines.read(path).get("cells", {}) if args.keep else {}
    with tempfile.TemporaryDirectory() as folder:
        for level in args.sparsity:
            model = export(level, Path(folder))
            for batch in args.batch:
                key = f"{100 * level:g} %, {batch}"
                print(key)
                cell = results["cells"][key] = measure(names, model, batch, args.rounds)
                print("  " + ", ".join(f"{name} {row['milliseconds']:.2f}" for name, row in cell.items()), flush=True)
                in_order = sorted(results["cells"].items(), key=lambda cell: [float(n) for n in cell[0].split(" %, ")])
                results["cells"] = dict(in_order)
                machines.write(path, results)
    everywhere = machines.all_in(RESULTS)
    fill("peers", "\n\n".join(map(table, everywhere)))
    plot(everywhere, ROOT / "docs" / "peers.png")


if __name__ == "__main__":
    main()
