"""Straight-through matching: what it keeps, that it leaves no trace, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import permgraph
from permgraph.errors import CheckpointError, EvaluationError, MismatchError, NonFiniteError, PermgraphError
from permgraph.matching import StraightThrough, WeightMatching, align, tuned
from permgraph.matching.ascent import step
from tests.matching.examples import Tied
from tests.matching.processes import run_alone_and_two
from tests.matching.untouched import untouched


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def data(count=256):
    """Points in eight dimensions, whose class is the sign pattern of two quadratic forms."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] * x[:, 3] > 0).long()
    return x, y


def batches(size=64):
    x, y = data()
    return list(zip(x.split(size), y.split(size), strict=True))


def trained(seed, width=24, norm=False):
    torch.manual_seed(seed)
    normalise = [nn.BatchNorm1d(width)] if norm else []
    model = nn.Sequential(
        nn.Linear(8, width), *normalise, nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def midpoint_loss(a, b, x, y):
    """The loss halfway between two networks without normalisation, from the definition."""
    middle = copy.deepcopy(a)
    theirs = b.state_dict()
    middle.load_state_dict({name: (tensor + theirs[name]) / 2 for name, tensor in a.state_dict().items()})
    with torch.no_grad():
        return float(nn.functional.cross_entropy(middle(x), y))


@pytest.fixture(scope="module")
def pair():
    return trained(0), trained(1)


def test_recovers_a_planted_permutation(pair):
    a = pair[0]
    spec = permgraph.auto_spec(a)
    secret = spec.random(3)
    b = copy.deepcopy(a)
    b.load_state_dict(secret.inverse().apply(a.state_dict()))
    fit = align(a, b, StraightThrough(batches(), epochs=1), spec=spec)
    assert fit.permutation == secret


def test_is_better_than_weight_matching(pair):
    a, b = pair
    x, y = data()
    plain = midpoint_loss(a, align(a, b).model(), x, y)
    fit = align(a, b, StraightThrough(batches(), epochs=20, optimizer=sgd))
    assert midpoint_loss(a, fit.model(), x, y) < 0.95 * plain
    assert fit.objective > fit.objective_before


def test_reports_the_best_that_it_measured(pair):
    a, b = pair
    x, y = data()
    seen = []
    fit = align(a, b, StraightThrough(batches(), epochs=4, optimizer=sgd), progress=seen.append)
    assert fit.objective == pytest.approx(-midpoint_loss(a, fit.model(), x, y), rel=1e-5)
    assert fit.objective_before == pytest.approx(-midpoint_loss(a, b, x, y), rel=1e-5)
    assert fit.objective >= max(sweep.objective for sweep in fit.history)
    assert tuple(seen) == fit.history
    assert [sweep.number for sweep in fit.history] == [1, 2, 3, 4]
    assert fit.outcome == "sweep limit"


def test_without_an_epoch_it_chooses_between_the_identity_and_weight_matching(pair):
    a, b = pair
    fit = align(a, b, StraightThrough(batches(), epochs=0))
    assert fit.permutation == align(a, b).permutation
    same = align(a, a, StraightThrough(batches(), epochs=0, matcher=WeightMatching(max_sweeps=0, init="identity")))
    assert same.permutation.is_identity


def test_goes_on_from_an_earlier_result(pair):
    a, b = pair
    spec = permgraph.auto_spec(a)
    first = align(a, b, StraightThrough(batches(), epochs=8, optimizer=sgd), spec=spec)
    second = align(a, b, StraightThrough(batches(), epochs=0, init=first.permutation), spec=spec)
    assert second.objective >= first.objective


def test_it_may_begin_at_b(pair):
    """Where the identity is nearest, so that without an epoch there is nothing else to keep."""
    a, b = pair
    spec = permgraph.auto_spec(a)
    still = align(a, b, StraightThrough(batches(), epochs=0, free_weights="b"), spec=spec)
    assert still.permutation.is_identity
    fit = align(a, b, StraightThrough(batches(), optimizer=sgd, epochs=10, free_weights="b"), spec=spec)
    assert fit.objective > still.objective and not fit.permutation.is_identity
    turn = spec.random(4)
    there = align(a, b, StraightThrough(batches(), epochs=0, free_weights="b", init=turn), spec=spec)
    assert there.permutation in (turn, spec.identity()) and there.objective >= still.objective


def test_the_seed_decides(pair):
    a, b = pair
    loader = DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True)
    how = StraightThrough(loader, epochs=2, optimizer=sgd, max_batches=None)
    fits = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        fits.append(align(a, b, how, seed=4))
    assert fits[0].permutation == fits[1].permutation
    assert [s.objective for s in fits[0].history] == [s.objective for s in fits[1].history]


