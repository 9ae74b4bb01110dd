"""Memory of second-order pruning beyond the model: `python -m benchmarks.fisher`. ResNet-50, 224 x 224, two threads.

oBS with blocks of 50 weights and 128 gradients, each of one image, to 90 %: the highest resident memory less that before,
and seconds. Figures go to benchmarks/results/fisher.json.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import resnet50

import sparsekit as sk
from sparsekit.engine.tuning import cpu_name

from .footprint import resident

RESULTS = Path(__file__).parent / "results" / "fisher.json"
GRADIENTS, BLOCK, SPARSITY = 128, 50, 0.9


class Peak(threading.Thread):
    """The highest resident memory while it runs, in MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.highest = max(self.highest, resident(trim=False))


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = resnet50()
    batches = [(torch.randn(1, 3, 224, 224), torch.randint(1000, (1,))) for _ in range(GRADIENTS)]
    # Whatever a first step allocates belongs to training.
    F.cross_entropy(model(batches[0][0].expand(2, -1, -1, -1)), batches[0][1].expand(2)).backward()
    model.zero_grad()
    before, start, peak = resident(), time.perf_counter(), Peak()
    peak.start()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = sk.pruning.OBS(
        model.eval(), optimizer, SPARSITY, batches, F.cross_entropy, gradients=GRADIENTS, block=BLOCK
    )  # fmt: skip
    pruner.finalize()
    seconds = time.perf_counter() - start
    peak.done.set()
    peak.join()
    results = {
        "cpu": cpu_name(), "torch": torch.__version__, "gradients": GRADIENTS, "block": BLOCK,
        "sparsity": sk.sparsity(model).overall, "memory_mb": round(peak.highest - before), "seconds": round(seconds, 1),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in results.items()))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
