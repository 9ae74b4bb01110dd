"""The command line: prune, transfer, tasks, study, compile, bench, explain, info, job."""

from __future__ import annotations

import json as json_module
import signal
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit("the command line needs the extra `transfer`: pip install '.[transfer]' in sparsekit's folder")

import torch

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make pruned CNNs fast, and transfer them.")
Json = Annotated[bool, typer.Option("--json", help="print the figures as JSON")]
Threads = Annotated[int, typer.Option(help="threads of PyTorch; 0 for its own choice")]


class Distribution(str, Enum):
    uniform, erk, globally = "uniform", "erk", "global"


class Kind(str, Enum):
    inference, full, linear = "inference", "full", "linear"


class Mode(str, Enum):
    linear, full = "linear", "full"


def _load(checkpoint: Path):
    """The SmallResNet in a checkpoint of ours; its shape is in the tensors."""
    from .io import load_checkpoint
    from .transfer.models import SmallResNet

    state = load_checkpoint(checkpoint).state_dict
    try:
        blocks = [key for key in state if key.startswith("layers.") and key.endswith(".conv1.weight")]
        widths = [state[key].shape[0] for key in sorted(blocks, key=lambda key: int(key.split(".")[1]))]
        stages = list(dict.fromkeys(widths))
        classes = state["fc.weight"].shape[0]
        channels = state["conv1.weight"].shape[1]
    except KeyError as error:
        raise typer.BadParameter(f"{checkpoint} does not hold a SmallResNet: it has no {error}") from error
    model = SmallResNet(stages, [widths.count(w) for w in stages], channels, classes)
    load_checkpoint(checkpoint, model)
    return model


