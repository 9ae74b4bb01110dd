"""The report of a study: HTML, Markdown, CSV, with the published figures beside ours."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ...bench import WAYS, best
from ...io import write_atomically
from ..report import png, pyplot, write_pages
from .summary import Figure, Summary

PROTOCOL = {"linear": (150, 0.01), "full": (150, 0.001)}  # epochs, learning rate
KINDS = {"inference": "inference", "linear": "linear finetuning step", "full": "full finetuning step"}  # of bench
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
MARKERS = "osD^vP*X"


def write_study_report(results: dict[str, Any], folder: Path) -> None:
    """Write ``report.html``, ``report.md`` with its plots, ``cells.csv`` and ``summary.csv``.

    Args:
        results: what :func:`collect` gives; more need not be there.
        folder: where.

    Raises:
        ValueError: no cell is finished, or the check has not left its facts.
    """
    if not results["cells"] or not results["upstreams"]:
        raise ValueError("results must hold finished cells, got none: run the study first")
    summary = Summary(results)
    _write_csv(folder / "cells.csv", results["cells"])
    _write_csv(folder / "summary.csv", _summary_rows(summary))
    write_pages(folder, results["title"], _blocks(summary))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda name: Path(name).write_text(text.getvalue()))


def _summary_rows(summary: Summary) -> list[dict[str, Any]]:
    """A row for every model, mode and task, and one for the mean over tasks; percent."""
    rows = []
    for title, upstream in summary.upstreams.items():
        for mode in summary.modes:
            figures = {task: summary.accuracy(title, task, mode) for task in summary.tasks}
            figures |= {"mean": summary.mean_accuracy(title, mode)}
            figures |= {"relative error change": summary.relative_error(title, mode)}
            for measure, ours in figures.items():
                name = summary.tasks[measure]["published"] if measure in summary.tasks else measure
                theirs = summary.published(title, mode, name)
                rows.append(
                    {
                        "method": upstream["method"], "target": upstream["target"], "sparsity": upstream["sparsity"],
                        "mode": mode, "measure": measure, "percent": ours and 100 * ours.mean,
                        "std": (ours and ours.std is not None and 100 * ours.std) or None,
                        "seeds": ours.seeds if ours else 0, "published": theirs and theirs.mean,
                        "published_std": theirs and theirs.std,
                    }
                )  # fmt: skip
    return rows


def _percent(figure: Figure | None, sign: str = "") -> str:
    if figure is None:
        return "–"
    std = "" if figure.std is None else f" ± {100 * figure.std:.1f}"
    return f"{100 * figure.mean:{sign}.1f}{std}"


def _published(figure: Figure | None, sign: str = "") -> str:
    if figure is None:
        return "–"
    return f"{figure.mean:{sign}.1f}" + ("" if figure.std is None else f" ± {figure.std:.1f}")


def _blocks(summary: Summary) -> list[tuple[str, object]]:
    results = summary.results
    made, settings = results["made"], results["settings"]
    unfinished = [*results["failed"]] or ([f"{results['missing']} of them"] if results["missing"] else [])
    blocks: list[tuple[str, object]] = [("title", results["title"])]
    if results["note"]:
        blocks.append(("text", results["note"]))
    blocks.append(
        (
            "text",
            f"{len(results['cells'])} cells: {len(summary.upstreams)} upstream models, {len(summary.tasks)} tasks, "
            f"{' and '.join(summary.modes)} transfer, {len(settings['seeds'])} seeds; ± is the standard deviation over "
            f"seeds. {made['cpu']}, {made['threads']} thread a cell, {made['isa']} kernels, sparsekit "
            f"{made['sparsekit']}, torch {made['torch']}. {_schedules(settings)}",
        )
    )
    if unfinished:
        blocks.append(("text", f"Not finished, and left out: {', '.join(unfinished)}."))
    blocks += [("heading", "Which way of transfer favours which method"), *_ranking_blocks(summary)]
    blocks += [("heading", "Relative error"), *_relative_blocks(summary)]
    blocks += [("heading", "Accuracy"), *_accuracy_blocks(summary)]
    blocks += [("heading", "Speed"), *_speed_blocks(summary)]
    blocks += [("heading", "Models and tasks"), *_material_blocks(summary)]
    return blocks


def _schedules(settings: dict[str, Any]) -> str:
    """How training differs from the protocol."""
    texts = []
    for mode in settings["modes"]:
        schedule, (epochs, lr) = settings[mode], PROTOCOL[mode]
        text = f"{mode} finetuning has {schedule['epochs']} epochs at a learning rate of {schedule['lr']:g}"
        texts.append(f"{text}, as in the protocol" if (schedule["epochs"], schedule["lr"]) == (epochs, lr) else
                     f"{text} (the protocol: {epochs} at {lr:g})")  # fmt: skip
    text = "; ".join(texts)
    return (
        f"{text[0].upper()}{text[1:]}; SGD, momentum 0.9, weight decay 5e-4, batches of {settings['full']['batch_size']}, "
        "the rate × 0.1 after a third and two thirds. Masks stay fixed; linear transfer trains a head on features extracted "
        "once from images as they are, full transfer all kept weights on random crops, on the sparse kernels."
    )


def _ranking_blocks(summary: Summary) -> list[tuple[str, object]]:
    blocks: list[tuple[str, object]] = [
        (
            "text",
            "Methods of one sparsity, best first, by the mean relative change in error; beside them the order of the same "
            "methods in the published results, where they are there.",
        )
    ]
    if set(summary.modes) != {"linear", "full"} or not summary.levels():
        return [("text", "There is no ranking without both ways of transfer and two methods at one sparsity.")]
    for level in summary.levels():
        rankings = [summary.ranking(level, mode) for mode in ("linear", "full")]
        rankings += [summary.published_ranking(level, mode) for mode in ("linear", "full")]
        table = [[f"{100 * level:g} %", "linear", "full", "linear, published", "full, published"]]
        for place in range(max(map(len, rankings))):
            names = [_name(summary, titles[place]) if place < len(titles) else "" for titles in rankings]
            names[2:] = [_published_name(summary, r[place]) if place < len(r) else "" for r in rankings[2:]]
            table.append([f"{place + 1}", *names])
        blocks += [("table", table), ("text", _flip_text(summary, level))]
    return blocks


def _name(summary: Summary, title: str) -> str:
    return summary.upstreams[title]["method"]


def _published_name(summary: Summary, title: str) -> str:
    return summary.upstreams[title]["published"]


def _flip_text(summary: Summary, level: float) -> str:
    flipped, pairs, clear = summary.flips(level)
    if not flipped:
        return f"At {100 * level:g} % the ranking does not flip: all {pairs} pairs of methods keep their order."
    listed = ", ".join(f"{_name(summary, a)} over {_name(summary, b)}" for a, b in flipped)
    beyond = ", ".join(f"{_name(summary, a)} over {_name(summary, b)}" for a, b in clear) or "none"
    linear, full = (summary.published_ranking(level, mode) for mode in ("linear", "full"))
    theirs = [
        f"{_published_name(summary, a)} over {_published_name(summary, b)}"
        for i, a in enumerate(linear)
        for b in linear[i + 1 :]
        if full.index(a) > full.index(b)
    ]
    return (
        f"At {100 * level:g} % {len(flipped)} of {pairs} pairs are in opposite order in full transfer; in linear transfer: "
        f"{listed}. Beyond the sum of both standard deviations: {beyond}. Published: {', '.join(theirs) or 'none'}."
    )


def _relative_blocks(summary: Summary) -> list[tuple[str, object]]:
    if summary.dense is None:
        return [("text", "There is no dense model to compare with.")]
    head = ["", "zeros"]
    for mode in summary.modes:
        head += [f"{mode}, %", "≥ dense", f"published {mode}, %"]
    table = [head]
    for title, upstream in summary.upstreams.items():
        row = [title, f"{100 * upstream['sparsity']:.1f} %"]
        for mode in summary.modes:
            row += [
                _percent(summary.relative_error(title, mode), "+"),
                f"{summary.at_least_dense(title, mode)}/{len(summary.tasks)}",
                _published(summary.published(title, mode, "relative error change"), "+"),
            ]
        table.append(row)
    theirs = {
        upstream["method"]: upstream["published"]
        for title, upstream in summary.upstreams.items()
        if title != summary.dense and summary.published(title, "linear", "mean")
        and upstream["published"] != upstream["method"]
    }  # fmt: skip
    stands = "".join(f" Beside {ours} stands {published}." for ours, published in theirs.items())
    architecture = {"resnet50": "ResNet-50", "mobilenetv1": "MobileNetV1"}[summary.results["settings"]["architecture"]]
    return [
        (
            "text",
            "Mean over tasks of (error − error of dense) / error of dense, against the dense model finetuned likewise: "
            f"below zero is better than dense. Published: {architecture} from ImageNet to twelve tasks (arXiv 2111.13445, "
            f"computed from its raw results).{stands}",
        ),
        ("table", table),
        ("plot", ("relative error and mean accuracy by sparsity", _sparsity_plot(summary))),
    ]


def _accuracy_blocks(summary: Summary) -> list[tuple[str, object]]:
    blocks: list[tuple[str, object]] = []
    for mode in summary.modes:
        table = [[f"{mode}, %", *summary.tasks, "mean", "published mean"]]
        for title in summary.upstreams:
            figures = [summary.accuracy(title, task, mode) for task in summary.tasks]
            row = [title]
            for task, ours in zip(summary.tasks.values(), figures):
                theirs = summary.published(title, mode, task["published"])
                row.append(_percent(ours) + (f" (published {_published(theirs)})" if theirs else ""))
            mean = _percent(summary.mean_accuracy(title, mode))
            table.append([*row, mean, _published(summary.published(title, mode, "mean"))])
        blocks.append(("table", table))
    metrics = {task["metric"] for task in summary.tasks.values()}
    names = {"top1": "top-1 accuracy", "mean_per_class": "accuracy averaged over classes"}
    text = " or ".join(names[metric] for metric in sorted(metrics))
    text = f"By each task's metric: {text}. The published mean is over other tasks: its level says nothing here."
    return [("text", text), *blocks]


def _speed_rows(summary: Summary) -> dict[str, dict[str, dict]]:
    """{title: {kind: figures of the way that we advise}}"""
    rows: dict[str, dict[str, dict]] = {}
    for group in (summary.results["speed"] or {"groups": []})["groups"]:
        for kind, measured in group.items():
            for title, row in best(measured).items():
                rows.setdefault(title, {})[kind] = row
    return rows


def _speed_blocks(summary: Summary) -> list[tuple[str, object]]:
    speed, rows = summary.results["speed"], _speed_rows(summary)
    if not rows:
        return [("text", "Not measured yet: `sparsekit study time` does, while no cell runs.")]
    measured = next(iter(speed["groups"][0].values()))
    blocks: list[tuple[str, object]] = [
        (
            "text",
            f"Exactly these models, by our kernels, over the fastest dense PyTorch (NCHW, channels_last or compiled) with "
            f"the same weights; alternating runs in one process, medians, ± half the distance between the quartiles. Images "
            f"of {measured['image'][-1]} × {measured['image'][-2]}, batches of {measured['batch']}, {speed['threads']} "
            f"threads of {speed['cpu']}, {speed['isa']} kernels. Inference and linear finetuning run an engine of "
            f"{WAYS['engine']}, full finetuning {WAYS['compressed']}. Sparsity is spread over layers as each method chose: "
            "see below. Below 1, sparse loses.",
        )
    ]
    table = [["", "zeros", *KINDS.values()]]
    for title, kinds in rows.items():
        cells = [
            f"{kinds[k]['milliseconds']:.2f} ms, {kinds[k]['speedup']:.2f}× ± {100 * kinds[k]['spread']:.0f} %"
            if k in kinds
            else "–"
            for k in KINDS
        ]
        table.append([title, f"{100 * next(iter(kinds.values()))['sparsity']:.1f} %", *cells])
    for group in speed["groups"]:
        dense = [group[kind]["dense"] for kind in KINDS]
        table.append(["dense PyTorch", "", *(f"{d[d['fastest']]:.2f} ms ({d['fastest']})" for d in dense)])
    blocks += [("table", table), ("plot", ("accuracy by measured speed-up", _speed_plot(summary, rows)))]
    return blocks


def _material_blocks(summary: Summary) -> list[tuple[str, object]]:
    models = [["", "zeros", "architecture", "parameters"]]
    for title, upstream in summary.upstreams.items():
        zeros, parameters = f"{100 * upstream['sparsity']:.1f} %", f"{upstream['parameters']:,}"
        models.append([title, zeros, upstream["architecture"], parameters])
    tasks = [["", "classes", "training images", "test images", "image", "metric", "source"]]
    for name, task in summary.tasks.items():
        image = " × ".join(map(str, task["image"])) or "of many sizes"
        counts = [str(task[key]) for key in ("classes", "train", "test")]
        tasks.append([name, *counts, image, task["metric"], task["source"]])
    size = summary.results["settings"]["size"]
    return [
        ("table", models),
        ("plot", ("zeros by layer", _layer_plot(summary))),
        (
            "text",
            f"Images of one size are resized to {size} × {size} with bilinear interpolation, and shifted and scaled by the "
            "same two numbers for all tasks; those of many sizes are resized, cropped and scaled as in the protocol. A model "
            "of one channel sees the luma of colour images, one of three sees grey thrice.",
        ),
        ("table", tasks),
    ]


def _methods(summary: Summary) -> dict[str, tuple[str, str]]:
    """Color and marker of every method but dense."""
    names = dict.fromkeys(u["method"] for title, u in summary.upstreams.items() if title != summary.dense)
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def _sparsity_plot(summary: Summary) -> bytes:
    """Relative error above, mean accuracy below, by sparsity; a column for every mode."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(summary.modes), figsize=(5.5 * len(summary.modes), 8), squeeze=False)
    for column, mode in enumerate(summary.modes):
        for axis, find, label in (
            (axes[0, column], summary.relative_error, "relative change in error, %"),
            (axes[1, column], summary.mean_accuracy, "mean accuracy, %"),
        ):
            for method, (color, marker) in _methods(summary).items():
                points = [
                    (100 * upstream["sparsity"], figure_)
                    for title, upstream in summary.upstreams.items()
                    if upstream["method"] == method and (figure_ := find(title, mode))
                ]
                points.sort(key=lambda point: point[0])
                axis.errorbar(
                    [x for x, _ in points], [100 * y.mean for _, y in points], [100 * (y.std or 0) for _, y in points],
                    color=color, marker=marker, capsize=2, label=method,
                )  # fmt: skip
            dense = find(summary.dense, mode) if summary.dense else None
            if dense:
                axis.axhline(100 * dense.mean, color="grey", linewidth=1, linestyle="--", label="dense")
            axis.set(title=f"{mode} transfer", xlabel="zeros, %", ylabel=label)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return png(plt, figure)


