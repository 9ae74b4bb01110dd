"""How times are taken."""

import types

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import bench


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_timed_calls_follow_calls_of_the_same_function(monkeypatch, lead):
    clock, calls = [0], []
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def function(name):
        def run():
            calls.append(name)
            clock[0] += 1 if calls[-1 - lead :] == [name] * (lead + 1) else 100

        return run

    times = bench.interleave({name: function(name) for name in "abc"}, runs=2, warmup=1, lead=lead)
    turns = [calls[i : i + 1 + lead] for i in range(0, len(calls), 1 + lead)]
    assert len(turns) == 9 and all(len(set(turn)) == 1 for turn in turns)
    assert times == {name: [1, 1] for name in "abc"}


def test_parts_are_those_of_the_steps_that_are_timed():
    model = sk.sparsify_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)), min_sparsity=0)
    measured = bench.measure({"it": model}, torch.randn(2, 3, 6, 6), "full", runs=1, compiled=False)
    row = measured["sparse"]["it"]
    assert measured["lead"] == 1 and set(row["parts"]) == set(bench.PARTS)
    assert 0 < sum(row["parts"].values()) <= row["milliseconds"]
