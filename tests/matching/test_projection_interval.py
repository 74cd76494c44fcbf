"""How often straight-through matching projects, where it is left to choose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from permgraph import auto_spec
from permgraph.matching import StraightThrough, align
from permgraph.matching.cost import estimate
from permgraph.matching.projection_interval import counted, steps_between
from permgraph.matching.straight_through import _Run
from permgraph.matching.tuned import LEAST_INTERVAL, PROJECTION_SHARE


def net(width):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).eval()


def loader(batch, count=40):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(batch, 8, generator=generator), torch.zeros(batch, dtype=torch.long)) for _ in range(count)]


def test_counts_products_forwards_and_backwards():
    model, x = net(16), torch.randn(10, 8)
    with counted() as work:
        model(x).sum().backward()
    forwards = 2 * 10 * (8 * 16 + 16 * 16 + 16 * 4)
    # No gradient goes to the inputs.
    assert work.operations == 3 * forwards - 2 * 10 * 8 * 16


def test_projections_take_no_more_than_their_share():
    spec = auto_spec(net(256))
    weights = sum(p.numel() for p in net(256).parameters())
    every = steps_between(spec, 10**7, weights)
    assert every > LEAST_INTERVAL
    assert estimate(spec).flops <= PROJECTION_SHARE * every * (10**7 + 240 * weights)
    assert steps_between(spec, 10**9, weights) < every
    assert steps_between(spec, 10**12, weights) == LEAST_INTERVAL
    assert steps_between(auto_spec(net(512)), 10**7, weights) > every


@pytest.mark.parametrize(("batch", "rarer"), [(4096, False), (4, True)])
def test_projects_less_often_where_a_step_is_cheap_next_to_it(batch, rarer, monkeypatch):
    steps = []
    project = _Run._project

    def noted(run, sweeps):
        steps.append((run.steps, run.every))
        project(run, sweeps)

    monkeypatch.setattr(_Run, "_project", noted)
    pair = net(128), net(128)
    how = StraightThrough(loader(batch), epochs=1, max_batches=1)
    fit = align(*pair, how)
    every = steps[0][1]
    assert (every > LEAST_INTERVAL) is rarer
    assert [number for number, _ in steps] == [*range(every, 40, every), 40]
    # To count changes nothing: the same interval, given, leads to the same.
    given = align(*pair, StraightThrough(loader(batch), epochs=1, max_batches=1, project_every=every))
    assert given.permutation == fit.permutation
    assert given.objective == fit.objective


def test_a_resumed_run_keeps_its_interval(tmp_path, monkeypatch):
    pair = net(128), net(128)
    settings = dict(max_batches=1, checkpoint=tmp_path / "run.pt")
    align(*pair, StraightThrough(loader(4), epochs=1, **settings))
    every = torch.load(tmp_path / "run.pt", weights_only=True)["every"]
    assert every > LEAST_INTERVAL
    monkeypatch.setattr(_Run, "_interval", lambda run, operations: pytest.fail("counted again"))
    align(*pair, StraightThrough(loader(4), epochs=2, **settings))
    assert torch.load(tmp_path / "run.pt", weights_only=True)["every"] == every