def test_leaves_models_and_the_random_state_alone():
    a, b = trained(0, norm=True), trained(1, norm=True)
    with untouched(a, b):
        align(a, b, StraightThrough(batches(), epochs=1))


def test_tied_weights():
    torch.manual_seed(0)
    a, b = Tied(), Tied()
    tokens = torch.arange(11)
    fit = align(a, b, StraightThrough([{"x": tokens, "labels": tokens.flip(0)}], epochs=3))
    assert fit.model().head.weight is fit.model().embed.weight or torch.equal(
        fit.state_dict["head.weight"], fit.state_dict["embed.weight"]
    )
    middle = copy.deepcopy(a)
    middle.load_state_dict({n: (t + fit.state_dict[n]) / 2 for n, t in a.state_dict().items()})
    loss = nn.functional.cross_entropy(middle(tokens), tokens.flip(0))
    assert fit.objective == pytest.approx(-loss.item(), rel=1e-5)


def test_gradients_go_straight_to_the_free_weights(pair):
    """The first step must use the gradient at the midpoint, halved, not that at A."""
    a, b = pair
    spec = permgraph.auto_spec(a)
    kept = {}

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            if not kept:
                kept["gradients"] = [p.grad.clone() for p in self.param_groups[0]["params"]]
            return super().step(closure)

    align(a, b, StraightThrough(batches(256), epochs=1, optimizer=lambda p: Spy(p, lr=0.01)), spec=spec)
    aligned = align(a, b, spec=spec).state_dict
    middle = copy.deepcopy(a)
    middle.load_state_dict({name: (tensor + aligned[name]) / 2 for name, tensor in a.state_dict().items()})
    x, y = data()
    nn.functional.cross_entropy(middle(x), y).backward()
    expected = {name: p.grad / 2 for name, p in middle.named_parameters()}
    moving = [n for n in spec.axes if any(o.group in spec.moving for o in spec.occurrences(n))]
    assert len(kept["gradients"]) == len(moving) > 2
    for name, gradient in zip(moving, kept["gradients"], strict=True):
        assert torch.allclose(gradient, expected[name], atol=1e-6)


def test_an_interrupted_run_gives_the_best_so_far(pair):
    def stop(sweep):
        raise KeyboardInterrupt

    fit = align(*pair, StraightThrough(batches(), epochs=5), progress=stop)
    assert fit.outcome == "interrupted"
    assert fit.sweeps == 1
    assert fit.objective > fit.objective_before


def test_refuses_bad_settings(pair):
    with pytest.raises(PermgraphError, match="epochs=-1"):
        StraightThrough([], epochs=-1)
    with pytest.raises(PermgraphError, match="free_weights='c'"):
        StraightThrough([], free_weights="c")
    with pytest.raises(PermgraphError, match="max_batches=0"):
        StraightThrough([], max_batches=0)
    with pytest.raises(PermgraphError, match="generator"):
        StraightThrough(batch for batch in batches())
    a, b = pair
    with pytest.raises(MismatchError, match="align\\(\\) with modules"):
        StraightThrough(batches()).match(a.state_dict(), b.state_dict(), permgraph.auto_spec(a))
    other = permgraph.auto_spec(trained(0, width=5)).identity()
    with pytest.raises(MismatchError, match="another spec"):
        align(a, b, StraightThrough(batches(), init=other))


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], EvaluationError, "gave no batch"),
        ([torch.zeros(4, 8)], EvaluationError, "holds no targets"),
        ([(torch.zeros(4, 7), torch.zeros(4).long())], EvaluationError, r"batch 1 of the loader, of shape \(4, 7\)"),
        ([(torch.zeros(4, 8), torch.zeros(3).long())], EvaluationError, r"logits and targets of shape .* and \(3,\)"),
        (
            [(torch.full((4, 8), float("nan")), torch.zeros(4).long())],
            NonFiniteError,
            "the loss at the midpoint is nan",
        ),
    ],
)
def test_refuses_bad_data(pair, loader, error, message):
    with pytest.raises(error, match=message):
        align(*pair, StraightThrough(loader))


