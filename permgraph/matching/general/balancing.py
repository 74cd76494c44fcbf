"""Balancing: the element of a model's own group that makes its weights small, so that what is left is compact.

Scales and invertible maps leave a network what it is and the inner product with another network unbounded: a query can
be as large as one likes if the key is as small. So before two models are compared, each is brought to where the sum of
squares of its weights is least over all scales and invertible maps of the group. There it is unique up to rotations,
signs and permutations (Kempf and Ness 1979 for reductive groups in general; for scales alone, the balance of incoming
and outgoing norms of each unit), and those the matching finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from permgraph.matching.general.acting import Acting, Element, Place, composed, powered
from permgraph.structures.pairs import pairs_of

SWEEPS = 200
TOLERANCE = 1e-9
"""Balanced is what no group's step changes by more than this, relative to one."""

ROUNDING = 16
"""Nor can groups that meet be balanced better than to so many times the precision of their weights."""

RIDGE = 1e-6
"""What is added to the Gram matrices of the weights as they were, relative to their mean eigenvalue.

A dead direction has no balance of its own, and would shrink for ever. Products of two such matrices must be well enough
conditioned for float64.
"""

TETHER = 1e-10
"""How strongly scales are held at one, relative to the weights as they were: so would a unit that nobody reads."""


COARSE, COARSE_SWEEPS = 1e-4, 50
"""The same as `TOLERANCE` and `SWEEPS`, of groups that meet in weights which each sweep has to read."""

Moments: TypeAlias = dict[tuple[int, ...], Tensor]
"""What a group's balance hangs on, by the powers with which it acts there.

Of a group with scales the sum of squares for each index, (*parents' sizes, size); of one of matrices the Gram matrices
(*parents' sizes, size, size).
"""


def balance(acting: Acting, tensors: dict[str, Tensor]) -> tuple[Element, dict[str, Tensor]]:
    """The balancing element of the weights `tensors`, without gains, and the weights as they are after it.

    Args:
        acting: how the groups act on these parameters.
        tensors: the parameters, in float64 best.
    """
    tensors, element = dict(tensors), Element()
    groups, exact = unbounded(acting), Element()
    coupled = _coupled(acting, groups)
    for group in (together[0] for together in coupled if len(together) == 1):
        exact = composed(acting, _balance_alone(acting, group, tensors.__getitem__, len(groups) > 1), exact)
    if exact.groups():
        inverses = acting.inverse_transposes(exact.matrices)
        element = exact.to(next(iter(tensors.values())).dtype)
        inverses = {group: inverse.to(element.matrices[group].dtype) for group, inverse in inverses.items()}
        for name in acting.touched(exact.groups()):
            tensors[name] = acting.act(name, tensors[name], element, inverses)
    for together in (together for together in coupled if len(together) > 1):
        least = max(TOLERANCE, ROUNDING * torch.finfo(next(iter(tensors.values())).dtype).eps)
        for _ in range(SWEEPS):
            change = 0.0
            for group in together:
                step, moved = _step(acting, tensors, group, element)
                change = max(change, moved)
                if moved:
                    for name in acting.touched([group]):
                        tensors[name] = acting.act(name, tensors[name], step)
                    element = composed(acting, step, element)
            if change < least:
                break
    return element, tensors


def _balance_alone(acting: Acting, group: str, load: Callable[[str], Tensor], several: bool) -> Element:
    """The balancing element, in float64, of a group that meets no other one that is balanced: its moments say all.

    Args:
        acting: how the groups act on the parameters.
        group: the group.
        load: gives a parameter.
        several: whether to make more than one step. Of a single group one is enough.
    """
    moments, element = _read_moments(acting, group, load, Element()), Element()
    for _ in range(SWEEPS if several else 1):
        step, moved = _best_step(acting, group, moments, element)
        if moved:
            element = composed(acting, step, element)
            moments = _moved_moments(moments, step, group)
        if moved < TOLERANCE:
            break
    return element


