import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)
pytest.importorskip("sklearn")
yaml = pytest.importorskip("yaml")

import sparsekit as sk
from sparsekit.transfer import study
from sparsekit.transfer.models import SmallResNet
from sparsekit.transfer.study import methods, ranks, table
from sparsekit.transfer.study.document import Work
from sparsekit.transfer.study.methods import Budget
from sparsekit.transfer.study.run import _folder_problems
from sparsekit.transfer.study.summary import Summary, published


@pytest.fixture
def document(tmp_path):
    """Writes a study of a dense and a pruned model on digits; its keys can be changed."""
    torch.manual_seed(0)
    dense = SmallResNet((8, 16), (1, 1))
    sk.io.save_checkpoint(tmp_path / "dense.safetensors", dense)
    pruned = sk.sparsify_(sk.pruning.magnitude_(dense, 0.9), min_sparsity=0)
    sk.io.save_checkpoint(tmp_path / "pruned.safetensors", pruned)

    def write(name="study", **keys):
        content = {
            "title": "tiny",
            "out": f"runs/{name}",
            "upstreams": [
                {"method": "dense", "sparsity": 0, "checkpoint": "dense.safetensors"},
                {"method": "magnitude", "sparsity": 0.9, "checkpoint": "pruned.safetensors"},
            ],
            "tasks": [{"name": "digits", "images": 96}],
            "seeds": [0, 1],
            "linear": {"epochs": 3},
            "full": {"epochs": 3, "lr": 0.01},
            "size": 8,
            "work": {"workers": 0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | keys))
        return path

    return write


def outcomes(loaded):
    return {cell.title: cell.result()["outcome"] for cell in table.cells(loaded)}


def outcomes_so_far(loaded):
    return {cell.title: repr(result["outcome"]) for cell in table.cells(loaded) if (result := cell.result())}


def test_run_gives_every_cell_once(document):
    loaded = study.load(document())
    results = study.run(loaded)
    assert len(results["cells"]) == 8 and results["missing"] == 0 and not results["failed"]
    assert json.loads((loaded.out / "results.json").read_text()) == results
    assert [u["title"] for u in results["upstreams"]] == ["dense", "magnitude 90 %"]
    assert results["upstreams"][1]["sparsity"] == pytest.approx(0.9, abs=0.01)
    for cell in table.cells(loaded):
        outcome = cell.result()["outcome"]
        assert 0 <= outcome["accuracy"] <= 1 and len(outcome["losses"]) == 3 and not cell.partial.exists()
        # The mask stays, and the new head is dense.
        assert (outcome["sparsity"] > 0.7) == (cell.upstream.method == "magnitude")
    weights = {cell["weights"] for cell in results["cells"]}
    assert len(weights) == 8

    times = {path: path.stat().st_mtime_ns for path in loaded.out.glob("cells/*/result.json")}
    before = outcomes(loaded)
    (gone := next(iter(times))).unlink()
    study.run(loaded)
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [gone]
    assert outcomes(loaded) == before
    assert not list(loaded.out.glob("features/*"))


def test_the_hash_follows_what_results_depend_on(document, tmp_path):
    def folders(**keys):
        return [cell.folder.name for cell in table.cells(study.load(document(**keys)))]

    first = folders()
    assert len(set(first)) == len(first) == 8
    assert folders(title="another", work={"workers": 2, "attempts": 5}) == first
    longer = folders(full={"epochs": 4, "lr": 0.01})
    assert longer[:4] == first[:4] and not set(longer[4:]) & set(first)
    assert not set(folders(work={"workers": 0, "threads": 2})) & set(first)
    sk.io.save_checkpoint(tmp_path / "dense.safetensors", SmallResNet((8, 16), (1, 1)))
    again = folders()
    assert sum(a == b for a, b in zip(first, again)) == 4


