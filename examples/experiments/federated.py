"""Federated rounds, with and without alignment before the mean (McMahan et al. 2017, Wang et al. 2020).

Each client has a share of the training data, whose classes are drawn from a Dirichlet distribution: the smaller ALPHA,
the less alike the shares are. In each round every client trains for a few epochs, and the server takes the mean,
weighted by the numbers of examples. In the first round the clients begin with the same weights, or each with its own;
in all others with the mean. Test accuracy of the mean after each round, by Flower's FedAvg and by its stand-in that
aligns the clients first; and the processor time that the first mean, the later ones, and whole rounds take.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Setting, arguments, bar, console, figure, legend, line, mean_and_error, settings, table
from matplotlib.axes import Axes
from networks import Batch, train
from rich.console import Console
from torch import Tensor, nn

from permgraph.merging import flower

try:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server.strategy import FedAvg
except ImportError:
    raise SystemExit("federated rounds need flwr: pip install 'permgraph[federated]'") from None

WAYS = ("FedAvg, one start", "aligned, one start", "FedAvg, own starts", "aligned, own starts")


@dataclass(frozen=True)
class Participant:
    """A client, in this process: its name, and its share of the data."""

    cid: str
    data: Batch


@dataclass
class Run:
    """What came out of one way to average, for one seed.

    Attributes:
        accuracy: of the mean on the test data, after each round.
        aggregation: seconds of processor time that the strategy took for the mean, alignment included, in each round.
        rounds: the same of each whole round, training included.
    """

    accuracy: list[float] = field(default_factory=list)
    aggregation: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)


def shares(data: Batch, clients: int, alpha: float, seed: int, least: int = 10) -> list[Batch]:
    """The data in one part for each client, whose share of each class is drawn from a Dirichlet distribution.

    Drawn again until every client has so many examples at least.
    """
    inputs, labels = data
    if clients * least > len(labels):
        raise SystemExit(f"{len(labels)} examples are too few for {clients} clients with {least} each")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for number in labels.unique():
            places = (labels == number).nonzero().flatten()
            places = places[torch.randperm(len(places), generator=generator)]
            weights = torch._standard_gamma(torch.full((clients,), alpha), generator=generator)
            ends = (weights.cumsum(0) / weights.sum() * len(places)).round().long().clamp(max=len(places))
            ends[-1] = len(places)
            for part, chosen in zip(parts, places.tensor_split(ends[:-1]), strict=True):
                part.append(chosen)
        chosen_by = [torch.cat(part) for part in parts]
        if min(map(len, chosen_by)) >= least:
            return [(inputs[chosen], labels[chosen]) for chosen in chosen_by]
    raise SystemExit(f"no division in 1,000 gave each of {clients} clients {least} examples: raise --alpha")


def trained(setting: Setting, start: nn.Module, data: Batch, seed: int, epochs: int) -> nn.Module:
    """A copy of a network after some epochs on a client's share."""
    inputs, labels = data
    if len(labels) % 64 == 1:  # BatchNorm cannot train on a batch of one
        inputs, labels = inputs[1:], labels[1:]
    recipe = setting.recipe
    return train(
        lambda: copy.deepcopy(start), (inputs, labels), seed=seed, epochs=epochs, rate=recipe.rate, decay=recipe.decay
    )


def fresh(setting: Setting, seed: int) -> nn.Module:
    """An untrained network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return setting.build()


def federated(
    setting: Setting, way: str, clients: Sequence[Participant], rounds: int, epochs: int, seed: int, step: Any
) -> Run:
    """Some rounds of training and averaging, one way."""
    own_starts = way.endswith("own starts")
    starts = [fresh(setting, 1000 * seed + (number if own_starts else 0)) for number in range(len(clients))]
    model = copy.deepcopy(starts[0])
    if way.startswith("aligned"):
        strategy = flower.AlignedFedAvg(model, rounds_apart=int(own_starts), inplace=False)
    else:
        strategy = FedAvg(inplace=False)
    run = Run()
    sent = parameters_of(model)
    for number in range(1, rounds + 1):
        began = time.process_time()
        if number > 1:
            starts = [model] * len(clients)
        if not (own_starts and number == 1):
            strategy.configure_fit(number, sent, Everyone(clients))
        results = []
        for client, start in zip(clients, starts, strict=True):
            network = trained(setting, start, client.data, 1000 * seed + number, epochs)
            done = FitRes(Status(Code.OK, ""), parameters_of(network), len(client.data[1]), {})
            results.append((client, done))
            step()
        trained_at = time.process_time()
        sent, _ = strategy.aggregate_fit(number, results, [])
        run.aggregation.append(time.process_time() - trained_at)
        arrays = parameters_to_ndarrays(sent)
        state = {name: torch.as_tensor(array) for name, array in zip(model.state_dict(), arrays, strict=True)}
        model = setting.network(state)
        run.rounds.append(time.process_time() - began)
        run.accuracy.append(setting.evaluate(setting.recalibrate(model))["accuracy"])
    return run


class Everyone:
    """A client manager of Flower's, by what a strategy asks of it: all clients take part in every round."""

    def __init__(self, clients: Sequence[Participant]) -> None:
        self.clients = list(clients)

    def num_available(self) -> int:
        """How many clients there are."""
        return len(self.clients)

    def sample(self, num_clients: int, min_num_clients: int | None = None, criterion: Any = None) -> list[Participant]:
        """All of them, in their order."""
        return self.clients


