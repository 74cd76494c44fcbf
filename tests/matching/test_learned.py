"""Learned matching: its slopes and steps, what it reaches and keeps, and what it refuses."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import permgraph as pg
from permgraph.errors import CheckpointError, EvaluationError, MismatchError, NonFiniteError, PermgraphError
from permgraph.matching import LearnedMatching, align
from permgraph.matching.general.acting import Element, composed
from permgraph.matching.general.between import BalancedLine
from permgraph.matching.general.coordinates import Coordinates
from permgraph.matching.general.turning import Turning, nearly_polar
from tests.matching.learnable import Reader, Tied, low_rank, perceptron, points, texts, trained
from tests.matching.processes import run_alone_and_two
from tests.matching.untouched import untouched

MODELS = {
    "perceptron": (perceptron, points, {"P"}),
    "tanh": (functools.partial(perceptron, nn.Tanh), points, {"B"}),
    "low rank": (low_rank, points, {"GL", "B"}),
    "layer norm": (Reader, texts, {"O1", "GL", "S"}),
    "rotary": (functools.partial(Reader, True), texts, {"O", "GL", "T", "M"}),
    "tied": (Tied, texts, {"P"}),
}


def batches(data, size=64):
    x, y = data
    return list(zip(x.split(size), y.split(size), strict=True))


@functools.cache
def pair(name):
    make, data, _ = MODELS[name]
    a, b = (trained(make, data(), seed) for seed in (0, 1))
    return a, b, pg.auto_spec(a, symmetry="general", example_inputs=(data()[0][:3],))


def line_loss(a, b, data, where=(0.25, 0.5, 0.75)):
    """The mean loss at points of the line, from the definition."""
    x, y = data
    total = 0.0
    for t in where:
        middle = copy.deepcopy(a)
        theirs = b.state_dict()
        middle.load_state_dict({n: torch.lerp(v, theirs[n], t) for n, v in a.state_dict().items()})
        with torch.no_grad():
            total += float(cross_entropy(middle(x), y))
    return total / len(where)


def kinds(spec):
    return {str(spec.groups[name].structure) for name in spec.acting}


@pytest.mark.parametrize("name", MODELS)
def test_has_the_structures_that_it_should(name):
    assert kinds(pair(name)[2]) >= MODELS[name][2]


def of_line(name, a, b, spec):
    line = BalancedLine(a, a.state_dict(), b.state_dict(), spec, cross_entropy)
    start = line.element(spec.random(3))
    return line, Coordinates(line.acting, start, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_slopes_are_those_of_the_loss(name):
    """By central differences of the loss along one direction of each group's coordinates, in float64."""
    a, b, spec = pair(name)
    a, b = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    line, here = of_line(name, a, b, spec)
    x, y = MODELS[name][1]()
    batch = (x.double() if x.is_floating_point() else x)[:32], y[:32]

    def loss(coordinates):
        line.place(line.moved(coordinates.element, coordinates.inverses), 0.4)
        return line.between.value(batch, 1)

    loss(here).backward()
    moved = line.moved(here.element, here.inverses)
    here.pull_back(moved, line.gradients(), 0.4)
    assert bool(here.leaves) == (name != "tanh")  # whose group is finite
    generator = torch.Generator().manual_seed(1)
    for group, leaf in here.leaves.items():
        direction = here._tangent(group, torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype))
        values = []
        for sign in (1, -1):
            there = Coordinates(line.acting, here.element, dtype=torch.float64)
            with torch.no_grad():
                there.leaves[group] += sign * 1e-5 * direction
            there.advance()
            assert not there.leaves[group].any()
            values.append(float(loss(there).detach()))
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-5, abs=1e-8)
        assert abs(slope) > 1e-6  # or there would be nothing to compare


@pytest.mark.parametrize("name", MODELS)
def test_steps_stay_in_the_group(name):
    """After large steps the function of B is kept to rounding in float64, in A's gauge."""
    a, b, spec = pair(name)
    a, b = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    line, here = of_line(name, a, b, spec)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        with torch.no_grad():
            for leaf in here.leaves.values():
                leaf += 0.2 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        here.advance()
    found = line.found(here.exact())
    x = MODELS[name][1]()[0]
    x = x.double() if x.is_floating_point() else x
    moved = copy.deepcopy(b)
    moved.load_state_dict(found.apply(b.state_dict()))
    with torch.no_grad():
        before, after = b(x), moved(x)
    assert float((before - after).abs().max()) <= 1e-9 * float(before.abs().max())
    for parameter, theirs in zip(b.parameters(), moved.parameters(), strict=True):
        assert parameter.dtype == theirs.dtype
    assert any(not torch.allclose(p, q) for p, q in zip(b.parameters(), moved.parameters(), strict=True))


