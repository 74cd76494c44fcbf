"""`verify` exchanges whole modules, and exchanging all but one of their parameters must change the output."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import permgraph as pg
from permgraph.spec import PermutationSpec
from permgraph.spec.expressions import Fixed, Ref


class Sum(nn.Module):
    """Experts whose outputs, squashed so that their biases count one by one, are added, each times its factor."""

    def __init__(self, factors: tuple[float, ...]) -> None:
        super().__init__()
        self.factors = factors
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in factors)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.factors, self.experts, strict=True)
        return sum((factor * expert(x).tanh() for factor, expert in pairs), torch.zeros_like(x))


X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


@functools.cache
def spec() -> PermutationSpec:
    return pg.auto_spec(Sum((1.0, 1.0, 1.0)), (X,), modules=True)


def test_each_parameter_of_the_modules_is_a_control() -> None:
    proof = pg.verify(Sum((1.0, 1.0, 1.0)), spec(), (X,), controls="all", further=0)
    assert proof.passed
    controls = {(c.group, c.parameter, c.dim) for c in proof.controls}
    assert {("experts.*", f"experts.*.{own}", 0) for own in ("0.weight", "0.bias", "2.weight", "2.bias")} <= controls
    assert all(c.passed and c.change > 1e-6 for c in proof.controls)


def test_an_exchange_of_experts_that_count_differently_fails() -> None:
    weighted = Sum((1.0, 2.0, 3.0))
    assert not pg.auto_spec(weighted, (X,), modules=True).stacks
    assert not pg.verify(weighted, spec(), (X,), further=0).passed


def test_an_exchange_without_one_of_the_parameters_fails() -> None:
    for left_out in ("2.bias", "0.bias"):
        name = f"experts.*.{left_out}"
        inner = tuple(
            Fixed(spec().shapes[name][1]) if isinstance(axis, Ref) else axis for axis in spec().axes[name][1:]
        )
        axes = {n: own for n, own in spec().axes.items() if n != name}
        axes |= dict.fromkeys(spec().tensors_of(name), inner)
        stacks = {n: names for n, names in spec().stacks.items() if n != name}
        proof = pg.verify(Sum((1.0, 1.0, 1.0)), PermutationSpec(spec().groups, axes, stacks=stacks), (X,), further=0)
        assert not proof.passed and "experts.*" in proof.failed


def test_a_stack_of_one_group_that_pairs_the_wrong_parameters_fails() -> None:
    """The first expert's output goes with the second one's input: no exchange."""
    text = str(spec()).replace("experts.0.2.weight, experts.1.2.weight", "experts.1.2.weight, experts.0.2.weight")
    wrong = PermutationSpec.parse(text)
    assert wrong.fingerprint != spec().fingerprint
    assert not pg.verify(Sum((1.0, 1.0, 1.0)), wrong, (X,), further=0).passed
