import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)

from sparsekit.transfer import Task
from sparsekit.transfer.study import methods
from sparsekit.transfer.study.methods import Budget

BUDGET = Budget(images=64, epochs=2, batch_size=16, widths=(8, 8), blocks=(1, 1), gradients=4, calibration=2)


@pytest.fixture(scope="module")
def task():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (96, 1, 28, 28), generator=g, dtype=torch.uint8)
    labels = torch.randint(10, (96,), generator=g)
    return Task("noise", 10, "top1", images[:64], labels[:64], images[64:], labels[64:])


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

    assert not any(row["step_seconds"] for row in again["rows"])
    methods.speed(tmp_path, task)
    timed_too = methods.upstream(tmp_path, BUDGET, seeds=(0,), task=task)
    assert json.loads((tmp_path / "upstream.json").read_text()) == timed_too
    timed = {row["title"] for row in timed_too["rows"] if row["step_seconds"] and min(row["step_seconds"].values()) > 0}
    assert {"GMP", "RigL", "AC/DC", "STR"} < timed and not timed & {"dense", "DNW", "CrAM+", "oBS, one-shot"}

    # Another machine goes on from what this one wrote.
    elsewhere = methods.upstream(tmp_path / "elsewhere", BUDGET, seeds=(0,), task=task, out=tmp_path)
    assert elsewhere == timed_too and not (tmp_path / "elsewhere" / "partial").exists()
    with pytest.raises(ValueError, match="out must be empty or hold results of this budget"):
        methods.upstream(tmp_path / "third", replace(BUDGET, epochs=3), task=task, out=tmp_path)


def test_upstream_refuses_other_budgets_and_unknown_rows(task, tmp_path):
    methods.upstream(tmp_path, BUDGET, seeds=(0,), only=["dense"], task=task)
    with pytest.raises(ValueError, match="hold results of this budget"):
        methods.upstream(tmp_path, replace(BUDGET, epochs=3), task=task)
    with pytest.raises(ValueError, match="only must match a row, such as 'GMP', got"):
        methods.upstream(tmp_path, BUDGET, only=["nothing"], task=task)
    with pytest.raises(ValueError, match="at most 4 gradients for 4 batches, got 5"):
        methods.upstream(tmp_path / "other", replace(BUDGET, gradients=5), task=task)
