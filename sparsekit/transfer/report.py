"""Reports: one HTML page that needs no network, and the same as Markdown; and that of the main job."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from ..bench import WAYS, best
from ..io import write_atomically

KIND_TITLES = {
    "inference": "inference (forward, eval mode)",
    "full": "full-finetuning step (forward, backward, SGD)",
    "linear": "linear finetuning on the fly (frozen backbone, head step)",
}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td,th{white-space:nowrap}td:first-child,th:first-child{text-align:left;white-space:normal;min-width:8rem}
img{max-width:100%}.table{overflow-x:auto}h1,h2{line-height:1.2}.note{color:#555}
"""


def write_report(folder: Path, results: dict) -> None:
    """Write ``report.html`` and ``report.md`` from what :func:`sparsekit.job.run` gathered."""
    write_pages(folder, "sparsekit report", _blocks(results))


def write_pages(folder: Path, title: str, blocks: list[tuple[str, object]]) -> None:
    """Write ``report.html``, which needs no other file, and ``report.md`` with its plots beside it.

    Args:
        folder: where.
        title: of the window.
        blocks: in their order: ``("title", text)``, ``("heading", text)``, ``("text", text)``, ``("table", rows of cells)``
            with the head as first row, ``("plot", (what it shows, PNG))``.
    """
    markdown, page, plots = [], [], 0
    for kind, content in blocks:
        if kind == "title":
            markdown.append(f"# {content}\n")
            page.append(f"<h1>{html.escape(content)}</h1>")
        elif kind == "heading":
            markdown.append(f"## {content}\n")
            page.append(f"<h2>{html.escape(content)}</h2>")
        elif kind == "text":
            markdown.append(f"{content}\n")
            page.append(f"<p>{html.escape(content)}</p>")
        elif kind == "table":
            markdown.append(_markdown_table(content))
            page.append(_html_table(content))
        elif kind == "plot":
            plots += 1
            name, (shows, image) = f"report-{plots}.png", content
            write_atomically(folder / name, lambda path, image=image: Path(path).write_bytes(image))
            markdown.append(f"![{shows}]({name})\n")
            encoded = base64.b64encode(image).decode()
            page.append(f'<img alt="{html.escape(shows)}" src="data:image/png;base64,{encoded}">')
    document = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>{''.join(page)}</body></html>"
    )
    write_atomically(folder / "report.html", lambda name: Path(name).write_text(document, encoding="utf-8"))
    write_atomically(folder / "report.md", lambda name: Path(name).write_text("\n".join(markdown), encoding="utf-8"))


