"""A fine-tuning is moved from one base to another, without training and without data (Rinaldi et al. 2025).

Two bases see the upper half of the classes only, from different seeds. One of them is fine-tuned on the lower half.
What that changed, its task vector, is added to the other base: as it is, after it was moved by the permutations that
align the one base to the other, and by their whole group. Test accuracy on the classes of the fine-tuning, and on the
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from common import Setting, arguments, bar, console, finished, mean_and_error, settings, table
from networks import Batch
from rich.console import Console
from torch import Tensor, nn

import permgraph as pg

WAYS = ("the other base", "naive", "permuted", "general", "fine-tuned itself")
Found = dict[tuple[str, float], list[dict[str, float]]]


def lower(data: Batch, wanted: bool) -> Batch:
    """The examples of the lower half of the classes, or the others."""
    inputs, labels = data
    chosen = (labels < (int(labels.max()) + 1) / 2) == wanted
    return inputs[chosen], labels[chosen]


def moved(a: nn.Module, tuned: nn.Module, b: nn.Module, way: str) -> Mapping[str, Tensor]:
    """What the fine-tuning of A changed, for B."""
    vector = {name: tensor - a.state_dict()[name] for name, tensor in tuned.state_dict().items()}
    if way == "naive":
        return vector
    spec = pg.auto_spec(a, symmetry="general" if way == "general" else "permutation")
    return finished(pg.align(b, a, spec=spec)).transport(vector, kind="difference", base=a)


def run(setting: Setting, seeds: Sequence[int], strengths: Sequence[float], epochs: int, where: Console) -> Found:
    """Every way for every pair of bases."""
    before, after = (replace(setting, data=lower(setting.data, half)) for half in (False, True))
    test_new, test_old = (pg.evaluate_on([lower(setting.test, half)]) for half in (True, False))
    found: Found = {}

    def measure(way: str, strength: float, network: nn.Module) -> None:
        new, old = test_new(network), test_old(network)
        found.setdefault((way, strength), []).append({"new": new["accuracy"], "old": old["accuracy"]})

    with bar(where, setting.name, len(seeds)) as step:
        for seed in seeds:
            a, b = (before.network(before.train(s, tag="-upper")[-1]) for s in (seed, seed + 1000))
            tuned, itself = (
                after.network(after.train(seed, start=base, epochs=epochs, tag=f"-tuned{n}")[-1])
                for n, base in enumerate((a, b))
            )
            measure("the other base", 0.0, b)
            measure("fine-tuned itself", 1.0, itself)
            for way in ("naive", "permuted", "general"):
                vector = moved(a, tuned, b, way)
                for strength in strengths:
                    state = {name: tensor + strength * vector[name] for name, tensor in b.state_dict().items()}
                    measure(way, strength, setting.network(state))
            step()
    return found


def main(given: Sequence[str] | None = None) -> dict[str, Found]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ViT"), seeds=(1, 2, 3), points=None)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="of the vector (0.5 1 1.5)")
    parser.add_argument("--tuning-epochs", type=int, default=4, help="of fine-tuning (4)")
    options = parser.parse_args(given)
    where = console()
    every: dict[str, Found] = {}
    result = table(
        f"A task vector on another base, mean of {len(options.seeds)} pairs and standard error",
        *("", "strength", "accuracy on its classes", "on the others"),
    )
    for setting in settings(options):
        found = every[setting.name] = run(setting, options.seeds, options.strengths, options.tuning_epochs, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for way, strength in sorted(found, key=lambda key: (WAYS.index(key[0]), key[1])):
            cells = [mean_and_error([one[part] for one in found[way, strength]]) for part in ("new", "old")]
            shown = f"{strength:g}" if way in ("naive", "permuted", "general") else ""
            result.add_row(way, shown, *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells))
    result.show(where, options.out / "task_vectors.md", options)
    return every


if __name__ == "__main__":
    main()