def _speed_plot(summary: Summary, rows: dict[str, dict[str, dict]]) -> bytes:
    """Mean accuracy by speed-up: a panel for inference, with full transfer's accuracy, one for each training."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(KINDS), figsize=(5 * len(KINDS), 4.3))
    for axis, kind in zip(axes, KINDS):
        mode = kind if kind in summary.modes else summary.modes[-1]
        for method, (color, marker) in _methods(summary).items():
            points = [
                (rows[title][kind]["speedup"], 100 * accuracy.mean)
                for title, upstream in summary.upstreams.items()
                if upstream["method"] == method and kind in rows.get(title, {})
                and (accuracy := summary.mean_accuracy(title, mode))
            ]  # fmt: skip
            axis.plot(*zip(*points), color=color, marker=marker, label=method) if points else None
        dense = summary.mean_accuracy(summary.dense, mode) if summary.dense else None
        if dense:
            axis.plot(1, 100 * dense.mean, color="grey", marker="s", linestyle="", label="dense")
        axis.axvline(1, color="grey", linewidth=1, linestyle="--")
        axis.set(title=KINDS[kind], xlabel="speed-up over dense PyTorch", ylabel=f"mean accuracy, {mode} transfer, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return png(plt, figure)


def _layer_plot(summary: Summary) -> bytes:
    """A heat map: models by layers, zeros in percent."""
    plt = pyplot()
    models = {title: u["layers"] for title, u in summary.upstreams.items() if u["layers"] and title != summary.dense}
    layers = list(dict.fromkeys(layer for zeros in models.values() for layer in zeros))
    size = (max(6, 0.55 * len(layers) + 2), 0.38 * len(models) + 2)
    figure, axis = plt.subplots(figsize=size)
    values = [[100 * zeros.get(layer, float("nan")) for layer in layers] for zeros in models.values()]
    image = axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(models)), list(models), fontsize=8)
    if len(layers) <= 24:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    color = "white" if value < 60 else "black"
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, label="zeros, %")
    return png(plt, figure)