@app.command()
def info(json: Json = False) -> None:
    """What runs here: versions, ISA, threads; and on a GPU, or what is missing for that."""
    from . import __version__, available_backends, backend, gpu

    facts = {
        "sparsekit": __version__,
        "torch": torch.__version__,
        "backend": backend(),
        "available": list(available_backends()),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpu_backends": [name for name in gpu.backends() if name != "reference"],
        "gpu_lacks": gpu.lacks(),
    }
    if json:
        print(json_module.dumps(facts))
        return
    lacks = facts.pop("gpu_lacks")
    for key, value in facts.items():
        print(f"{key}: {', '.join(map(str, value)) or 'none' if isinstance(value, list) else value}")
    for name, reason in lacks.items():
        print(f"no {name} kernels for GPUs: {reason}")


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="a dense or sparse checkpoint of ours")],
    out: Annotated[Path, typer.Argument(help="where the sparse one goes")],
    sparsity: Annotated[
        float | None, typer.Option(help="fraction of zeros, in [0, 1); default: the recipe's, else 0.9")
    ] = None,
    distribution: Annotated[
        Distribution | None, typer.Option(help="of sparsity over layers, where there is no recipe; default: global")
    ] = None,
    epochs: Annotated[int, typer.Option(help="epochs of training; 0 prunes at once and recalibrates BatchNorm")] = 0,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="a preset such as acdc-90 (see sparsekit recipes) or a YAML file, scaled to --epochs; else GMP"
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="what to train on and recalibrate with")] = "fashion-mnist",
    lr: float = 0.05,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Prune an upstream model: at once by magnitude, gradually (GMP), or by any recipe."""
    import torch.nn.functional as F

    from . import pruning, sparsify_
    from . import sparsity as count
    from .io import save_checkpoint
    from .transfer import evaluate, tasks, train
    from .transfer.finetune import prepare

    model, data = _load(checkpoint), tasks.load(task)
    chosen = None if recipe is None else pruning.recipe(recipe)
    if chosen is not None:
        if not epochs:
            raise typer.BadParameter(f"--recipe {recipe} needs --epochs, a positive number of epochs to scale it to")
        if distribution is not None:
            raise typer.BadParameter(
                f"--distribution is the recipe's own; leave it out, or write --recipe {recipe} as YAML"
            )
        if sparsity is not None:
            chosen = chosen.at(sparsity)
    target, shared_out = 0.9 if sparsity is None else sparsity, (distribution or Distribution.globally).value
    if epochs:

        def pruner(network, optimizer, steps):
            if chosen is None:
                return pruning.GMP(
                    network, optimizer, target, end=max(epochs * steps // 2, 1), interval=max(steps // 5, 1),
                    distribution=shared_out,
                )  # fmt: skip
            shown = zip(data.train_images.split(128), data.train_labels.split(128))
            batches = [(prepare(images, 28), labels) for images, labels in shown] if chosen.needs_data else None
            return chosen.attach(network, optimizer, steps, epochs, batches, F.cross_entropy)

        smoothing = 0.0 if chosen is None else chosen.training.get("label_smoothing", 0.0)
        result = train(
            model, data, epochs=epochs, lr=lr, seed=seed, batch_size=128, schedule="cosine", pruner=pruner,
            label_smoothing=smoothing,
        )  # fmt: skip
        accuracy = result.accuracy
    else:
        sparsify_(pruning.magnitude_(model, target, shared_out), min_sparsity=0)
        pruning.recalibrate_batchnorm_(model, [prepare(p, 28) for p in data.train_images[:4096].split(256)])
        accuracy = evaluate(model, data)
    save_checkpoint(out, model, extra={"accuracy": accuracy, "task": task})
    figures = {"accuracy": accuracy, "sparsity": count(model).overall}
    print(json_module.dumps(figures) if json else f"{count(model)}\naccuracy on {task}: {100 * accuracy:.2f} %")


@app.command()
def transfer(
    model: Annotated[str, typer.Argument(help="a checkpoint, torchvision:NAME or timm:NAME")],
    task: Annotated[str, typer.Argument(help="a name of `sparsekit tasks`, or a folder of folders of images")],
    mode: Mode = Mode.linear,
    epochs: int = 150,
    lr: Annotated[float | None, typer.Option(help="default: the protocol's, 0.01 linear, 0.001 full")] = None,
    seed: int = 0,
    size: Annotated[
        int, typer.Option(help="height and width of the images; 0: 28 for small ResNets, 224 for others")
    ] = 0,
    arch: Annotated[str | None, typer.Option(help="of a checkpoint whose names do not say it")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="take a checkpoint without zeros or mask")] = False,
    on_the_fly: Annotated[bool, typer.Option(help="linear: run the backbone on augmented images every epoch")] = False,
    out: Annotated[Path | None, typer.Option(help="where the finetuned checkpoint goes")] = None,
    json: Json = False,
) -> None:
    """Finetune an upstream model on another task; the mask stays fixed."""
    from .io import save_checkpoint
    from .transfer import full_finetune, linear_finetune, tasks, upstream
    from .transfer.models import SmallResNet

    # Data first: it is what is most often missing.
    data = tasks.from_folder(task) if Path(task).is_dir() else tasks.load(task)
    loaded = upstream.load(model, arch, dense=dense)
    print(loaded, file=sys.stderr)
    settings = {
        "epochs": epochs, "seed": seed, "size": size or (28 if isinstance(loaded.model, SmallResNet) else 224),
        "interpolation": loaded.interpolation,
    }  # fmt: skip
    if mode is Mode.linear:
        result = linear_finetune(loaded.model, data, lr=lr or 0.01, on_the_fly=on_the_fly, **settings)
    else:
        result = full_finetune(loaded.model, data, lr=lr or 0.001, **settings)
    if out:
        save_checkpoint(out, result.model, extra={"accuracy": result.accuracy, "task": task})
    figures = {"task": task, "mode": mode.value, "accuracy": result.accuracy, "seconds": result.seconds}
    print(json_module.dumps(figures) if json else f"{mode.value} on {task}: {100 * result.accuracy:.2f} %")


@app.command()
def bench(
    sparsity: Annotated[
        list[float] | None, typer.Option(help="repeat for several; default 0.5 0.8 0.9 0.95 0.98")
    ] = None,
    kind: Kind = Kind.inference,
    train: Annotated[bool, typer.Option("--train", help="the same as --kind full: a whole training step")] = False,
    batch: int = 16,
    runs: int = 5,
    threads: Threads = 0,
    compiled: Annotated[bool, typer.Option(help="also time torch.compile; takes minutes")] = True,
    json: Json = False,
) -> None:
    """ResNet-50 at 224 x 224, sparse against the fastest dense PyTorch."""
    from .bench import WAYS, keep_freed_memory, measure
    from .job import resnet50

    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    networks = {f"{100 * level:g} %": resnet50(level) for level in sparsity or (0.5, 0.8, 0.9, 0.95, 0.98)}
    which = "full" if train else kind.value
    figures = measure(
        networks, torch.randn(batch, 3, 224, 224), which, runs=runs, compiled=compiled, compile_sparse=compiled
    )
    if json:
        print(json_module.dumps(figures))
        return
    dense = figures["dense"]
    fastest = dense["fastest"]
    print(f"dense: {dense[fastest]:.1f} ms ({fastest}){_parts(dense)}, batch {batch}, {figures['threads']} threads")
    for way, title in WAYS.items():
        for name, row in figures.get(way, {}).items():
            timed = f"{row['milliseconds']:7.1f} ms ± {100 * row['spread']:.0f} %  {row['speedup']:.2f}x"
            print(f"{title:<30} {name:>6}: {timed}{_parts(row)}")


def _parts(row: dict) -> str:
    parts = ", ".join(f"{part} {milliseconds:.0f}" for part, milliseconds in row.get("parts", {}).items())
    return f" ({parts})" if parts else ""


@app.command()
def explain(
    checkpoint: Annotated[Path | None, typer.Argument(help="a checkpoint of ours; none: ResNet-50 at 90 %")] = None,
    batch: int = 16,
    train: Annotated[bool, typer.Option(help="forward and backward instead of forward")] = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Which kernel runs in every layer, why, and how long it takes against dense."""
    from . import explain as explain_model

    if threads:
        torch.set_num_threads(threads)
    if checkpoint is None:
        from .job import resnet50

        model, images = resnet50(0.9), torch.randn(batch, 3, 224, 224)
    else:
        model = _load(checkpoint)
        images = torch.randn(batch, model.conv1.in_channels, 28, 28)
    rows = explain_model(model, images, train=train)
    print(json_module.dumps([row._asdict() for row in rows]) if json else rows)


