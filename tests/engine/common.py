"""What tests of the engine share."""

import copy

import pytest
import torch

import sparsekit as sk


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing that an earlier test measured."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))


def schedule_of(engine):
    """The only schedule of an engine."""
    (schedule,) = engine._schedules.values()
    return schedule


def run_all(engine, backend):
    """Run every layer by itself on ``backend``, if it is there."""
    schedule = schedule_of(engine)
    schedule.join([])
    for choice in schedule.choices.values():
        choice.backend = backend if sk.backend() != "reference" else "dense"


def assert_as_good(engine, model, x):
    """Outputs are as near to float64's as PyTorch's own, up to a factor that luck has, and are not all the same."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        theirs, ours = model(x), engine(x)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert exact.std() > 1e-4
    scale = exact.abs().max()
    ours_off, theirs_off = ((t.double() - exact).abs().max() / scale for t in (ours, theirs))
    assert ours_off <= 4 * theirs_off + 1e-6, (float(ours_off), float(theirs_off))
