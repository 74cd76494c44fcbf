"""What weight matching is measured against, and in which ways it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks._networks import Network, State
from permgraph.matching import FrankWolfe, WeightMatching
from permgraph.matching.problem.objective import pair
from permgraph.matching.problem.renumber import act
from permgraph.spec import PermutationSpec
from permgraph.spec.blocks import blocks_of
from permgraph.spec.expressions import Fixed, Ref
from permgraph.spec.permutation import Permutation


@dataclass(frozen=True)
class Found:
    """What a method reached.

    Attributes:
        objective: the inner product of A with the permuted B, over the tensors that weight matching compares.
        sweeps: passes over the groups; 0 where the method does not say.
        permute: permutes a state dict as B was permuted.
        statistics: whether `permute` permutes the statistics of BatchNorm too.
    """

    objective: float
    sweeps: int
    permute: Callable[[State], State]
    statistics: bool = True


Run = Callable[[], Found]


def plain_groups(spec: PermutationSpec) -> list[str]:
    """The groups that a plain reading knows: fibred over none, and with none fibred over them."""
    above = {parent for group in spec.moving.values() for parent in group.parents}
    return [name for name, group in spec.moving.items() if not group.parents and name not in above]


def plain(a: State, b: State, spec: PermutationSpec, seed: int, max_sweeps: int = 100) -> Found:
    """Algorithm 1 of Ainsworth et al. 2022: every Gram matrix in full, scipy, one group at a time, in random order.

    Over the groups of the spec that are fibred over none; the others stay as they are.
    """
    compared = pair(a, b, spec)
    names = plain_groups(spec)
    where: dict[str, list[Any]] = {name: [] for name in names}
    simple = {}
    for name in compared.a:
        simple[name] = all(isinstance(axis, Ref | Fixed) for axis in spec.axes[name])
        for block in blocks_of(spec, name):
            for axis, leaf in enumerate(block.leaves):
                if leaf.group in where:
                    where[leaf.group].append((block, axis))
    arrays = {name: np.arange(spec.groups[name].size) for name in names}

    def permuted(name: str, but: str | None = None, axis: int = -1) -> torch.Tensor:
        """B's tensor with all groups applied, but `but` on one axis."""
        tensor = compared.b[name]
        if not simple[name]:
            return act(spec, {group: array for group, array in arrays.items() if group != but}, name, tensor)
        for dim, expression in enumerate(spec.axes[name]):
            if isinstance(expression, Ref) and expression.group in arrays and (expression.group != but or dim != axis):
                tensor = tensor.index_select(dim, torch.from_numpy(arrays[expression.group]))
        return tensor

    rng = np.random.default_rng(seed)
    sweeps, progress = 0, True
    while progress and sweeps < max_sweeps:
        sweeps, progress = sweeps + 1, False
        for number in rng.permutation(len(names)):
            group = names[number]
            n = spec.groups[group].size
            gram = torch.zeros(n, n, dtype=next(iter(compared.a.values())).dtype)
            for block, axis in where[group]:
                name = block.parameter
                left = block.view(compared.a[name]).movedim(axis, 0).reshape(n, -1)
                right = block.view(permuted(name, group, axis)).movedim(axis, 0).reshape(n, -1)
                gram += left @ right.T
            cost = gram.numpy()
            _, columns = linear_sum_assignment(cost, maximize=True)
            rows = np.arange(n)
            old, new = cost[rows, arrays[group]].sum(dtype=float), cost[rows, columns].sum(dtype=float)
            if new > old * (1 + 1e-6) + 1e-12:
                progress = True
                arrays[group] = columns
    permutation = Permutation(spec, {**spec.identity().arrays, **arrays})
    reached = compared.inner(compared.a, {name: permuted(name) for name in compared.a})
    return Found(reached, sweeps, lambda state: dict(permutation.apply(state)))


def rebasin(network: Network, a: State, b: State, spec: PermutationSpec, seed: int) -> Run:
    """The package rebasin, called as it documents; it traces the model within the time that is measured."""
    from rebasin import PermutationCoordinateDescent

    one, other = network.build(), network.build()
    one.load_state_dict(a)
    other.load_state_dict(b)

    def run() -> Found:
        torch.manual_seed(seed)
        search = PermutationCoordinateDescent(one, other, network.example())
        search.rebasin()
        compared = pair(a, dict(other.state_dict()), spec)

        def permute(state: State) -> State:
            other.double().load_state_dict(state)
            search.apply_permutations()
            return dict(other.state_dict())

        return Found(compared.inner(compared.a, compared.b), 0, permute, statistics=False)

    return run


OURS: dict[str, WeightMatching | FrankWolfe] = {
    "WeightMatching()": WeightMatching(),
    'WeightMatching(init="identity")': WeightMatching(init="identity"),
    "WeightMatching(restarts=1)": WeightMatching(restarts=1),
    'WeightMatching(order="random", restarts=1)': WeightMatching(order="random", restarts=1),
    "WeightMatching(restarts=10)": WeightMatching(restarts=10),
    "FrankWolfe()": FrankWolfe(),
    "WeightMatching(), plain groups": WeightMatching(),
}
PEERS = ("plain", "rebasin")


def prepare(method: str, network: Network, a: State, b: State, spec: PermutationSpec, seed: int) -> Run:
    """What is to be timed."""
    if method == "plain":
        return lambda: plain(a, b, spec, seed)
    if method == "plain, one sweep":
        return lambda: plain(a, b, spec, seed, 1)
    if method == "rebasin":
        return rebasin(network, a, b, spec, seed)
    how = OURS[method]
    if method.endswith("plain groups"):
        known = plain_groups(spec)
        assert isinstance(how, WeightMatching)
        how = dataclasses.replace(how, frozen=[name for name in spec.moving if name not in known])

    def run() -> Found:
        found = how.match(a, b, spec, seed)
        return Found(found.objective, found.sweeps, lambda state: dict(found.permutation.apply(state)))

    return run
