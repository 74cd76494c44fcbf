"""Which pairs of many experts are worth a closer look, by what the order of the units inside does not change.

What it is worth to put expert j of B in the place of expert i of A is an assignment between all their units. With 256
experts these are 65,536 assignments a step, nearly all of them between experts that have nothing in common. Each unit's
weights, all of its matrices together, are projected to a few random directions; the Gram matrix of these projections
over the units of an expert is the same in whatever order they stand (Tran et al., 2509.11348, equation 11, compare
whole Gram matrices). So experts whose Gram matrices are close are looked at, and each pair that is at rest; all of
an expert from which none stands out, as happens where the axes around are not in order yet.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from permgraph.matching import tuned
from permgraph.matching.ascent.step import Scene, values
from permgraph.matching.problem.moves import Node, Place


def is_worthwhile(scene: Scene, root: Node) -> bool:
    """Whether all pairs of a move's root are too many to be looked at."""
    sizes = {name: group.size for name, group in scene.spec.groups.items()}
    n = sizes[root.group]
    if n <= tuned.ALL_PAIRS or root.batch or not root.inner or scene.share is not None:
        return False
    flops = sum(
        2 * place.block.size * math.prod(sizes[name] for name in node.chain)
        for node in root.nodes()
        for place in node.places
    )
    return flops > tuned.ALL_PRODUCTS


def likely_values(scene: Scene, root: Node) -> torch.Tensor:
    """`values` (n, n) of a move's root for pairs that look alike; less than all of them for every other pair.

    For each index of A the likeliest few of B are looked at, for each of B those of A, and the pairs at rest, so that
    an assignment of these never loses.
    """
    names = {place.block.parameter for node in root.nodes() for place in node.places}
    scene = replace(scene, b={name: scene.b[name] for name in names})  # permuted once, and not for every pair
    wanted = _candidates(scene, root)
    n = len(wanted)
    total = torch.full((n, n), -math.inf, dtype=next(iter(scene.a.values())).dtype)
    for i in range(n):
        columns = wanted[i].nonzero().flatten()
        total[i, columns] = values(scene, root, slice(i, i + 1), columns)[0].to(total)
    known = total[wanted]
    # Finite, so that sums can be compared; below whatever one known pair could make up for.
    return total.nan_to_num(neginf=float(known.min() - 2 * n * (known.abs().max() + 1)))


def _candidates(scene: Scene, root: Node) -> torch.Tensor:
    """The pairs (n, n) to look at, as a mask."""
    ours, theirs = (_signature(scene, root, of_a) for of_a in (True, False))
    scale = (ours.square().sum(1).mean() + theirs.square().sum(1).mean()).clamp_min(1e-30)
    distance = torch.cdist(ours / scale.sqrt(), theirs / scale.sqrt())
    n = len(distance)
    wanted = torch.eye(n, dtype=torch.bool)
    few = min(tuned.CANDIDATES, n)
    wanted.scatter_(1, distance.topk(few, largest=False).indices.cpu(), True)
    wanted.T.scatter_(1, distance.T.topk(few, largest=False).indices.cpu(), True)
    nearest, middle = distance.min(1).values, distance.median(1).values
    spread = 1.4826 * (distance - middle[:, None]).abs().median(1).values
    wanted[(middle - nearest < tuned.CLEARLY * spread).cpu()] = True  # nothing stands out: look at all
    return wanted


def _signature(scene: Scene, root: Node, of_a: bool) -> torch.Tensor:
    """For each index of the root numbers (n, s) that what is renumbered inside leaves alone."""
    tensors = scene.a if of_a else scene.b
    generator = torch.Generator().manual_seed(0)
    by_node: dict[str, list[torch.Tensor]] = {}
    for node in root.nodes():
        for place in node.places:
            rows = _projected(place, place.block.view(tensors[place.block.parameter]), scene, generator)
            by_node.setdefault(node.group, []).append(rows)
    found = []
    for units in by_node.values():
        joined = torch.cat(units, dim=-1)
        joined = joined.flatten(1, -2) if joined.ndim > 2 else joined[:, None]
        found.append(torch.einsum("nus,nut->nst", joined, joined).flatten(1))
    return torch.cat([each / each.square().sum(1).mean().sqrt().clamp_min(1e-30) for each in found], dim=1)


def _projected(place: Place, view: torch.Tensor, scene: Scene, generator: torch.Generator) -> torch.Tensor:
    """A block (n, units, s): for each unit the products of its weights with a few random directions."""
    leaves = place.block.leaves
    rest = [axis for axis in range(len(leaves)) if axis not in place.own]
    unknown = [axis for axis in rest if leaves[axis].group in scene.free]
    known = [axis for axis in rest if axis not in unknown]
    size = math.prod(view.shape[axis] for axis in known)
    directions = torch.randn(size, min(tuned.DIRECTIONS, size), generator=generator).to(view)
    step = max(1, tuned.PORTION * view.shape[place.own[0]] // max(1, view.numel()))
    found = []
    for part in torch.split(view, step, place.own[0]):  # what is flattened is copied
        flat = part.sum(unknown, keepdim=True) if unknown else part
        found.append(flat.permute(*place.own, *known, *unknown).flatten(len(place.own)) @ directions)
    return torch.cat(found) / math.sqrt(directions.shape[1])