@app.command("compile")
def compile_model(
    model: Annotated[str, typer.Argument(help="a checkpoint of ours, or torchvision:NAME for its pretrained weights")],
    out: Annotated[Path, typer.Option(help="where the engine goes; sparsekit.load(OUT) reads it")],
    batch: Annotated[int, typer.Option(help="images at a time, to tune for; any number runs")] = 16,
    size: Annotated[
        int, typer.Option(help="height and width of the images; 0: 28 for ours, 224 for torchvision's")
    ] = 0,
    autotune: Annotated[bool, typer.Option(help="measure what runs sparse instead of following the cost table")] = True,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Make an inference engine of a model, in one file that runs without the model's code."""
    from .engine import compile

    if threads:
        torch.set_num_threads(threads)
    if model.startswith("torchvision:"):
        from torchvision.models import get_model

        network, channels, size = get_model(model.removeprefix("torchvision:"), weights="DEFAULT"), 3, size or 224
    else:
        network = _load(Path(model))
        channels, size = network.conv1.in_channels, size or 28
    images = torch.randn(batch, channels, size, size)
    engine = compile(network.eval(), images, autotune=autotune)
    engine.save(out)
    rows = engine.explain(images)
    print(json_module.dumps([row._asdict() for row in rows]) if json else f"{rows}\n{engine}\nsaved to {out}")


@app.command()
def recipes(json: Json = False) -> None:
    """The recipes that `prune --recipe` knows, with the numbers of their authors."""
    from .pruning import PRESETS

    if json:
        print(json_module.dumps({name: recipe.to_dict() for name, recipe in PRESETS.items()}))
        return
    for name, recipe in PRESETS.items():
        settings = ", ".join(f"{key}={value}" for key, value in recipe.settings.items())
        print(f"{name:<14} {recipe.method:<10} {recipe.epochs:g} epochs; {settings}")


tasks_app = typer.Typer(help="The tasks: which there are, where they are looked for, how to get them.")
app.add_typer(tasks_app, name="tasks")


@tasks_app.callback(invoke_without_command=True)
def list_tasks(context: typer.Context, json: Json = False) -> None:
    """The tasks: which there are, where they are looked for, and how to get each."""
    if context.invoked_subcommand is not None:
        return
    from .transfer import tasks

    rows = tasks.overview()
    if json:
        print(json_module.dumps(rows))
        return
    for row in rows:
        size = (
            f"{row['classes']} classes, {row['train']:,} / {row['test']:,}, {row['metric']}; "
            if "classes" in row
            else ""
        )
        print(
            f"{row['name']:<16} {'there  ' if row['there'] else 'missing'}  {size}{row['where']}\n{'':26}{row['how']}"
        )


@tasks_app.command("fetch")
def fetch_tasks(
    names: Annotated[list[str], typer.Argument(help="of `sparsekit tasks`")],
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="leave out images that cannot be read")] = False,
    json: Json = False,
) -> None:
    """Fetch tasks into the folder that SPARSEKIT_DATA names, and read them once."""
    from .transfer import tasks

    unknown = [name for name in names if name not in tasks.names()]
    if unknown:
        raise typer.BadParameter(f"NAMES must be of {', '.join(tasks.names())}, got {', '.join(unknown)}")
    rows = []
    for name in names:
        task = tasks.load(name, download=True, skip_corrupt=skip_corrupt)
        counts = {"classes": task.classes, "train": len(task.train_labels), "test": len(task.test_labels)}
        rows.append({"name": name, **counts, "metric": task.metric, "source": task.source})
        if not json:
            print(
                f"{name}: {task.classes} classes, {counts['train']:,} images to train on, {counts['test']:,} to test on; "
                f"{task.metric}\n  {task.source}"
            )
    if json:
        print(json_module.dumps(rows))


