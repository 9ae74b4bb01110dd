import json

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)
pytest.importorskip("sklearn")
typer_testing = pytest.importorskip("typer.testing")

from PIL import Image

import sparsekit as sk
from sparsekit import bench, cli
from sparsekit.transfer.models import SmallResNet


def run(*arguments):
    result = typer_testing.CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    sk.io.save_checkpoint(tmp_path / "dense", SmallResNet((8, 16), (1, 2)))
    return tmp_path / "dense"


def test_info():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["backend"] == sk.backend() and facts["sparsekit"] == sk.__version__


def test_every_command_has_help():
    for command in ("prune", "transfer", "tasks", "compile", "bench", "explain", "info", "job"):
        assert "Usage" in run(command, "--help").stdout
    for grid in ("upstream", "imagenet", "check", "run", "status", "time", "collect", "report"):
        assert "Usage" in run("study", grid, "--help").stdout


def test_prune_transfer_explain(checkpoint, tmp_path):
    pruned = tmp_path / "sparse"
    figures = json.loads(run("prune", checkpoint, pruned, "--sparsity", 0.8, "--task", "digits", "--json").stdout)
    assert figures["sparsity"] == pytest.approx(0.8, abs=1e-3)
    out = tmp_path / "linear"
    figures = json.loads(run("transfer", pruned, "digits", "--epochs", 2, "--out", out, "--json").stdout)
    assert 0 <= figures["accuracy"] <= 1 and sk.io.load_checkpoint(out).masks
    rows = json.loads(run("explain", pruned, "--batch", 2, "--json").stdout)
    assert {row["backend"] for row in rows} <= {"sparse", "dense"} and len(rows) == 9


def test_transfer_to_a_folder_of_ones_own(checkpoint, tmp_path):
    for number in range(8):
        path = tmp_path / "own" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (30 * number, 0, 0)).save(path)
    with pytest.raises(ValueError, match="would be trained dense"):
        run("transfer", checkpoint, tmp_path / "own", "--epochs", 1)
    printed = run("transfer", checkpoint, tmp_path / "own", "--epochs", 1, "--dense", "--json").stdout
    assert 0 <= json.loads(printed)["accuracy"] <= 1


def test_tasks_are_listed_and_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_DATA", str(tmp_path))
    rows = {row["name"]: row for row in json.loads(run("tasks", "--json").stdout)}
    assert len(rows) == 24 and rows["digits"]["there"] and not rows["cifar10"]["there"]
    assert rows["wesnoth-race"]["where"].startswith(str(tmp_path)) and "GPL-2+" in rows["wesnoth-race"]["how"]
    printed = run("tasks").stdout
    assert "cifar10          missing  10 classes, 50,000 / 10,000, top1" in printed
    assert json.loads(run("tasks", "fetch", "digits", "--json").stdout)[0]["train"] == 1437
    failed = run("tasks", "fetch", "nothing")
    assert failed.exit_code == 2 and "NAMES must be of sun397" in failed.output


def test_compile(checkpoint, tmp_path):
    out = tmp_path / "engine"
    printed = run("compile", checkpoint, "--out", out, "--batch", 2, "--no-autotune").stdout
    assert f"saved to {out}" in printed and "BatchNorm" in printed
    assert sk.load(out)(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_missing_files_end_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["sparsekit", "explain", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="error: path must be a checkpoint"):
        cli.main()


@pytest.mark.parametrize("kind", bench.KINDS)
def test_bench_measures_every_way(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    model = sk.sparsify_(sk.pruning.magnitude_(SmallResNet((8, 16), (1, 1)), 0.8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # Inductor would take a minute, and is PyTorch's to test.
    monkeypatch.setattr(torch, "compile", lambda model: model)
    result = bench.measure({"80 %": model}, torch.randn(2, 1, 12, 12), kind, runs=2, compile_sparse=True)
    assert result["dense"].keys() >= {"nchw", "channels_last", "compiled"}
    assert result["sparse"]["80 %"]["speedup"] > 0
    assert bench.best(result)["80 %"]["speedup"] > 0
    if kind == "full":
        assert result.keys() >= {"sparse", "compressed", "compiled"}
        parts = result["compressed"]["80 %"]["parts"]
        assert list(parts) == ["forward", "backward", "optimizer"] and all(v > 0 for v in parts.values())
    else:
        assert result.keys() >= {"sparse", "engine"} and "compressed" not in result
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    json.dumps(result)


def test_bench_names_bad_arguments():
    with pytest.raises(ValueError, match="kind must be one of inference, full, linear, got 'train'"):
        bench.measure({}, torch.zeros(1), "train")


def test_study_upstream_names_bad_widths(tmp_path):
    result = run("study", "upstream", "--folder", tmp_path, "--widths", 8, 0, 8)
    assert result.exit_code == 2 and "--widths must be positive, got (8, 0, 8)" in result.output