def balance_read(acting: Acting, load: Callable[[str], Tensor]) -> tuple[Element, int]:
    """The balancing element of weights that are read when a step needs them, and how often some were read.

    What a step needs of a group are its moments, which its own steps change in a known way. So weights are read once,
    but where two groups that are balanced meet in a block: what the one's step does to the other's moments only the
    weights can say. Those groups are balanced more coarsely (`COARSE`), since every sweep over them reads.

    Args:
        acting: how the groups act on these parameters.
        load: reads a parameter, without gains, at the precision in which to compute.

    Returns:
        The element, in float64, and the most often that a group's weights were read.
    """
    element, most = Element(), 1
    groups = unbounded(acting)
    for together in _coupled(acting, groups):
        if len(together) == 1:
            element = composed(acting, _balance_alone(acting, together[0], load, len(groups) > 1), element)
            continue
        for sweep in range(COARSE_SWEEPS):
            change = 0.0
            for group in together:
                step, moved = _best_step(acting, group, _read_moments(acting, group, load, element), element)
                change = max(change, moved)
                if moved:
                    element = composed(acting, step, element)
            most = max(most, sweep + 1)
            if change < COARSE:
                break
    return element, most


def _coupled(acting: Acting, groups: Sequence[str]) -> list[list[str]]:
    """The groups, those together that meet in a block, directly or by way of others."""
    found: list[list[str]] = []
    for group in groups:
        blocks = {place.block for place in acting.of_group[group]}
        joined = [t for t in found if any(place.block in blocks for other in t for place in acting.of_group[other])]
        found = [t for t in found if t not in joined] + [[*(other for t in joined for other in t), group]]
    return found


def _read_moments(acting: Acting, group: str, load: Callable[[str], Tensor], element: Element) -> Moments:
    moments: Moments = {}
    for place in acting.of_group[group]:
        _add_moment(moments, acting, place, _moved(acting, place.block.parameter, load, element))
    return {powers: own.double() for powers, own in moments.items()}


def _moved(acting: Acting, name: str, load: Callable[[str], Tensor], element: Element) -> Tensor:
    tensor = load(name)
    return acting.act(name, tensor, element.to(tensor.dtype))


def _moved_moments(moments: Moments, step: Element, group: str) -> Moments:
    """Moments of a group after a step of its own."""
    if group in step.scales:
        factors = step.scales[group]
        return {
            powers: norms * powered(factors, powers).square() if any(powers) else norms
            for powers, norms in moments.items()
        }
    matrix = step.matrices[group]
    both: Moments = {(1,): matrix, (-1,): torch.linalg.inv(matrix).mT}
    return {powers: both[powers] @ gram @ both[powers].mT for powers, gram in moments.items()}


def unbounded(acting: Acting) -> list[str]:
    """The groups with scales or invertible maps, which can make weights as large as one likes."""
    structures = {group: acting.structure(group) for group in acting.of_group}
    return [g for g, own in structures.items() if own.scales or own.linear == "GL" or own.is_paired]


def _step(acting: Acting, tensors: dict[str, Tensor], group: str, at: Element) -> tuple[Element, float]:
    """The best element of one group with all others at rest, and how far it is from the identity.

    Args:
        acting: how the groups act.
        tensors: the weights as an element has moved them.
        group: the group.
        at: that element.
    """
    moments: Moments = {}
    for place in acting.of_group[group]:
        _add_moment(moments, acting, place, tensors[place.block.parameter])
    return _best_step(acting, group, moments, at)


def _add_moment(moments: Moments, acting: Acting, place: Place, tensor: Tensor) -> None:
    """Add what a group's balance hangs on at a place; matrices leave a gain alone, which counts for nothing."""
    assert place.leaf.group is not None
    structure, powers = acting.structure(place.leaf.group), place.action.powers
    if structure.scales:
        _add(moments, powers or (0,) * structure.scales, place.rows(place.block.view(tensor)).square().sum(-2))
    elif powers:
        rows = place.rows(place.block.view(tensor))
        _add(moments, powers, rows.mT @ rows)