@pytest.mark.parametrize("name", ["low rank", "layer norm", "rotary"])
def test_one_end_is_as_good_as_both(name):
    """The networks between h·A and g·B compute what those between A and h⁻¹·g·B do."""
    a, b, spec = pair(name)
    a, b = copy.deepcopy(a).double(), copy.deepcopy(b).double()
    h, g = spec.random(5), spec.random(6)
    x, _ = MODELS[name][1]()
    x = x.double() if x.is_floating_point() else x
    line = BalancedLine(a, a.state_dict(), b.state_dict(), spec, cross_entropy)
    ours, theirs = line.element(h), line.element(g)
    both = {n: line.acting.act(n, t, ours) for n, t in line.a.items()}
    back = Element.of(ours.transformation(line.spec).inverse(), "cpu", torch.float64)
    outputs = []
    for start, end in ((both, line.moved(theirs)), (line.a, line.moved(composed(line.acting, back, theirs)))):
        middle = {n: torch.lerp(start[n], end[n], 0.3) for n in start}
        line.place(middle, 1.0)
        outputs.append(line.between.model(x).detach())
    assert torch.allclose(*outputs, rtol=0, atol=1e-9 * float(outputs[0].abs().max()))


@pytest.mark.parametrize("name", ["perceptron", "layer norm", "rotary"])
def test_is_better_than_weight_matching(name):
    a, b, spec = pair(name)
    data = MODELS[name][1]()
    start = align(a, b, spec=spec)
    fit = align(a, b, LearnedMatching(batches(data), init=start, steps=300), spec=spec)
    learned, weights = line_loss(a, fit.model(), data), line_loss(a, start.model(), data)
    ends = (line_loss(a, a, data) + line_loss(a, b, data, [1.0])) / 2
    assert learned - ends < 0.5 * (weights - ends)
    assert fit.objective == pytest.approx(-learned, rel=1e-3, abs=1e-5)
    assert fit.objective_before == pytest.approx(-line_loss(a, b, data), rel=1e-4)
    x = data[0]
    with torch.no_grad():
        assert torch.allclose(fit.model()(x), b(x), rtol=0, atol=1e-4 * float(b(x).abs().max()))


