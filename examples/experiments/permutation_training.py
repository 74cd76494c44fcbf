"""Training by permutation alone: weights keep their values at initialisation, and only their places are learnt.

Networks so trained are universal approximators (Cai et al. 2024, "Neural networks trained by weight permutation are
universal approximators"); the algorithm is Qiu & Suda's (2020, "Train-by-Reconnect: Decoupling Locations of Weights
from their Values"): let free weights descend for some steps, then put the initial weights in their place, in the same
order.
Here that order is found by weight matching: the group may shuffle each row of a matrix by itself, so it is no symmetry
of the network, and the permutation nearest to the free weights is a nested assignment over a three-line specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import arguments, bar, console, figure, line, mean_and_error, table
from matplotlib.axes import Axes
from torch import Tensor, nn

import permgraph as pg

TARGETS = {
    "-sin 2πx": lambda x: -torch.sin(2 * torch.pi * x),
    "staircase": lambda x: torch.round(3 * x.abs()) / 3,
}


class Regressor(nn.Module):
    """One hidden layer of pairs of ReLUs with evenly spaced kinks, whose outward weights alone are permuted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kinks = torch.linspace(-1, 1, width)
        self.register_buffer("kinks", torch.cat([kinks, kinks]))
        self.register_buffer("signs", torch.cat([torch.ones(width), -torch.ones(width)]))
        # Kinks are 2 / width apart: so large must weights be for slopes to change as fast as the targets' do.
        values = torch.linspace(-40 / width, 40 / width, 2 * width)
        self.out = nn.Parameter(values[torch.randperm(2 * width)][None])
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.signs * (x[:, None] - self.kinks))
        return self.scale * (hidden @ self.out.T)[:, 0] + self.shift


def spec_of(width: int) -> pg.PermutationSpec:
    """Each row of the outward weights may be shuffled by itself."""
    return pg.PermutationSpec.parse(
        f"out  1x{2 * width}  rows places\ngroups: rows 1 fixed · places {2 * width} per rows"
    )


@dataclass(frozen=True)
class Result:
    """One training: the network, the permutation of its initial weights, and its loss after each projection."""

    network: nn.Module
    permutation: pg.Permutation
    losses: list[float]


def train(width: int, target: Tensor, x: Tensor, seed: int, rounds: int, every: int) -> Result:
    """Train by permutation: Adam on free weights, projected every so many steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Regressor(width)
    spec = spec_of(width)
    initial = {"out": network.out.detach().clone()}
    permutation = spec.identity()
    losses = []
    # The initial values are 40 / width² apart. At first, free weights get past many of them from one projection to the
    # next, since orders that are far from the initial one are looked for; at last, past none.
    descent = torch.optim.Adam(
        [{"params": [network.out], "lr": 4 / width}, {"params": [network.scale, network.shift], "lr": 1e-2}]
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(descent, 0.01 ** (1 / rounds))
    for _ in range(rounds):
        for _ in range(every):
            descent.zero_grad()
            (network(x) - target).square().mean().backward()
            descent.step()
        schedule.step()
        # The permutation of the initial weights that lies nearest to the free ones.
        permutation = pg.WeightMatching().match({"out": network.out.detach()}, initial, spec).permutation
        with torch.no_grad():
            network.out.copy_(permutation.apply(initial)["out"])
            losses.append(float((network(x) - target).square().mean()))
    return Result(network, permutation, losses)


def main(given: Sequence[str] | None = None) -> dict[tuple[str, int], list[Result]]:
    """Run the experiment and return what was found."""
    parser = arguments(__doc__, models=(), seeds=(1, 2, 3), points=None)
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 20, 40, 80], help="of the hidden layer")
    parser.add_argument("--rounds", type=int, default=150, help="of descent and projection (150)")
    parser.add_argument("--every", type=int, default=20, help="steps from one projection to the next (20)")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    where = console()
    x = torch.linspace(-1, 1, 256)
    found: dict[tuple[str, int], list[Result]] = {}
    with bar(where, "training by permutation", len(TARGETS) * len(options.widths) * len(options.seeds)) as step:
        for name, target in TARGETS.items():
            for width in options.widths:
                for seed in options.seeds:
                    one = train(width, target(x), x, seed, options.rounds, options.every)
                    found.setdefault((name, width), []).append(one)
                    step()
    result = table(
        "Mean squared error of networks whose weights kept their initial values",
        *("target", *(f"width {width}" for width in options.widths)),
        caption=f"Mean and standard error over {len(options.seeds)} seeds; two more numbers are trained freely: scale "
        "and shift of the output.",
    )
    for name in TARGETS:
        figures = [mean_and_error([one.losses[-1] for one in found[name, width]]) for width in options.widths]
        result.add_row(name, *(f"{mean:.5f} ± {error:.5f}" for mean, error in figures))
    result.show(where, options.out / "permutation_training.md", options)

    def draw(axes: list[Axes]) -> None:
        for ax, (name, target) in zip(axes, TARGETS.items(), strict=False):
            ax.plot(x, target(x), color="black", linewidth=1, label="target")
            for number, width in enumerate(options.widths[:: max(1, len(options.widths) // 2)]):
                one = found[name, width][0]
                with torch.no_grad():
                    ax.plot(x, one.network(x), color=f"C{number}", linestyle=("--", "-.", ":")[number % 3], label=width)
            ax.set(title=name, xlabel="x")
            ax.legend(frameon=False, title="width", fontsize=8)
        for number, name in enumerate(TARGETS):
            heights = [mean_and_error([one.losses[-1] for one in found[name, w]])[0] for w in options.widths]
            line(axes[-1], number, options.widths, heights, name)
        axes[-1].set(xlabel="width", ylabel="mean squared error", xscale="log", yscale="log")
        axes[-1].legend(frameon=False)

    figure(len(TARGETS) + 1, options.out / "permutation_training.png", draw)
    return found


if __name__ == "__main__":
    main()
