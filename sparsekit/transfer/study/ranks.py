"""A cell of several processes: torchrun starts them, on this node or on all nodes of a SLURM job.

``python -m sparsekit.transfer.study.ranks CELL`` is one of them; CELL is the JSON file that :func:`run_ranks` writes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from .document import TaskEntry, Upstream, Work
from .table import Cell, read, write


def run_ranks(cell: Cell, work: Work) -> None:
    """Train a cell by torchrun; its first rank writes ``result.json``.

    Args:
        cell: of full finetuning.
        work: says how many processes on how many nodes.

    Raises:
        RuntimeError: a rank failed; with the end of what it said.
    """
    path = cell.folder / "cell.json"
    content = {"upstream": asdict(cell.upstream), "task": asdict(cell.task), "mode": cell.mode, "seed": cell.seed}
    write(path, content | {"config": cell.config, "gpus": work.gpus})
    done = subprocess.run(command(path, work), capture_output=True, text=True, env=_environment(work))
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-2000:]}")


def command(path: Path, work: Work, address: str = "") -> list[str]:
    """What starts all ranks of a cell.

    Args:
        path: of the cell.
        work: says how many processes on how many nodes.
        address: ``host:port`` where nodes meet; "": this host, at a free port.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(work.processes)]
    if work.nodes == 1:
        torchrun.append("--standalone")
    else:
        nodes = str(work.nodes)
        torchrun += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", address or _free_address()]
        # One torchrun on every node, beside the step of this worker.
        torchrun = ["srun", "--overlap", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", *torchrun]
    return [*torchrun, "-m", "sparsekit.transfer.study.ranks", str(path)]


def _free_address() -> str:
    with socket.socket() as found:
        found.bind(("", 0))
        return f"{socket.gethostname()}:{found.getsockname()[1]}"


def _environment(work: Work) -> dict[str, str]:
    # Else ranks that were restarted wait for each other forever, with gloo and torch 2.14.
    return os.environ | {"OMP_NUM_THREADS": str(work.threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def main(path: Path) -> None:
    """Train a cell as one of its ranks."""
    from .run import run_cell

    content = read(path)
    upstream, task = Upstream(**content["upstream"]), TaskEntry(**content["task"])
    cell = Cell(upstream, task, content["mode"], content["seed"], content["config"], path.parent)
    torch.set_num_threads(cell.config["threads"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if content["gpus"] else torch.device("cpu")
    dist.init_process_group("nccl" if content["gpus"] else "gloo")
    try:
        result = run_cell(cell, device)
        if dist.get_rank() == 0:
            write(path.parent / "result.json", result)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
