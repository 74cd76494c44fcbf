"""Balancing: the element of a model's own group that makes its weights small, so that what is left is compact.

Scales and invertible maps leave a network what it is and the inner product with another network unbounded: a query can
be as large as one likes if the key is as small. So before two models are compared, each is brought to where the sum of
squares of its weights is least over all scales and invertible maps of the group. There it is unique up to rotations,
signs and permutations (Kempf and Ness 1979 for reductive groups in general; for scales alone, the balance of incoming
and outgoing norms of each unit), and those the matching finds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permgraph.matching.general.acting import Acting, Element, Place, composed
from permgraph.structures.pairs import pairs_of

SWEEPS = 200
TOLERANCE = 1e-9
"""Balanced is what no group's step changes by more than this, relative to one."""

RIDGE = 1e-9
"""What is added to Gram matrices, relative to their mean eigenvalue: a dead direction has no balance of its own."""

TETHER = 1e-6
"""How strongly scales are held at one, relative to the weights: a unit that nobody reads would shrink for ever."""


def balance(acting: Acting, tensors: dict[str, Tensor]) -> tuple[Element, dict[str, Tensor]]:
    """The balancing element of the weights `tensors`, without gains, and the weights as they are after it.

    Args:
        acting: how the groups act on these parameters.
        tensors: the parameters, in float64 best.
    """
    element = Element()
    groups = [
        g
        for g in acting.of_group
        if acting.structure(g).scales or acting.structure(g).linear == "GL" or acting.structure(g).is_paired
    ]
    tensors = dict(tensors)
    for _ in range(SWEEPS if len(groups) > 1 else 1):
        change = 0.0
        for group in groups:
            step, moved = _step(acting, tensors, group)
            change = max(change, moved)
            if moved:
                for name in acting.touched([group]):
                    tensors[name] = acting.act(name, tensors[name], step)
                element = composed(acting, step, element)
        if change < TOLERANCE:
            break
    return element, tensors


def _step(acting: Acting, tensors: dict[str, Tensor], group: str) -> tuple[Element, float]:
    """The best element of one group with all others at rest, and how far it is from the identity."""
    structure, places = acting.structure(group), acting.of_group[group]
    if structure.scales:
        squares: dict[tuple[int, ...], Tensor] = {}
        for place in places:
            norms = _rows(place, tensors).square().sum(-2)
            _add(squares, place.action.powers or (0,) * structure.scales, norms)
        logs = _least_scales(squares, structure.scales)
        return Element(scales={group: logs.exp()}), float(logs.abs().max())
    covariant: dict[tuple[int, ...], Tensor] = {}
    for place in places:
        if place.action.powers:
            rows = _rows(place, tensors)
            _add(covariant, place.action.powers, rows.mT @ rows)
    out, dual = covariant.get((1,)), covariant.get((-1,))
    if out is None or dual is None:
        return Element(), 0.0
    if structure.linear == "GL":
        matrices = _least_matrix(out, dual)
    else:
        first, second = pairs_of(structure.linear, out.shape[-1])
        sizes = [torch.diagonal(gram, dim1=-2, dim2=-1) for gram in (out, dual)]
        of_pairs = [size[..., first] + size[..., second] for size in sizes]
        logs = _least_scales({(1,): of_pairs[0], (-1,): of_pairs[1]}, 1)[..., 0]
        factors = torch.empty_like(sizes[0])
        factors[..., first] = factors[..., second] = logs.exp()
        matrices = torch.diag_embed(factors)
    away = matrices - torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return Element(matrices={group: matrices}), float(away.abs().max())


def _rows(place: Place, tensors: dict[str, Tensor]) -> Tensor:
    return place.rows(place.block.view(tensors[place.block.parameter]))


def _add(sums: dict[tuple[int, ...], Tensor], key: tuple[int, ...], tensor: Tensor) -> None:
    sums[key] = sums[key] + tensor if key in sums else tensor


def _least_scales(squares: dict[tuple[int, ...], Tensor], number: int) -> Tensor:
    """The logarithms s (..., number) that minimise the sum of squares · exp(2 e·s) over exponents e.

    Found by Newton's method. They are held at zero a little (`TETHER`).
    """
    exponents = torch.tensor(list(squares), dtype=torch.float64)
    sums = torch.stack(list(squares.values()), -1).double()
    exponents = exponents.to(sums.device)
    tether = (TETHER * sums.sum(-1)).clamp_min(torch.finfo(sums.dtype).tiny)[..., None]
    logs = sums.new_zeros(*sums.shape[:-1], number)
    for _ in range(60):
        terms = sums * (2 * logs @ exponents.T).exp()
        gradient = 2 * terms @ exponents + 2 * tether * logs
        hessian = 4 * torch.einsum("...e,ek,el->...kl", terms, exponents, exponents)
        hessian = hessian + 2 * tether[..., None] * torch.eye(number, dtype=sums.dtype, device=sums.device)
        step = torch.linalg.solve(hessian, gradient[..., None])[..., 0]
        step = step / step.abs().amax(-1, keepdim=True).clamp_min(1.0)
        logs = logs - step
        if float(step.abs().max()) < 1e-12:
            break
    return logs.to(next(iter(squares.values())).dtype)


def _least_matrix(out: Tensor, dual: Tensor) -> Tensor:
    """The positive matrices M that minimise tr(M out M) + tr(M⁻¹ dual M⁻¹): M² out M² = dual.

    M² is the geometric mean of out⁻¹ and dual.
    """
    out, dual = (_ridged(gram.double()) for gram in (out, dual))
    root, back = _power(out, 0.5), _power(out, -0.5)
    square = back @ _power(root @ dual @ root, 0.5) @ back
    return _power((square + square.mT) / 2, 0.5)


def _ridged(gram: Tensor) -> Tensor:
    mean = torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)
    ridge = (RIDGE * mean).clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
    return gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    powered: Tensor = (vectors * values.clamp_min(torch.finfo(values.dtype).tiny)[..., None, :] ** power) @ vectors.mT
    return powered