study = typer.Typer(no_args_is_help=True, help="The study's grids; each goes on where it was stopped.")
app.add_typer(study, name="study")


@study.command("upstream")
def study_upstream(
    folder: Annotated[Path, typer.Option(help="where results go")] = Path("runs/upstream"),
    seeds: Annotated[int, typer.Option(help="seeds of every row at its first sparsity")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="part of a row's title; repeat for several")] = None,
    images: Annotated[int, typer.Option(help="training images of Fashion-MNIST")] = 20_000,
    epochs: Annotated[int, typer.Option(help="of training, for every method")] = 8,
    widths: Annotated[tuple[int, int, int], typer.Option(help="channels of the three stages")] = (32, 64, 256),
    out: Annotated[
        Path | None, typer.Option(help="where upstream.md, upstream.json and upstream.png go; default: the same folder")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="time epochs: train every row again, while nothing else runs, ~40 min")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="processes that share the cells, each with one thread")] = 1,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Every pruning method on Fashion-MNIST, with the same budget of epochs: a table and a plot."""
    from .transfer.study import methods as grid

    if threads:
        torch.set_num_threads(threads)
    if min(widths) < 1:
        raise typer.BadParameter(f"--widths must be positive, got {widths}")
    budget = grid.Budget(images=images, epochs=epochs, widths=widths)
    budget = replace(budget, gradients=max(min(budget.gradients, images // budget.batch_size), 1))
    if speed:
        grid.speed(folder, budget, only or ())
    results = grid.upstream(folder, budget, range(seeds), only or (), out=out, workers=workers)
    print(json_module.dumps(results) if json else grid.document(results))


@study.command("imagenet")
def study_imagenet(
    folder: Annotated[Path, typer.Option(help="where the pruned models and their figures go")] = Path("runs/imagenet"),
    out: Annotated[
        Path | None, typer.Option(help="where imagenet.md and imagenet.json go; default: the same folder")
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(
            help="a folder of photographs to calibrate and compare with; default: those of two Debian packages"
        ),
    ] = None,
    crops: Annotated[int, typer.Option(help="of the calibration photographs, a gradient each")] = 512,
    dampening: Annotated[float, typer.Option(help="lambda of oBS, but for the published one")] = 1e-4,
    speed: Annotated[
        bool, typer.Option("--speed", help="time the models pruned before, while nothing else runs; takes minutes")
    ] = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """What magnitude and second-order pruning keep of a real ImageNet model, EfficientNet-Lite0: a table."""
    from .bench import keep_freed_memory
    from .transfer import imagenet

    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    if speed:
        imagenet.speed(folder)
    else:
        settings = imagenet.Settings(crops=crops, dampening=dampening)
        imagenet.prune(folder, settings, imagenet.load_images(settings, photos))
    results = imagenet.write(folder, out)
    print(json_module.dumps(results) if json else imagenet.document(results))


Document = Annotated[Path, typer.Argument(help="a study document, such as studies/fashion.yaml")]


@study.command("check")
def study_check(document: Document) -> None:
    """Load every model and task of a study, and see whether it can run."""
    from .transfer.study import check, load

    facts = check(load(document))
    for model in facts["upstreams"]:
        print(f"{model['title']}: {model['architecture']}, {100 * model['sparsity']:.1f} % zeros")
    for task in facts["tasks"]:
        print(f"{task['name']}: {task['classes']} classes, {task['train']} images to train, {task['test']} to test")


@study.command("run")
def study_run(
    document: Document,
    workers: Annotated[int | None, typer.Option(help="instead of the document's; 0: this process")] = None,
    json: Json = False,
) -> None:
    """Run what is not finished of a study: checks it first, and tries failed cells again."""
    from .transfer.study import load, run

    # Being terminated cancels the workers, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = load(document)
    if workers is not None:
        chosen = replace(chosen, work=replace(chosen.work, workers=workers))
    results = run(chosen)
    print(json_module.dumps(results) if json else f"results: {chosen.out / 'results.json'}")


@study.command("status")
def study_status(document: Document, json: Json = False) -> None:
    """How many cells are finished, which are running, and what failed."""
    from .transfer.study import load, status

    state = status(load(document))
    if json:
        print(json_module.dumps(state))
        return
    print(f"{state['finished']} of {state['cells']} cells are finished")
    columns = list(next(iter(state["rows"].values())))
    width = max(len(title) for title in state["rows"])
    for title, row in state["rows"].items():
        cells = "  ".join(f"{key} {row[key]}/{state['seeds']}" for key in columns)
        print(f"{title:<{width}}  {cells}")
    for title in state["running"]:
        print(f"running: {title}")
    for title, error in state["failed"].items():
        print(f"failed: {title}: {error}")


@study.command("time")
def study_time(document: Document, json: Json = False) -> None:
    """Time the study's models with our kernels against dense PyTorch, one after the other, while no cell runs."""
    from .bench import best
    from .transfer.study import load, time_models

    speed = time_models(load(document))
    if json:
        print(json_module.dumps(speed))
        return
    for group in speed["groups"]:
        for kind, measured in group.items():
            for title, row in best(measured).items():
                timed = f"{row['milliseconds']:.2f} ms ± {100 * row['spread']:.0f} %, {row['speedup']:.2f}x"
                print(f"{kind}, batch {measured['batch']}: {title}: {timed}")


