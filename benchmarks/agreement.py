"""Whether sparse training is masked dense training: `python -m benchmarks.agreement`. Goes on where it was stopped.

A small ResNet at 90 % on Fashion-MNIST, from the same start in the same order of images: dense with masks multiplied in
(torch.nn.utils.prune), sparse modules, and compressed ones, for three seeds: their accuracy after three epochs, and the
relative difference of their losses in the first steps, there and at smaller learning rates. At a large one differences of
rounding grow fast: the control is masked dense training against itself with a single weight moved by one rounding, as
far apart as it may be without anything being wrong. Figures go to benchmarks/results/agreement.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import sparsekit as sk
from sparsekit.transfer import evaluate, tasks
from sparsekit.transfer.finetune import batches
from sparsekit.transfer.models import SmallResNet

RESULTS = Path(__file__).parent / "results" / "agreement.json"
SEEDS, EPOCHS, BATCH, LR, SPARSITY = (0, 1, 2), 3, 128, 0.05, 0.9
SMALLER = (0.002, 0.001, 0.0005)  # learning rates of the first steps alone
NUDGED = "masked dense, one weight rounded"
FORMS = ("masked dense", "sparse", "compressed", NUDGED)
COMPARED = 100  # steps


def network(seed: int, form: str) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallResNet((32, 64, 128))
    sk.pruning.magnitude_(model, SPARSITY, "uniform", exclude=sk.pruning.first_and_last(model))
    if form == NUDGED:
        with torch.no_grad():
            model.conv1.weight.view(-1)[0].mul_(1 + torch.finfo(torch.float32).eps)
    if form in ("masked dense", NUDGED):
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                prune.custom_from_mask(module, "weight", module.weight.detach() != 0)
        return model
    sk.sparsify_(model)
    for module in model.modules():
        if isinstance(module, sk.nn.SparseModule):
            module.backend = "sparse"
    return sk.compress_(model) if form == "compressed" else model


def train(seed: int, form: str, task: tasks.Task, lr: float, epochs: int) -> dict:
    """Losses of the first steps, and the accuracy at the end; after the first steps if ``epochs`` is 0."""
    model, losses = network(seed, form).train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4)
    steps = EPOCHS * -(-len(task.train_labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(max(epochs, 1)):
        for images, labels in batches(task, 28, 1, BATCH, True, seed, epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if len(losses) < COMPARED:
                losses.append(loss.item())
            elif not epochs:
                break
    return {"losses": losses, "accuracy": evaluate(model, task, size=28)}


RUNS = {"": (LR, EPOCHS)} | {f", lr {lr}": (lr, 0) for lr in SMALLER}


def summary(runs: dict) -> dict:
    """Worst relative differences of losses, and mean accuracies in percent."""
    found = {"accuracy": {f: sum(runs[f"{f}, {s}"]["accuracy"] for s in SEEDS) / len(SEEDS) * 100 for f in FORMS}}
    for form in FORMS[1:]:
        for kind, (lr, _) in RUNS.items():
            off = []
            for seed in SEEDS:
                ours, theirs = (torch.tensor(runs[f"{f}, {seed}{kind}"]["losses"]) for f in (form, FORMS[0]))
                off.append(((ours - theirs).abs() / theirs).tolist())
            worst = {f"first {n} steps": max(max(o[:n]) for o in off) for n in (10, COMPARED)}
            found[f"{form}, lr {lr}"] = worst
    return found


def main() -> None:
    torch.set_num_threads(1)  # with two, dense products of this size differ from run to run
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if results.pop("summary", None):
        results = {}
    task = tasks.load("fashion-mnist")
    for seed in SEEDS:
        for form in FORMS:
            for kind, settings in RUNS.items():
                if (key := f"{form}, {seed}{kind}") not in results:
                    results[key] = train(seed, form, task, *settings)
                    RESULTS.write_text(json.dumps(results) + "\n")
                    print(key, results[key]["accuracy"], flush=True)
    results["summary"] = summary(results)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
