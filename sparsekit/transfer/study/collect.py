"""Gathering what cells left into one file, which the report is made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .document import Study
from .table import cells, read, write


def collect(study: Study) -> dict[str, Any]:
    """Gather the finished cells into ``results.json``, from which alone a report can be made.

    Args:
        study: the document.

    Returns:
        What ``results.json`` holds, JSON types: the settings, facts about models and tasks, ``cells`` with accuracy and
        seconds, the number of ``missing`` ones, ``failed`` with their errors, and ``speed`` if it was measured.
    """
    found, failed, missing, made = [], {}, 0, {}
    for cell in cells(study):
        result = cell.result()
        if result is not None:
            made = made or {key: result["made"][key] for key in ("cpu", "isa", "torch", "sparsekit")}
            found.append(
                {
                    "upstream": cell.upstream.title, "task": cell.task.name, "mode": cell.mode, "seed": cell.seed,
                    "accuracy": result["outcome"]["accuracy"], "loss": result["outcome"]["losses"][-1],
                    "weights": result["outcome"]["weights"], "seconds": result["made"]["seconds"],
                }
            )  # fmt: skip
            continue
        missing += 1
        failure = cell.failure()
        if failure is not None:
            failed[cell.title] = failure["error"]
    results = {
        "title": study.title,
        "note": study.note,
        "made": made | {"threads": study.work.threads, "workers": study.work.workers},
        "settings": {
            "architecture": study.architecture, "modes": list(study.modes), "seeds": list(study.seeds),
            "size": study.size, "linear": asdict(study.linear),
            "full": asdict(study.full), "tasks": [asdict(task) for task in study.tasks],
        },
        **(read(study.out / "facts.json") or {"upstreams": [], "tasks": []}),
        "cells": found,
        "missing": missing,
        "failed": failed,
        "speed": read(study.out / "speed.json"),
    }  # fmt: skip
    write(Path(study.out) / "results.json", results)
    return results
