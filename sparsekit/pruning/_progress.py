"""A progress bar for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """``items``, with a bar where somebody can see it: on a terminal, if rich is installed."""
    if not sys.stderr.isatty():
        return iter(items)
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        return iter(items)
    return iter(bar(items, description, total, transient=True, console=Console(stderr=True)))