def parameters_of(network: nn.Module) -> Any:
    """A network's state dict as Flower sends it."""
    return ndarrays_to_parameters([tensor.numpy() for tensor in network.state_dict().values()])


def compare(setting: Setting, options: Any, where: Console) -> dict[str, list[Run]]:
    """All ways, for all seeds, on the same shares."""
    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    steps = len(WAYS) * len(options.seeds) * options.rounds * options.clients
    with bar(where, f"{setting.name} {setting.width}", steps) as step:
        for seed in options.seeds:
            parts = shares(setting.data, options.clients, options.alpha, seed)
            clients = [Participant(f"{number:03}", part) for number, part in enumerate(parts)]
            for way in WAYS:
                run = federated(setting, way, clients, options.rounds, options.local_epochs, seed, step)
                found[way].append(run)
    return found


def shown(values: Sequence[float], digits: int = 3) -> str:
    """A mean and its standard error, or nothing where there are no values."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def main(given: Sequence[str] | None = None) -> dict[str, dict[str, list[Run]]]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=("MLP", "ConvGroupNorm"), seeds=(1, 2, 3), points=None)
    parser.set_defaults(models=[("MLP", 128), ("ConvGroupNorm", 16)])
    parser.add_argument("--clients", type=int, default=5, help="how many take part, all in each round (5)")
    parser.add_argument("--rounds", type=int, default=6, help="of training and averaging (6)")
    parser.add_argument("--local-epochs", type=int, default=5, help="of each client in each round (5)")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet distribution over classes (0.5)")
    options = parser.parse_args(given)
    for name in ("clients", "rounds", "local_epochs", "alpha"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    where = console()
    every: dict[str, dict[str, list[Run]]] = {}
    looked_at = sorted({1, 2, -(-options.rounds // 2), options.rounds} & set(range(1, options.rounds + 1)))
    result = table(
        f"Test accuracy of the mean of {options.clients} clients, Dirichlet {options.alpha:g}, "
        f"{options.local_epochs} local epochs; mean and standard error of {len(options.seeds)} seeds",
        *("", *(f"round {number}" for number in looked_at), "mean 1, s", "later, s", "round, s"),
    )
    for setting in settings(options):
        found = every[setting.name] = compare(setting, options, where)
        result.add_row(f"[bold]{setting.name}, width {setting.width}")
        for way, runs in found.items():
            cells = [shown([run.accuracy[number - 1] for run in runs]) for number in looked_at]
            first = [run.aggregation[0] for run in runs]
            later = [second for run in runs for second in run.aggregation[1:]]
            whole = [second for run in runs for second in run.rounds]
            result.add_row(way, *cells, shown(first, 2), shown(later, 2), shown(whole, 2))
    result.show(where, options.out / "federated.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (name, found) in zip(axes, every.items(), strict=True):
            for number, (way, runs) in enumerate(found.items()):
                points = [mean_and_error(values) for values in zip(*(run.accuracy for run in runs), strict=True)]
                means = [mean for mean, _ in points]
                places = range(1, len(means) + 1)
                line(ax, number, places, means, way)
                low, high = ([m + sign * e for m, e in points] for sign in (-1, 1))
                ax.fill_between(places, low, high, color=ax.lines[-1].get_color(), alpha=0.15, linewidth=0)
            ax.set(title=name, xlabel="round", xticks=list(places))
        axes[0].set_ylabel("test accuracy")
        legend(axes)

    figure(len(every), options.out / "federated.png", draw)
    return every


if __name__ == "__main__":
    main()