def test_a_killed_run_goes_on_to_the_same_bits(document):
    pytest.importorskip("submitit")
    settings = {"full": {"epochs": 12, "lr": 0.01}, "tasks": [{"name": "digits", "images": 400}]}
    killed = document("killed", work={"workers": 2}, **settings)
    whole = study.load(document("whole", **settings))
    loaded = study.load(killed)
    command = [sys.executable, "-m", "sparsekit.cli", "study", "run", str(killed)]
    environment = os.environ | {"PYTHONPATH": str(Path(sk.__file__).parents[1])}

    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 900
        while not list(loaded.out.glob("cells/*/partial.safetensors")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        assert study.status(loaded)["running"]
    finally:
        for pid in [process.pid, *workers_of(loaded.out)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    finished = study.status(loaded)["finished"]
    assert finished < 8

    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=900)
    study.run(whole)
    assert outcomes(loaded) == outcomes(whole)


def test_a_cell_of_two_ranks_is_close_to_one(document):
    keys = {
        "seeds": [0], "modes": ["full"], "tasks": [{"name": "digits", "images": 129}],
        "upstreams": [{"method": "magnitude", "sparsity": 0.9, "checkpoint": "pruned.safetensors"}],
    }  # fmt: skip
    one = study.load(document("one", **keys))
    two = study.load(document("two", work={"workers": 0, "processes": 2}, **keys))
    study.run(one)
    study.run(two)
    (alone,), (together,) = outcomes(one).values(), outcomes(two).values()
    # The same images and steps; only BatchNorm sees halves of the batches.
    assert together["losses"] == pytest.approx(alone["losses"], rel=0.1)
    assert together["weights"] != alone["weights"] and together["sparsity"] == alone["sparsity"]


def test_nodes_meet_through_srun():
    work = Work(executor="slurm", nodes=3, processes=2, gpus=2)
    command = ranks.command(Path("cell.json"), work, "host:29400")
    assert command[:8] == ["srun", "--overlap", "--nodes", "3", "--ntasks", "3", "--ntasks-per-node", "1"]
    assert " ".join(command[8:]).endswith(
        "-m torch.distributed.run --nproc-per-node 2 --nnodes 3 --rdzv-backend c10d --rdzv-endpoint host:29400 "
        "-m sparsekit.transfer.study.ranks cell.json"
    )


def workers_of(out):
    """Processes of submitit that work for this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out / "log") in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_failed_cells_are_reported_and_tried_again(document):
    loaded = study.load(document(full={"epochs": 3, "lr": 1e30}))
    with pytest.raises(RuntimeError, match="4 cells failed.*\n.*full, seed 0: training diverged"):
        study.run(loaded)
    state = study.status(loaded)
    assert state["finished"] == 4 and len(state["failed"]) == 4 and not state["running"]
    failure = table.cells(loaded)[-1].failure()
    assert failure["attempts"] == 2 and "Traceback" in failure["traceback"]
    assert len(study.collect(loaded)["failed"]) == 4


def test_check_finds_all_that_is_wrong_at_once(document, tmp_path):
    whole = (tmp_path / "dense.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    sk.io.save_checkpoint(tmp_path / "other.safetensors", torch.nn.Linear(3, 3))
    files = {"gone": 0.9, "half": 0.9, "other": 0.9, "dense": 0.9, "pruned": 0.5}
    upstreams = [{"method": name, "sparsity": s, "checkpoint": f"{name}.safetensors"} for name, s in files.items()]
    tasks = [{"name": "digits", "images": 7}, {"name": "digit"}]
    loaded = study.load(document(upstreams=upstreams, tasks=tasks))
    with pytest.raises(ValueError, match="the study cannot run") as caught:
        study.run(loaded)
    problems = str(caught.value).splitlines()[1:]
    for problem, expected in zip(
        problems,
        (
            r"gone 90 %: .*gone.safetensors.* does not exist",
            r"half 90 %: .*half.safetensors.* damaged",
            r"other 90 %: .*other.safetensors",
            r"dense 90 %: must be 90 % sparse, but 0\.0 % are zeros",
            r"pruned 50 %: must be 50 % sparse, but 90\.. % are zeros",
            r"digits: has 10 classes, but no training images of \[\d",
            r"digit: name must be one of .*, got 'digit'",
        ),
        strict=True,
    ):
        assert re.search(expected, problem)
    assert not list(loaded.out.glob("cells/*"))


def test_check_wants_room_and_a_folder_to_write_to(document, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: nothing can be written to .*file"):
        study.check(study.load(document(out="file/runs")))
    loaded = study.load(document(work={"workers": 0}))
    facts = study.check(loaded)
    facts["upstreams"][0]["features"] = 10**15
    assert re.search(r"MB left, and \d+ MB are needed", _folder_problems(loaded, facts)[0])


def test_a_full_disk_loses_nothing_that_is_finished(document):
    path = document(linear={"epochs": 3}, full={"epochs": 3, "lr": 0.01})
    loaded = study.load(path)
    # Small enough for results, too small for the checkpoint of a full cell.
    limited = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.argv = ["sparsekit", "study", "run", {str(path)!r}]
from sparsekit.cli import main
main()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(sk.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, env=environment, timeout=900)
    assert (
        done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    )
    state = study.status(loaded)
    assert state["finished"] == 4 and not state["failed"]
    before = outcomes_so_far(loaded)
    assert study.run(loaded)["missing"] == 0
    assert before.items() < outcomes_so_far(loaded).items()


def test_a_damaged_file_is_made_again(document):
    loaded = study.load(document(seeds=[0]))
    study.run(loaded)
    before = outcomes(loaded)
    linear, *_, full = table.cells(loaded)
    for cell in (linear, full):
        result = cell.folder / "result.json"
        result.write_text(result.read_text()[:50])
    full.partial.write_bytes(b"half a checkpoint")
    features = table.features_path(linear)
    features.write_bytes(b"half of the features")
    study.run(loaded)
    assert outcomes(loaded) == before and full.failure() is None and not features.exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tittle": "x"}, "must have keys of title, .*, got 'tittle'"),
        (
            {"upstreams": [{"method": "x", "sparsity": 0.9}]},
            r"upstreams\[0\] must have a 'checkpoint', which is missing",
        ),
        ({"upstreams": [{"method": "x", "sparsity": 90, "checkpoint": "a"}]}, r"sparsity must be in \[0, 1\), got 90"),
        ({"tasks": []}, "tasks must list at least one, got none"),
        ({"tasks": "digits"}, "tasks must be a list, got 'digits'"),
        ({"tasks": [{"name": "digits"}, {"name": "digits"}]}, "tasks must differ, got 'digits' twice"),
        (
            {"tasks": [{"name": "digits", "full": {"rate": 1}}]},
            "full of digits must have keys of epochs, .*, got 'rate'",
        ),
        ({"modes": ["half"]}, "modes must be of linear, full, got 'half'"),
        ({"full": {"epochs": 0}}, "full: epochs must be a positive number, got 0"),
        ({"full": {"epochs": "many"}}, "full: .*'many'"),
        ({"work": {"executor": "cloud"}}, "executor must be one of local, slurm, got 'cloud'"),
        ({"work": {"nodes": 2}}, "nodes must be 1 without executor: slurm, got 2"),
        ({"out": None}, "out must be a folder, got None"),
    ],
)
def test_a_document_that_cannot_be_is_refused(document, keys, message):
    with pytest.raises(ValueError, match=message):
        study.load(document(**keys))


def test_a_document_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="a study document must be a file, got .*none.yaml"):
        study.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("title: [")
    with pytest.raises(ValueError, match="is not YAML"):
        study.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold keys and values"):
        study.load(tmp_path / "list.yaml")


def test_our_own_document_loads():
    path = Path(__file__).parents[2] / "studies" / "fashion.yaml"
    loaded = study.load(path)
    assert len(loaded.upstreams) == 13 and len(loaded.tasks) == 4 and loaded.seeds == (0, 1, 2)
    models = {f"{entry.name}-{100 * target:g}" for entry in methods._entries(Budget()) for target in entry.sparsities}
    assert {Path(upstream.checkpoint).stem for upstream in loaded.upstreams} <= models


def test_time_measures_every_sparse_model_once_and_alone(document):
    loaded = study.load(document(timing={"batch": 4, "runs": 1, "compiled": False}))
    with (
        table.locked(table.machine_lock(), wait=True, shared=True),
        pytest.raises(RuntimeError, match="cells of a study are running"),
    ):
        study.time_models(loaded)
    with table.locked(table.machine_lock()) as alone:
        if not alone:
            pytest.skip("cells of a study are running on this machine")
    speed = study.time_models(loaded)
    (group,) = speed["groups"]
    for kind, way in (("inference", "engine"), ("linear", "engine"), ("full", "compressed")):
        assert group[kind][way].keys() == {"magnitude 90 %"} and group[kind][way]["magnitude 90 %"]["speedup"] > 0
    assert study.time_models(loaded) == speed
    assert study.collect(loaded)["speed"] == speed


def test_published_figures_agree_with_each_other():
    figures = published()
    assert len(figures) == 60 * 14
    rows = {key[:4] for key in figures}
    measures = {key[4] for key in figures}
    tasks = measures - {"mean", "relative error change"}
    assert len(rows) == 60 and len(tasks) == 12
    for row in rows:
        ours, dense = ({m: figures[(*key, m)].mean for m in measures} for key in (row, (*row[:2], "Dense", 0.0)))
        assert statistics.mean(ours[task] for task in tasks) == pytest.approx(ours["mean"], abs=0.05)
        changes = [100 * (dense[task] - ours[task]) / (100 - dense[task]) for task in tasks]
        # Accuracies are rounded to 0.1 %, and errors are as small as 2.6 %.
        assert statistics.mean(changes) == pytest.approx(ours["relative error change"], abs=0.7, rel=0.005)
    assert figures["resnet50", "linear", "AC/DC", 0.9, "cars"][:2] == (56.0, 0.1)
    assert figures["resnet50", "full", "LTH-T", 0.95, "flowers"][:2] == (76.0, 1.3)
    assert figures["mobilenetv1", "full", "M-FAC", 0.89, "pets"][:2] == (86.7, None)
    assert figures["resnet50", "linear", "AC/DC", 0.8, "relative error change"].mean == -3.2


@pytest.fixture
def results():
    """Two tasks, two seeds; A is better in linear transfer, B in full, and C is worse than both."""
    accuracies = {
        ("dense", "linear"): (0.8, 0.6), ("A 90 %", "linear"): (0.84, 0.6), ("B 90 %", "linear"): (0.8, 0.4),
        ("C 90 %", "linear"): (0.4, 0.2), ("dense", "full"): (0.9, 0.8), ("A 90 %", "full"): (0.85, 0.7),
        ("B 90 %", "full"): (0.9, 0.9), ("C 90 %", "full"): (0.5, 0.1),
    }  # fmt: skip
    cells = [
        {"upstream": upstream, "task": task, "mode": mode, "seed": seed, "accuracy": accuracy + 0.002 * seed}
        for (upstream, mode), pair in accuracies.items()
        for task, accuracy in zip(("x", "y"), pair)
        for seed in (0, 1)
    ]
    upstreams = [
        {"title": title, "method": title[:-5] or title, "published": "STR", "target": target, "sparsity": target}
        for title, target in (("dense", 0), ("A 90 %", 0.9), ("B 90 %", 0.9), ("C 90 %", 0.9))
    ]
    upstreams[0]["method"] = "dense"
    tasks = [{"name": name, "published": name} for name in ("x", "y")]
    settings = {"modes": ["linear", "full"], "seeds": [0, 1], "architecture": "resnet50"}
    return {"cells": cells, "upstreams": upstreams, "tasks": tasks, "settings": settings}


def test_summary_by_hand(results):
    summary = Summary(results)
    assert summary.accuracy("A 90 %", "x", "linear") == pytest.approx((0.841, 0.002 / 2**0.5, 2))
    # Seed 0: (0.2 - 0.16) / 0.2 better on x, the same on y. Seed 1: the same differences over errors of 0.198 and 0.398.
    expected = [-0.04 / 0.2 / 2, -0.04 / 0.198 / 2]
    change = summary.relative_error("A 90 %", "linear")
    assert change.mean == pytest.approx(statistics.mean(expected)) and change.std == pytest.approx(
        statistics.stdev(expected)
    )
    assert summary.relative_error("dense", "full").mean == 0
    assert summary.at_least_dense("A 90 %", "linear") == 2 and summary.at_least_dense("B 90 %", "linear") == 1
    assert summary.levels() == [0.9]
    assert summary.ranking(0.9, "linear") == ["A 90 %", "B 90 %", "C 90 %"]
    assert summary.ranking(0.9, "full") == ["B 90 %", "A 90 %", "C 90 %"]
    assert summary.flips(0.9) == ([("A 90 %", "B 90 %")], 3, [("A 90 %", "B 90 %")])
    assert summary.published("A 90 %", "full", "mean").mean == 82.39

    # What is not there yet is left out, not guessed.
    results["cells"] = [c for c in results["cells"] if (c["upstream"], c["task"], c["seed"]) != ("A 90 %", "y", 1)]
    assert Summary(results).relative_error("A 90 %", "linear").seeds == 1
    results["cells"] = [c for c in results["cells"] if c["upstream"] != "A 90 %"]
    assert Summary(results).ranking(0.9, "linear") == ["B 90 %", "C 90 %"]


def test_report_stands_alone(document, tmp_path):
    loaded = study.load(document(seeds=[0, 1], note="Small <images>."))
    results = study.run(loaded)
    out = tmp_path / "report"
    study.write_study_report(json.loads((loaded.out / "results.json").read_text()), out)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script", page) and "Small &lt;images&gt;." in page
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in re.findall(r"\]\((.*?png)\)", text))
    for title, mode in (("dense", "linear"), ("magnitude 90 %", "full")):
        own = [c["accuracy"] for c in results["cells"] if (c["upstream"], c["mode"]) == (title, mode)]
        shown = f"{100 * statistics.mean(own):.1f} ± {100 * statistics.stdev(own):.1f}"
        assert f"| {title} | {shown} | {shown} |" in text
    assert "Not measured yet" in text
    with open(out / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in results["cells"]]
    assert len((out / "summary.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    with pytest.raises(ValueError, match="must hold finished cells, got none"):
        study.write_study_report(results | {"cells": []}, out)

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser to open the page with")
    probe = "<script>document.title = [...document.images].map(i => i.naturalWidth > 99).join()</script>"
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'probe.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>true,true</title>" in dom
