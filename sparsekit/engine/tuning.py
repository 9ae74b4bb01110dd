"""What autotuning measured, kept on disk: ``~/.cache/sparsekit/tuning.json``, or under ``$SPARSEKIT_CACHE``.

Entries are seconds, by machine (CPU, ISA, threads, version, build), by what was measured (shape, non-zeros), and by the way
that it was done.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .. import _ops
from .._version import __version__
from ..io.checkpoint import write_atomically
from ..profile import seconds_in_turns


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
    parts = cpu_name(), _ops.backend(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", __version__
    return " | ".join((*parts, _ops.build_id()))


class Cache:
    """Measurements of this machine; written back at the end of a ``with`` block if there are new ones."""

    def __enter__(self) -> Cache:
        self._known = _read().get(machine(), {})
        self._new: dict[str, dict[str, float]] = {}
        return self

    def knows(self, key: str, ways: Iterable[str]) -> bool:
        """Whether these ways of doing something were measured."""
        return self._known.get(key, {}).keys() == set(ways)

    def known(self, key: str) -> dict[str, float]:
        """The seconds that each way takes, by name."""
        return self._known[key]

    def keep(self, key: str, seconds: dict[str, float]) -> None:
        """The seconds that each way takes, by whoever measured them."""
        self._known[key] = self._new[key] = seconds

    def seconds(self, key: str, ways: dict[str, Callable[[], object]], limit: float = math.inf) -> dict[str, float]:
        """The seconds that each of some ways of doing something takes, measured if nobody has."""
        if not self.knows(key, ways):
            self.keep(key, seconds_in_turns(ways, limit=limit))
        return self.known(key)

    def __exit__(self, *error) -> None:
        if not self._new or error[0] is not None:
            return
        everything = _read()  # once more: another process may have written
        everything.setdefault(machine(), {}).update(self._new)
        with contextlib.suppress(OSError):  # a read-only home costs the next process a measurement, nothing else
            write_atomically(path(), lambda name: Path(name).write_text(json.dumps(everything, indent=1)))


def _read() -> dict[str, dict[str, dict[str, float]]]:
    try:
        everything = json.loads(path().read_text())
        valid = all(
            isinstance(seconds, (int, float))
            for entries in everything.values()
            for ways in entries.values()
            for seconds in ways.values()
        )
        return everything if valid else {}
    except (OSError, ValueError, AttributeError):
        return {}  # absent or damaged: measure again