@pytest.mark.parametrize("name", ["layer norm", "rotary"])
def test_comes_back_to_what_was_planted(name):
    """From a start near a planted element, the line's loss comes down to that of A itself."""
    a, _, spec = pair(name)
    data = MODELS[name][1]()
    secret = spec.random(7)
    b = copy.deepcopy(a)
    b.load_state_dict(secret.inverse().apply(a.state_dict()))
    line = BalancedLine(a, a.state_dict(), b.state_dict(), spec, cross_entropy)
    near = Coordinates(line.acting, line.element(secret), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for leaf in near.leaves.values():
            leaf += 0.3 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    near.advance()
    start = line.found(near.exact())
    moved = copy.deepcopy(a)
    moved.load_state_dict(start.apply(b.state_dict()))
    own = line_loss(a, a, data)
    away = line_loss(a, moved, data) - own
    assert away > 0.1
    fit = align(a, b, LearnedMatching(batches(data), init=start, steps=300), spec=spec)
    assert -fit.objective - own < 0.05 * away


def test_learns_permutations_alone():
    """Of a spec with permutations alone; from a start at which units are out of order."""
    a, b, general = pair("perceptron")
    spec = general.permutations()
    data = points()
    how = LearnedMatching(batches(data), rate=0.02, steps=160, measure_every=16)
    fixed = align(a, b, LearnedMatching(batches(data), steps=0), spec=spec)
    fit = align(a, b, how, spec=spec)
    assert fit.transformation is None and fit.permutation.spec is spec
    assert fit.permutation != fixed.permutation
    assert -fit.objective < 0.97 * -fixed.objective
    assert sum(sum(sweep.moved.values()) for sweep in fit.history) > 0
    still = align(a, b, LearnedMatching(batches(data), permutations="fixed", steps=20), spec=spec)
    assert still.permutation == fixed.permutation


def test_reports_the_best_that_it_measured():
    a, b, spec = pair("layer norm")
    seen = []
    how = LearnedMatching(batches(texts()), steps=45, measure_every=10, optimizer=lambda p: torch.optim.Adam(p, 0.5))
    fit = align(a, b, how, spec=spec, progress=seen.append)
    assert tuple(seen) == fit.history
    assert [sweep.number for sweep in fit.history] == [1, 2, 3, 4, 5]
    start = align(a, b, LearnedMatching(batches(texts()), steps=0), spec=spec)
    assert fit.objective >= max(start.objective, *(sweep.objective for sweep in fit.history))
    assert fit.outcome == "sweep limit" and fit.transformation is not None
    assert start.objective == pytest.approx(-line_loss(a, start.model(), texts()), rel=1e-4)


def test_goes_on_from_an_earlier_result():
    a, b, spec = pair("rotary")
    first = align(a, b, LearnedMatching(batches(texts()), steps=60), spec=spec)
    for init in (first, first.transformation):
        again = align(a, b, LearnedMatching(batches(texts()), steps=0, init=init), spec=spec)
        assert again.objective == pytest.approx(first.objective, rel=1e-4)
    permutation = spec.permutations().random(0)
    there = align(a, b, LearnedMatching(batches(texts()), steps=0, init=permutation), spec=spec)
    assert there.objective >= there.objective_before


def test_measures_on_batches_of_its_own():
    a, b, spec = pair("perceptron")
    data = points()
    held = [(data[0][:16], data[1][:16])]
    fit = align(a, b, LearnedMatching(batches(data), validation=held, measured=(0.5,), steps=30), spec=spec)
    assert fit.objective == pytest.approx(-line_loss(a, fit.model(), held[0], (0.5,)), rel=1e-4)
    every = align(a, b, LearnedMatching(batches(data), max_batches=None, steps=0), spec=spec)
    first = align(a, b, LearnedMatching(batches(data), max_batches=1, steps=0), spec=spec)
    assert every.objective == pytest.approx(-line_loss(a, every.model(), data), rel=1e-4)
    assert first.objective == pytest.approx(-line_loss(a, first.model(), (data[0][:64], data[1][:64])), rel=1e-4)


def test_leaves_models_and_the_random_state_alone():
    a, b = (trained(functools.partial(perceptron, norm=True), points(), seed) for seed in (0, 1))
    spec = pg.auto_spec(a, symmetry="general")
    with untouched(a, b):
        fit = align(a, b, LearnedMatching(batches(points()), steps=20), spec=spec)
    assert fit.objective > fit.objective_before


def test_ties_stay_tied():
    a, b, spec = pair("tied")
    fit = align(a, b, LearnedMatching(batches(texts()), steps=40), spec=spec)
    assert fit.state_dict["head.weight"] is fit.state_dict["embed.weight"]
    assert fit.objective == pytest.approx(-line_loss(a, fit.model(), texts()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    a, b, spec = pair("perceptron")
    a, b = copy.deepcopy(a).to(dtype), copy.deepcopy(b).to(dtype)
    x, y = points()
    fit = align(a, b, LearnedMatching([(x.to(dtype), y)], steps=20), spec=spec)
    assert all(tensor.dtype == dtype for tensor in fit.state_dict.values())
    assert fit.objective > fit.objective_before


def test_nothing_to_learn():
    a, b = nn.Linear(8, 4), nn.Linear(8, 4)
    spec = pg.auto_spec(a, symmetry="general")
    fit = align(a, b, LearnedMatching(batches(points()), steps=5), spec=spec)
    assert fit.permutation.is_identity and "nothing to permute" in fit.notes[0]
    assert fit.objective == fit.objective_before == pytest.approx(-line_loss(a, b, points()), rel=1e-5)


def shuffled(seed=5, own=True):
    generator = torch.Generator().manual_seed(seed) if own else None
    return DataLoader(TensorDataset(*texts()), batch_size=32, shuffle=True, generator=generator)


def noisy():
    """A loss that draws random numbers, so that a run which lost the random state would not be the same."""

    def loss(output, targets):
        return cross_entropy(output + 0.01 * torch.randn_like(output), targets)

    return loss


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_from_its_checkpoint_ends_as_one_without_a_break(tmp_path, own, stop):
    """A measurement every 5 steps of passes of 8 batches: checkpoints fall inside passes and at their ends."""
    a, b, spec = pair("layer norm")
    settings = dict(
        steps=30, measure_every=4 if stop == 4 else 5, project_every=4, loss=noisy(), init=pg.align(a, b, spec=spec)
    )
    whole = align(a, b, LearnedMatching(shuffled(own=own), **settings), spec=spec, seed=3)

    def interrupt(sweep):
        if sweep.number == stop:
            raise KeyboardInterrupt

    file = tmp_path / "run.pt"
    how = functools.partial(LearnedMatching, **settings, checkpoint=file)
    broken = align(a, b, how(shuffled(own=own)), spec=spec, seed=3, progress=interrupt)
    assert broken.outcome == "interrupted" and broken.sweeps == stop
    torch.manual_seed(99)
    resumed = align(a, b, how(shuffled(own=own)), spec=spec, seed=3)
    assert [(s.number, s.objective, s.moved) for s in resumed.history] == [
        (s.number, s.objective, s.moved) for s in whole.history
    ]
    assert resumed.objective == whole.objective and resumed.objective_before == whole.objective_before
    assert all(torch.equal(tensor, whole.state_dict[name]) for name, tensor in resumed.state_dict.items())
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    again = align(a, b, how(shuffled(own=own)), spec=spec, seed=3)
    assert again.history == resumed.history


def test_refuses_the_checkpoint_of_another_run(tmp_path):
    a, b, spec = pair("perceptron")
    file = tmp_path / "run.pt"
    settings = dict(loader=batches(points()), steps=4, checkpoint=file)
    align(a, b, LearnedMatching(**settings), spec=spec)
    assert torch.load(file, weights_only=True)["steps"] == 4  # tensors and plain values only
    for other, named in (
        (dict(steps=5), "steps"),
        (dict(points=(0.1, 0.9)), "points"),
        (dict(permutations="fixed"), "permutations"),
        (dict(init=spec.random(0)), "init"),
        (dict(optimizer=functools.partial(torch.optim.SGD, lr=0.1)), "optimizer, optimizer's settings"),
    ):
        with pytest.raises(CheckpointError, match=f"belongs to another run, with other {named}"):
            align(a, b, LearnedMatching(**{**settings, **other}), spec=spec)
    with pytest.raises(CheckpointError, match="other weights of A, weights of B:"):
        align(b, a, LearnedMatching(**settings), spec=spec)
    align(a, b, pg.StraightThrough(batches(points()), epochs=1, checkpoint=tmp_path / "other.pt"), spec=spec)
    with pytest.raises(CheckpointError, match="holds 'permgraph straight-through run'"):
        align(a, b, LearnedMatching(**{**settings, "checkpoint": tmp_path / "other.pt"}), spec=spec)


def test_an_interrupted_run_gives_the_best_so_far():
    a, b, spec = pair("layer norm")

    def stop(sweep):
        raise KeyboardInterrupt

    fit = align(a, b, LearnedMatching(batches(texts()), measure_every=20), spec=spec, progress=stop)
    assert fit.outcome == "interrupted" and fit.sweeps == 1
    assert fit.objective > fit.objective_before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=-1), "steps=-1"),
        (dict(rate=0.0), "rate=0.0"),
        (dict(points=(0.8, 0.2)), r"points=\(0.8, 0.2\)"),
        (dict(measured=()), r"measured=\(\)"),
        (dict(measured=(0.5, 1.5)), "measured="),
        (dict(permutations="free"), "'straight-through', 'fixed'"),
        (dict(schedule="linear"), "'cosine', 'constant'"),
        (dict(max_batches=0), "max_batches=0"),
        (dict(loader=(batch for batch in [])), "generator"),
        (dict(validation=(batch for batch in [])), "generator"),
        (dict(accelerator="gpu"), "not a str"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(PermgraphError, match=message):
        LearnedMatching(**{"loader": [], **settings})


def test_refuses_what_it_cannot_run():
    a, b, spec = pair("perceptron")
    with pytest.raises(MismatchError, match=r"align\(\) with modules"):
        LearnedMatching(batches(points())).match(a.state_dict(), b.state_dict(), spec)
    with pytest.raises(MismatchError, match="another spec"):
        align(a, b, LearnedMatching(batches(points()), init=pair("tanh")[2].identity()), spec=spec)
    broken = copy.deepcopy(pair("layer norm")[0])
    with torch.no_grad():
        broken.layer.norm1.weight[3] = 0
    with pytest.raises(MismatchError, match=r"the gain layer.norm1.weight of A has a zero"):
        align(broken, pair("layer norm")[1], LearnedMatching(batches(texts())), spec=pair("layer norm")[2])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], EvaluationError, "gave no batch"),
        ([torch.zeros(4, 8)], EvaluationError, "holds no targets"),
        ([(torch.zeros(4, 7), torch.zeros(4).long())], EvaluationError, r"batch 1 of the loader, of shape \(4, 7\)"),
        ([(torch.zeros(4, 8), torch.zeros(3).long())], EvaluationError, r"logits and targets of shape .* and \(3,\)"),
        ([(torch.full((4, 8), float("nan")), torch.zeros(4).long())], NonFiniteError, "is nan on batch 1"),
    ],
)
def test_refuses_bad_data(loader, error, message):
    a, b, spec = pair("perceptron")
    with pytest.raises(error, match=message):
        align(a, b, LearnedMatching(loader), spec=spec)