def _blocks(results: dict) -> list[tuple[str, object]]:
    steps, settings = results["steps"], results["settings"]
    upstream = results["upstream"]
    dense, sparse = steps["dense"], steps["sparse"]
    blocks: list[tuple[str, object]] = [
        ("title", "A pruned ResNet, transferred and timed"),
        (
            "text",
            f"{results['cpu']}, {results['threads']} threads, {results['isa']} kernels, sparsekit "
            f"{results['sparsekit']}, torch {results['torch']}.",
        ),
        ("heading", "Accuracy"),
        (
            "text",
            f"Upstream: a ResNet of widths {tuple(upstream['widths'])} and {tuple(upstream['blocks'])} basic blocks on "
            f"{upstream['images']:,} images of {upstream['task']}, {settings['dense']['epochs']} epochs; then gradual "
            f"magnitude pruning from the dense model, {settings['sparse']['epochs']} epochs. Downstream: linear "
            f"finetuning for {settings['linear']['epochs']} epochs and full finetuning for "
            f"{settings['full']['epochs']} (the protocol has 150 of each; its schedule, x 0.1 after a third and two "
            f"thirds, is scaled to these), with lr {settings['full']['lr']} in full finetuning. One seed. Small grey "
            "images: what carries over to ImageNet is the procedure, not the numbers.",
        ),
    ]
    rows = [["model", "sparsity", upstream["task"]]]
    names = sorted({name.split("-", 1)[1].rsplit("-", 1)[0] for name in steps if name.startswith("linear-")})
    for name in names:
        rows[0] += [f"{name}, linear", f"{name}, full"]
    for label, outcome in (("dense", dense), ("sparse", sparse)):
        row = [label, f"{100 * outcome.get('sparsity', 0):.1f} %", _percent(outcome)]
        for name in names:
            row += [_percent(steps[f"{kind}-{name}-{label}"]) for kind in ("linear", "full")]
        rows.append(row)
    blocks.append(("table", rows))
    blocks.append(("heading", "Speed"))
    blocks.append(
        (
            "text",
            "Speed-up of the whole model over dense PyTorch: the fastest of NCHW eager, channels_last eager and "
            "torch.compile; alternating runs in one process, medians, layout conversion included. ± is half the distance "
            "between the quartiles. Where only a head is trained, or nothing, the model can run as an engine "
            "(sk.compile); where all is trained, it can train kept weights alone (sk.compress_). ResNet-50 has random "
            "weights at uniform sparsity, conv1 and fc dense. Below 1: sparse loses.",
        )
    )
    for model, title in (("resnet50", "ResNet-50 at 224 x 224"), ("small", "This ResNet at 28 x 28, global pruning")):
        measured = {kind: steps.get(f"speed-{model}-{kind}") for kind in KIND_TITLES}
        if not any(measured.values()):
            continue
        blocks.append(("heading", title))
        head = ["", "dense ms (fastest)", *next(iter(m for m in measured.values() if m))["sparse"]]
        table = [head]
        for kind, m in measured.items():
            if m:
                fastest = m["dense"]["fastest"]
                for way in WAYS:
                    row = [f"{KIND_TITLES[kind]}, batch {m['batch']}: {WAYS[way]}"]
                    row += [f"{m['dense'][fastest]:.1f} ({fastest})"]
                    row += [f"{r['speedup']:.2f}x ± {100 * r['spread']:.0f} %" for r in m.get(way, {}).values()]
                    table += [row] if m.get(way) else []
        blocks.append(("table", table))
        if model == "resnet50":
            plot = speed_plot({kind: m for kind, m in measured.items() if m})
            blocks.append(("plot", ("speed-up over dense by sparsity", plot)))
        linear = measured["linear"]
        if linear:
            fastest = linear["dense"][linear["dense"]["fastest"]] / linear["batch"]
            epochs = [f"dense {fastest * 5000 / 1e3:.1f} s"]
            epochs += [
                f"{name} {row['milliseconds'] / linear['batch'] * 5000 / 1e3:.1f} s"
                for name, row in linear["engine"].items()
            ]
            blocks.append(
                (
                    "text",
                    f"An epoch of 5,000 images of linear finetuning on the fly through sk.compile, extrapolated from "
                    f"{linear['runs']} batches of {linear['batch']}: {', '.join(epochs)}.",
                )
            )
    blocks.append(("heading", "Sparsity by layer"))
    blocks.append(("plot", ("sparsity by layer", _layer_plot(results["layers"]))))
    return blocks


def _percent(outcome: dict) -> str:
    return f"{100 * outcome['accuracy']:.2f} %"


def _markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _html_table(rows: list[list[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="table"><table>{line(rows[0], "th")}{body}</table></div>'


def pyplot():
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def png(plt, figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def speed_plot(measured: dict[str, dict]) -> bytes:
    """A PNG of speed-up by sparsity: of the engine, or of compressed modules where there is none.

    Args:
        measured: kind to what :func:`sparsekit.bench.measure` gave, all of ResNet-50.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    for kind, m in measured.items():
        figures = best(m)
        axes.plot(
            list(figures),
            [f["speedup"] for f in figures.values()],
            marker="o",
            label=f"{KIND_TITLES[kind]}, batch {m['batch']}",
        )
    axes.axhline(1, color="grey", linewidth=1, linestyle="--", label="dense PyTorch")
    first = next(iter(measured.values()))
    axes.set(xlabel="uniform sparsity", ylabel="speed-up over dense", ylim=(0, None))
    axes.set_title(f"ResNet-50 at 224 x 224, {first['threads']} threads, float32")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return png(plt, figure)


def _layer_plot(layers: dict[str, float]) -> bytes:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(layers) + 1))
    names = list(layers)[::-1]
    axes.barh(names, [100 * layers[name] for name in names], color="#4477aa")
    axes.set(xlabel="zeros, %", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    return png(plt, figure)
