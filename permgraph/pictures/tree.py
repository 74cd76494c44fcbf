"""The modules of a spec as a tree, in which blocks that repeat are noticed.

A spec knows names such as ``layers.3.mlp.up.weight``, and no modules. The names give the tree. Two neighbouring
modules are alike where their parameters agree in names and shapes, and in their axes once the groups that stand nowhere
else are numbered afresh: a stack of eighty transformer layers is then one layer, and seventy-nine like it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from permgraph.spec.expressions import rename

if TYPE_CHECKING:
    from permgraph.spec.spec import PermutationSpec

_DEEPEST = 32  # names from a damaged checkpoint may have any number of dots
_REPEATS = 3


@dataclass(frozen=True)
class Module:
    """A module that holds parameters, or modules that do.

    Attributes:
        path: its name in the model; empty for the model itself.
        parameters: the canonical names of its own parameters and buffers.
        children: the modules inside it, runs of those that are alike put together.
    """

    path: str
    parameters: tuple[str, ...]
    children: tuple[Module | Repeated, ...]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @functools.cached_property
    def all_parameters(self) -> tuple[str, ...]:
        """Its own parameters, and those of all modules inside it, in the order of the tree."""
        return (*self.parameters, *itertools.chain.from_iterable(child.all_parameters for child in self.children))


@dataclass(frozen=True)
class Repeated:
    """Neighbouring modules that are like another one, which stands before them.

    Attributes:
        like: the path of that one.
        modules: the others.
    """

    like: str
    modules: tuple[Module, ...]

    @functools.cached_property
    def all_parameters(self) -> tuple[str, ...]:
        """The parameters of all of them."""
        return tuple(itertools.chain.from_iterable(module.all_parameters for module in self.modules))


def module_tree(spec: PermutationSpec, *, collapse: bool = True) -> Module:
    """The modules that hold the parameters and buffers of ``spec``.

    Args:
        spec: whose names make the tree.
        collapse: put together the third and later of neighbouring modules that are alike, if there are that many.

    Example:
        >>> from permgraph.spec import PermutationSpec
        >>> spec = PermutationSpec.parse("a.weight 3 .")
        >>> module_tree(spec).children[0].parameters
        ('a.weight',)
    """
    root: _Draft = _Draft("")
    for name in spec.axes:
        *path, _ = name.split(".", _DEEPEST)
        root.at(path).parameters.append(name)
    plain = root.module()
    return _Collapser(spec, plain).collapsed(plain) if collapse else plain


class _Draft:
    def __init__(self, path: str) -> None:
        self.path, self.parameters, self.children = path, list[str](), dict[str, _Draft]()

    def at(self, path: list[str]) -> _Draft:
        found = self
        for depth, name in enumerate(path, start=1):
            found = found.children.setdefault(name, _Draft(".".join(path[:depth])))
        return found

    def module(self) -> Module:
        return Module(self.path, tuple(self.parameters), tuple(child.module() for child in self.children.values()))


class _Collapser:
    def __init__(self, spec: PermutationSpec, root: Module) -> None:
        self.spec = spec
        place = {name: at for at, name in enumerate(root.all_parameters)}
        # Subtrees are intervals of the order in which the tree lists parameters, so two numbers say where a group is.
        self.extent = {
            group: (min(place[name] for name, _ in uses), max(place[name] for name, _ in uses))
            for group in spec.groups
            if (uses := spec.uses(group))
        }
        self.place = place

    def collapsed(self, module: Module) -> Module:
        children: list[Module | Repeated] = []
        inner = [child for child in module.children if isinstance(child, Module)]
        alike = itertools.groupby(inner, key=self.signature) if len(inner) >= _REPEATS else ((c, [c]) for c in inner)
        for _, group in alike:
            first, *others = group
            children.append(self.collapsed(first))
            if len(others) + 1 >= _REPEATS:
                children.append(Repeated(first.path, tuple(map(self.collapsed, others))))
            else:
                children.extend(map(self.collapsed, others))
        return Module(module.path, module.parameters, tuple(children))

    def signature(self, module: Module) -> tuple[object, ...]:
        names = module.all_parameters
        low, high = self.place[names[0]], self.place[names[-1]]
        own: dict[str, str] = {}

        def new(group: str) -> str:
            first, last = self.extent[group]
            if not low <= first <= last <= high:
                return group
            return own.setdefault(group, f"#{len(own)}")

        spec = self.spec
        lines = [
            (name[len(module.path) :], spec.shapes[name], tuple(rename(axis, new) for axis in spec.axes[name]))
            for name in names
        ]
        # A parent may stand outside: naming it can lengthen the list of those inside, which must not be walked then.
        groups = [
            (spec.groups[n].size, spec.groups[n].fixed, tuple(map(new, spec.groups[n].parents))) for n in list(own)
        ]
        return (*lines, *groups)


def walk(module: Module, depth: int = 0) -> Iterator[tuple[int, Module]]:
    """A module and all inside it with their depths, outermost first; of those alike, all."""
    yield depth, module
    for child in module.children:
        for inner in child.modules if isinstance(child, Repeated) else (child,):
            yield from walk(inner, depth + 1)


def short_names(names: Mapping[str, object]) -> dict[str, str]:
    """For each dotted name the shortest end of it that no other name has; the whole name if there is none.

    Example:
        >>> short_names({"a.conv": 0, "b.conv": 0, "b.norm": 0})
        {'a.conv': 'a.conv', 'b.conv': 'b.conv', 'b.norm': 'norm'}
    """
    ends: dict[str, int] = {}
    parts = {name: name.split(".", _DEEPEST) for name in names}
    for part in parts.values():
        for start in range(len(part)):
            end = ".".join(part[start:])
            ends[end] = ends.get(end, 0) + 1

    def says(end: str) -> bool:
        """Whether no other name has an end, and it is more than the stars of modules that change places."""
        return ends[end] == 1 and bool(end.strip("*."))

    return {
        name: next((end for end in (".".join(p[s:]) for s in reversed(range(len(p)))) if says(end)), name)
        for name, p in parts.items()
    }