def test_refuses_a_loss_that_is_no_number():
    a, b, spec = pair("perceptron")
    with pytest.raises(PermgraphError, match="one number"):
        align(a, b, LearnedMatching(batches(points()), nn.CrossEntropyLoss(reduction="none")), spec=spec)


@pytest.mark.parametrize("name", ["perceptron", "layer norm"])
def test_says_when_it_diverges(name):
    a, b, spec = pair(name)
    data = MODELS[name][1]()
    how = LearnedMatching(batches(data), optimizer=lambda p: torch.optim.SGD(p, lr=float("inf")))
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        align(a, b, how, spec=spec)


def test_an_accelerator_gives_the_same_in_one_process():
    accelerate = pytest.importorskip("accelerate")
    a, b, spec = pair("layer norm")
    settings = dict(steps=20, measure_every=10)
    plain = align(a, b, LearnedMatching(shuffled(), **settings), spec=spec)
    engine = accelerate.Accelerator(cpu=True)
    fit = align(a, b, LearnedMatching(shuffled(), **settings, accelerator=engine), spec=spec)
    assert fit.objective == pytest.approx(plain.objective, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no processes to join")
def test_two_processes_find_what_one_does(tmp_path):
    pytest.importorskip("accelerate")
    found = run_alone_and_two("tests.matching.two_learning", tmp_path)
    (alone,), (one, other) = found[1], found[2]
    for each in (one, other):
        assert all(torch.allclose(each["state"][n], t, rtol=0, atol=1e-6) for n, t in alone["state"].items())
    assert one["history"] == other["history"] == pytest.approx(alone["history"], rel=1e-6)
    assert len(set(alone["history"])) > 1  # it went somewhere
    assert one["world"] == 2 and alone["world"] == 1


def test_turns_every_plane_alike():
    """A skew matrix becomes one with eigenvalues near ±i, whatever its own, and on any axes; zero stays zero."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.diag(torch.logspace(-2, 0, 4, dtype=torch.float64))
    skew = torch.kron(sizes, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64))
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    turned = nearly_polar(skew)
    values = torch.linalg.svdvals(turned)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    assert torch.allclose(turned, -turned.mT)
    assert torch.allclose(nearly_polar(axes @ skew @ axes.T), axes @ turned @ axes.T)
    assert not nearly_polar(torch.zeros(2, 3, 3)).any()


def test_all_but_matrices_move_by_adam():
    ours, theirs = (torch.tensor([1.0, -2.0, 3.0], requires_grad=True) for _ in range(2))
    optimizers = Turning([], [ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for step in range(5):
        for value, optimizer in zip((ours, theirs), optimizers, strict=True):
            value.grad = torch.tensor([1.0, 0.1, -step])
            optimizer.step()
    assert torch.allclose(ours, theirs)
