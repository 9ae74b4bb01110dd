import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)

from sparsekit import pruning
from sparsekit.transfer import Task
from sparsekit.transfer.study import methods
from sparsekit.transfer.study.methods import Budget
from sparsekit.transfer.study.table import locked

BUDGET = Budget(images=64, epochs=2, batch_size=16, widths=(8, 8), blocks=(1, 1), gradients=4, calibration=2)


@pytest.fixture(scope="module")
def task():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (112, 1, 28, 28), generator=g, dtype=torch.uint8)
    labels = torch.randint(10, (112,), generator=g)
    return Task("noise", 10, "top1", images[:80], labels[:80], images[80:], labels[80:])


def test_upstream_runs_every_row_and_goes_on(task, tmp_path):
    results = methods.upstream(tmp_path, BUDGET, seeds=(0,), task=task)
    rows = {(row["title"], row["target"]): row for row in results["rows"]}
    assert rows.keys() == {(e.title, target) for e in methods._entries(BUDGET) for target in e.sparsities}
    for (title, target), row in rows.items():
        assert 0 <= row["accuracy"] <= 1 and row["seeds"] == 1
        expected = {"dense": 0, "LTH-T": 1 - 0.8 ** (10 if target == 0.9 else 13)}.get(title, target)
        if title not in ("STR",):
            # First and last layers are pruned too, but the pruned ones alone are counted where a recipe leaves some out.
            assert row["sparsity"] == pytest.approx(expected, abs=5e-3), title
    page = (tmp_path / "upstream.md").read_text()
    assert "| RigL | 90.0 % |" in page and (tmp_path / "upstream.png").read_bytes()[:4] == b"\x89PNG"

    assert not list((tmp_path / "partial").iterdir())

    cells = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0.json")}
    (gone := next(iter(cells))).unlink()
    again = methods.upstream(tmp_path, BUDGET, seeds=(0,), task=task)
    assert [path for path in cells if path.stat().st_mtime_ns != cells[path]] == [gone]
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in results["rows"]]

    # A cell of another recipe runs again.
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-0.json")}
    other = json.loads((tmp_path / "rigl-90-0.json").read_text())
    other["recipe"]["settings"]["fraction"] = 0.5
    (tmp_path / "rigl-90-0.json").write_text(json.dumps(other))
    methods.upstream(tmp_path, BUDGET, seeds=(0,), task=task)
    assert [path.name for path in cells if path.stat().st_mtime_ns != cells[path]] == ["rigl-90-0.json"]
    assert json.loads((tmp_path / "rigl-90-0.json").read_text())["recipe"]["settings"]["fraction"] == 0.3