def test_refuses_a_loss_that_is_no_number(pair):
    with pytest.raises(PermgraphError, match="one number"):
        align(*pair, StraightThrough(batches(), loss=nn.CrossEntropyLoss(reduction="none")))


def test_says_when_the_free_weights_diverge(pair):
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        align(*pair, StraightThrough(batches(), optimizer=lambda p: torch.optim.SGD(p, lr=float("inf")), epochs=3))


def shuffled(seed=5, size=32):
    return DataLoader(
        TensorDataset(*data()), batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


def dropping():
    """A pair whose loss draws random numbers, so that a run which lost the random state would not be the same."""

    def loss(output, targets):
        return nn.functional.cross_entropy(output + 0.01 * torch.randn_like(output), targets)

    return loss


@pytest.mark.parametrize("make", [shuffled, lambda: DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True)])
def test_a_run_from_its_checkpoint_ends_as_one_without_a_break(pair, tmp_path, make):
    settings = dict(epochs=4, optimizer=sgd, project_every=3, loss=dropping())
    whole = align(*pair, StraightThrough(make(), **settings), seed=3)

    def stop_after_two(sweep):
        if sweep.number == 2:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    broken = align(*pair, StraightThrough(make(), **settings, checkpoint=file), seed=3, progress=stop_after_two)
    assert broken.outcome == "interrupted"
    assert broken.sweeps == 2
    torch.manual_seed(99)
    resumed = align(*pair, StraightThrough(make(), **settings, checkpoint=file), seed=3)
    assert resumed.permutation == whole.permutation
    assert resumed.objective == whole.objective
    assert resumed.objective_before == whole.objective_before
    assert [(s.number, s.objective, s.moved) for s in resumed.history] == [
        (s.number, s.objective, s.moved) for s in whole.history
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    # Finished, it has nothing left to do; asked for more epochs, it goes on.
    again = align(*pair, StraightThrough(make(), **settings, checkpoint=file), seed=3)
    assert again.history == resumed.history
    longer = align(*pair, StraightThrough(make(), **{**settings, "epochs": 5}, checkpoint=file), seed=3)
    assert longer.history[:4] == resumed.history
    assert longer.sweeps == 5


def test_a_checkpoint_holds_tensors_and_plain_values_only(pair, tmp_path):
    align(*pair, StraightThrough(batches(), epochs=1, checkpoint=tmp_path / "run.pt"))
    assert torch.load(tmp_path / "run.pt", weights_only=True)["steps"] == 4


def test_refuses_the_checkpoint_of_another_run(pair, tmp_path):
    file = tmp_path / "run.pt"
    how = StraightThrough(batches(), epochs=1, checkpoint=file)
    align(*pair, how, seed=1)
    with pytest.raises(CheckpointError, match="belongs to another run, with other seed: give another path"):
        align(*pair, how, seed=2)
    with pytest.raises(CheckpointError, match="other weights of A, weights of B:"):
        align(pair[1], pair[0], how, seed=1)
    with pytest.raises(CheckpointError, match="other free_weights:"):
        align(*pair, StraightThrough(batches(), epochs=1, free_weights="b", checkpoint=file), seed=1)
    with pytest.raises(CheckpointError, match="other project_every, optimizer, optimizer's settings:"):
        align(*pair, StraightThrough(batches(), project_every=2, optimizer=sgd, checkpoint=file), seed=1)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"run.pt: not the checkpoint of a straight-through run"):
        align(*pair, how, seed=1)
    torch.save({"format": "another", "version": 1}, file)
    with pytest.raises(CheckpointError, match="holds 'another', version 1"):
        align(*pair, how, seed=1)


