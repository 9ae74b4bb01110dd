"""Two ranks under torchrun compute what one process computes on the joint batch; also after one of them died."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekit as sk

WORKER = Path(__file__).parent / "worker.py"
spec = importlib.util.spec_from_file_location("worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def torchrun(folder, *arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(WORKER), str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # Else workers that were restarted wait for each other forever, with gloo and torch 2.14.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


def alone(form):
    """The state dict that one process ends with, and its model."""
    model, optimizer = worker.build(form)
    pruner = worker.PRUNERS[form](model, optimizer) if form in worker.PRUNERS else None
    for step in range(worker.STEPS):
        worker.train_step(model, model, optimizer, step, pruner=pruner)
    return sk.dense_state_dict(model), model


FORMS = ["sparse", "compressed", *worker.PRUNERS]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Where two ranks left their results; masks that differ after a step would have stopped them."""
    folder = tmp_path_factory.mktemp("ranks")
    run = torchrun(folder, *FORMS)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_are_one_process(form, together):
    result = torch.load(together / f"{form}.pt")
    expected, model = alone(form)
    for name, value in expected.items():
        torch.testing.assert_close(
            result["model"][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Compressed, nothing but kept weights travels. CrAM has two passes a step, but the last.
    numbers = sum(p.numel() for p in model.parameters())
    assert result["sent"] == (2 * worker.STEPS - 1 if form == "cram" else worker.STEPS) * numbers
    if form == "compressed":
        dense = worker.build("sparse")[0]
        assert numbers == sum(int((p != 0).sum()) if p.dim() > 1 else p.numel() for p in dense.parameters())


def test_a_lost_rank_restarts_from_the_checkpoint(tmp_path):
    run = torchrun(tmp_path, "compressed", "--crash-at", "4", restarts=1)
    assert run.returncode == 0, run.stderr
    result = torch.load(tmp_path / "compressed.pt")
    assert result["start"] == 4
    for name, value in alone("compressed")[0].items():
        torch.testing.assert_close(result["model"][name], value, rtol=1e-5, atol=1e-6)


def test_ranks_with_other_masks_are_stopped(tmp_path):
    run = torchrun(tmp_path, "sparse", "--other-mask")
    assert run.returncode != 0 and "ranks must have the same masks, but those of 0 differ" in run.stderr