@study.command("collect")
def study_collect(document: Document, json: Json = False) -> None:
    """Gather the finished cells into results.json."""
    from .transfer.study import collect, load

    chosen = load(document)
    results = collect(chosen)
    missing = f"{len(results['cells'])} cells, {results['missing']} missing: {chosen.out / 'results.json'}"
    print(json_module.dumps(results) if json else missing)


@study.command("report")
def study_report(
    document: Annotated[Path, typer.Argument(help="a study document, or the results.json of one")],
    out: Annotated[Path | None, typer.Option(help="where the report goes; default: the study's folder")] = None,
) -> None:
    """Tables, rankings, plots and the published figures beside ours: report.html, report.md, cells.csv, summary.csv.

    With --out also results.json, from which alone all of it can be made again.
    """
    from .transfer.study import collect, load, write_study_report

    if document.suffix == ".json":
        results, folder = json_module.loads(document.read_text()), document.parent
    else:
        chosen = load(document)
        results, folder = collect(chosen), chosen.out
    write_study_report(results, out or folder)
    if out is not None:
        (out / "results.json").write_text(json_module.dumps(results) + "\n")
    print(f"report: {(out or folder) / 'report.html'}")


@app.command()
def job(
    name: Annotated[str, typer.Option(help="results go to runs/NAME; an unfinished job goes on")] = "default",
    folder: Path = Path("runs"),
    quick: Annotated[bool, typer.Option(help="a fraction of it, to try it out")] = False,
    threads: Threads = 0,
) -> None:
    """The main job: prune an upstream model, transfer it, report accuracy and speed-ups."""
    from .job import run

    if threads:
        torch.set_num_threads(threads)
    run(folder / name, quick)


def main() -> None:
    """The entry point; errors that a user can act on end without a traceback."""
    try:
        app()
    except (OSError, MemoryError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
