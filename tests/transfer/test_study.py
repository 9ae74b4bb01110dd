import json
import os
import signal
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
from sparsekit.transfer.study import table


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
        deadline = time.monotonic() + 120
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

    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    study.run(whole)
    assert outcomes(loaded) == outcomes(whole)


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
