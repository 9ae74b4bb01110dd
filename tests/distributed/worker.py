"""A rank of small data-parallel trainings: `torchrun worker.py FOLDER FORM ... [--crash-at STEP] [--other-mask]`.

Writes FOLDER/FORM.pt (the dense state dict, and how many numbers each step sent) at the end of every form, and a checkpoint
after every step, from which it goes on after a restart.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import sparsekit as sk

STEPS, BATCH, CHANGE = 6, 8, 3


def build(form):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    sk.sparsify_(sk.pruning.magnitude_(model, 0.75, "uniform"))
    for module in model.modules():
        if isinstance(module, sk.nn.SparseModule):
            module.backend = "sparse"
    if form == "compressed":
        sk.compress_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, optimizer


def data(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 8, 8, generator=g), torch.randint(4, (BATCH,), generator=g)


def fisher(method, **settings):
    """Second-order methods, whose own gradients are of the same batches on all ranks."""
    batches = [data(100 + i) for i in range(4)]
    schedule = {"interval": 2, "end": 4, "initial_sparsity": 0.75}
    return lambda m, o: method(m, o, 0.9, batches, F.cross_entropy, gradients=4, dampening=1e-3, **schedule, **settings)


# Pruners by form, of a model that is at 75 % already. RigL averages its gradients over the ranks, STR's thresholds follow
# the gradients, Movement adds them up, SET draws.
PRUNERS = {
    "gmp": lambda m, o: sk.pruning.GMP(m, o, 0.9, interval=2, end=4, initial_sparsity=0.75),
    "movement": lambda m, o: sk.pruning.Movement(m, o, 0.9, begin=1, interval=2, end=5, initial_sparsity=0.75),
    "woodfisher": fisher(sk.pruning.WoodFisher, block=16),
    "obs": fisher(sk.pruning.OBS, block=8),
    "mfac": fisher(sk.pruning.MFAC),
    "set": lambda m, o: sk.pruning.SET(m, o, 0.75, interval=2, end=20, start="magnitude"),
    "rigl": lambda m, o: sk.pruning.RigL(m, o, 0.75, interval=2, end=20, start="magnitude"),
    "topkast": lambda m, o: sk.pruning.TopKAST(m, o, 0.75, interval=2, end=20),
    "str": lambda m, o: sk.pruning.STR(m, o, initial=-4.0, weight_decay=0.1),
    "dnw": lambda m, o: sk.pruning.DNW(m, o, 0.75),
    "acdc": lambda m, o: sk.pruning.ACDC(m, o, sk.pruning.Phases(0.8, prune_at=(1, 5), restore_at=(3,))),
    "lth": lambda m, o: sk.pruning.LTH(m, o, 0.9, interval=2, rate=0.5),
    "cram": lambda m, o: sk.pruning.CrAM(m, o, 0.9, end=5, levels=(0.8, 0.9)),
    "snip": lambda m, o: sk.pruning.SNIP(m, o, 0.9, [data(100)], F.cross_entropy),
}  # fmt: skip


def train_step(run, model, optimizer, step, rank=0, ranks=1, pruner=None):
    """Forward and backward on a rank's share of the batch, and the optimizer's step; masks change once, or as a pruner
    has it."""
    # Statistics of a share are not those of the batch.
    model[1].eval()
    x, y = (t.chunk(ranks)[rank] for t in data(step))
    optimizer.zero_grad()

    def loss():
        return F.cross_entropy(run(x), y)

    pruner.backward(loss) if pruner else loss().backward()
    optimizer.step()
    if pruner:
        pruner.step()
        sk.check_masks(model)
    elif step == CHANGE:
        sk.set_mask_(model[3], model[3].weight_mask.roll(1), optimizer)
        sk.check_masks(model)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("forms", nargs="+")
    parser.add_argument("--crash-at", type=int)
    parser.add_argument("--other-mask", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for form in args.forms:
        train(form, args)
    dist.destroy_process_group()


def train(form, args):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, optimizer = build(form)
    if args.other_mask and rank == 1:
        sk.set_mask_(model[0], model[0].weight_mask.roll(1))
    pruner = PRUNERS[form](model, optimizer) if form in PRUNERS else None
    sk.check_masks(model)
    path, start = args.folder / f"{form}-checkpoint", 0
    if path.exists():
        start = sk.io.load_checkpoint(path, model, optimizer).extra["steps"]
    parallel, sent = DistributedDataParallel(model), []

    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    parallel.register_comm_hook(None, count)
    for step in range(start, STEPS):
        if step == args.crash_at and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)
        train_step(parallel, model, optimizer, step, rank, ranks, pruner)
        if rank == 0:
            sk.io.save_checkpoint(path, model, optimizer, {"steps": step + 1})
        dist.barrier()
    if rank == 0:
        result = {"model": sk.dense_state_dict(model), "sent": sum(sent), "start": start}
        torch.save(result, args.folder / f"{form}.pt")


if __name__ == "__main__":
    main()