def test_epochs_are_timed_on_a_whole_training(task, tmp_path, monkeypatch):
    monkeypatch.setattr(methods._Turns, "TURN", 1)
    only = ["GMP", "RigL", "AC/DC", "oBS"]
    with pytest.raises(FileNotFoundError, match="hold a grid that was begun, got .*; run without --speed first"):
        methods.speed(tmp_path, BUDGET, only, task)
    results = methods.upstream(tmp_path, BUDGET, seeds=(0,), only=only, task=task)
    assert not any(row["epoch_seconds"] for row in results["rows"])
    backends, own = [], []

    def backends_of(turns):
        return {layer.backend for layer in turns.layers.values()}

    step, rigl_step = methods._Turns.step, pruning.RigL.step
    monkeypatch.setattr(methods._Turns, "step", lambda turns: (backends.append(backends_of(turns)), step(turns))[1])
    monkeypatch.setattr(pruning.RigL, "step", lambda pruner: (own.append(backends_of(pruner)), rigl_step(pruner))[1])
    methods.speed(tmp_path, BUDGET, ["RigL"], task)
    # Eight steps, in turns; after each, the pruner's own.
    assert backends == 4 * [{"auto"}, {"dense"}] and own == 8 * [{"auto"}]
    before = json.loads((tmp_path / "speed.json").read_text())["epochs"]["rigl"]
    with pytest.raises(ValueError, match="only must match a row, such as 'GMP', got"):
        methods.speed(tmp_path, BUDGET, ["RigLe"], task)
    with pytest.raises(ValueError, match="only must match a row that trains at 90 %, got"):
        methods.speed(tmp_path, BUDGET, ["one-shot"], task)
    # Stopped after one of two rows, it goes on with the other; rows that are not asked for stay.
    epoch_seconds = methods._Grid.epoch_seconds

    def stop_at_oBS(grid, entry):
        if entry.title == "oBS":
            raise KeyboardInterrupt
        return epoch_seconds(grid, entry)

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(methods._Grid, "epoch_seconds", stop_at_oBS)
        methods.speed(tmp_path, BUDGET, ["GMP", "oBS", "AC/DC"], task)
    assert len(backends) == 8 + 8 + 4
    methods.speed(tmp_path, BUDGET, ["GMP", "oBS", "AC/DC"], task)
    assert len(backends) == 8 + 8 + 4 + 4 + 8 and not (tmp_path / "speed.partial.json").exists()
    timed_too = methods.upstream(tmp_path, BUDGET, seeds=(0,), only=only, task=task)
    assert json.loads((tmp_path / "upstream.json").read_text()) == timed_too
    timed = {row["title"]: row["epoch_seconds"] for row in timed_too["rows"] if row["epoch_seconds"]}
    assert timed.keys() == {"GMP", "GMP from dense", "RigL", "AC/DC", "oBS"} and timed["RigL"] == before
    assert all(row[kind] > 0 for row in timed.values() for kind in ("sparse", "masked dense", "pruner"))
    assert " s |" in next(line for line in (tmp_path / "upstream.md").read_text().splitlines() if "| RigL | 90" in line)
    # At one sparsity alone.
    assert not any(row["epoch_seconds"] for row in timed_too["rows"] if row["target"] != methods.TIMED)

    # Another machine goes on from what this one wrote.
    elsewhere = methods.upstream(tmp_path / "elsewhere", BUDGET, seeds=(0,), only=only, task=task, out=tmp_path)
    assert elsewhere == timed_too and not (tmp_path / "elsewhere" / "partial").exists()
    with pytest.raises(ValueError, match="out must be empty or hold results of this budget"):
        methods.upstream(tmp_path / "third", replace(BUDGET, epochs=3), task=task, out=tmp_path)

    # Times of another recipe are none, and neither are steps that an earlier version timed.
    record = json.loads((tmp_path / "speed.json").read_text())
    record["epochs"]["rigl"]["recipe"]["settings"]["fraction"] = 0.5
    (tmp_path / "speed.json").write_text(json.dumps(record))
    rows = methods.upstream(tmp_path, BUDGET, seeds=(0,), only=only, task=task)["rows"]
    assert {row["title"] for row in rows if row["epoch_seconds"]} == timed.keys() - {"RigL"}
    (tmp_path / "speed.json").write_text(json.dumps({"cpu": "", "threads": 1, "steps": {}}))
    assert methods.upstream(tmp_path, BUDGET, seeds=(0,), only=only, task=task)["speed"] is None
    monkeypatch.setattr(methods._Turns, "TURN", 3)
    with pytest.raises(ValueError, match="budget must have at least 12 optimizer steps to time, got 8"):
        methods.speed(tmp_path, BUDGET, ["RigL"], task)


def test_workers_share_the_cells(task, tmp_path):
    only = ["oBS", "magnitude"]
    alone = methods.upstream(tmp_path / "alone", BUDGET, seeds=(0,), only=only, task=task)
    shared = methods.upstream(tmp_path / "shared", BUDGET, seeds=(0,), only=only, task=task, workers=2)
    assert {cell["threads"] for cell in shared["cells"].values()} == {1}
    for results in (alone, shared):
        results["accuracies"] = {name: cell["sparsity"] for name, cell in results["cells"].items()}
    assert alone["accuracies"] == shared["accuracies"] and len(shared["cells"]) == 6
    # A cell that somebody else has is left to them.
    (tmp_path / "shared" / "obs-90-0.json").unlink()
    with locked(tmp_path / "shared" / "locks" / "obs-90-0") as mine:
        assert mine
        assert len(methods.upstream(tmp_path / "shared", BUDGET, seeds=(0,), only=only, task=task)["cells"]) == 5
    # What a worker cannot do is said.
    (tmp_path / "shared" / "trained-0.safetensors").write_text("damaged")
    with pytest.raises(RuntimeError, match=r"of 2 workers failed, with exit codes \[1.*; run again to go on"):
        methods.upstream(tmp_path / "shared", BUDGET, seeds=(0,), only=only, task=task, workers=2)


def test_upstream_refuses_other_budgets_and_unknown_rows(task, tmp_path):
    methods.upstream(tmp_path, BUDGET, seeds=(0,), only=["dense"], task=task)
    with pytest.raises(ValueError, match="hold results of this budget"):
        methods.upstream(tmp_path, replace(BUDGET, epochs=3), task=task)
    with pytest.raises(ValueError, match="only must match a row, such as 'GMP', got"):
        methods.upstream(tmp_path, BUDGET, only=["nothing"], task=task)
    with pytest.raises(ValueError, match="at most 4 gradients for 4 batches, got 5"):
        methods.upstream(tmp_path / "other", replace(BUDGET, gradients=5), task=task)
