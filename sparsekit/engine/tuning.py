"""What autotuning measured, kept on disk: ``~/.cache/sparsekit/tuning.json``, or under ``$SPARSEKIT_CACHE``.

Entries are seconds, by machine (CPU, ISA, threads, version) and by what was measured (shape, non-zeros).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from .. import _ops
from .._version import __version__
from ..io.checkpoint import write_atomically


def path() -> Path:
    """The file of measurements."""
    folder = os.environ.get("SPARSEKIT_CACHE") or Path.home() / ".cache" / "sparsekit"
    return Path(folder) / "tuning.json"


def cpu_name() -> str:
    """The CPU's model, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> str:
    """What a measurement depends on besides the layer."""
    return f"{cpu_name()} | {_ops.backend()} | {torch.get_num_threads()} threads | torch {torch.__version__} | {__version__}"


class Cache:
    """Measurements of this machine; written back at the end of a ``with`` block if there are new ones."""

    def __enter__(self) -> Cache:
        self._known = _read().get(machine(), {})
        self._new: dict[str, list[float]] = {}
        return self

    def get(self, key: str, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """The seconds under ``key``, measured if nobody has."""
        if key not in self._known:
            self._known[key] = self._new[key] = list(measure())
        return self[key]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> tuple[float, ...]:
        return tuple(self._known[key])

    def __exit__(self, *error) -> None:
        if not self._new or error[0] is not None:
            return
        everything = _read()  # once more: another process may have written
        everything.setdefault(machine(), {}).update(self._new)
        with contextlib.suppress(OSError):  # a read-only home costs the next process a measurement, nothing else
            write_atomically(path(), lambda name: Path(name).write_text(json.dumps(everything, indent=1)))


def _read() -> dict[str, dict[str, list[float]]]:
    try:
        everything = json.loads(path().read_text())
        valid = isinstance(everything, dict) and all(
            isinstance(seconds, list) and all(isinstance(s, (int, float)) for s in seconds)
            for entries in everything.values()
            for seconds in entries.values()
        )
        return everything if valid else {}
    except (OSError, ValueError, AttributeError):
        return {}  # absent or damaged: measure again