def _best_step(acting: Acting, group: str, moments: Moments, at: Element) -> tuple[Element, float]:
    """The best element of one group for its moments, which `at` has moved, and how far it moves."""
    structure = acting.structure(group)
    if structure.scales:
        before = at.scales[group].log() if group in at.scales else None
        logs = _least_scales(moments, structure.scales, before)
        return Element(scales={group: logs.exp()}), float(logs.abs().max())
    out, dual = moments.get((1,)), moments.get((-1,))
    if out is None or dual is None:
        return Element(), 0.0
    matrices = at.matrices.get(group)
    if structure.linear == "GL":
        matrices = _least_matrix(out, dual, matrices).to(out.dtype)
    else:
        first, second = pairs_of(structure.linear, out.shape[-1])
        sizes = [torch.diagonal(gram, dim1=-2, dim2=-1) for gram in (out, dual)]
        of_pairs = [size[..., first] + size[..., second] for size in sizes]
        before = None
        if matrices is not None:
            before = torch.diagonal(matrices, dim1=-2, dim2=-1)[..., first].log()[..., None]
        logs = _least_scales({(1,): of_pairs[0], (-1,): of_pairs[1]}, 1, before)[..., 0]
        factors = torch.empty_like(sizes[0])
        factors[..., first] = factors[..., second] = logs.exp()
        matrices = torch.diag_embed(factors)
    away = matrices - torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return Element(matrices={group: matrices}), float(away.abs().max())


def _add(sums: dict[tuple[int, ...], Tensor], key: tuple[int, ...], tensor: Tensor) -> None:
    sums[key] = sums[key] + tensor if key in sums else tensor


def _least_scales(squares: Moments, number: int, at: Tensor | None = None) -> Tensor:
    """The logarithms s (..., number) that minimise the sum of squares · exp(2 e·s) over exponents e.

    Found by Newton's method. They are held a little (`TETHER`) at where all scales together are one, which `at` says.
    """
    exponents = torch.tensor(list(squares), dtype=torch.float64)
    sums = torch.stack(list(squares.values()), -1).double()
    exponents = exponents.to(sums.device)
    logs = sums.new_zeros(*sums.shape[:-1], number)
    at = logs if at is None else at.double()
    as_they_were = (sums * (-2 * at @ exponents.T).exp()).sum(-1)
    tether = (TETHER * as_they_were).clamp_min(torch.finfo(sums.dtype).tiny)[..., None]
    for _ in range(60):
        terms = sums * (2 * logs @ exponents.T).exp()
        gradient = 2 * terms @ exponents + 2 * tether * (logs + at)
        hessian = 4 * torch.einsum("...e,ek,el->...kl", terms, exponents, exponents)
        hessian = hessian + 2 * tether[..., None] * torch.eye(number, dtype=sums.dtype, device=sums.device)
        step = torch.linalg.solve(hessian, gradient[..., None])[..., 0]
        step = step / step.abs().amax(-1, keepdim=True).clamp_min(1.0)
        logs = logs - step
        if float(step.abs().max()) < 1e-12:
            break
    return logs.to(next(iter(squares.values())).dtype)


def _least_matrix(out: Tensor, dual: Tensor, at: Tensor | None = None) -> Tensor:
    """The positive matrices M that minimise tr(M out M) + tr(M⁻¹ dual M⁻¹): M² out M² = dual.

    M² is the geometric mean of out⁻¹ and dual, to both of which a little is added (`RIDGE`) of what the identity was
    before the matrices `at` moved it.
    """
    at = torch.eye(out.shape[-1], dtype=torch.float64, device=out.device) if at is None else at.double()
    back = torch.linalg.inv(at)
    out, dual = _ridged(out.double(), at, back), _ridged(dual.double(), back.mT, at.mT)
    root, inverse = _power(out, 0.5), _power(out, -0.5)
    square = inverse @ _power(root @ dual @ root, 0.5) @ inverse
    return _power((square + square.mT) / 2, 0.5)


def _ridged(gram: Tensor, at: Tensor, back: Tensor) -> Tensor:
    mean = torch.diagonal(back @ gram @ back.mT, dim1=-2, dim2=-1).mean(-1)
    ridge = (RIDGE * mean).clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
    return gram + ridge[..., None, None] * (at @ at.mT)


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    powered: Tensor = (vectors * values.clamp_min(torch.finfo(values.dtype).tiny)[..., None, :] ** power) @ vectors.mT
    return powered
