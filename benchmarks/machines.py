"""Figures by machine: a file for every CPU and ISA, since CPUs of several generations may call themselves the same."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import torch

import sparsekit as sk
from sparsekit.engine.tuning import cpu_name

ROOT = Path(__file__).parent.parent


def here() -> dict[str, str]:
    """What figures depend on: the machine, PyTorch, and the commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {"cpu": cpu_name(), "isa": sk.backend(), "torch": torch.__version__, "commit": done.stdout.strip()}


def file_in(folder: Path) -> Path:
    """This machine's file."""
    name = f"{re.sub(r'[(].*?[)]', '', cpu_name())} {sk.backend()}"
    return folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def all_in(folder: Path) -> list[dict]:
    """The figures of every machine."""
    return [read(path) for path in sorted(folder.glob("*.json"))]
