"""One step of coordinate ascent: the best renumbering of one move's groups, all others at rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from permgraph.assignment.certificate import prices_of
from permgraph.assignment.parallel import side_by_side
from permgraph.assignment.solve import Solver, assign, crowded
from permgraph.matching import tuned
from permgraph.matching.problem.moves import Node
from permgraph.matching.workers import Share
from permgraph.spec.spec import PermutationSpec

Tensors = Mapping[str, torch.Tensor]

Part: TypeAlias = "slice | torch.Tensor"
"""Some indices of an axis: a range, or a list of them."""


@dataclass(frozen=True)
class Scene:
    """The two models as a step sees them.

    Attributes:
        spec: what may move.
        a, b: tensors by parameter, B's at the present permutation.
        free: groups whose permutation is not known yet.
        solver: for the assignments.
        memory: bytes that the Gram matrices of nested groups may take at a time.
        share: where several processes match together, what of it this one does.
    """

    spec: PermutationSpec
    a: Tensors
    b: Tensors
    free: Collection[str] = ()
    solver: Solver = "auto"
    memory: int = 1 << 29
    share: Share | None = None


def gram(scene: Scene, node: Node, rows: slice = slice(None), columns: Part = slice(None)) -> torch.Tensor | None:
    """The Gram matrix of one group, over every place where it stands; None if it stands in none by itself.

    `rows` are of A and `columns` of B, along the axis of the move's root.
    """
    total: torch.Tensor | None = None
    for place in node.places:
        name = place.block.parameter
        if scene.share is not None and name not in scene.share.names:
            continue
        a, b = place.block.view(scene.a[name]), place.block.view(scene.b[name])
        cut = (slice(None),) * place.own[0]
        total = place.gram(a[(*cut, rows)], b[(*cut, columns)], scene.free, total)
    if scene.share is not None and node.places:
        total = scene.share.sum(total, _shape(scene, node, rows, columns))
    return total


def _shape(scene: Scene, node: Node, rows: slice, columns: Part) -> tuple[int, ...]:
    size = {name: group.size for name, group in scene.spec.groups.items()}
    root, *inner = node.chain
    pairs = [len(range(size[root])[part]) if isinstance(part, slice) else len(part) for part in (rows, columns)]
    return (*(size[name] for name in node.batch), *pairs, *(size[name] for name in inner for _ in "ab"))


def values(scene: Scene, node: Node, rows: slice = slice(None), columns: Part = slice(None)) -> torch.Tensor:
    """What each pairing of the group's indices is worth, with the best assignments inside it.

    Shape: (*sizes of batch, then a pair of axes for each group of the chain).
    """
    total = gram(scene, node, rows, columns)
    for inner in node.inner:
        inside = values(scene, inner, rows, columns)
        best = assign(inside, maximise=True, solver=scene.solver, name=f"the Gram matrix of {inner.group}").value
        worth = torch.from_numpy(np.asarray(best)).to(inside)
        # A parent at rest that this group is not over holds separate assignments, whose values add up.
        extra = [axis for axis, parent in enumerate(inner.batch) if parent not in node.batch]
        worth = worth.sum(extra) if extra else worth
        total = worth if total is None else total.add_(worth)
    assert total is not None, f"{node.group} stands nowhere"
    return total


def outer_values(scene: Scene, root: Node) -> torch.Tensor:
    """`values` of a move's root (*batch, n, n), in portions that fit the memory where groups are nested."""
    from permgraph.matching.ascent.prefilter import is_worthwhile, likely_values

    if is_worthwhile(scene, root):
        return likely_values(scene, root)
    n = scene.spec.groups[root.group].size
    need = max((_bytes(scene, node) for node in root.nodes() if node is not root), default=0)
    if need <= scene.memory:
        return values(scene, root)
    across = n if need // n <= scene.memory else max(1, n * n * scene.memory // need)
    down = max(1, min(n, n * scene.memory // need))
    return torch.cat(
        [
            torch.cat(
                [values(scene, root, slice(i, i + down), slice(j, j + across)) for j in range(0, n, across)], dim=-1
            )
            for i in range(0, n, down)
        ],
        dim=-2,
    )


def _bytes(scene: Scene, node: Node) -> int:
    groups = scene.spec.groups
    batch, chain = (math.prod(groups[name].size for name in names) for names in (node.batch, node.chain))
    return batch * chain**2 * next(iter(scene.a.values())).element_size()


def choose(worth: torch.Tensor, solver: Solver, name: str) -> tuple[np.ndarray, float]:
    """The best renumbering (*batch, n) for the values (*batch, n, n), and what it gains over the identity.

    Where indices can stay without loss they do: of the best assignment's cycles, those that gain no more than
    rounding are undone. So ties, dead units for instance, never move, and nothing moves in circles for ever.
    """
    return _choose(*_task(worth, solver, name), None, False)[:2]


def choose_each(
    worths: Mapping[str, torch.Tensor], solver: Solver, prices: dict[str, np.ndarray] | None = None
) -> dict[str, tuple[np.ndarray, float]]:
    """`choose` for several groups, by name; side by side where that is worth it.

    Args:
        worths: for each group its values (*batch, n, n).
        solver: see `assign`.
        prices: for some groups the prices (n,) from when they were last chosen; those of hard assignments are put in
            for the next time, numbered as what is chosen now will number the columns.
    """
    if callable(solver):
        return {name: choose(worth, solver, name) for name, worth in worths.items()}
    known = {} if prices is None else prices
    tasks = [(*_task(worth, solver, name), known.get(name), prices is not None) for name, worth in worths.items()]
    found = side_by_side(_choose, tasks, sum(task[0].size for task in tasks))
    for name, (_, _, new) in zip(worths, found, strict=True):
        if new is not None:
            known[name] = new
    return {name: (columns, gain) for name, (columns, gain, _) in zip(worths, found, strict=True)}


def rounding_of(values: torch.Tensor) -> float:
    """The share of what was added up below which a difference is taken for rounding."""
    return 16 * torch.finfo(values.dtype).eps


def _task(worth: torch.Tensor, solver: Solver, name: str) -> tuple[np.ndarray, float, Solver, str]:
    exact = worth.dtype in (torch.float32, torch.float64)
    return (worth if exact else worth.double()).detach().cpu().numpy(), rounding_of(worth), solver, name


def _choose(
    table: np.ndarray, rounding: float, solver: Solver, name: str, prices: np.ndarray | None, wanted: bool
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """What is chosen, what it gains, and prices for the next time where that is like to be hard again."""
    what = f"the Gram matrix of {name}"
    # What float32 loses in a wide assignment is less than what counts as a gain below.
    columns = assign(table, maximise=True, solver=solver, precise=False, prices=prices, name=what).columns
    settled, gain = _settled(table, columns, rounding)
    if not wanted:
        return settled, gain, None
    hard = prices is not None or (table.ndim == 2 and len(table) >= tuned.PRICED and crowded(table, maximise=True))
    if not hard:
        return settled, gain, None
    return settled, gain, prices_of(table, columns, prices, maximise=True)[settled]


def _settled(table: np.ndarray, columns: np.ndarray, rounding: float) -> tuple[np.ndarray, float]:
    n = columns.shape[-1]
    if (columns == np.arange(n)).all():
        return columns, 0.0
    flat = columns.reshape(-1, n)
    table = table.reshape(-1, n, n)
    new = np.take_along_axis(table, flat[:, :, None], axis=2)[:, :, 0].astype(np.float64)
    old = np.diagonal(table, axis1=1, axis2=2).astype(np.float64)
    cycle = cycles((flat + np.arange(len(flat))[:, None] * n).reshape(-1))
    gains = np.bincount(cycle, (new - old).reshape(-1))
    limit = rounding * np.bincount(cycle, (np.abs(new) + np.abs(old)).reshape(-1))
    worthwhile = gains > limit
    settled = np.where(worthwhile[cycle].reshape(flat.shape), flat, np.arange(n))
    return settled.reshape(columns.shape), float(gains[worthwhile].sum())


def cycles(permutation: np.ndarray) -> np.ndarray:
    """For each index of a permutation (n,) the least index of its cycle.

    Each round looks twice as far along the cycles as the one before; once a round finds nothing less, none will.

    Example:
        >>> cycles(np.array([2, 1, 4, 3, 0])).tolist()
        [0, 1, 0, 3, 0]
    """
    least, reach = np.arange(len(permutation)), permutation
    while True:
        seen = np.minimum(least, least[reach])
        if np.array_equal(seen, least):
            return least
        least, reach = seen, reach[reach]
