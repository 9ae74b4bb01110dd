"""From accuracies to the study's figures: means, relative error, rankings; and the published ones to put beside them."""

from __future__ import annotations

import csv
import functools
import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the seeds.
        std: sample standard deviation; None: one seed.
        seeds: how many.
    """

    mean: float
    std: float | None
    seeds: int


def figure(values: list[float]) -> Figure | None:
    """Mean and standard deviation; None: there are no values."""
    if not values:
        return None
    return Figure(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Summary:
    """The figures of a study.

    Args:
        results: what :func:`collect` gives.
    """

    def __init__(self, results: dict[str, Any]):
        self.results = results
        self.upstreams: dict[str, dict] = {upstream["title"]: upstream for upstream in results["upstreams"]}
        self.tasks: dict[str, dict] = {task["name"]: task for task in results["tasks"]}
        self.modes: list[str] = results["settings"]["modes"]
        self.dense: str | None = next((title for title, u in self.upstreams.items() if u["method"] == "dense"), None)
        # {(upstream, task, mode): {seed: accuracy}}
        self._accuracies: dict[tuple[str, str, str], dict[int, float]] = {}
        for cell in results["cells"]:
            key = cell["upstream"], cell["task"], cell["mode"]
            self._accuracies.setdefault(key, {})[cell["seed"]] = cell["accuracy"]

    def accuracy(self, upstream: str, task: str, mode: str) -> Figure | None:
        """Of a model on a task; None: no seed is finished."""
        return figure(list(self._accuracies.get((upstream, task, mode), {}).values()))

    def mean_accuracy(self, upstream: str, mode: str) -> Figure | None:
        """The mean over tasks; None: not all of them are there."""
        return figure(list(self._by_seed(upstream, mode, lambda sparse, _: sparse).values()))

    def relative_error(self, upstream: str, mode: str) -> Figure | None:
        """The mean over tasks of (error - dense error) / dense error, as a fraction; ± over seeds.

        A task that the dense model makes no error on counts for nobody. None: not all tasks are there, or no dense model.
        """
        return figure(list(self._by_seed(upstream, mode, _relative).values()))

    def at_least_dense(self, upstream: str, mode: str) -> int:
        """On how many tasks a model is as accurate as the dense one, or more."""
        pairs = [
            (self.accuracy(upstream, t, mode), self.accuracy(self.dense, t, mode)) for t in self.tasks if self.dense
        ]
        return sum(sparse.mean >= dense.mean for sparse, dense in pairs if sparse and dense)

    def _by_seed(self, upstream: str, mode: str, combine) -> dict[int, float]:
        """Mean over tasks of ``combine(accuracy, accuracy of dense)``, for every seed that has all tasks."""
        found: dict[int, float] = {}
        for seed in self.results["settings"]["seeds"]:
            values = []
            for task in self.tasks:
                sparse = self._accuracies.get((upstream, task, mode), {}).get(seed)
                dense = self._accuracies.get((self.dense, task, mode), {}).get(seed)
                if sparse is None or (dense is None and combine is _relative):
                    break
                values.append(combine(sparse, dense))
            else:
                values = [value for value in values if value is not None]
                if values:
                    found[seed] = statistics.mean(values)
        return found

    def levels(self) -> list[float]:
        """The sparsities at which at least two methods can be ranked."""
        targets = [u["target"] for title, u in self.upstreams.items() if title != self.dense]
        return sorted({target for target in targets if targets.count(target) > 1})

    def ranking(self, level: float, mode: str) -> list[str]:
        """The models of a sparsity, best first by relative error, else by mean accuracy."""
        scores = {}
        for title, upstream in self.upstreams.items():
            change, accuracy = self.relative_error(title, mode), self.mean_accuracy(title, mode)
            if upstream["target"] == level and title != self.dense and accuracy:
                scores[title] = change.mean if change else -accuracy.mean
        return sorted(scores, key=scores.get)

    def flips(self, level: float) -> tuple[list[tuple[str, str]], int, list[tuple[str, str]]]:
        """Pairs of models that linear and full transfer put in opposite order.

        Returns:
            Those pairs, the better one in linear transfer first; how many pairs there are; and those of the flipped whose
            difference exceeds the sum of both standard deviations in both modes.
        """
        linear, full = (self.ranking(level, mode) for mode in ("linear", "full"))
        pairs = list(itertools.combinations([title for title in linear if title in full], 2))
        flipped = [(a, b) for a, b in pairs if full.index(a) > full.index(b)]
        clear = [pair for pair in flipped if all(self._differs(*pair, mode) for mode in ("linear", "full"))]
        return flipped, len(pairs), clear

    def _differs(self, a: str, b: str, mode: str) -> bool:
        first, second = (self.relative_error(t, mode) or self.mean_accuracy(t, mode) for t in (a, b))
        return abs(first.mean - second.mean) > (first.std or 0) + (second.std or 0)

    def published(self, upstream: str, mode: str, measure: str) -> Figure | None:
        """The published figure in percent: of a task, the ``"mean"`` over the twelve, or ``"relative error change"``."""
        facts = self.upstreams[upstream]
        method = "Dense" if facts["method"] == "dense" else facts["published"]
        return published().get((self.results["settings"]["architecture"], mode, method, facts["target"], measure))

    def published_ranking(self, level: float, mode: str) -> list[str]:
        """The models of a sparsity, by the published relative error of their methods."""
        scores = {title: self.published(title, mode, "relative error change") for title in self.upstreams}
        known = {
            title: score.mean
            for title, score in scores.items()
            if score and title != self.dense and self.upstreams[title]["target"] == level
        }
        return sorted(known, key=known.get)


def _relative(sparse: float, dense: float) -> float | None:
    return None if dense == 1 else (dense - sparse) / (1 - dense)


@functools.cache
def published() -> dict[tuple[str, str, str, float, str], Figure]:
    """The results of arXiv 2111.13445, from the raw files of IST-DASLab/sparse-imagenet-transfer (Apache-2.0).

    Returns:
        {(``"resnet50"`` or ``"mobilenetv1"``, mode, method, sparsity, measure): percent}; a measure is the name of a task,
        ``"mean"`` over the twelve, or ``"relative error change"``, the mean over them against dense. It is not stated
        whether an accuracy is that of the best or of the last epoch; the number of seeds is 5 linear, 3 to 4 full, 1 to 2
        for MobileNetV1 full, which have no standard deviation where there was one.
    """
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return {
            (row["architecture"], row["mode"], row["method"], float(row["sparsity"]), row["measure"]): Figure(
                float(row["percent"]), float(row["std"]) if row["std"] else None, _seeds(row)
            )
            for row in csv.DictReader(file)
        }


def _seeds(row: dict[str, str]) -> int:
    if row["mode"] == "linear":
        return 5
    return 3 if row["architecture"] == "resnet50" else 1
