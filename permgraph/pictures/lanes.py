"""Groups as lanes through the modules: where each line of the picture runs, before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from permgraph.errors import SpecError
from permgraph.pictures.tree import Module, Repeated, module_tree, short_names, walk

if TYPE_CHECKING:
    from permgraph.spec.spec import PermutationSpec


@dataclass(frozen=True)
class Row:
    """One line of the picture: a module, or several that are alike.

    Attributes:
        label: what to write beside it.
        module: the path of the module, or of the first of those alike.
        modules: how many modules like an earlier one it stands for; 0 if it is a module by itself.
        first: the groups that stand in the first dimension of one of its parameters.
        later: those that stand in a later dimension of one.
        inner: the groups that stand in no other row; they have no lane. Of modules alike, those of one of them.
    """

    label: str
    module: str
    modules: int
    first: frozenset[str]
    later: frozenset[str]
    inner: tuple[str, ...]


@dataclass(frozen=True)
class Lane:
    """A group with the rows that it runs through.

    Attributes:
        group: its name.
        column: from 0, the leftmost; two lanes in one column do not share a row.
        start, stop: its first and its last row.
    """

    group: str
    column: int
    start: int
    stop: int


@dataclass(frozen=True)
class Lanes:
    """The whole picture.

    Attributes:
        rows: from top to bottom.
        lanes: in the order in which they start.
        names: a short name for each moving group.
    """

    rows: tuple[Row, ...]
    lanes: tuple[Lane, ...]
    names: dict[str, str]

    @property
    def columns(self) -> int:
        """How many lanes run side by side at most."""
        return max((lane.column + 1 for lane in self.lanes), default=0)


def lay_out(spec: PermutationSpec, *, rows: int = 80, collapse: bool = True, within: str = "") -> Lanes:
    """Decide which modules are rows, and in which column each moving group runs.

    Args:
        spec: what to picture.
        rows: about how many there may be; inner modules are folded into the one around them until there are so few,
            unless hardly any would be left.
        collapse: draw blocks that repeat once.
        within: the path of the module to picture; the whole model by default.

    Raises:
        SpecError: no module ``within`` holds a parameter.
    """
    tree = module_tree(spec, collapse=collapse)
    if within:
        found = next((module for _, module in walk(tree) if module.path == within), None)
        if found is None:
            raise SpecError(f"no module {within!r} in this spec holds a parameter or buffer")
        tree = found
    chosen = _rows(tree, rows)
    moving = {group: spec.uses(group) for group in spec.moving if spec.uses(group)}
    owner = {name: at for at, row in enumerate(chosen) for name in row.all_parameters}
    touched: dict[str, dict[int, None]] = {
        group: dict.fromkeys(sorted({owner[name] for name, _ in places if name in owner}))
        for group, places in moving.items()
    }
    inner = {group for group, at in touched.items() if len(at) == 1 and all(n in owner for n, _ in moving[group])}
    lanes: list[Lane] = []
    ends: list[int] = []
    spans = sorted(
        ((min(at), -max(at), group) for group, at in touched.items() if at and group not in inner),
        key=lambda span: span[:2],
    )
    for start, minus_stop, group in spans:
        column = next((c for c, end in enumerate(ends) if end < start), len(ends))
        ends[column : column + 1] = [-minus_stop]
        lanes.append(Lane(group, column, start, -minus_stop))
    shown = []
    for at, row in enumerate(chosen):
        here = [(group, dim) for group, places in moving.items() for name, dim in places if owner.get(name) == at]
        alike = isinstance(row, Repeated)
        # One of those alike speaks for all.
        names = set((row.modules[0] if isinstance(row, Repeated) else row).all_parameters)
        shown.append(
            Row(
                _label(row, tree),
                row.modules[0].path if isinstance(row, Repeated) else row.path,
                len(row.modules) if isinstance(row, Repeated) else 0,
                frozenset(group for group, dim in here if dim == 0),
                frozenset(group for group, dim in here if dim > 0),
                tuple(
                    group
                    for group in dict.fromkeys(group for group, _ in here)
                    if group in inner and (not alike or moving[group][0][0] in names)
                ),
            )
        )
    return Lanes(tuple(shown), tuple(lanes), short_names(spec.groups))


def _label(row: Module | Repeated, root: Module) -> str:
    def relative(path: str) -> str:
        return path[len(root.path) + 1 if root.path else 0 :] or path or "(the model)"

    if isinstance(row, Module):
        return relative(row.path)
    first, last = relative(row.modules[0].path), row.modules[-1].name
    return f"{first} … {last}" if len(row.modules) > 1 else first


def _rows(tree: Module, limit: int) -> list[Module | Repeated]:
    """The tree cut at the deepest level that gives few enough rows; a level that would leave too little is kept."""
    deepest = max(depth for depth, _ in walk(tree))
    best = _cut(tree, deepest)
    for depth in range(deepest - 1, 0, -1):
        if len(best) <= limit:
            break
        coarser = _cut(tree, depth)
        if len(coarser) < limit // 5 and len(best) <= 3 * limit:
            break
        best = coarser
    return best


def _cut(module: Module, depth: int) -> list[Module | Repeated]:
    """The modules down to ``depth``, those at it with all that is inside them."""
    if depth == 0 or not module.children:
        return [module] if module.all_parameters else []
    rows: list[Module | Repeated] = [Module(module.path, module.parameters, ())] if module.parameters else []
    for child in module.children:
        rows += [child] if isinstance(child, Repeated) else _cut(child, depth - 1)
    return rows