def gentle(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def smoothed(amount):
    return lambda output, targets: nn.functional.cross_entropy(output, targets, label_smoothing=amount)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (dict(optimizer=gentle), "optimizer's settings"),
        (dict(loss=smoothed(0.2)), "loss"),
        (dict(loss=nn.functional.multi_margin_loss), "loss"),
        (dict(loader=batches(32)), "loader"),
        (dict(matcher=WeightMatching(ignore=["*bias"])), "matcher"),
        (dict(init="random"), "init"),
    ],
)
def test_a_run_with_other_settings_does_not_go_on(pair, tmp_path, other, named):
    settings = dict(loader=batches(), loss=smoothed(0.1), optimizer=sgd, checkpoint=tmp_path / "run.pt", max_batches=1)
    if "init" in other:
        other = dict(init=permgraph.auto_spec(pair[0]).random(0))
    first = align(*pair, StraightThrough(**settings, epochs=1))
    again = align(
        *pair, StraightThrough(**{**settings, "loss": smoothed(0.1)}, epochs=1)
    )  # as another process makes it
    assert again.history == first.history
    with pytest.raises(CheckpointError, match=f"belongs to another run, with other {named}:"):
        align(*pair, StraightThrough(**{**settings, **other}, epochs=2))


def test_measures_no_permutation_twice_in_a_row(pair):
    """Where training has settled, an epoch needs no pass over the loader to measure what was measured already."""
    read = []

    class Counted(list):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    align(*pair, StraightThrough(Counted(batches()), epochs=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    assert len(read) == 2 + 3  # the identity, weight matching, and three epochs that moved nothing


def test_prices_from_one_projection_to_the_next_change_nothing(monkeypatch):
    a, b = trained(0, width=160), trained(1, width=160)
    how = StraightThrough(batches(), epochs=2, project_every=2, optimizer=sgd)
    kept, prices_of = [], step.prices_of

    def counted(table, columns, start, **keywords):
        kept.append(start is not None)
        return prices_of(table, columns, start, **keywords)

    monkeypatch.setattr(step, "prices_of", counted)
    found = align(a, b, how)
    assert sum(kept) > 4  # most projections began with some
    monkeypatch.setattr(tuned, "PRICED", 1000)
    without = align(a, b, how)
    assert without.permutation == found.permutation
    assert without.objective == found.objective


def test_an_accelerator_gives_the_same_in_one_process(pair):
    accelerate = pytest.importorskip("accelerate")
    plain = align(*pair, StraightThrough(shuffled(), epochs=2, optimizer=sgd, project_every=3))
    engine = accelerate.Accelerator(cpu=True)
    fit = align(*pair, StraightThrough(shuffled(), epochs=2, optimizer=sgd, project_every=3, accelerator=engine))
    assert fit.permutation == plain.permutation
    assert fit.objective == pytest.approx(plain.objective, rel=1e-5)


def test_refuses_accelerators_that_would_scale_gradients():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(PermgraphError, match=r"not a str; it comes with pip install permgraph\[distributed\]"):
        StraightThrough(shuffled(), accelerator="gpu")
    with pytest.raises(PermgraphError, match="the loader is a list"):
        StraightThrough(batches(), accelerator=accelerate.Accelerator(cpu=True))
    with pytest.raises(PermgraphError, match="gradient_accumulation_steps=2"):
        StraightThrough(shuffled(), accelerator=accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no processes to join")
def test_two_processes_find_what_one_does(tmp_path):
    pytest.importorskip("accelerate")
    found = run_alone_and_two("tests.matching.two_processes", tmp_path)
    (alone,), (one, other) = found[1], found[2]
    for arrays in (one["arrays"], other["arrays"]):
        assert all(torch.equal(arrays[name], array) for name, array in alone["arrays"].items())
    assert one["objective"] == other["objective"] == pytest.approx(alone["objective"], rel=1e-4)
    assert one["history"] == pytest.approx(alone["history"], rel=1e-4)
    assert len(set(alone["history"])) > 1  # it went somewhere
    assert one["world"] == 2 and alone["world"] == 1
